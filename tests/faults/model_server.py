"""A model server that keeps a ledger of its own: a process that faults kill, stop and slow down.

    python model_server.py PORT LEDGER

LEDGER gets a line at once for each request that arrives (A, time, name, ticket) and for each that
ends (E, time, name, and whether it was answered whole), on the monotonic clock that all processes
of a machine share. `x-pieces` and `x-pause-ms` say how long the answer takes; POST /slow/FACTOR
makes every pause longer.
"""

import asyncio
import os
import sys
import time
from typing import Final, final

import uvloop

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


@final
class Server:
    """Answers, and writes down what it answers."""

    def __init__(self, ledger: str) -> None:
        self._file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.factor = 1.0
        self.running = 0

    def _note(self, *words: str) -> None:
        os.write(
            self._file, " ".join((words[0], repr(time.monotonic()), *words[1:])).encode() + b"\n"
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                raw = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = raw.removesuffix("\r\n\r\n").split("\r\n")
                headers = {
                    key.lower(): value.strip()
                    for key, _, value in (x.partition(":") for x in lines)
                }
                await reader.readexactly(int(headers.get("content-length", 0)))
                path = first.split(" ")[1]
                if path == "/metrics" or path.startswith("/slow/"):
                    writer.write(self._page(path))
                else:
                    await self._answer(headers, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def _page(self, path: str) -> bytes:
        if path != "/metrics":
            self.factor = float(path.rpartition("/")[2])
        text = f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
        return f"HTTP/1.1 200 OK\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()

    async def _answer(
        self,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        name = headers["x-request-id"]
        pause_s = float(headers["x-pause-ms"]) / 1000
        self.running += 1
        self._note("A", name, headers.get("x-ticket") or "-")
        how = "broken"
        # Envoy does not pipeline: whatever comes before the answer is the end of the connection.
        gone = asyncio.ensure_future(reader.read(1))
        try:
            for number in range(int(headers["x-pieces"])):
                await asyncio.wait((gone,), timeout=pause_s * self.factor)
                if gone.done():
                    raise ConnectionResetError
                piece = b"%s %d\n" % (name.encode(), number)
                writer.write((b"" if number else _HEAD) + b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
            gone.cancel()
            await asyncio.wait((gone,))
            writer.write(b"0\r\n\r\n")
            how = "whole"
        finally:
            gone.cancel()
            self.running -= 1
            self._note("E", name, how)


async def main(port: int, ledger: str) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(Server(ledger).serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1]), sys.argv[2]))

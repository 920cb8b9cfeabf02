"""h2spec, the conformance suite for HTTP/2 servers, against ours. Not collected by default.

    H2SPEC=/path/to/h2spec pytest tests/h2spec.py         H2SPEC may be left out if it is on PATH
    go install github.com/summerwind/h2spec/cmd/h2spec@latest       is how one gets it

It sends plain requests and reads bodies, so it is run twice: against a server of seven lines that
answers them, for the core alone, and against the direct door, which has only refusals for them.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server.classify import ExemptPaths
from server.direct_door import DirectDoor
from server.http2.connection import Http2Connection
from server.http2.events import Ended, Opened, Received
from server.http2.headers import encode_block
from server.http2.limits import Http2Limits
from tests.gates import running_gate

H2SPEC = os.environ.get("H2SPEC") or shutil.which("h2spec")
OK = encode_block([(":status", "200"), ("content-type", "text/plain")])
BODY = b"hello, h2spec: long enough for windows of a few bytes"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(H2SPEC is None, reason="h2spec is not on PATH and H2SPEC does not name it"),
]


class PlainServer(asyncio.Protocol):
    """Answers every request when it has ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connection = Http2Connection(Http2Limits(), time.monotonic_ns())
        transport.write(self.connection.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Answer what has come to its end."""
        for event in self.connection.receive(data, time.monotonic_ns()):
            match event:
                case Opened(stream_id, _, True) | Received(stream_id, _, True):
                    self.connection.send_headers(stream_id, OK)
                    self.connection.send_data(stream_id, BODY, is_end=True)
                case Ended():
                    self.transport.write(self.connection.data_to_send())
                    self.transport.close()
                case _:
                    pass
        self.transport.write(self.connection.data_to_send())


async def h2spec(port: int, *arguments: str) -> str:
    """Run it; its report if anything failed, else nothing."""
    assert H2SPEC is not None
    process = await asyncio.create_subprocess_exec(
        *(H2SPEC, "--strict", "--port", str(port), "--timeout", "1", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode() if process.returncode else ""


async def against_core(run: Callable[[int], Awaitable[str]]) -> str:
    """Run it against the seven lines."""
    server = await asyncio.get_running_loop().create_server(PlainServer, "127.0.0.1", 0)
    async with server:
        return await run(server.sockets[0].getsockname()[1])


async def against_door(run: Callable[[int], Awaitable[str]]) -> str:
    """Run it against the direct door."""
    async with running_gate() as gate:
        door = DirectDoor(gate, ExemptPaths(()), continue_on_fault=False, limits=Http2Limits())
        port = await door.listen(("127.0.0.1", 0))
        try:
            return await run(port)
        finally:
            await door.close(0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("against", [against_core, against_door])
async def test_h2spec(against: Callable[[Callable[[int], Awaitable[str]]], Awaitable[str]]) -> None:
    """Every case of generic, http2 and hpack passes."""
    assert await against(h2spec) == ""


if __name__ == "__main__":
    print(asyncio.run(against_core(h2spec)) or "all passed", Path(H2SPEC or "").name)  # noqa: T201

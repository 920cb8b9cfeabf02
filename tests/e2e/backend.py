"""A model server that does what the test says, call by call: HTTP/1.1 on a raw socket."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self, final

from flowcontrol_server.common.addresses import Address

ARRIVAL_S = 10.0
"""How long a test waits for a call that should come."""
_ACCEPTING_TURNS = 3
"""Of the loop, from a connection that it has accepted to the task that serves it."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@final
@dataclass(eq=False)
class Call:
    """A request that has reached the model server, and what the server does with it."""

    endpoint: Address
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    arrived_s: float
    """On the event loop's clock."""
    _writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the other side has closed the connection."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the response is complete or broken off."""

    @property
    def name(self) -> str:
        """What the client calls the request (x-request-id)."""
        return self.headers["x-request-id"]

    async def respond(
        self,
        body: bytes = b"{}",
        status: int = 200,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole response."""
        head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: {content_type}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()
        self.over.set()

    async def stream(self, *pieces: bytes) -> None:
        """Begin a response of events (SSE) and send the first."""
        self._writer.write(
            b"HTTP/1.1 200 Scripted\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await self.send(*pieces)

    async def send(self, *pieces: bytes) -> None:
        """Send more events of a response that was begun."""
        for piece in pieces:
            self._writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await self._writer.drain()

    async def upgrade(self, protocol: str) -> None:
        """Accept an upgrade of the connection."""
        head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
        self._writer.write(f"{head}Upgrade: {protocol}\r\n\r\n".encode())
        await self._writer.drain()

    async def end(self) -> None:
        """Complete a response that was begun."""
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        self.over.set()

    def reset(self) -> None:
        """Break the connection off (RST)."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()
        self.over.set()


@final
class Backend:
    """Takes every call and leaves it hanging until the test answers it.

    Args:
        address: to listen on, from entering the context to leaving it.
        arrived: gets every call; share it between backends to see the order over all of them.
    """

    def __init__(self, address: Address, arrived: asyncio.Queue[Call]) -> None:
        self.address = address
        self.calls: list[Call] = []
        """Every call there ever was."""
        self.is_answering = False
        """Whether each call is answered at once, instead of by the test."""
        self.page: bytes | None = None
        """What /metrics says, which is asked for beside the calls; None: 404."""
        self._arrived = arrived
        self._connections: set[asyncio.Task[None]] = set()
        self._fresh: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, *self.address)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Refuse connections from now on and break off those there are."""
        if self._server is not None:
            # Python 3.11 loses the connection that it is taking in as its server closes.
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(_ACCEPTING_TURNS):
                await asyncio.sleep(0)
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def drop_fresh(self) -> int:
        """Break off the connections on which no call has come; return how many there were."""
        fresh = [*self._fresh]
        for connection in fresh:
            connection.cancel()
        await asyncio.gather(*fresh, return_exceptions=True)
        return len(fresh)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        self._fresh.add(task)
        for kept in (self._connections, self._fresh):
            task.add_done_callback(kept.discard)
        # Not within the task: one that is cancelled before its first step does nothing.
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            self._fresh -= {asyncio.current_task()}
            while True:
                call = await self._read(head, reader, writer)
                # Envoy does not pipeline: what comes before the answer is the end.
                following = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
                following.add_done_callback(partial(_note_end, call))
                if call.path == "/metrics":
                    await call.respond(self.page or b"", 404 if self.page is None else 200)
                    head = await following
                    continue
                self.calls.append(call)
                if self.is_answering:
                    await call.respond()
                else:
                    self._arrived.put_nowait(call)
                try:
                    head = await following
                finally:
                    following.cancel()

    async def _read(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Call:
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, path, _version = first.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        body = bytearray(await reader.readexactly(int(headers.get("content-length", 0))))
        while headers.get("transfer-encoding") == "chunked":
            size = int((await reader.readuntil(b"\r\n")).strip(), 16)
            body += (await reader.readexactly(size + 2))[:-2]
            if not size:
                break
        now_s = asyncio.get_running_loop().time()
        return Call(self.address, method, path, headers, bytes(body), now_s, writer)


def _note_end(call: Call, following: asyncio.Future[bytes]) -> None:
    if following.cancelled() or following.exception() is not None:
        call.gone.set()

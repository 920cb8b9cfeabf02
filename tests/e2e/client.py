"""A client whose every byte, and whose way of leaving, a test decides: HTTP/1.1 on a raw socket."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol_server.common.addresses import Address

CHAT = "/v1/chat/completions"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends RST."""


@final
@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@final
@dataclass
class Caller:
    """One request on a connection of its own."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    status: int = 0
    """0 until the head of the response is here."""
    headers: dict[str, str] = field(default_factory=dict)
    patience_s: float = 15.0
    """Longest wait for any part of the response; then the test fails with TimeoutError."""
    _is_chunked: bool = False
    _left: int = 0
    """Bytes of the body still to come, when that was announced."""

    async def send(self, part: bytes) -> None:
        """Send a part of a body whose length the headers have announced."""
        self._writer.write(part)
        await self._writer.drain()

    async def head(self) -> int:
        """Wait for status and headers; return the status."""
        async with asyncio.timeout(self.patience_s):
            raw = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = raw.removesuffix("\r\n\r\n").split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        self._is_chunked = self.headers.get("transfer-encoding") == "chunked"
        self._left = int(self.headers.get("content-length", 0))
        return self.status

    async def piece(self) -> bytes:
        """Return the next piece of the body, b"" at its proper end.

        Raises:
            asyncio.IncompleteReadError: the response was cut off; ConnectionResetError: likewise.
        """
        async with asyncio.timeout(self.patience_s):
            if self._is_chunked:
                size = int((await self._reader.readuntil(b"\r\n")).strip(), 16)
                return (await self._reader.readexactly(size + 2))[:-2]
            left, self._left = self._left, 0
            return await self._reader.readexactly(left)

    async def rest(self) -> bytes:
        """Return all of the body that has not been read."""
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def reply(self) -> Reply:
        """Wait for the whole response, and close."""
        await self.head()
        body = await self.rest()
        await self.hang_up()
        return Reply(self.status, self.headers, body)

    async def hang_up(self) -> None:
        """Close the connection (FIN)."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the other side was faster
            await self._writer.wait_closed()

    def reset(self) -> None:
        """Break the connection off (RST)."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()


async def call(
    address: Address,
    path: str = CHAT,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = b"{}",
) -> Caller:
    """Send a request; the response is the caller's to await.

    Args:
        address: of the server.
        path: to ask for.
        method: of the request.
        headers: beside Host and Content-Length; with Transfer-Encoding the body goes in chunks.
        body: None for a request that has none.
    """
    reader, writer = await asyncio.open_connection(*address)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body and "transfer-encoding" in (headers or {}):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    elif body is not None:
        lines.append(f"Content-Length: {len(body)}")
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
    await writer.drain()
    return Caller(reader, writer)


async def fetch(address: Address, path: str) -> Reply:
    """GET something and wait for it."""
    caller = await call(address, path, method="GET", body=None)
    return await caller.reply()

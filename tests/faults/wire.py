"""A wire to a server that can be cut: connections stay, and nothing passes, as with a partition."""

import asyncio
import contextlib
from typing import Final, final

from flowcontrol_server.common.addresses import Address
from tests.support.ports import HOST, free_port

_CHUNK: Final = 65_536


@final
class Wire:
    """Passes bytes on between whoever connects to it and a server.

    Args:
        port: of the server, on this machine.
    """

    def __init__(self, port: int) -> None:
        self.address = Address(HOST, free_port())
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take connections from now on."""
        self._server = await asyncio.start_server(self._accept, *self.address)

    async def close(self) -> None:
        """End all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Let nothing pass."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Let pass what waits, and what comes."""
        self._is_whole.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Not within the task: one that is cancelled before its first step does nothing.
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other: asyncio.StreamWriter | None = None
        try:
            await self._is_whole.wait()
            answers, other = await asyncio.open_connection(HOST, self._port)
            ways = (self._pass(reader, other), self._pass(answers, writer))
            await asyncio.wait(
                [asyncio.ensure_future(way) for way in ways],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except OSError:
            pass  # the server is gone
        finally:
            if other is not None:
                other.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._is_whole.wait()
                writer.write(data)
                await writer.drain()

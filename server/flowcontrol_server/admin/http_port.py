"""The HTTP port, with limits on the number of connections and on their silence.

aiohttp has neither limit. A silent connection costs a file descriptor, and without a free one the
process can accept no connection, including those of liveness probes.

A new connection beyond the limit replaces one without a request, before its first or between two:
the oldest of the address that has the most of them.
"""

import asyncio
import logging
from collections import Counter
from typing import Final, final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from flowcontrol_server.common.listening import listen

CONNECTIONS_MAX: Final = 256
REQUEST_WITHIN_S: Final = 10.0
"""Longest time from the connection to its first request."""
READ_WITHIN_S: Final = 30.0
"""Longest time for which a client may leave a full output buffer unread."""
_KEEPALIVE_S: Final = 75.0
"""Longest time from a response to the next request; above Prometheus's default interval, 60 s."""
_HEADER_BYTES_MAX: Final = 16_384
_LOGGER: Final = logging.getLogger(__name__)
"""Logger of aiohttp's server."""


def _is_ours(record: logging.LogRecord) -> bool:
    """Return whether a log record of aiohttp reports a fault here, and not invalid HTTP.

    aiohttp logs each invalid request with a traceback: any client could fill the disk.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_LOGGER.addFilter(_is_ours)


@final
class _Connection(asyncio.Protocol):
    """Passes everything on to aiohttp, and ends the connection at its time limits."""

    def __init__(self, port: "HttpPort", inner: asyncio.Protocol) -> None:
        self._port = port
        self._inner = inner
        self._deadline: asyncio.TimerHandle | None = None
        self.peer = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Start the time limit for the first request."""
        self._transport = transport
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if name else ""
        self._inner.connection_made(transport)
        self._abort_in(REQUEST_WITHIN_S)
        self._port.connected(self, transport)

    def data_received(self, data: bytes) -> None:
        """Pass the call on."""
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the call on."""
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the call on."""
        self.requested()
        self._port.lost(self, self._transport)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time limit for the client to read."""
        self._abort_in(READ_WITHIN_S)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """End the time limit."""
        self.requested()
        self._inner.resume_writing()

    def requested(self) -> None:
        """Cancel the time limit, because the client has met it."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def abort(self) -> None:
        """Abort the connection."""
        self._transport.abort()

    def _abort_in(self, delay_s: float) -> None:
        self.requested()
        self._deadline = asyncio.get_running_loop().call_later(delay_s, self.abort)


@final
class HttpPort:
    """Serves an application.

    Args:
        application: not frozen yet; gets a middleware that records requests.
        connections_max: concurrent connections.
    """

    def __init__(
        self, application: web.Application, connections_max: int = CONNECTIONS_MAX
    ) -> None:
        application.middlewares.insert(0, self._middleware())
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=_LOGGER,
            keepalive_timeout=_KEEPALIVE_S,
            max_line_size=_HEADER_BYTES_MAX,
            max_field_size=_HEADER_BYTES_MAX,
        )
        self._connections_max = connections_max
        self._connections: dict[asyncio.BaseTransport, _Connection] = {}
        self._silent: dict[_Connection, None] = {}
        """Connections without a request, oldest first."""
        self._server: asyncio.Server | None = None

    async def open(self, address: tuple[str, int]) -> int:
        """Open the port; return its number.

        Raises:
            ListenError: it cannot be opened; names the address.
        """
        await self._runner.setup()
        aiohttp = self._runner.server
        assert aiohttp is not None, "set up"
        self._server = await listen(lambda: _Connection(self, aiohttp()), address, None)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Accept no more connections, and close the open ones."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def connected(self, connection: _Connection, transport: asyncio.BaseTransport) -> None:
        """Add a connection; beyond the limit, abort one without a request."""
        self._connections[transport] = connection
        self._silent[connection] = None
        if len(self._connections) > self._connections_max:
            self._victim().abort()

    def lost(self, connection: _Connection, transport: asyncio.BaseTransport) -> None:
        """Remove a connection."""
        self._connections.pop(transport, None)
        self._silent.pop(connection, None)

    def _victim(self) -> _Connection:
        """Return a connection without a request; the new one is always such a connection."""
        ((peer, _),) = Counter(each.peer for each in self._silent).most_common(1)
        return next(each for each in self._silent if each.peer == peer)

    def _middleware(self) -> Middleware:
        @web.middleware
        async def recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Record that a connection has a request, and when that has been answered."""
            transport = request.transport
            connection = None if transport is None else self._connections.get(transport)
            if transport is None or connection is None:
                return await handler(request)
            self._silent.pop(connection, None)
            connection.requested()
            try:
                return await handler(request)
            finally:
                if transport in self._connections:
                    self._silent[connection] = None

        return recorded

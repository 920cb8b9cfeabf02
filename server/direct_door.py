"""The direct door: Envoy's ext_proc streams over our own HTTP/2, straight to the gate.

It carries the same conversation as the grpcio door (`ext_proc`), for Envoy alone and for a fraction
of the cost: no task and no queue per request, only callbacks on the loop. `direct_line` is one of
its connections, `direct_calls` what is said on one of their streams.
"""

import asyncio
import ssl
import time
from pathlib import Path
from typing import final

from server.direct_line import CHECK_NS, Line
from server.listening import listen
from server.terms import Terms


@final
class DirectDoor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor/Process`, and health checks, over HTTP/2.

    Args:
        terms: what holds for every call; the door's to change from now on.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.lines: set[Line] = set()
        """Its connections."""
        self._servers: list[asyncio.Server] = []
        self._paths: list[Path] = []
        self._loop = asyncio.get_running_loop()
        self._checking = self._loop.call_later(CHECK_NS / 1e9, self._check)
        self._emptied: asyncio.Future[None] | None = None

    async def listen(
        self, address: tuple[str, int] | Path, ssl_context: ssl.SSLContext | None = None
    ) -> int:
        """Open the door at one more address; return its port, 0 for a Unix socket.

        Args:
            address: host and port, or the path of a Unix socket.
            ssl_context: for TLS, and for mTLS when it asks for certificates. Its ALPN must offer h2
                alone, which clients must choose (RFC 9113, 3.2).

        Raises:
            ListenError: naming the address.
        """
        server = await listen(
            lambda: Line(self._terms, self.lines, self._line_lost), address, ssl_context
        )
        self._servers.append(server)
        if isinstance(address, Path):
            self._paths.append(address)
            return 0
        port: int = server.sockets[0].getsockname()[1]
        return port

    def begin_drain(self) -> None:
        """Ask every client to use this connection no more; what is under way goes on.

        The door stays open: who comes is told by the gate why there is no service.
        """
        for line in self.lines:
            line.drain()

    async def close(self, grace_s: float) -> None:
        """Take no more connections, end requests in flight politely, and hang up.

        A stream that breaks off makes Envoy break off the response; one that ends with OK after its
        answer leaves the response alone.

        Args:
            grace_s: how long clients may take to hang up on their side; then they are cut off.
        """
        self._terms.is_closing = True
        for server in self._servers:
            server.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for line in list(self.lines):
            line.end_politely()
        self._checking.cancel()
        if self.lines:
            self._emptied = self._loop.create_future()
            await asyncio.wait((self._emptied,), timeout=grace_s)
            for line in list(self.lines):
                line.abort()
            await self._emptied

    def _line_lost(self) -> None:
        if self._emptied is not None and not self.lines and not self._emptied.done():
            self._emptied.set_result(None)

    def _check(self) -> None:
        self._checking = self._loop.call_later(CHECK_NS / 1e9, self._check)
        now_ns = time.monotonic_ns()
        for line in list(self.lines):
            line.check(now_ns)

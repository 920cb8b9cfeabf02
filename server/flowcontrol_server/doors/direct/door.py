"""The direct door: Envoy's ext_proc streams over our own HTTP/2, straight to the gate.

It carries the same conversation as the grpcio door (`ext_proc`), only for Envoy and at a fraction
of the cost: no task and no queue per request, only callbacks on the loop. `connection` has its
connections, `calls` the calls on their streams.
"""

# interpreted: uvloop's Server.sockets is a list, where typeshed and so mypyc have a tuple

import asyncio
import ssl
import time
from pathlib import Path
from typing import final

from flowcontrol_server.common.listening import listen
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.connection_log import ConnectionLog
from flowcontrol_server.doors.direct.connection import CHECK_NS, Line, Turns
from flowcontrol_server.doors.first_byte import EitherPort


@final
class DirectDoor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor/Process`, and health checks, over HTTP/2.

    Args:
        context: shared by all calls; the door may change it from now on.
    """

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self.lines: set[Line] = set()
        """Its connections."""
        self._log = ConnectionLog()
        self._turns = Turns()
        self._servers: list[asyncio.Server | EitherPort] = []
        self._paths: list[Path] = []
        self._loop = asyncio.get_running_loop()
        self._checking = self._loop.call_later(CHECK_NS / 1e9, self._check)
        self._emptied: asyncio.Future[None] | None = None

    async def listen(
        self,
        address: tuple[str, int] | Path,
        ssl_context: ssl.SSLContext | None = None,
        *,
        takes_both: bool = False,
    ) -> int:
        """Open the door at one more address; return its port, 0 for a Unix socket.

        Args:
            address: host and port, or the path of a Unix socket.
            ssl_context: for TLS, and for mTLS if it requires certificates; None: plain text. Its
                ALPN must offer only h2, which clients must choose (RFC 9113, 3.2).
            takes_both: whether to accept plain text as well as TLS, at a TCP port.

        Raises:
            ListenError: it cannot be opened; the error names the address.
        """
        if takes_both:
            assert ssl_context is not None, "there is TLS"
            assert isinstance(address, tuple), "at a TCP port"
            either = EitherPort(self._line, ssl_context, self._context.limits.handshake_ns / 1e9)
            self._servers.append(either)
            return await either.open(*address)
        server = await listen(self._line, address, ssl_context)
        self._servers.append(server)
        if isinstance(address, Path):
            self._paths.append(address)
            return 0
        port: int = server.sockets[0].getsockname()[1]
        return port

    def begin_drain(self) -> None:
        """Ask every client to open no more streams on its connection; streams under way go on.

        The door stays open: the gate answers new calls with the reason.
        """
        for line in self.lines:
            line.drain()

    def move_calls(self) -> None:
        """End all calls so that another replica takes them up; requests in flight go on."""
        for line in list(self.lines):
            line.move_calls()

    async def close(self, grace_s: float, echo_grace_s: float = 0.0) -> None:
        """Accept no more, end the streams of requests in flight with OK, and half-close.

        If a stream breaks off, Envoy breaks off the response. If it ends with OK after its answer,
        the response goes on.

        Args:
            grace_s: time for clients to close their side, before their connections are aborted.
            echo_grace_s: additional time for bodies that pass through here.
        """
        self._context.is_closing = True
        for server in self._servers:
            server.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for line in list(self.lines):
            line.end_with_status()
        self._context.gate.release_unseen()
        self._checking.cancel()
        if self.lines:
            self._emptied = self._loop.create_future()
            await asyncio.wait((self._emptied,), timeout=grace_s)
            if any(line.owes_echoes for line in self.lines):
                await asyncio.wait((self._emptied,), timeout=echo_grace_s)
            for line in list(self.lines):
                line.abort()
            await self._emptied

    def _line(self) -> Line:
        return Line(self._context, self.lines, self._line_lost, self._log, self._turns)

    def _line_lost(self) -> None:
        if self._emptied is not None and not self.lines and not self._emptied.done():
            self._emptied.set_result(None)

    def _check(self) -> None:
        self._checking = self._loop.call_later(CHECK_NS / 1e9, self._check)
        self._log.flush()
        now_ns = time.monotonic_ns()
        for line in list(self.lines):
            line.check(now_ns)

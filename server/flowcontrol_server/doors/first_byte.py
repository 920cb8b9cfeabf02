"""One port for TLS and plain text: the first byte of a connection shows which one it is.

A TLS client begins with a handshake record, 0x16; HTTP/2 without TLS begins with `PRI`. The byte is
only peeked at: it stays in the socket's buffer. This is for clients that verify nothing, and never
for a port whose TLS authenticates clients.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Final, final

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.listening import BACKLOG, naming

_HANDSHAKE: Final = b"\x16"
PAUSE_S: Final = 1.0
"""How long to accept nothing after an error of accept. The error means that the system is out of
resources, or, on Linux, that a new connection has failed already or a firewall forbids it. None of
them may end the service."""
UNDECIDED_MAX: Final = 256
"""Connections that have sent nothing yet, or are in their handshake. One more ends the oldest that
has sent nothing, so silent ones cannot keep others out."""


@final
class EitherPort:
    """Accepts connections, peeks at their first byte, and starts their protocol.

    Args:
        protocol: makes the protocol object of one connection.
        ssl_context: for connections that begin a TLS handshake.
        wait_s: time limit for the first byte of a connection, and then for its handshake.
        undecided_max: limit of connections before the end of their handshake.
    """

    def __init__(
        self,
        protocol: Callable[[], asyncio.Protocol],
        ssl_context: ssl.SSLContext,
        wait_s: float,
        undecided_max: int = UNDECIDED_MAX,
    ) -> None:
        self._protocol = protocol
        self._ssl_context = ssl_context
        self._wait_s = wait_s
        self._undecided_max = undecided_max
        self._loop = asyncio.get_running_loop()
        self._listening: list[socket.socket] = []
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        """Connections that have sent nothing, oldest first, with the timers that end them."""
        self._starting: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> int:
        """Listen at every address of a host; return the port.

        Raises:
            ListenError: it cannot be opened; the error names the address.
        """
        with naming(str(Address(host, port))), contextlib.ExitStack() as opened:
            found = await self._loop.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            addresses = dict.fromkeys((each[0], each[4]) for each in found)
            listening = [
                opened.enter_context(socket.create_server(address, family=family, backlog=BACKLOG))
                for family, address in addresses
            ]
            opened.pop_all()  # all or none
        for each in listening:
            each.settimeout(0)
            self._loop.add_reader(each, self._accept, each)
        self._listening = listening
        bound: int = self._listening[0].getsockname()[1]
        return bound

    def close(self) -> None:
        """Accept no more, and end the connections whose protocol has not started."""
        for listening in self._listening:
            retry = self._retries.pop(listening, None)
            if retry is None:
                self._loop.remove_reader(listening)
            else:
                retry.cancel()
            listening.close()
        self._listening.clear()
        for connection in list(self._silent):
            self._drop(connection)
        for task in self._starting:
            task.cancel()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(listening)
                self._retries[listening] = self._loop.call_later(
                    PAUSE_S, self._accept_again, listening
                )
                return
            self._take(connection)

    def _accept_again(self, listening: socket.socket) -> None:
        del self._retries[listening]
        self._loop.add_reader(listening, self._accept, listening)

    def _take(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        if len(self._silent) + len(self._starting) >= self._undecided_max:
            if not self._silent:
                connection.close()
                return
            self._drop(next(iter(self._silent)))
        self._silent[connection] = self._loop.call_later(self._wait_s, self._drop, connection)
        self._loop.add_reader(connection, self._look, connection)

    def _drop(self, connection: socket.socket) -> None:
        self._unwatch(connection)
        connection.close()

    def _unwatch(self, connection: socket.socket) -> None:
        self._silent.pop(connection).cancel()
        self._loop.remove_reader(connection)

    def _look(self, connection: socket.socket) -> None:
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        if not first:
            self._drop(connection)
            return
        self._unwatch(connection)
        starting = self._loop.create_task(self._start(connection, is_tls=first == _HANDSHAKE))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket, *, is_tls: bool) -> None:
        with contextlib.suppress(OSError):  # the handshake failed, and the connection is closed
            await self._loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._ssl_context if is_tls else None,
                ssl_handshake_timeout=self._wait_s if is_tls else None,
            )

"""Opening a TCP port or a Unix socket, and saying which one it was that could not be opened."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from flowcontrol.errors import ListenError

_BACKLOG = 1_024
"""Connections the system accepts ahead of us."""
_REASONS = {
    errno.EADDRINUSE: "in use by another process",
    errno.EADDRNOTAVAIL: "address not assigned to this host",
    errno.ENOENT: "parent directory does not exist",
    errno.EACCES: "not permitted",
}


async def listen(
    protocol: Callable[[], asyncio.Protocol],
    address: tuple[str, int] | Path,
    ssl_context: ssl.SSLContext | None,
) -> asyncio.Server:
    """Open an address.

    Args:
        protocol: makes what serves one connection.
        address: host and port, or the path of a Unix socket.
        ssl_context: None for plain text.

    Raises:
        ListenError: naming the address.
    """
    loop = asyncio.get_running_loop()
    if isinstance(address, Path):
        await _expect_unused(address)
        with naming(str(address)):
            return await loop.create_unix_server(
                protocol, str(address), ssl=ssl_context, backlog=_BACKLOG
            )
    host, port = address
    with naming(f"{host}:{port}"):
        # Without reuse_port: two processes on one port would share its requests, unnoticed.
        return await loop.create_server(protocol, host, port, ssl=ssl_context, backlog=_BACKLOG)


@contextlib.contextmanager
def naming(address: str) -> Iterator[None]:
    """Say of an address that could not be opened which it was, and why.

    Raises:
        ListenError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        reason = "host name does not resolve"
        if not isinstance(error, socket.gaierror):
            said = error.strerror or str(error)
            reason = _REASONS.get(error.errno or 0, said)
        raise ListenError(address, reason) from error


async def _expect_unused(path: Path) -> None:
    """Leave a Unix socket to the process that answers on it; a stale one may be replaced.

    Raises:
        ListenError: there is such a process, or something else.
    """
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError as error:
        if _is_something_else(path):
            reason = "the path exists and is not a socket"
            raise ListenError(str(path), reason) from error
        return
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise ListenError(str(path), _REASONS[errno.EADDRINUSE])


def _is_something_else(path: Path) -> bool:
    return path.exists() and not path.is_socket()

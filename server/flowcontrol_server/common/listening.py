"""Opening a TCP port or a Unix socket, with errors that name the address."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from flowcontrol.errors import ListenError
from flowcontrol_server.common.addresses import Address

BACKLOG = 1_024
"""Connections that the system queues until they are accepted."""
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
        protocol: makes the protocol object of one connection.
        address: host and port, or the path of a Unix socket.
        ssl_context: None for plain text.

    Raises:
        ListenError: it cannot be opened; the error names the address.
    """
    loop = asyncio.get_running_loop()
    if isinstance(address, Path):
        await _expect_unused(address)
        with naming(str(address)):
            return await loop.create_unix_server(
                protocol, str(address), ssl=ssl_context, backlog=BACKLOG
            )
    host, port = address
    with naming(str(Address(host, port))):
        # Without reuse_port: two processes would silently share the requests of one port.
        return await loop.create_server(protocol, host, port, ssl=ssl_context, backlog=BACKLOG)


@contextlib.contextmanager
def naming(address: str) -> Iterator[None]:
    """Turn an OSError into an error that names the address and the reason.

    Raises:
        ListenError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        reason = "host name does not resolve"
        if not isinstance(error, socket.gaierror):
            text = error.strerror or str(error)
            reason = _REASONS.get(error.errno or 0, text)
        raise ListenError(address, reason) from error


async def _expect_unused(path: Path) -> None:
    """Check that no process answers on a Unix socket; a stale socket may be replaced.

    Raises:
        ListenError: a process answers on it, or the path is not a socket.
    """
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError as error:
        if _is_no_socket(path):
            reason = "the path exists and is not a socket"
            raise ListenError(str(path), reason) from error
        return
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise ListenError(str(path), _REASONS[errno.EADDRINUSE])


def _is_no_socket(path: Path) -> bool:
    return path.exists() and not path.is_socket()

"""Ports for servers that a test starts."""

import itertools
import os
import socket

HOST = "127.0.0.1"
_ports = itertools.count(20_000 + os.getpid() * 997 % 10_000)
"""Below the kernel's range for clients; workers, whose process ids are close, begin far apart."""


def free_port() -> int:
    """Return a port that is free and outside of the kernel's range for clients."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def free_ports(count: int) -> list[int]:
    """Return several such ports."""
    return [free_port() for _ in range(count)]

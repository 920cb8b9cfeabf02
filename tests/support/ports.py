"""Ports for servers that a test starts."""

import itertools
import os
import socket

HOST = "127.0.0.1"
_ports = itertools.count(20_000 + os.getpid() * 997 % 10_000)
"""Below those that the kernel gives to clients; workers, whose ids are close, begin far apart."""


def free_port() -> int:
    """Return a port that nobody listens on and no client will be given."""
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
    """Return as many of them."""
    return [free_port() for _ in range(count)]

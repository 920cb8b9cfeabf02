"""Valkey or Redis as in production, on loopback: with TLS, behind Sentinel, as a cluster."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, final

from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.valkey_server import ValkeyServer

CLI: Final = shutil.which("valkey-cli") or shutil.which("redis-cli")
NAME: Final = "primary"
"""Name of the primary that the sentinel watches."""
_HOST: Final = "127.0.0.1"
_PRIMARIES: Final = 3
_WITHIN_S: Final = 20.0
_DOWN_AFTER_MS: Final = 500


@final
class Group:
    """Servers that are stopped together; with TLS they require it, and a client certificate.

    Args:
        directory: directory for a folder of each, and the certificates.
        has_tls: whether they use TLS.
        names: names in their certificates; empty: those of this machine.
    """

    def __init__(
        self, directory: Path, *, has_tls: bool = False, names: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.files = {
            "ca": directory / "ca.pem",
            "certificate": directory / "client.pem",
            "key": directory / "client.key",
        }
        """The files that a client needs, by the names of the settings."""
        self.has_tls = has_tls
        self._stack = ExitStack()
        if has_tls:
            authority = Authority()
            (directory / "ca.pem").write_bytes(authority.pem)
            for name in ("server", "client"):
                certificate, key = authority.issue(*names)
                (directory / f"{name}.pem").write_bytes(certificate)
                (directory / f"{name}.key").write_bytes(key)

    def start(self, name: str, *options: str, is_sentinel: bool = False) -> ValkeyServer:
        """Start a further server."""
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        port = free_port()
        every = [*options, *(self._tls_options(port) if self.has_tls else ())]
        server = ValkeyServer(folder, *every, port=port, is_sentinel=is_sentinel)
        server.start()
        self._stack.callback(server.stop)
        return server

    def stop(self) -> None:
        """Stop all."""
        self._stack.close()

    def ask(self, server: ValkeyServer, *words: str) -> str:
        """Return a server's response to a command."""
        assert CLI is not None
        tls: tuple[str, ...] = ()
        if self.has_tls:
            files = (str(self.files[name]) for name in ("ca", "certificate", "key"))
            options = zip(("--cacert", "--cert", "--key"), files, strict=True)
            tls = ("--tls", *(word for pair in options for word in pair))
        command = (CLI, "-p", str(server.port), *tls, *words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _tls_options(self, port: int) -> list[str]:
        folder = self.directory
        return [
            *("--port", "0", "--tls-port", str(port), "--tls-replication", "yes"),
            *("--tls-cert-file", str(folder / "server.pem")),
            *("--tls-key-file", str(folder / "server.key")),
            *("--tls-ca-cert-file", str(folder / "ca.pem")),
        ]


@contextmanager
def running(
    directory: Path, *, has_tls: bool = False, names: Sequence[str] = ()
) -> Iterator[Group]:
    """A group that is stopped at the end."""
    group = Group(directory, has_tls=has_tls, names=names)
    try:
        yield group
    finally:
        group.stop()


def watched_pair(group: Group) -> tuple[ValkeyServer, ValkeyServer]:
    """Start a primary, a replica, and a sentinel that promotes it; return the first and last."""
    primary = group.start("one")
    at = f"{_HOST} {primary.port}"
    group.start("other", "--replicaof", at)
    (group.directory / "watch").mkdir()
    (group.directory / "watch" / "sentinel.conf").write_text(
        f"sentinel monitor {NAME} {at} 1\n"
        f"sentinel down-after-milliseconds {NAME} {_DOWN_AFTER_MS}\n"
        f"sentinel failover-timeout {NAME} 3000\n"
    )
    sentinel = group.start("watch", is_sentinel=True)
    _until(lambda: "slaves=1" in group.ask(sentinel, "info", "sentinel"))
    return primary, sentinel


def cluster(group: Group) -> list[ValkeyServer]:
    """Start three primaries that share the slots of a cluster."""
    nodes = []
    for number in range(_PRIMARIES):
        bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        tls = ("--tls-cluster", "yes") if group.has_tls else ()
        nodes.append(group.start(f"node{number}", *bus, *tls))
    addresses = [f"{_HOST}:{each.port}" for each in nodes]
    group.ask(nodes[0], "--cluster", "create", *addresses, "--cluster-yes")
    _until(lambda: all("cluster_state:ok" in group.ask(each, "cluster", "info") for each in nodes))
    return nodes


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline, "the servers do not find each other"
        time.sleep(0.05)

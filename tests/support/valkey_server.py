"""A real Valkey or Redis server for tests, on a Unix socket or a free port."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from tests.support.ports import free_port

BINARY: Final = shutil.which("valkey-server") or shutil.which("redis-server")
_START_S = 10.0
_HOST: Final = "127.0.0.1"


@final
class ValkeyServer:
    """A server without any persistence.

    Args:
        directory: directory for its log.
        options: further command-line options.
        wrap: prefix of its command, to run it in another network.
        host: its address.
        port: its port; 0: a free one.
        is_sentinel: whether it is a sentinel, configured by sentinel.conf in its directory.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        wrap: Sequence[str] = (),
        host: str = _HOST,
        port: int = 0,
        is_sentinel: bool = False,
    ) -> None:
        self.directory = directory
        self.host = host
        self._wrap = wrap
        self._options = options
        self.port = port or free_port()
        self._is_sentinel = is_sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its URL."""
        return f"valkey://{self.host}:{self.port}"

    def start(self) -> None:
        """Start it, empty, and wait until it listens."""
        assert BINARY is not None
        common = ["--save", "", "--appendonly", "no", "--bind", self.host]
        if self._wrap:
            common[-1:] = ["0.0.0.0", "--protected-mode", "no"]
        kind = ["sentinel.conf", "--sentinel"] if self._is_sentinel else []
        if self._is_sentinel:
            common = common[4:]  # it stores nothing
        command = [*self._wrap, BINARY, *kind, "--port", str(self.port), *common, *self._options]
        with (self.directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, cwd=self.directory)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection((self.host, self.port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.01)
            else:
                return

    def pause(self) -> None:
        """Stop it from answering."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop it; its content is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

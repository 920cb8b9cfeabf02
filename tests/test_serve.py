"""`flowcontrol serve` where its surroundings fail it."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.served import configuration, free_ports, lines_until, serving

TIMEOUT_S = 20.0
pytestmark = pytest.mark.slow


@pytest.fixture(name="ports")
def _ports() -> list[int]:
    """Ports for ext_proc, health, HTTP and the direct door."""
    return free_ports(4)


@pytest.fixture(name="config")
def _config(tmp_path: Path, ports: list[int]) -> Path:
    """A configuration that listens on these ports."""
    return configuration(tmp_path, ports)


def page(port: int, path: str = "/metrics") -> str:
    """A page of a service, once it has it."""
    until_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT_S) as answer:
                text: str = answer.read().decode()
                return text
        except URLError:
            assert time.monotonic() < until_s, f"no {path}"
            time.sleep(0.05)  # another process: there is nothing to wait for


class TestLog:
    """A log that cannot be written decides nothing."""

    def test_reader_gone(self, config: Path) -> None:
        """With nobody at the other end of its log, SIGTERM drains the service and ends it."""
        with serving(config) as process:
            lines_until(process, "service_started")
            assert process.stderr is not None
            process.stderr.close()
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0

    def test_full_disk(self, config: Path, ports: list[int]) -> None:
        """With no room for its log the service starts, follows its file, and ends as it should."""
        with Path("/dev/full").open("wb") as full, serving(config, full) as process:
            page(ports[2], "/readyz")
            new = config.with_suffix(".new")
            new.write_text(config.read_text() + "flowControl: {requestTTL: 7s}\n")
            new.rename(config)
            while "flowcontrol_config_reloads_total 1.0" not in page(ports[2]):
                assert process.poll() is None
                os.sched_yield()
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0


class TestHangUp:
    """SIGHUP asks for the file to be read, and ends nothing."""

    def test_while_it_starts(self, config: Path) -> None:
        """A service that is not ready to follow its file lives on."""
        with serving(config) as process:
            lines_until(process, "endpoints_changed")
            process.send_signal(signal.SIGHUP)
            lines_until(process, "service_started")
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0

    def test_while_it_stops(self, config: Path) -> None:
        """Until the very end."""
        with serving(config) as process:
            lines_until(process, "service_started")
            process.send_signal(signal.SIGTERM)
            lines_until(process, "drain_began")
            status = None
            while status is None:
                process.send_signal(signal.SIGHUP)
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(0.01)

        assert status == 0


class TestLedger:
    """The ledger of a service that runs is its own."""

    @pytest.mark.parametrize("same_ports", [True, False], ids=["same-ports", "other-ports"])
    def test_started_twice(self, tmp_path: Path, same_ports: bool) -> None:  # noqa: FBT001 - a parameter
        """A second service, started by mistake, says what is taken and touches nothing."""
        ports = free_ports(8)
        ledger = tmp_path / "ledger.jsonl"
        first, second = tmp_path / "first", tmp_path / "second"
        for each, its in ((first, ports[:4]), (second, ports[:4] if same_ports else ports[4:])):
            each.mkdir()
            configuration(each, its, f"ledger: {{file: {ledger}, files: 2}}\n")
        with serving(first / "flowcontrol.yaml") as process:
            lines_until(process, "service_started")
            before = ledger.stat().st_ino
            with serving(second / "flowcontrol.yaml") as other:
                _, errors = other.communicate(timeout=TIMEOUT_S)

            assert other.returncode == 2
            assert ledger.stat().st_ino == before
            assert not ledger.with_name("ledger.jsonl.1").exists()
            assert "in use by another process" in errors.splitlines()[-1]
            assert same_ports == ("cannot listen on" in errors)


class TestInterrupt:
    """Ctrl-C before there is anything to drain."""

    def test_while_it_starts(self, config: Path) -> None:
        """It ends the process, without a traceback and without a word."""
        with serving(config) as process:
            lines_until(process, "endpoints_changed")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT_S)

        words = [line for line in errors.splitlines() if not line.startswith("{")]
        assert words == []
        assert process.returncode in {-signal.SIGINT, 0}  # 0: it had come so far as to drain

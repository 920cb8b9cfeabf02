"""`flowcontrol serve` where its surroundings fail it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.ports import free_ports
from tests.support.served import configuration, lines_until, serving
from tests.support.streams import Streams

TIMEOUT_S = 20.0
STOP_WITHIN_S = 6.0
"""A drain budget of 1 s, and the ends of the doors and of the log, on a busy machine."""
START_PATIENCE_S = 5.0
"""Half of how long a start waits for its sources."""
BURST = 200
"""Requests at a time."""
pytestmark = pytest.mark.slow


@pytest.fixture(name="ports")
def _ports() -> list[int]:
    """Ports for ext_proc, gRPC and HTTP."""
    return free_ports(3)


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


def lost_lines(port: int) -> int:
    """How many log lines a service has dropped."""
    (sample,) = re.findall(r"^flowcontrol_log_lines_lost_total (\S+)$", page(port), re.MULTILINE)
    return int(float(sample))


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

    @pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_streams(self, config: Path, ports: list[int], closed: str) -> None:
        """Where a supervisor has closed standard streams, no socket takes their place."""
        with serving(config, prefix=("sh", "-c", f'exec "$@" {closed}', "sh")) as process:
            page(ports[2], "/readyz")
            streams = [
                str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)
            ]
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0
        assert not [stream for stream in streams if stream.startswith(("socket:", "anon_inode:"))]

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

    async def test_stalled_reader(self, tmp_path: Path, ports: list[int]) -> None:
        """While nobody reads it all is answered as ever; read again, it says what is missing."""
        budget = "flowControl: {noEndpointTTL: 100ms, drainBudget: 1s}\n"
        config = configuration(tmp_path, ports, budget)
        statuses = set[int]()
        with serving(config) as process:
            await asyncio.to_thread(page, ports[2], "/readyz")
            streams = Streams(f"127.0.0.1:{ports[0]}")
            async with asyncio.timeout(TIMEOUT_S):
                while not await asyncio.to_thread(lost_lines, ports[2]):
                    asking = (streams.ask("\N{CYCLONE}" * 256) for _ in range(BURST))
                    statuses.update(await asyncio.gather(*asking))
                assert "ok" in await asyncio.to_thread(page, ports[2], "/healthz")
            await streams.close()
            lines = await asyncio.to_thread(lines_until, process, "log_lines_lost")
            lost = await asyncio.to_thread(lost_lines, ports[2])
            process.send_signal(signal.SIGTERM)
            lines += await asyncio.to_thread(lines_until, process, "service_stopped")

            assert await asyncio.to_thread(process.wait, TIMEOUT_S) == 0
        assert statuses == {503}
        assert sum(line["lines"] for line in lines if line["event"] == "log_lines_lost") == lost

    async def test_stalled_reader_at_the_end(self, tmp_path: Path, ports: list[int]) -> None:
        """A service whose log is never read heeds SIGTERM, and ends within its budget."""
        budget = "flowControl: {noEndpointTTL: 100ms, drainBudget: 1s}\n"
        config = configuration(tmp_path, ports, budget)
        with serving(config) as process:
            await asyncio.to_thread(page, ports[2], "/readyz")
            streams = Streams(f"127.0.0.1:{ports[0]}")
            async with asyncio.timeout(TIMEOUT_S):
                for _ in range(2):  # 3 kB each: several times what a pipe holds
                    asking = (streams.ask("\N{CYCLONE}" * 256) for _ in range(BURST))
                    await asyncio.gather(*asking)
            await streams.close()
            process.send_signal(signal.SIGTERM)

            assert await asyncio.to_thread(process.wait, STOP_WITHIN_S) == 0


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


class TestReload:
    """What a running service says of another configuration."""

    def test_warnings(self, config: Path) -> None:
        """What to look at is logged as at the start, but not what was so before."""
        bands = "flowControl: {bands: [{}, {maxRequests: 5}]}"
        text = config.read_text()
        said: list[list[str]] = []
        with serving(config) as process:
            lines_until(process, "service_started")
            for more in (bands, "flowControl: {requestTTL: 7s}", bands):
                new = config.with_suffix(".new")
                new.write_text(f"{text}{more}\n")
                new.rename(config)
                lines = lines_until(process, "configuration_changed")
                warnings = [line["warning"] for line in lines if "warning" in line]
                said.append([each.partition(" ")[0] for each in warnings])
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0
        assert said == [["flowControl.bands[1]"], [], ["flowControl.bands[1]"]]


class TestInotify:
    """A system whose limits for inotify are reached."""

    @pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
    def test_reload(self, config: Path, ports: list[int], limit: str) -> None:
        """The file is read at SIGHUP at once, and at a change a moment later; that is said."""
        script = f'echo 0 > /proc/sys/user/{limit} && exec "$@"'
        prefix = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
        if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
            pytest.skip("needs user namespaces")
        with serving(config, prefix=prefix) as process:
            lines = lines_until(process, "service_started")
            text = config.read_text()
            for ttl, number in (("7s", signal.SIGHUP), ("8s", 0)):
                new = config.with_suffix(".new")
                new.write_text(f"{text}flowControl: {{requestTTL: {ttl}}}\n")
                new.rename(config)
                process.send_signal(number)
                lines += lines_until(process, "configuration_changed")
            metrics = page(ports[2])
            process.send_signal(signal.SIGTERM)

            assert process.wait(TIMEOUT_S) == 0
        polled = {line["folder"] for line in lines if line["event"] == "folder_polled"}
        assert polled == {str(config.parent), str(config.parent / "objectives")}
        assert "flowcontrol_config_last_reload_successful 1.0" in metrics
        assert "flowcontrol_config_reloads_total 2.0" in metrics


class TestLedger:
    """The ledger of a service that runs is its own."""

    @pytest.mark.parametrize("same_ports", [True, False], ids=["same-ports", "other-ports"])
    def test_started_twice(self, tmp_path: Path, same_ports: bool) -> None:  # noqa: FBT001 - a parameter
        """A second service, started by mistake, says what is taken and touches nothing."""
        ports = free_ports(6)
        ledger = tmp_path / "ledger.jsonl"
        first, second = tmp_path / "first", tmp_path / "second"
        for each, its in ((first, ports[:3]), (second, ports[:3] if same_ports else ports[3:])):
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


class TestStop:
    """SIGTERM and ctrl-C at any time."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_while_it_is_imported(self, config: Path, number: signal.Signals) -> None:
        """It ends the process with status 0: there is a handler before anything else."""
        arguments = [
            "-X",
            "importtime",
            "-m",
            "flowcontrol_server",
            "serve",
            "--config",
            str(config),
        ]
        command = [sys.executable, *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(line.split()[-1] == "click" for line in process.stderr)
            process.send_signal(number)
            _, errors = process.communicate(timeout=TIMEOUT_S)

        assert process.returncode == 0
        assert "Traceback" not in errors

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_while_it_starts(self, config: Path, ports: list[int], number: signal.Signals) -> None:
        """A start that waits for a name server is cancelled; nothing is left open or locked."""
        ledger = config.with_name("ledger.jsonl")
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            server = f"127.0.0.1:{silent.getsockname()[1]}"
            dns = f"dns: {{names: ['vllm:8000'], servers: ['{server}']}}"
            text = config.read_text().replace("static: []", dns)
            config.write_text(f"{text}ledger: {{file: {ledger}, files: 2}}\n")
            with serving(config) as process:
                lines_until(process, "objectives_changed")
                process.send_signal(number)
                _, errors = process.communicate(timeout=START_PATIENCE_S)

        assert process.returncode == 0
        assert [json.loads(line)["event"] for line in errors.splitlines()] == ["start_cancelled"]
        for port in ports:
            socket.create_server(("127.0.0.1", port)).close()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_twice(self, config: Path, ports: list[int], number: signal.Signals) -> None:
        """During the drain a second signal ends the process at once, whatever waits."""
        with serving(config) as process:
            await asyncio.to_thread(lines_until, process, "service_started")
            streams = Streams(f"127.0.0.1:{ports[0]}")
            waiting = asyncio.create_task(streams.ask("tenant"))
            while 'flowcontrol_waiting_requests{priority="0"} 1.0' not in await asyncio.to_thread(
                page, ports[2]
            ):
                assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(lines_until, process, "drain_began")
            process.send_signal(number)
            (line,) = await asyncio.to_thread(lines_until, process, "drain_aborted")

            assert await asyncio.to_thread(process.wait, STOP_WITHIN_S) == 1
            assert line["cause"] == number.name
            await asyncio.gather(waiting, return_exceptions=True)
            await streams.close()

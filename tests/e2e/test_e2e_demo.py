"""The demo as a stranger runs it: it ends well, says what is in its way, leaves nothing behind."""

import asyncio
import csv
import signal
import socket
import sys
from pathlib import Path

import pytest

from server.demo.stack import HOST, Ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

OFFSET = 11_000
PORTS = Ports().shifted(OFFSET)


async def demo(output: Path, *more: str) -> asyncio.subprocess.Process:
    """Start the demo."""
    command = ("demo", "--port-offset", str(OFFSET), "--output", str(output), *more)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def outcome(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Return the exit status and everything that was said."""
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def listening() -> list[int]:
    """Return the demo's ports on which anybody listens."""
    found = []
    for port in PORTS.all():
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                found.append(port)
    return found


class TestDemo:
    """`flowcontrol demo`."""

    async def test_whole(self, tmp_path: Path) -> None:
        """Both phases, a table, a picture, every request, what to try next."""
        status, said = await outcome(await demo(tmp_path, "--seconds", "2", "--seed", "7"))

        assert status == 0, said
        assert said.startswith("seed 7;")
        assert said.count("with flowcontrol │") == 2
        assert "curl -iN http://127.0.0.1:19080/v1/chat/completions" in said
        assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "ttft.svg").read_text()
        with (tmp_path / "requests.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = dict.fromkeys(row["phase"] for row in rows)
        first, second = ([row["at_s"] for row in rows if row["phase"] == name] for name in names)
        assert first == second
        assert {row["failure"] for row in rows} == {""}
        assert listening() == []

    async def test_interrupted(self, tmp_path: Path) -> None:
        """Ctrl-C in the middle of it leaves nothing running."""
        process = await demo(tmp_path)
        assert process.stdout is not None
        said = b""
        while b"Envoy alone, " not in said:  # the live view: everything is up
            said += await process.stdout.readline()
        assert len(listening()) == 10
        process.send_signal(signal.SIGINT)

        status, rest = await outcome(process)

        assert status == 130
        assert "nothing is left running" in rest
        assert listening() == []

    async def test_port_in_use(self, tmp_path: Path) -> None:
        """Which port it is, and what to do."""
        with socket.create_server((HOST, PORTS.http)):
            status, said = await outcome(await demo(tmp_path))

        assert status == 2
        assert said.endswith(
            f"demo: in use already: port {PORTS.http}; "
            "stop what listens there or use --port-offset\n"
        )
        assert listening() == []

"""The demo as a stranger runs it: it ends well, says what is in its way, leaves nothing behind."""

import asyncio
import csv
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import median

import pytest

from flowcontrol_server.tools.demo.stack import HOST, Ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

OFFSET = 11_000
ROOT = Path(__file__).parents[2]
GRPCURL = Path(sys.executable).with_name("grpcurl")
_TIMED_OUT = 124
PORTS = Ports().shifted(OFFSET)


def command_line(output: Path, *more: str) -> list[str]:
    """Return the demo's command."""
    options = ("--port-offset", str(OFFSET), "--output", str(output), *more)
    return [sys.executable, "-m", "flowcontrol_server", "demo", *options]


async def demo(output: Path, *more: str) -> asyncio.subprocess.Process:
    """Start the demo, where a proxy is set that nothing on this machine is to be asked through."""
    environment = {name: value for name, value in os.environ.items() if "no_proxy" not in name}
    return await asyncio.create_subprocess_exec(
        *("env", "--default-signal=HUP"),  # these tests may run under nohup
        *command_line(output, *more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**environment, "http_proxy": f"http://{HOST}:1"},
    )


async def until_up(process: asyncio.subprocess.Process) -> None:
    """Wait for the live view: everything runs."""
    assert process.stdout is not None
    said = b""
    while b"Envoy alone, " not in said:
        line = await process.stdout.readline()
        assert line, said.decode()
        said += line


async def outcome(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Return the exit status and everything that was said."""
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def documented() -> list[str]:
    """Return the grpcurl commands of README and the API's page, with the demo's ports here.

    Those with an own condition, objectives by the API, are left out.
    """
    page = (ROOT / "docs" / "grpc-api.md").read_text()
    condition, rest = page.split("With `objectives: {api", 1)
    _, rest = rest.split("\n\nTo act as Envoy, ", 1)
    found = []
    for text in ((ROOT / "README.md").read_text(), rest, condition):  # it ends with Drain
        joined = re.sub(r" *\\\n *", " ", text)
        for block in re.findall(r"(?:^    .+\n?)+", joined, re.MULTILINE):
            commands = textwrap.dedent(block)
            if "grpcurl" in commands:
                found += [commands] if commands.startswith("(") else commands.splitlines()
    return [
        re.sub(r"(127\.0\.0\.1:)(\d+)", lambda port: f"{port[1]}{int(port[2]) + OFFSET}", each)
        for each in found
    ]


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
        alone_s, with_us_s = (
            median(
                float(row["ttft_s"])
                for row in rows
                if row["phase"] == name and row["class"] == "interactive"
            )
            for name in names
        )
        assert with_us_s < alone_s, "short as it is, it shows what it is for"
        assert listening() == []

    @pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")
    async def test_commands_of_the_documents(self, tmp_path: Path) -> None:
        """With what it prints, grpcurl does as README and the API's page say, admin calls too."""
        commands = documented()
        process = await demo(tmp_path, "--seconds", "2", "--keep")
        assert process.stdout is not None
        said = b""
        while b"Running until ctrl-C" not in said:
            line = await process.stdout.readline()
            assert line, said.decode()
            said += line
        token = re.search(rb"export FLOWCONTROL_ADMIN_TOKEN=(\w{32})", said)
        assert token is not None, said.decode()
        environment = os.environ | {"FLOWCONTROL_ADMIN_TOKEN": token[1].decode()}
        environment["PATH"] = f"{GRPCURL.parent}:{os.environ['PATH']}"
        answers = {}
        for command in commands:
            answers[command] = await asyncio.to_thread(
                subprocess.run,
                ("timeout", "4", "sh", "-c", command),
                cwd=ROOT,
                env=environment,
                capture_output=True,
                check=False,
            )
        process.send_signal(signal.SIGINT)
        await process.wait()

        assert len(answers) >= 12
        for command, answer in answers.items():
            is_endless = "WatchSnapshot" in command or "sleep" in command
            assert answer.returncode == (_TIMED_OUT if is_endless else 0), (command, answer)
            assert answer.stdout, command

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    async def test_interrupted(self, tmp_path: Path, number: signal.Signals) -> None:
        """Ctrl-C in the middle of it, or a terminal that is closed, leaves nothing running."""
        process = await demo(tmp_path)
        await until_up(process)
        assert listening() == [*PORTS.all()]
        process.send_signal(number)

        status, rest = await outcome(process)

        assert status == 130
        assert "nothing is left running" in rest
        assert listening() == []

    async def test_reader_gone(self, tmp_path: Path) -> None:
        """Behind `| head` it stops, without a traceback, and leaves nothing running."""
        command = f"{shlex.join(command_line(tmp_path))} | head -2"
        pipeline = await asyncio.create_subprocess_exec(
            *("sh", "-c", command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, errors = await pipeline.communicate()

        assert said.splitlines()[1].startswith(b"Envoy alone, ")
        assert errors == b""
        assert listening() == []

    async def test_port_in_use(self, tmp_path: Path) -> None:
        """Which port it is, and what to do."""
        with socket.create_server((HOST, PORTS.http)):
            status, said = await outcome(await demo(tmp_path))

        assert status == 2
        assert said.endswith(
            f"demo: in use already: port {PORTS.http}; "
            "stop the process there or use --port-offset\n"
        )
        assert listening() == []

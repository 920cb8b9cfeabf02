"""h2spec, the conformance suite for HTTP/2 servers, against ours; strict, all of its cases.

It is a Go program: built with Go, once, where that is installed, and left out elsewhere. What it
asks of the core is asked by test_http2_connection.py too, which needs nothing.

It sends plain requests and reads bodies, so it is run twice: against a server of seven lines that
answers them, for the core alone, and against the direct door, which has only refusals for them.
"""

import asyncio
import os
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.direct.door import DirectDoor
from flowcontrol_server.doors.http2.connection import Http2Connection
from flowcontrol_server.doors.http2.events import Ended, Opened, Received
from flowcontrol_server.doors.http2.headers import encode_block
from flowcontrol_server.doors.http2.limits import Http2Limits
from tests.support.gates import running_gate
from tests.support.http2 import received

ROOT = Path(__file__).parents[3]
H2SPEC = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible"
BUILD_S = 240
CASES_MIN = 140
OK = encode_block([(":status", "200"), ("content-type", "text/plain")])
LIMITS = Http2Limits(streams_max=100)
"""One case exceeds the number of streams, within a second."""
BODY = b"hello, h2spec: long enough for windows of a few bytes"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(BUILD_S + 60)]


class PlainServer(asyncio.Protocol):
    """Answers every request when it has ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connection = Http2Connection(LIMITS, time.monotonic_ns())
        transport.write(self.connection.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Answer what has come to its end."""
        for event in received(self.connection, data, time.monotonic_ns()):
            match event:
                case Opened(stream_id, _, True) | Received(stream_id, _, True):
                    self.connection.send_headers(stream_id, OK)
                    self.connection.send_data(stream_id, BODY, is_end=True)
                case Ended():
                    self.transport.write(self.connection.data_to_send())
                    self.transport.close()
                case _:
                    pass
        self.transport.write(self.connection.data_to_send())


async def against_core(run: Callable[[int], Awaitable[set[str]]]) -> set[str]:
    """Run it against the seven lines."""
    server = await asyncio.get_running_loop().create_server(PlainServer, "127.0.0.1", 0)
    async with server:
        return await run(server.sockets[0].getsockname()[1])


async def against_door(run: Callable[[int], Awaitable[set[str]]]) -> set[str]:
    """Run it against the direct door."""
    async with running_gate() as gate:
        door = DirectDoor(CallContext(gate=gate, limits=LIMITS))
        port = await door.listen(("127.0.0.1", 0))
        try:
            return await run(port)
        finally:
            await door.close(0)


@pytest.fixture(scope="module")
def h2spec() -> str:
    """The program: named by H2SPEC, on PATH, built before, or built now."""
    found = os.environ.get("H2SPEC") or shutil.which("h2spec")
    if found is not None:
        return found
    built = ROOT / ".cache" / "bin" / "h2spec"
    go = shutil.which("go")
    if not built.exists() and go is None:
        pytest.skip("there is neither h2spec nor Go to build it with")
    if not built.exists() and go is not None:
        done = subprocess.run(
            [go, "install", H2SPEC],
            env=os.environ | {"GOBIN": str(built.parent)},
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"h2spec cannot be built here: {done.stderr[-300:]}")
    return str(built)


@pytest.mark.parametrize("against", [against_core, against_door])
async def test_h2spec(
    h2spec: str,
    against: Callable[[Callable[[int], Awaitable[set[str]]]], Awaitable[set[str]]],
    tmp_path: Path,
) -> None:
    """Every case of generic, http2 and hpack passes."""
    report = tmp_path / "report.xml"

    async def run(port: int) -> set[str]:
        process = await asyncio.create_subprocess_exec(
            *(h2spec, "--strict", "--port", str(port), "--timeout", "1"),
            *("--junit-report", str(report)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        print(re.sub(r"(?s).*Failures:", "Failures:", output.decode()))  # noqa: T201 - if it fails
        suites = ET.parse(report).getroot().iter("testsuite")
        cases = [(suite.get("id"), case) for suite in suites for case in suite.iter("testcase")]
        assert len(cases) >= CASES_MIN
        return {
            str(section)
            for section, case in cases
            if case.find("failure") is not None or case.find("error") is not None
        }

    assert await against(run) == set()

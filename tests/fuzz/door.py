"""Throws bytes at the direct door and holds it to what it must never do, whatever comes.

It never raises, never leaves a request at the gate, and never says what is no HTTP/2. As a script
it lets atheris, which watches the branches taken, think the bytes up:

    pip install atheris
    python tests/fuzz/door.py -max_total_time=300 [CORPUS] [libFuzzer's other options]

The suite does the same with Hypothesis, shortly (test_direct_fuzz.py).
"""

import asyncio
import importlib
import sys
from typing import Any, cast, final

import structlog

from flowcontrol.config import Concurrency, ControllerConfig
from flowcontrol.events import DrainBegan
from flowcontrol.request import Request
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.connection_log import ConnectionLog
from flowcontrol_server.doors.direct.connection import Line, Turns
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.limits import Http2Limits
from flowcontrol_server.requests.classify import ExemptPaths, Intake
from flowcontrol_server.requests.gate import FlowGate

LIMITS = Http2Limits(
    streams_max=50, message_bytes_max=2_000, partial_bytes_max=5_000, queued_bytes_max=20_000
)
HELLO = frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK


@final
class Transport:
    """The socket's end: keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_over = False

    def get_extra_info(self, _name: str) -> None:
        """There is no TLS."""

    def set_write_buffer_limits(self, high: int) -> None:
        """Everything is taken at once."""

    def get_write_buffer_size(self) -> int:
        """Everything is taken at once."""
        return 0

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.written += data

    def is_closing(self) -> bool:
        """Whether the door has said its last."""
        return self.is_over

    def can_write_eof(self) -> bool:
        """As TCP can."""
        return True

    def write_eof(self) -> None:
        """The door says no more, and listens on."""

    def pause_reading(self) -> None:
        """What comes all the same is to be read, later."""

    def resume_reading(self) -> None:
        """Nothing was held back."""

    def abort(self) -> None:
        """The door has had enough."""
        self.is_over = True


async def talk(pieces: list[bytes]) -> bytes:
    """Send pieces, a turn of the loop each, on a connection of its own; return what was said.

    Raises:
        AssertionError: a request was left at the gate, or a callback has failed.
    """
    loop = asyncio.get_running_loop()
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: failures.append(context))
    over = asyncio.Event()
    ended: list[int] = []
    gate = FlowGate(
        ControllerConfig(detectors=(Concurrency(requests_max=3),)),
        20,  # beyond it requests are refused on the spot
        lambda parked, _decision: ended.append(parked.request_id),
        lambda _fault: over.set(),
    )
    context = CallContext(gate=gate, intake=Intake(exempt=ExemptPaths(("/",))), limits=LIMITS)
    transport, lines = Transport(), set[Line]()
    line = Line(context, lines, lambda: None, ConnectionLog(), Turns())
    line.connection_made(cast("asyncio.Transport", transport))
    for piece in pieces:
        if not transport.is_over:
            line.data_received(piece)
            await asyncio.sleep(0)
    gate.start()  # what is parked gets its decision now, and after it
    gate.post(DrainBegan(0))
    line.end_with_status()
    await over.wait()
    await asyncio.sleep(0)
    line.connection_lost(None)
    for _ in range(3):
        await asyncio.sleep(0)
    assert gate.join(10)
    assert failures == []
    assert lines == set()
    probe = gate.park(Request(0, "probe"))
    assert sorted(ended) == [*range(1, probe.request_id)], "a request ends, and once"
    return bytes(transport.written)


def expect_frames(said: bytes) -> None:
    """Hold what the door said to the shape of frames.

    Raises:
        AssertionError: it is none.
    """
    at = 0
    while at < len(said):
        high, low, kind, _flags, stream_id = frames.unpack_header(said, at)
        size = high << 8 | low
        frames.check_shape(kind, stream_id, size)
        at += frames.FRAME_HEADER_BYTES + size
    assert at == len(said)


def one(data: bytes) -> None:
    """Try one input of a fuzzer's; its first byte says whether a greeting goes ahead."""
    pieces = data[1:].split(b"\xf0\x9f\x94\xaa")
    greeting = [HELLO] if data[:1] != b"\x00" else []
    expect_frames(asyncio.run(talk([*greeting, *pieces])))


def main() -> None:
    """Let atheris think inputs up until it is told to end."""
    atheris: Any = importlib.import_module("atheris")  # no dependency of the project
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # say nothing
    atheris.instrument_all()
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What one request costs on its way through the direct door: objects, turns of the loop.

docs/design.md, "The way of one request", names each of them.
"""

import asyncio
from collections import Counter
from statistics import mode

import pytest

from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.connection_log import ConnectionLog
from flowcontrol_server.doors.direct.connection import Line, Turns
from flowcontrol_server.doors.http2 import frames
from tests.support.direct import arrival
from tests.support.gates import TIMEOUT_S, running_gate
from tests.support.way import CountingSelector, Made, Pipe

pytestmark = pytest.mark.interpreted

OBJECTS = {
    *("ProcessCall", "Exchange", "Message", "Request", "Parked", "Arrived"),
    *("Lease", "Decision", "Decided", "Left"),
}
"""Of the request itself."""
AROUND = {"Stream", "Opened", "Received", "FieldReader", "Opening", "Tokens"}
"""Of its frames and its message while they are read, and the numbers of an estimate."""
TURNS = 3


class Walk:
    """Lets requests through a door that nobody else uses, and counts."""

    def __init__(self) -> None:
        self.made = Made()
        self.counts: Counter[str] = Counter()
        self.turns = 0
        self._selector = CountingSelector()

    def run(self) -> None:
        """Let some requests pass; count what each of them made, and most of them took.

        The first make what all need; a timer may fall between, or the processor be awake already.
        """
        loop = asyncio.SelectorEventLoop(self._selector)
        with self.made.watching():
            try:
                loop.run_until_complete(self._pass())
            finally:
                loop.close()

    async def _pass(self) -> None:
        written = asyncio.Event()
        all_turns: list[int] = []
        async with running_gate() as gate:
            line = Line(CallContext(gate=gate), set(), lambda: None, ConnectionLog(), Turns())
            line.connection_made(Pipe(lambda _data: written.set()))
            line.data_received(frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK)
            for stream_id in range(1, 41, 2):
                await gate.snapshot()
                self.made.counts.clear()
                written.clear()
                turns = -self._selector.turns
                line.data_received(arrival(stream_id))
                async with asyncio.timeout(TIMEOUT_S):
                    await written.wait()
                turns += self._selector.turns
                if stream_id > 1:  # the first stays, so that its flow does
                    line.data_received(frames.frame(frames.DATA, frames.END_STREAM, stream_id, b""))
                    async with asyncio.timeout(TIMEOUT_S):
                        # A busy machine reads it a turn later.
                        while not self.made.counts["Left"]:  # noqa: ASYNC110 - nothing says so
                            await asyncio.sleep(0)
                    all_turns.append(turns)
                    self.counts = (self.counts or self.made.counts) & self.made.counts
            line.connection_lost(None)
        self.turns = mode(all_turns)


def test_objects_and_turns() -> None:
    """Ten objects from its first byte to its end; three turns of the loop until its answer."""
    walk = Walk()
    walk.run()

    counts = {name: n for name, n in walk.counts.items() if name not in AROUND}
    assert counts == dict.fromkeys(OBJECTS, 1)
    assert len(OBJECTS) == 10
    assert walk.turns - 1 == TURNS  # the last is the one in which this test wakes up

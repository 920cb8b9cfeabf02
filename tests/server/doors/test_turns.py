"""Who reads when, of several connections that have input."""

import asyncio
from collections.abc import Callable
from typing import final

import pytest

from flowcontrol_server.doors.direct import connection
from flowcontrol_server.doors.direct.connection import DEBT_TURNS, SLICE_NS, TURN_NS, Turns


@final
class Clock:
    """Time that passes only by reading."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        """As that of `time`."""
        return self.now_ns


@final
class Flood:
    """A connection that always has more.

    Args:
        clock: moves with each read.
        took: is called with each read.
        least_ns: that a read takes, however little time it is given.
    """

    def __init__(self, clock: Clock, took: Callable[[], None], least_ns: int = 0) -> None:
        self._clock = clock
        self._took = took
        self._least_ns = least_ns

    def read(self, end_ns: int) -> bool:
        """Read until then, or longer."""
        self._took()
        self._clock.now_ns = max(end_ns, self._clock.now_ns + self._least_ns)
        return True


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that is read."""
    clock = Clock()
    monkeypatch.setattr(connection, "time", clock)
    return clock


@pytest.mark.interpreted
class TestTurns:
    """Turns of the loop, in which a test counts."""

    async def test_in_order(self, clock: Clock) -> None:
        """Each reads a slice, then the next, and no turn of the loop is longer than it may be."""
        reads: list[str] = []
        turns = Turns()
        for name in "abc":
            turns.read(Flood(clock, lambda name=name: reads.append(name)))  # type: ignore[misc]  # a default
        lengths_ns = []
        for _ in range(6):
            before_ns = clock.now_ns
            await asyncio.sleep(0)
            lengths_ns.append(clock.now_ns - before_ns)

        assert lengths_ns == [TURN_NS] * 6
        assert reads[2:14] == ["a", "b", "c"] * 4  # the first was alone
        assert TURN_NS // SLICE_NS == 2

    async def test_debt(self, clock: Clock) -> None:
        """After a read that took long some turns are free of any."""
        turn = 0
        read_in: list[int] = []
        turns = Turns()
        turns.read(Flood(clock, lambda: read_in.append(turn), least_ns=3 * TURN_NS))
        for turn in range(1, 9):  # noqa: B007 - as seen by the flood
            await asyncio.sleep(0)

        assert read_in == [0, 2, 5, 8]

    async def test_debt_is_bounded(self, clock: Clock) -> None:
        """However long it took, after some turns there is another read."""
        turn = 0
        read_in: list[int] = []
        turns = Turns()
        turns.read(Flood(clock, lambda: read_in.append(turn), least_ns=1000 * TURN_NS))
        for turn in range(1, 2 * DEBT_TURNS + 2):  # noqa: B007 - as seen by the flood
            await asyncio.sleep(0)

        assert read_in == [0, DEBT_TURNS, 2 * DEBT_TURNS]

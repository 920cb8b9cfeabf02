"""How late the loop is, on a loop of our own making."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from flowcontrol_server.telemetry import loop_lag
from flowcontrol_server.telemetry.loop_lag import LoopLag


class Loop:
    """A loop that calls back when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, Callable[[], None]]] = []
        self.is_cancelled = False

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Loop":
        """Take note."""
        self.asked.append((delay_s, callback))
        return self

    def cancel(self) -> None:
        """Take note."""
        self.is_cancelled = True


@pytest.fixture(name="loop")
def _loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """The running loop."""
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time, in its one element."""
    now = [0]

    class Time:
        """A clock."""

        monotonic_ns: Any = staticmethod(lambda: now[0])

    monkeypatch.setattr(loop_lag, "time", Time)
    assert time.monotonic_ns() > 0
    return now


class TestLoopLag:
    """Looking."""

    def test_on_time_late_and_early(self, loop: Loop, clock: list[int]) -> None:
        """It counts by how much each call came late, and asks for the next."""
        lag = LoopLag()
        for late_ns in (0, 20_000_000, -1_000_000):
            delay_s, look = loop.asked[-1]
            clock[0] += round(delay_s * 1e9) + late_ns
            look()

        seen = lag.snapshot()
        assert len(loop.asked) == 4
        assert sum(seen.counts) == 3
        assert seen.counts[0] == 2
        assert seen.counts[seen.bounds_s.index(0.025)] == 1
        assert seen.sum_ns == 20_000_000

    def test_stop(self, loop: Loop, clock: list[int]) -> None:
        """Stopped, it asks no more."""
        del clock
        LoopLag().stop()

        assert loop.is_cancelled

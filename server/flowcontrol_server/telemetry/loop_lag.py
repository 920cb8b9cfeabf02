"""Measures the lag of the event loop.

Every response to a client passes through the loop. A timer that fires late shows that the loop is
busy, or that something has blocked it.
"""

import asyncio
import time
from typing import final

from flowcontrol.histogram import Histogram, HistogramSnapshot

INTERVAL_S = 0.25
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@final
class LoopLag:
    """Measures four times a second how late a timer fires on the running loop, until stopped."""

    def __init__(self) -> None:
        self._histogram = Histogram(_BOUNDS_S)
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def snapshot(self) -> HistogramSnapshot:
        """Return the lags measured so far."""
        return self._histogram.snapshot()

    def stop(self) -> None:
        """Stop measuring."""
        self._timer.cancel()

    def _schedule(self) -> None:
        self._due_ns = time.monotonic_ns() + round(INTERVAL_S * 1e9)
        self._timer = self._loop.call_later(INTERVAL_S, self._measure)

    def _measure(self) -> None:
        self._histogram.observe(max(0, time.monotonic_ns() - self._due_ns))
        self._schedule()

"""How late the event loop is.

Everything a client waits for passes through the loop: what is due on it and comes late says how
busy it is, or that something has blocked it. A timer of its own is the one way to see that.
"""

import asyncio
import time
from typing import final

from flowcontrol.histogram import Histogram, HistogramSnapshot

INTERVAL_S = 0.25
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@final
class LoopLag:
    """Looks four times a second how late it is called, on the running loop, until stopped."""

    def __init__(self) -> None:
        self._histogram = Histogram(_BOUNDS_S)
        self._loop = asyncio.get_running_loop()
        self._ask()

    def snapshot(self) -> HistogramSnapshot:
        """Return what was seen so far."""
        return self._histogram.snapshot()

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _ask(self) -> None:
        self._due_ns = time.monotonic_ns() + round(INTERVAL_S * 1e9)
        self._timer = self._loop.call_later(INTERVAL_S, self._look)

    def _look(self) -> None:
        self._histogram.observe(max(0, time.monotonic_ns() - self._due_ns))
        self._ask()

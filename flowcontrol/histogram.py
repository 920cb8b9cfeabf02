"""Pure. A histogram of durations."""

from bisect import bisect_left
from typing import Final, NamedTuple, final

_SECOND_NS: Final = 1_000_000_000


class HistogramSnapshot(NamedTuple):
    """A histogram at one moment."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    """Durations up to each bound, and last those above all; not cumulative."""
    sum_ns: int


@final
class Histogram:
    """Counts durations; O(log bounds) each.

    Owner: the thread that observes; not thread-safe.

    Args:
        bounds_s: upper bounds in seconds, ascending.
    """

    __slots__ = ("_bounds_ns", "_bounds_s", "_counts", "_sum_ns")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds_s = bounds_s
        self._bounds_ns = tuple(round(bound * _SECOND_NS) for bound in bounds_s)
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_ns = 0

    def observe(self, duration_ns: int) -> None:
        """Count one duration; bounds are inclusive."""
        self._counts[bisect_left(self._bounds_ns, duration_ns)] += 1
        self._sum_ns += duration_ns

    def snapshot(self) -> HistogramSnapshot:
        """Return a frozen copy."""
        return HistogramSnapshot(self._bounds_s, tuple(self._counts), self._sum_ns)

"""Pure. Counts of what became of requests, kept for as long as the process lives.

A name whose counts are kept is an operator's, a priority or an objective; those that are declared
no more are kept, too, but only so many.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, TypeVar, final

from flowcontrol.histogram import Histogram
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import FORECAST_BOUNDS, WAIT_BOUNDS_S, Totals

_BOUNDS_NS: Final = tuple(round(bound * 1_000_000_000) for bound in WAIT_BOUNDS_S)
_RATIO_1: Final = 1_000_000_000
COUNTED_MAX: Final = 1_000
"""Names whose counts are kept, at most, where no more are declared. A scraper takes what begins
again at 0 for a counter of a process that was restarted."""
Name = TypeVar("Name", int, str)
Counts = TypeVar("Counts")


def make_room(counted: dict[Name, Counts], is_declared: Callable[[Name], bool]) -> None:
    """Forget, before a new name is counted, the first that is declared no more, where it is full.

    O(names), and only for a new one.
    """
    if len(counted) >= COUNTED_MAX:
        outdated = next((name for name in counted if not is_declared(name)), None)
        if outdated is not None:
            del counted[outdated]


@final
class Tally:
    """The counts of one priority: outcomes, completions and waits by outcome. O(1)."""

    __slots__ = ("completed", "forecasts", "outcomes", "wait_counts", "wait_sum_ns")

    def __init__(self) -> None:
        self.completed = 0
        self.forecasts = Histogram(FORECAST_BOUNDS)
        """Real waits over predicted ones, a ratio of 1 as a second."""
        self.outcomes: dict[Outcome, int] = {}
        self.wait_counts: dict[Outcome, list[int]] = {}
        self.wait_sum_ns: dict[Outcome, int] = {}

    def count(self, outcome: Outcome, waited_ns: int, expected_ns: int | None = None) -> None:
        """Count one decision.

        Args:
            outcome: what it was.
            waited_ns: from arrival to decision.
            expected_ns: what that was predicted to be; what was dispatched shows how true it was.
        """
        if expected_ns and outcome is Outcome.DISPATCHED:
            self.forecasts.observe(waited_ns * _RATIO_1 // expected_ns)
        if outcome not in self.outcomes:
            self.outcomes[outcome] = 0
            self.wait_sum_ns[outcome] = 0
            self.wait_counts[outcome] = [0] * (len(_BOUNDS_NS) + 1)
        self.outcomes[outcome] += 1
        self.wait_sum_ns[outcome] += waited_ns
        self.wait_counts[outcome][bisect_left(_BOUNDS_NS, waited_ns)] += 1

    def totals(self) -> Totals:
        """Return a frozen copy."""
        return Totals(
            outcomes=dict(self.outcomes),
            completed=self.completed,
            wait_counts={outcome: tuple(counts) for outcome, counts in self.wait_counts.items()},
            wait_sum_ns=dict(self.wait_sum_ns),
            forecasts=self.forecasts.snapshot(),
        )

"""Pure. Counts of what became of requests, kept for as long as the process lives.

A name whose counts are kept is an operator's, a priority or an objective; those that are declared
no more are kept, too, but only so many.
"""

from collections.abc import Callable
from typing import Final, TypeVar, final

from flowcontrol.histogram import Histogram
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import FORECAST_BOUNDS, WAIT_BOUNDS_S, Totals

_RATIO_1: Final = 1_000_000_000
COUNTED_MAX: Final = 1_000
"""Names whose counts are kept, at most, where no more are declared. A scraper takes what begins
again at 0 for a counter of a process that was restarted."""
Name = TypeVar("Name", int, str)
Counts = TypeVar("Counts")


def make_room(counted: dict[Name, Counts], is_declared: Callable[[Name], bool]) -> None:
    """Make room for a new name, where there is none: drop the first that is declared no more.

    O(names), and only for a new one.
    """
    if len(counted) >= COUNTED_MAX:
        outdated = next((name for name in counted if not is_declared(name)), None)
        if outdated is not None:
            del counted[outdated]


@final
class Tally:
    """The counts of one priority: outcomes, completions and waits by outcome. O(1)."""

    __slots__ = ("_waits", "completed", "forecasts")

    def __init__(self) -> None:
        self.completed = 0
        self.forecasts = Histogram(FORECAST_BOUNDS)
        """Real waits over predicted ones; a ratio of 1 is counted as 1 s."""
        self._waits: dict[Outcome, Histogram] = {}
        """Of all that were decided, by outcome."""

    def count(self, outcome: Outcome, waited_ns: int, expected_ns: int | None = None) -> None:
        """Count one decision.

        Args:
            outcome: what it was.
            waited_ns: from arrival to decision.
            expected_ns: what that was predicted to be; what was dispatched shows how true it was.
        """
        if expected_ns and outcome is Outcome.DISPATCHED:
            self.forecasts.observe(waited_ns * _RATIO_1 // expected_ns)
        waits = self._waits.get(outcome)
        if waits is None:
            waits = self._waits[outcome] = Histogram(WAIT_BOUNDS_S)
        waits.observe(waited_ns)

    @property
    def outcomes(self) -> dict[Outcome, int]:
        """Return how often each was decided."""
        return {outcome: sum(waits.snapshot().counts) for outcome, waits in self._waits.items()}

    def totals(self) -> Totals:
        """Return a frozen copy."""
        waits = {outcome: each.snapshot() for outcome, each in self._waits.items()}
        return Totals(
            outcomes=self.outcomes,
            completed=self.completed,
            wait_counts={outcome: each.counts for outcome, each in waits.items()},
            wait_sum_ns={outcome: each.sum_ns for outcome, each in waits.items()},
            forecasts=self.forecasts.snapshot(),
        )

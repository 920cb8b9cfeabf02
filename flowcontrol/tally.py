"""Pure. Counts of the outcomes of requests, kept for the life of the process.

Counts are kept by priority or objective, names that operators declare. Counts of names that are no
longer declared are kept, too, up to a bound.
"""

from collections.abc import Callable
from typing import Final, TypeVar, final

from flowcontrol.histogram import Histogram
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import FORECAST_BOUNDS, WAIT_BOUNDS_S, Totals

_RATIO_1: Final = 1_000_000_000
COUNTED_MAX: Final = 1_000
"""Most names whose counts are kept, unless more are declared. A counter that starts again at 0
looks to Prometheus like a restart."""
Name = TypeVar("Name", int, str)
Counts = TypeVar("Counts")


def make_room(counted: dict[Name, Counts], is_declared: Callable[[Name], bool]) -> None:
    """Make room for a new name, if there is none: drop the first that is not declared.

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
        """Ratios of real to forecast waits; a ratio of 1 is counted as 1 s."""
        self._waits: dict[Outcome, Histogram] = {}
        """Waits of all decided requests, by outcome."""

    def count(self, outcome: Outcome, waited_ns: int, expected_ns: int | None = None) -> None:
        """Count one decision.

        Args:
            outcome: of the request.
            waited_ns: from arrival to decision.
            expected_ns: the forecast of that; compared only if the request was dispatched.
        """
        if expected_ns and outcome is Outcome.DISPATCHED:
            self.forecasts.observe(waited_ns * _RATIO_1 // expected_ns)
        waits = self._waits.get(outcome)
        if waits is None:
            waits = self._waits[outcome] = Histogram(WAIT_BOUNDS_S)
        waits.observe(waited_ns)

    @property
    def outcomes(self) -> dict[Outcome, int]:
        """Return the count of each outcome."""
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

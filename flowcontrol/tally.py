"""Pure. Counts of what became of requests, kept for as long as the process lives."""

from bisect import bisect_left
from typing import final

from flowcontrol.request import Outcome
from flowcontrol.snapshot import WAIT_BOUNDS_S, Totals

_BOUNDS_NS = tuple(round(bound * 1_000_000_000) for bound in WAIT_BOUNDS_S)


@final
class Tally:
    """The counts of one priority: outcomes, completions and waits by outcome. O(1)."""

    __slots__ = ("completed", "outcomes", "wait_counts", "wait_sum_ns")

    def __init__(self) -> None:
        self.completed = 0
        self.outcomes: dict[Outcome, int] = {}
        self.wait_counts: dict[Outcome, list[int]] = {}
        self.wait_sum_ns: dict[Outcome, int] = {}

    def count(self, outcome: Outcome, waited_ns: int) -> None:
        """Count one decision."""
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
        )

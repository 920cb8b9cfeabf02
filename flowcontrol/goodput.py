"""Pure. Goodput: results of dispatched requests, from settlements.

Throughput counts all work, goodput only useful work: requests answered, and in time if they said
when their first token is due. Counted by objective, because operators give promises by objective.
"""

from collections.abc import Callable
from enum import Enum
from typing import final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease
from flowcontrol.tally import make_room
from flowcontrol.views.snapshot import GoodputSnapshot


class ResponseResult(Enum):
    """How one request ended. The value is the word used in metrics."""

    GOOD = "good"
    LATE = "late"
    """Answered, but the first token came late."""
    FAILED = "failed"
    """Answered with an error, or cut off by the model server."""
    ABANDONED = "abandoned"
    """Its client left before a response had begun."""

    __hash__ = object.__hash__  # as in Outcome


@final
class _Counted:
    """The counts of one objective."""

    def __init__(self) -> None:
        self.results = dict.fromkeys(ResponseResult, 0)
        self.good_tokens = 0


@final
class Goodput:
    """Counts results by objective; bounded for objectives no longer declared. O(1)."""

    def __init__(self) -> None:
        self._counted: dict[str, _Counted] = {}

    def count(
        self,
        objective: str,
        lease: Lease,
        settled: Settled,
        is_declared: Callable[[str], bool] = bool,
    ) -> None:
        """Count one request, once.

        Args:
            objective: a declared one; empty for all requests without one.
            lease: of the request.
            settled: its actual usage.
            is_declared: whether an objective is declared; called when a new one is counted.
        """
        counted = self._counted.get(objective)
        if counted is None:
            make_room(self._counted, is_declared)
            counted = self._counted[objective] = _Counted()
        result = _result(lease, settled)
        counted.results[result] += 1
        if result is ResponseResult.GOOD and settled.output_tokens is not None:
            counted.good_tokens += settled.output_tokens

    def snapshot(self) -> dict[str, GoodputSnapshot]:
        """Return a frozen copy, by objective."""
        return {
            objective: GoodputSnapshot(
                {result.value: count for result, count in counted.results.items()},
                counted.good_tokens,
            )
            for objective, counted in self._counted.items()
        }


def _result(lease: Lease, settled: Settled) -> ResponseResult:
    if not settled.is_success:
        return ResponseResult.FAILED
    if not settled.was_answered:
        return ResponseResult.ABANDONED
    due_ns = lease.request.ttft_slo_ns
    if due_ns is None or settled.ttft_ns is None:
        return ResponseResult.GOOD
    first_ns = lease.dispatched_ns - lease.arrived_ns + settled.ttft_ns
    return ResponseResult.GOOD if first_ns <= due_ns else ResponseResult.LATE

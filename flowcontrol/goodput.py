"""Pure. What became of dispatched requests, as settlements tell: what was any use.

Throughput counts what was done, goodput what was any use: answered, and in time where the request
said when its first token was due. Counted by objective, because operators promise by objective.
"""

from enum import Enum
from typing import final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease
from flowcontrol.snapshot import GoodputSnapshot


class Result(Enum):
    """How one request ended. The value is the word used in metrics."""

    GOOD = "good"
    LATE = "late"
    """Answered, but the first token came after it was due."""
    FAILED = "failed"
    """Answered with an error, or broken off by the model server."""


@final
class Goodput:
    """Counts results by objective; at most as many as were ever declared. O(1)."""

    def __init__(self) -> None:
        self._results: dict[str, dict[Result, int]] = {}
        self._good_tokens: dict[str, int] = {}

    def count(self, objective: str, lease: Lease, settled: Settled) -> None:
        """Count one request, once.

        Args:
            objective: a declared one, or empty for all that named none.
            lease: of the request.
            settled: what it really took.
        """
        results = self._results.setdefault(objective, dict.fromkeys(Result, 0))
        result = _result(lease, settled)
        results[result] += 1
        if result is Result.GOOD and settled.output_tokens is not None:
            tokens = self._good_tokens.get(objective, 0)
            self._good_tokens[objective] = tokens + settled.output_tokens

    def snapshot(self) -> dict[str, GoodputSnapshot]:
        """Return a frozen copy, by objective."""
        return {
            objective: GoodputSnapshot(
                {result.value: count for result, count in results.items()},
                self._good_tokens.get(objective, 0),
            )
            for objective, results in self._results.items()
        }


def _result(lease: Lease, settled: Settled) -> Result:
    if not settled.is_success:
        return Result.FAILED
    due_ns = lease.request.ttft_slo_ns
    if due_ns is None or settled.ttft_ns is None:
        return Result.GOOD
    first_ns = lease.dispatched_ns - lease.arrived_ns + settled.ttft_ns
    return Result.GOOD if first_ns <= due_ns else Result.LATE

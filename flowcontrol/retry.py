"""Pure. When should a refused client come back?

A full queue gets room at the rate at which it is drained, so the first client refused is told
1/rate: the contract of llm-d-router#2487. But refusals come in crowds, and room for one is not room
for all: were everybody told 1/rate, everybody would return at the same moment and all but one would
be refused again. So every refusal here takes the next free place in a schedule that advances 1/rate
a place (the virtual scheduling form of the leaky bucket, ITU-T I.371), and returning clients come
at the rate the queue can take them. Kubernetes' API priority and fairness reaches for the same by
counting dropped requests.
"""

from typing import final

_SECOND_NS = 1_000_000_000
_FOLD_WEIGHT = 0.3
"""Share of the latest second in the average: after 6 s of silence an eighth is left."""
_RATE_MIN = 0.001
"""Dispatches a second below which it is silence: some 20 s after the last, or 40 s after many."""


@final
class DrainRate:
    """How fast waiting work leaves one scope by dispatch, and what that promises to the refused.

    An exponentially weighted average folded once a second of passed time; a busy second under way
    may raise it before it is folded.
    """

    __slots__ = ("_average", "_count", "_promised_ns", "_window_from_ns")

    def __init__(self, now_ns: int) -> None:
        self._average = 0.0
        self._count = 0
        self._window_from_ns = now_ns
        self._promised_ns = now_ns

    def dispatched(self, now_ns: int) -> None:
        """Count one request that left the queue to be served."""
        self._fold(now_ns)
        self._count += 1

    def per_second(self, now_ns: int) -> float:
        """Return the dispatches per second, 0.0 when none was seen lately."""
        self._fold(now_ns)
        return max(self._average, self._count)

    def promise(self, now_ns: int, most_ns: int) -> int | None:
        """Take the next place in the schedule of returns; the time until then, None when unknown.

        Never longer than `most_ns`: beyond it the schedule stands still and clients share its end.
        """
        rate = self.per_second(now_ns)
        if rate <= 0:
            return None
        promised_ns = max(self._promised_ns, now_ns) + round(_SECOND_NS / rate)
        self._promised_ns = min(promised_ns, now_ns + most_ns)
        return self._promised_ns - now_ns

    def _fold(self, now_ns: int) -> None:
        windows = (now_ns - self._window_from_ns) // _SECOND_NS
        if windows <= 0:
            return
        self._average += _FOLD_WEIGHT * (self._count - self._average)
        self._average *= (1 - _FOLD_WEIGHT) ** (windows - 1)
        if self._average < _RATE_MIN:
            self._average = 0.0
        self._count = 0
        self._window_from_ns += windows * _SECOND_NS

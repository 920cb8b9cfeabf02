"""Pure. Two estimators of queueing delay: both for `adaptive`, the second also for `blind`.

Both measure by how much a cohort exceeds the least time ever seen. A slower model or longer answers
make the least outdated, so it grows a little with each cohort, and can be learnt again.
"""

from bisect import insort
from math import log2
from typing import Protocol, final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease


class Evidence(Protocol):
    """Estimates how long the requests of a cohort waited inside the engines."""

    few: float
    aim: float
    many: float
    """Shares of the requests in flight that wait inside: too few, right, and too many."""
    cohort: int
    """Least number of requests in a cohort."""
    cohort_first: int
    """The same, before the first fall of the limit."""

    def begin(self) -> None:
        """Start a cohort; what was learnt from earlier ones stays."""

    def released(self, in_flight_ns: int) -> bool:
        """Take in that a request of the cohort has left; return whether it is now fully known."""

    def is_enough(self, over: int, wanted: int, full_ns: int) -> bool:
        """Whether the cohort can be judged.

        Args:
            over: requests of it that are known.
            wanted: requests it must have.
            full_ns: how long ago it reached that number; 0: it has not.
        """

    def settled(self, lease: Lease, settled: Settled, *, is_member: bool) -> None:
        """Take in what one request actually used."""

    def wait_ns(self) -> float | None:
        """Return the mean wait of the cohort, in ns; None: unknown."""

    def relearn(self) -> None:
        """Assume that the latest requests did not wait."""


@final
class FirstTokens:
    """From settlements: times to first token beyond the least for the length of the prompt.

    For a length without a least time, others bound it: a longer prompt takes at least as long, and
    a shorter one at least in proportion. Cached tokens do not count for the length of a prompt.
    """

    few = 0.045
    aim = 0.08
    many = 0.115
    cohort = 16
    cohort_first = 8
    _MOST = 0.75
    """Part of the cohort that must be known: to wait for the last would take too long."""
    _FADING = 1.002
    """Growth of the least with each cohort."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}
        """By class of length; each class is longer by a factor of 1.4 than the one before."""
        self._waits: list[float] = []

    def begin(self) -> None:
        """Let the least grow a little."""
        self._waits = []
        for length in self._least:
            self._least[length] *= self._FADING

    def released(self, in_flight_ns: int) -> bool:  # noqa: ARG002 - known when it is settled
        """Return False: only its settlement counts."""
        return False

    def is_enough(self, over: int, wanted: int, full_ns: int) -> bool:  # noqa: ARG002 - the others'
        """Whether most of the cohort are known."""
        return over >= self._MOST * wanted

    def settled(self, lease: Lease, settled: Settled, *, is_member: bool) -> None:
        """Take in a time to first token."""
        if settled.ttft_ns is None or not settled.is_success:
            return
        prompt = settled.input_tokens
        prompt = round(lease.tokens.input) if prompt is None else prompt
        prompt -= settled.cached_tokens or 0
        length = round(2 * log2(max(1, prompt)))
        least = self._least
        least[length] = min(settled.ttft_ns, least.get(length, settled.ttft_ns))
        if is_member:
            floor_ns = min(
                ttft_ns * max(1.0, 2 ** ((length - other) / 2)) for other, ttft_ns in least.items()
            )
            self._waits.append(settled.ttft_ns - floor_ns)

    def wait_ns(self) -> float | None:
        """Return the mean time beyond the least."""
        return sum(self._waits) / len(self._waits) if self._waits else None

    def relearn(self) -> None:
        """Forget every least."""
        self._least.clear()


@final
class Residences:
    """From departures alone: how long the shortest requests of a cohort were in flight."""

    few = 0.05
    aim = 0.08
    many = 0.13
    cohort = 64
    cohort_first = 64
    _SHORTEST = 0.15
    _FADING = 1.001

    def __init__(self) -> None:
        self.least_ns: float | None = None
        """How long the shortest requests of any cohort were in flight."""
        self._residences: list[int] = []

    def begin(self) -> None:
        """Let the least grow a little."""
        self._residences = []
        if self.least_ns is not None:
            self.least_ns *= self._FADING

    def released(self, in_flight_ns: int) -> bool:
        """Take in how long it was in flight."""
        insort(self._residences, in_flight_ns)
        return True

    def is_enough(self, over: int, wanted: int, full_ns: int) -> bool:
        """Whether the requests still in flight can no longer be among the shortest."""
        return over > self._SHORTEST * wanted and full_ns >= self._shortest()

    def settled(self, lease: Lease, settled: Settled, *, is_member: bool) -> None:
        """Ignored: departures alone are counted."""

    def wait_ns(self) -> float:
        """Return by how much the shortest times exceed the least."""
        shortest = self._shortest()
        self.least_ns = shortest if self.least_ns is None else min(self.least_ns, shortest)
        return shortest - self.least_ns

    def relearn(self) -> None:
        """Take the shortest times of this cohort as the least."""
        self.least_ns = self._shortest()

    def _shortest(self) -> float:
        place = int(self._SHORTEST * self.cohort)
        return float(self._residences[min(place, len(self._residences) - 1)])

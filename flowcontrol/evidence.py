"""Pure. Two estimators of queueing delay, used by `adaptive`, the second by `blind`, too.

Both judge a cohort by what exceeds the least ever seen. The least may become outdated, by a slower
model or longer answers, so it grows a little with each cohort, and can be learnt again.
"""

from bisect import insort
from math import log2
from typing import Protocol, final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease


class Evidence(Protocol):
    """How long the requests of a cohort waited inside the engines."""

    few: float
    aim: float
    many: float
    """Shares of those in flight that wait inside: below, at, and above what is wanted."""
    cohort: int
    """Requests in a window, at least."""
    cohort_first: int
    """The same, as long as the limit has never fallen."""

    def begin(self) -> None:
        """Forget the cohort before, not what was learnt from it."""

    def released(self, in_flight_ns: int) -> bool:
        """Take in that one of the cohort has left; whether all that matters of it is known now."""

    def is_enough(self, over: int, wanted: int, full_ns: int) -> bool:
        """Whether the cohort can be judged.

        Args:
            over: how many of it are known.
            wanted: how many there must be in it.
            full_ns: for how long as many as that have been.
        """

    def settled(self, lease: Lease, settled: Settled, *, is_member: bool) -> None:
        """Take in what one really took."""

    def wait_ns(self) -> float | None:
        """Return the mean wait of the cohort, None when nothing is known of it."""

    def learn_anew(self) -> None:
        """Assume that the requests seen so far did not wait."""


@final
class FirstTokens:
    """From settlements: times to first token, against the least by length of prompt.

    What a length has never shown is taken from others: a longer prompt takes no less, and a shorter
    one, in proportion, no less either. A prompt is as long as what of it was in no cache.
    """

    few = 0.045
    aim = 0.08
    many = 0.115
    cohort = 16
    cohort_first = 8
    _MOST = 0.75
    """Part of the cohort that must be known: the last would be waited for too long."""
    _FADING = 1.002
    """How the least grows with each cohort."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}
        """By length of the prompt, each a factor of 1.4 longer than the one before."""
        self._waits: list[float] = []

    def begin(self) -> None:
        """Let the least grow a little."""
        self._waits = []
        for length in self._least:
            self._least[length] *= self._FADING

    def released(self, in_flight_ns: int) -> bool:  # noqa: ARG002 - known when it is settled
        """Wait for its settlement."""
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
        """Return the mean of what exceeded the least."""
        return sum(self._waits) / len(self._waits) if self._waits else None

    def learn_anew(self) -> None:
        """Forget every least."""
        self._least.clear()


@final
class Residences:
    """From departures alone: how long the shortest of a cohort were in flight."""

    few = 0.05
    aim = 0.08
    many = 0.13
    cohort = 64
    cohort_first = 64
    _SHORTEST = 0.15
    _FADING = 1.001

    def __init__(self) -> None:
        self.least_ns: float | None = None
        """How long the shortest of any cohort were in flight."""
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
        """Whether those that are not over can no longer be among the shortest."""
        return over > self._SHORTEST * wanted and full_ns >= self._shortest()

    def settled(self, lease: Lease, settled: Settled, *, is_member: bool) -> None:
        """Ignored: departures alone are counted."""

    def wait_ns(self) -> float:
        """Return by how much the shortest exceeded the least."""
        shortest = self._shortest()
        self.least_ns = shortest if self.least_ns is None else min(self.least_ns, shortest)
        return shortest - self.least_ns

    def learn_anew(self) -> None:
        """Take the shortest of this cohort for the least."""
        self.least_ns = self._shortest()

    def _shortest(self) -> float:
        place = int(self._SHORTEST * self.cohort)
        return float(self._residences[min(place, len(self._residences) - 1)])

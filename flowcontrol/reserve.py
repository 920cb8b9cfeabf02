"""Pure. How much of the pool must a lower band leave free, so that higher bands find a place?

A person who arrives when every place is taken waits for the next departure. So a lower band is
dispatched only while more than k places stay free, and k is chosen such that an arrival of the
higher bands finds no place with at most the probability p of their `wait_target`.

While requests of lower bands wait, at most k places are free: a departure that frees one more lets
one of them in. Higher bands take places at a rate a, departures give places back at a rate d. So k
minus the free places is a random walk with drift a - d that does not go below 0, and an arrival
waits if the walk has reached k. By Lundberg's inequality, in the steady state,

    P(walk >= k) <= exp(-t k)       where t > 0 solves   (a / b) (exp(t b) - 1) = d (1 - exp(-t))

for arrivals in batches of b that come at random, and departures at random (Asmussen and Albrecher,
Ruin Probabilities, 2010; for b = 1 it is exact: t = log(d / a), the queue M/M/1). So

    k = log(1 / p) / t

The burstiness b of arrivals is measured. The variance of their number in a second over its mean is
1 if they arrive independently of each other, and b if they arrive in batches of b. It is measured
over one second and over eight; the larger counts. Rates are means over about a minute. The rate d
is that of a full pool: by Little's law, the present departures over how full the pool is.

A place is what a request of the higher bands adds to the load of the pool on average: a slot, or
its tokens. At most a quarter of the pool is held back, also if a and d are so close that the walk
has no drift: people who fill more than that go before the job anyway.

A free place is not enough for a short wait: `reading` limits how busy its engine is with prompts.

What it does not see: a request that may go to some endpoints only is less sure to find a place. And
the first burst of its kind arrives before it was measured.
"""

from collections.abc import Sequence
from math import exp, expm1, log, log1p
from typing import Final, final

from flowcontrol.config import ControllerConfig
from flowcontrol.memory import BandNeed, CountsMemory, ReserveMemory

_SECOND_NS: Final = 1_000_000_000
_MEMORY: Final = 64.0
"""Seconds over which rates are means."""
_SCALES: Final = (1, 8)
"""Widths of the bins in which arrivals are counted to measure burstiness, in seconds."""
_KEPT_MOST: Final = 0.25
"""Largest part held back, of what the highest band may fill."""
_RENEW_NS: Final = 250_000_000
_LOAD_MEMORY: Final = 64.0
_SELDOM: Final = 0.5
"""Fewer arrivals within `_MEMORY`, and none is expected."""
_BATCH_MOST: Final = 256.0


@final
class EventCounts:
    """Counts events: their rate, and their burstiness. O(1) amortised."""

    __slots__ = ("_bins", "_means", "_next_ns", "_now", "_passed", "_squares")

    def __init__(self, now_ns: int) -> None:
        self._begin(now_ns)

    def _begin(self, now_ns: int) -> None:
        self._next_ns = now_ns + _SECOND_NS
        self._now = [0.0 for _ in _SCALES]
        """Events in the bin under way, of each width."""
        self._passed = 0
        """Seconds that have passed."""
        self._bins = [0.0 for _ in _SCALES]
        """Bins that the means are over, at most those within `_MEMORY`."""
        self._means = [0.0 for _ in _SCALES]
        self._squares = [0.0 for _ in _SCALES]

    def count(self, now_ns: int) -> None:
        """Take in one event."""
        self.advance(now_ns)
        for index in range(len(_SCALES)):
            self._now[index] += 1.0

    def advance(self, now_ns: int) -> None:
        """Close the bins that are over; after a long silence forget everything."""
        if now_ns - self._next_ns > 8 * _MEMORY * _SECOND_NS:
            self._begin(now_ns)
            return
        while self._next_ns <= now_ns:
            self._next_ns += _SECOND_NS
            self._passed += 1
            for index, seconds in enumerate(_SCALES):
                if self._passed % seconds == 0:
                    self._close(index, seconds)

    def _close(self, index: int, seconds: int) -> None:
        number, self._now[index] = self._now[index], 0.0
        bins = self._bins[index] = min(self._bins[index] + 1.0, _MEMORY / seconds)
        self._means[index] += (number - self._means[index]) / bins
        self._squares[index] += (number * number - self._squares[index]) / bins

    def remember(self, now_ns: int) -> CountsMemory:
        """Return what was counted, without changing it: a replay does not ask at the same times."""
        copy = EventCounts(now_ns)
        copy._next_ns, copy._now, copy._passed = self._next_ns, list(self._now), self._passed
        copy._bins, copy._means = list(self._bins), list(self._means)
        copy._squares = list(self._squares)
        copy.advance(now_ns)
        return CountsMemory(tuple(copy._bins), tuple(copy._means), tuple(copy._squares))

    def resume(self, memory: CountsMemory, now_ns: int) -> None:
        """Go on with what was counted before, if in bins of these widths."""
        self._begin(now_ns)
        counted = (memory.bins, memory.means, memory.squares)
        if {len(each) for each in counted} == {len(_SCALES)}:
            self._bins, self._means, self._squares = [list(each) for each in counted]

    @property
    def per_second(self) -> float:
        """Mean rate, per second."""
        return self._means[0]

    @property
    def batch(self) -> float:
        """Variance over mean of the counts, at least 1: the batch size that would explain it."""
        batch = 1.0
        for index, mean in enumerate(self._means):
            if mean > 0 and self._bins[index] > 1:
                batch = max(batch, (self._squares[index] - mean * mean) / mean)
        return min(batch, _BATCH_MOST)


@final
class Reserve:
    """Learns what each band needs free, and the saturation at which each lower band is gated.

    O(bands) for each arrival and every quarter of a second, else O(1).
    """

    def __init__(self, now_ns: int) -> None:
        self.ceilings: list[float] = []
        """Ceiling of each band, highest first, as of the last renewal."""
        self._priorities: Sequence[int] = ()
        self._targets: list[float] = []
        self._above: dict[int, EventCounts] = {}
        """By priority: arrivals of that band and all above it."""
        self._departures = EventCounts(now_ns)
        self._loads: dict[int, float] = {}
        """By priority: what one request adds to the saturation of the pool, on average."""
        self._fullness = 0.0
        self._renewed_ns: int | None = None

    def set_bands(self, priorities: Sequence[int], config: ControllerConfig, now_ns: int) -> None:
        """Replace the bands, or their settings."""
        self._priorities = priorities
        self._targets = [config.settings_for(each).wait_target for each in priorities]
        self._above = {each: self._above.get(each) or EventCounts(now_ns) for each in priorities}
        self._loads = {each: self._loads.get(each, 0.0) for each in priorities}
        self.ceilings = [1.0] * len(priorities)
        self._renewed_ns = None

    def remember(self, now_ns: int) -> ReserveMemory | None:
        """Return what was learnt; None: nothing yet. O(bands)."""
        if not self._fullness:
            return None
        bands = [
            BandNeed(priority, counts.remember(now_ns), self._loads[priority])
            for priority, counts in self._above.items()
        ]
        return ReserveMemory(tuple(bands), self._departures.remember(now_ns), self._fullness)

    def restore(self, memory: ReserveMemory, now_ns: int) -> None:
        """Go on with what was learnt before, for bands that exist. O(bands)."""
        for band in memory.bands:
            counts = self._above.get(band.priority)
            if counts is not None:
                counts.resume(band.arrivals, now_ns)
                self._loads[band.priority] = band.load
        self._departures.resume(memory.departures, now_ns)
        self._fullness = memory.fullness

    def is_lower(self, rank: int) -> bool:
        """Whether a band must leave places free for those above it."""
        return self.ceilings[rank] < self.ceilings[0]

    def arrived(self, priority: int, now_ns: int) -> None:
        """Count an arrival for its band and those below it."""
        for each, counts in self._above.items():
            if each <= priority:
                counts.count(now_ns)

    def sent(self, priority: int, load: float) -> None:
        """Learn what a dispatch added to the saturation of the pool."""
        before = self._loads.get(priority)
        if before is not None and load > 0:
            self._loads[priority] = before + (load - before) / (_LOAD_MEMORY if before else 1.0)

    def left(self, now_ns: int) -> None:
        """Count a departure."""
        self._departures.count(now_ns)

    def renew(self, saturation: float, high: float, now_ns: int) -> None:
        """Compute the ceilings, at most every quarter of a second.

        Args:
            saturation: of the pool, now.
            high: ceiling of the highest band.
            now_ns: the time.
        """
        if self._renewed_ns is not None and now_ns - self._renewed_ns < _RENEW_NS:
            return
        passed_s = (now_ns - self._renewed_ns) / _SECOND_NS if self._renewed_ns is not None else 1.0
        self._renewed_ns = now_ns
        part = min(1.0, passed_s / _MEMORY) if self._fullness else 1.0
        self._fullness += (min(saturation, 1.0) - self._fullness) * part
        self._departures.advance(now_ns)
        departures = self._departures.per_second / max(self._fullness, 0.01)
        kept = 0.0
        for rank, priority in enumerate(self._priorities):
            load = self._loads[priority]
            self.ceilings[rank] = high - min(kept + load, _KEPT_MOST * high) if kept else high
            counts = self._above[priority]
            counts.advance(now_ns)
            free = places(counts.per_second, counts.batch, departures, self._targets[rank])
            kept = max(kept, free * load)


def places(arrivals: float, batch: float, departures: float, target: float) -> float:
    """Return how many places must be free so that an arrival finds none with that probability.

    Args:
        arrivals: per second.
        batch: size of the batches they come in, at least 1.
        departures: per second, of a full pool.
        target: the probability, above 0, at most 1.
    """
    if target >= 1 or arrivals * _MEMORY < _SELDOM:
        return 0.0
    if arrivals >= departures:
        return 1e9
    return log(1 / target) / _exponent(arrivals, batch, departures)


def _exponent(arrivals: float, batch: float, departures: float) -> float:
    """Solve for the exponent by bisection. The walk drifts down, so there is one above 0.

    Upper bounds are the exponent for single arrivals, and the point where the left side alone
    reaches `departures`: up to there the exponential is finite, however large the batch.
    """
    most = log1p(departures / arrivals * batch) / batch
    low, high = 0.0, min(log(departures / arrivals), most)
    for _ in range(40):
        middle = (low + high) / 2
        if arrivals / batch * expm1(middle * batch) < departures * (1 - exp(-middle)):
            low = middle
        else:
            high = middle
    return (low + high) / 2

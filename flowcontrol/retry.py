"""Pure. How fast does a queue drain, and when should a refused client come back?

The drain rate of a scope is the number of dispatches over the time in which something waited there.
Both fade alike. A ratio of two exponentially weighted sums is unbiased from the start, unlike an
average that begins at zero. Time in which nothing waits does not count, nor do dispatches in that
time: a burst that finds free slots has drained nothing, and a quiet hour is not a slow one. So an
old rate is kept until the scope is busy again, and then soon outweighed. Compared with an average
over every second, this halves the median error of the waits predicted from it.

A few dispatches at one moment are no rate: n of them count as seen in at least 1/n s, one in 1 s.

Until a request that waited was dispatched, the rate is unknown. Retry-After then goes by requests
dispatched without waiting. That is better than nothing, and all there is where nothing may wait.

A full queue gets room at its drain rate, so the first refused client gets 1/rate: the contract of
llm-d-router#2487. But refusals come in crowds. If each got 1/rate, all would return at the same
moment, and all but one would be refused again. So every refusal takes the next free place in a
schedule that advances by 1/rate per place (the virtual scheduling form of the leaky bucket, ITU-T
I.371), and clients return at the rate at which the queue can take them. Kubernetes' API priority
and fairness has the same aim, and counts dropped requests. The value sent to a client is then
spread at random (`retry_after_s`).
"""

from collections.abc import Iterable
from math import ceil, exp
from typing import Final, final

from flowcontrol.config import RETRY_AFTER_MAX_NS
from flowcontrol.memory import Drain

_SECOND_NS: Final = 1_000_000_000
_RETRY_AFTER_MAX_S: Final = RETRY_AFTER_MAX_NS // _SECOND_NS
_SPREAD: Final = 0.25
"""Largest random addition to a client's wait, as a part of it."""
_FADED: Final = exp(-1 / 15)
"""Part of both sums that is left after a second; after 15 it is 1/e: long enough to see slow pools,
and short compared with most waits. The last second counts in full."""
_COUNT_MIN: Final = 0.01
"""With fewer faded dispatches the rate is 0: some 70 s after one, twice that after a hundred."""


@final
class DrainRate:
    """The drain rate of one scope, and the schedule of clients it refused. O(1)."""

    __slots__ = (
        "_at_ns",
        "_began_ns",
        "_count",
        "_is_busy",
        "_is_known",
        "_left_ns",
        "_promised_ns",
        "_time_ns",
    )

    def __init__(self, now_ns: int) -> None:
        self._count = 0.0
        """Dispatches, faded."""
        self._time_ns = 0.0
        """The time in which they were seen, faded alike."""
        self._at_ns = now_ns
        """The time up to which both are counted."""
        self._is_busy = False
        """Whether something waits."""
        self._began_ns = now_ns
        """Since when something waits."""
        self._is_known = False
        """Whether a request that waited was dispatched; until then every dispatch counts."""
        self._left_ns = 0
        """Rest of less than a second that was not faded when the scope became idle."""
        self._promised_ns = now_ns

    def began(self, now_ns: int) -> None:
        """Note that something waits from now on."""
        self._is_busy = True
        self._began_ns = now_ns
        if self._is_known:
            self._at_ns = now_ns - self._left_ns

    def dispatched(self, now_ns: int) -> None:
        """Count a dispatch."""
        if self._is_busy and not self._is_known:
            self._is_known = True
            self._count = 0.0
            self._time_ns = float(now_ns - self._began_ns)
            self._at_ns = now_ns
        if now_ns - self._at_ns >= _SECOND_NS:
            self._pass(now_ns)
        if self._is_busy or not self._is_known:
            self._count += 1.0

    def ended(self, now_ns: int) -> None:
        """Note that nothing waits any more; called after the last dispatch."""
        if self._is_known:
            self._pass(now_ns)
            self._left_ns = now_ns - self._at_ns
        self._is_busy = False

    def per_second(self, now_ns: int) -> float:
        """Return dispatches per second; 0.0: none lately of requests that waited."""
        return self._rate(now_ns) if self._is_known else 0.0

    def per_second_of(self, usual: float, now_ns: int) -> float:
        """Return the rate as if one more dispatch had been seen, at the usual rate.

        This steadies the rate of a scope where waits are few and short.

        Args:
            usual: dispatches per second of a wider scope; 0.0: unknown.
            now_ns: the time.
        """
        known = self.per_second(now_ns)
        if known <= 0 or usual <= 0:
            return known
        count, time_ns = self._seen(now_ns)
        return (count + 1) * _SECOND_NS / (time_ns + _SECOND_NS / usual)

    def busy_ns(self, now_ns: int) -> int:
        """Return how long something has been waiting; 0: nothing is."""
        return now_ns - self._began_ns if self._is_busy else 0

    def promise(self, now_ns: int, most_ns: int) -> int | None:
        """Take the next place in the schedule; return the time until then, None if unknown.

        At most `most_ns`: there the schedule stands still, and clients share its last place.
        """
        rate = self._rate(now_ns)
        if rate <= 0:
            return None
        promised_ns = max(self._promised_ns, now_ns) + round(_SECOND_NS / rate)
        self._promised_ns = min(promised_ns, now_ns + most_ns)
        return self._promised_ns - now_ns

    def remember(self, now_ns: int) -> Drain | None:
        """Return what is known of the rate; None: nothing."""
        if not self._is_known:
            return None
        count, time_ns = self._seen(now_ns)
        return Drain(count, time_ns)

    def restore(self, drain: Drain, now_ns: int) -> None:
        """Go on with what was known before, unless something is known already."""
        if not self._is_known:
            self._is_known = True
            self._count, self._time_ns, self._at_ns = drain.requests, drain.time_ns, now_ns

    def _rate(self, now_ns: int) -> float:
        """Return the rate, without changing anything: a replay does not ask at the same times."""
        count, time_ns = self._seen(now_ns)
        if count < _COUNT_MIN:
            return 0.0
        least = count if self._is_known and count > 1 else 1.0
        return count * _SECOND_NS / max(time_ns, _SECOND_NS / least)

    def _seen(self, now_ns: int) -> tuple[float, float]:
        """Return dispatches and the time in which they were seen, up to now."""
        count, time_ns, at_ns = self._faded(now_ns)
        is_running = self._is_busy or not self._is_known
        return count, time_ns + (now_ns - at_ns if is_running else self._left_ns)

    def _pass(self, now_ns: int) -> None:
        self._count, self._time_ns, self._at_ns = self._faded(now_ns)

    def _faded(self, now_ns: int) -> tuple[float, float, int]:
        """Return both sums, faded by whole seconds while time counts, and up to when they count."""
        seconds = (now_ns - self._at_ns) // _SECOND_NS
        if seconds <= 0 or (self._is_known and not self._is_busy):
            return self._count, self._time_ns, self._at_ns
        faded = _FADED**seconds
        # Each of these seconds fades by those after it and by itself, like what is counted in it.
        time_ns = self._time_ns * faded + _SECOND_NS * _FADED * (1 - faded) / (1 - _FADED)
        return self._count * faded, time_ns, self._at_ns + seconds * _SECOND_NS


def retry_after_s(expected_ns: int | None, chance: float) -> int | None:
    """Return whole seconds to wait before trying again, at least one; None: unknown.

    Without the header the official clients try three times within two seconds, and give up. The
    wait is spread upwards at random, by a quarter or what the cap leaves of it, and rounded up. So
    no client returns before its place, except where the cap cuts that off.

    Args:
        expected_ns: the time until the client's place in the schedule.
        chance: random, from 0 to 1; it differs between clients, so that a crowd spreads out.
    """
    if expected_ns is None:
        return None
    if expected_ns < _SECOND_NS:
        return 1
    if expected_ns >= RETRY_AFTER_MAX_NS:
        return _RETRY_AFTER_MAX_S
    seconds = expected_ns / _SECOND_NS
    spread = min(seconds * _SPREAD, _RETRY_AFTER_MAX_S - seconds)
    return min(ceil(seconds + spread * chance), _RETRY_AFTER_MAX_S)  # the sum is rounded


def latest_promise(rates: Iterable[DrainRate], now_ns: int, most_ns: int) -> int | None:
    """Take a place in each schedule; return the time until the latest, None if unknown."""
    promises = [rate.promise(now_ns, most_ns) for rate in rates]
    return max((each for each in promises if each is not None), default=None)

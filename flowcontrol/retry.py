"""Pure. How fast does a queue drain, and when should a refused client come back?

The rate of a scope is what left it by dispatch over the time in which something waited there, both
fading alike (a ratio of two exponentially weighted sums, so that it is unbiased from the first
moment on, unlike an average that begins at zero). Time in which nothing waits does not count, and
neither does what is dispatched then: a burst that finds free slots has drained nothing, and a quiet
hour is no slow one. So an old rate is kept until the scope is busy again, and then soon outweighed.
Against an average over every second, this halves the median error of the waits predicted from it.

Some that go at one moment are no rate yet: n of them count as seen in 1/n s at least, one in 1 s.

Until something that waited was dispatched, the rate is not known. Retry-After then goes by what
was dispatched without waiting: better than nothing, and all there is where nothing may wait.

A full queue gets room at the rate at which it is drained, so the first client refused gets 1/rate:
the contract of llm-d-router#2487. But refusals come in crowds, and room for one is not room for
all: if all were sent away for 1/rate, all would return at the same moment and all but one would be
refused again. So every refusal here takes the next free place in a schedule that advances 1/rate a
place (the virtual scheduling form of the leaky bucket, ITU-T I.371), and returning clients come at
the rate the queue can take them. Kubernetes' API priority and fairness reaches for the same by
counting dropped requests. What a client is sent is then spread by chance (`retry_after_s`).
"""

from collections.abc import Iterable
from math import ceil, exp
from typing import Final, final

from flowcontrol.config import RETRY_AFTER_MAX_NS
from flowcontrol.memory import Drain

_SECOND_NS: Final = 1_000_000_000
_RETRY_AFTER_MAX_S: Final = RETRY_AFTER_MAX_NS // _SECOND_NS
_SPREAD: Final = 0.25
"""How much later than its place a client may be sent for, as a part of its wait."""
_FADED: Final = exp(-1 / 15)
"""What is left of both after a second; after 15 it is 1/e. Long enough to see slow pools, short
beside most waits. What happened within the last second counts in full."""
_COUNT_MIN: Final = 0.01
"""Faded dispatches below which it is silence: some 70 s after one, twice that after a hundred."""


@final
class DrainRate:
    """How fast waiting work leaves one scope by dispatch, and what that promises to the refused."""

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
        """The time they were seen in, faded alike."""
        self._at_ns = now_ns
        """Until when both are counted."""
        self._is_busy = False
        """Whether something waits."""
        self._began_ns = now_ns
        """Since when, if it does."""
        self._is_known = False
        """Whether something that waited was dispatched; until then everything counts."""
        self._left_ns = 0
        """Time below a second that was not faded yet when nothing waited any more."""
        self._promised_ns = now_ns

    def began(self, now_ns: int) -> None:
        """Notice that something waits from now on."""
        self._is_busy = True
        self._began_ns = now_ns
        if self._is_known:
            self._at_ns = now_ns - self._left_ns

    def dispatched(self, now_ns: int) -> None:
        """Count one request that left to be served."""
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
        """Notice that nothing waits any more; after the last dispatch."""
        if self._is_known:
            self._pass(now_ns)
            self._left_ns = now_ns - self._at_ns
        self._is_busy = False

    def per_second(self, now_ns: int) -> float:
        """Return the dispatches per second, 0.0 when none was seen lately of what waited."""
        return self._rate(now_ns) if self._is_known else 0.0

    def per_second_of(self, usual: float, now_ns: int) -> float:
        """Return the same, where little was seen yet: as if one dispatch at a usual rate had been.

        So few and short waits are not taken for a whole second of waiting.

        Args:
            usual: dispatches per second, of a wider scope; 0.0 when unknown.
            now_ns: the time.
        """
        known = self.per_second(now_ns)
        if known <= 0 or usual <= 0:
            return known
        count, time_ns = self._seen(now_ns)
        return (count + 1) * _SECOND_NS / (time_ns + _SECOND_NS / usual)

    def busy_ns(self, now_ns: int) -> int:
        """Return for how long something has been waiting, 0 where nothing is."""
        return now_ns - self._began_ns if self._is_busy else 0

    def promise(self, now_ns: int, most_ns: int) -> int | None:
        """Take the next place in the schedule of returns; the time until then, None when unknown.

        Never longer than `most_ns`: beyond it the schedule stands still and clients share its end.
        """
        rate = self._rate(now_ns)
        if rate <= 0:
            return None
        promised_ns = max(self._promised_ns, now_ns) + round(_SECOND_NS / rate)
        self._promised_ns = min(promised_ns, now_ns + most_ns)
        return self._promised_ns - now_ns

    def remember(self, now_ns: int) -> Drain | None:
        """Return what is known of the rate; None if nothing is."""
        if not self._is_known:
            return None
        count, time_ns = self._seen(now_ns)
        return Drain(count, time_ns)

    def restore(self, drain: Drain, now_ns: int) -> None:
        """Go on with what was known, unless something is known already."""
        if not self._is_known:
            self._is_known = True
            self._count, self._time_ns, self._at_ns = drain.requests, drain.time_ns, now_ns

    def _rate(self, now_ns: int) -> float:
        """Return the rate; to ask changes nothing, not even by rounding: replay asks less often."""
        count, time_ns = self._seen(now_ns)
        if count < _COUNT_MIN:
            return 0.0
        least = count if self._is_known and count > 1 else 1.0
        return count * _SECOND_NS / max(time_ns, _SECOND_NS / least)

    def _seen(self, now_ns: int) -> tuple[float, float]:
        """Return dispatches and the time they were seen in, up to the present."""
        count, time_ns, at_ns = self._faded(now_ns)
        is_running = self._is_busy or not self._is_known
        return count, time_ns + (now_ns - at_ns if is_running else self._left_ns)

    def _pass(self, now_ns: int) -> None:
        self._count, self._time_ns, self._at_ns = self._faded(now_ns)

    def _faded(self, now_ns: int) -> tuple[float, float, int]:
        """Return both, faded by whole seconds if time counts, and until when they are counted."""
        seconds = (now_ns - self._at_ns) // _SECOND_NS
        if seconds <= 0 or (self._is_known and not self._is_busy):
            return self._count, self._time_ns, self._at_ns
        faded = _FADED**seconds
        # Each of these seconds fades by those after it and by itself, like what is counted in it.
        time_ns = self._time_ns * faded + _SECOND_NS * _FADED * (1 - faded) / (1 - _FADED)
        return self._count * faded, time_ns, self._at_ns + seconds * _SECOND_NS


def retry_after_s(expected_ns: int | None, chance: float) -> int | None:
    """Return whole seconds to wait before trying again, at least one; None when unknown.

    Without the header the official clients try three times within two seconds, and give up.
    Rounded up and spread upwards, by a quarter or what the cap leaves of it: no client is sent
    back before its place, but for what the cap cuts off.

    Args:
        expected_ns: the client's place in the schedule.
        chance: from 0 to 1, differs from client to client so that a crowd comes back as none.
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
    """Take a place in the schedule of each, and return the time until the last; None if unknown."""
    promises = [rate.promise(now_ns, most_ns) for rate in rates]
    return max((each for each in promises if each is not None), default=None)

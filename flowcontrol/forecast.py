"""Pure. How long will it still wait?

Drain rates say how fast queues empty (`retry`); how much stands ahead says how long that takes. For
a request with `ahead` requests before it in its own band and `above` in higher ones,

    max( (ahead + 1) / (rate of its band (1 - o)), (above + ahead + 1) / rate of all bands )

The first term knows what arrivals above cost the band, the second also covers a band that was not
served lately: until a request has waited there for longer than it says, unserved. Then nothing is
known, for the band may be gated. The part o of the band's rate goes to requests that come later and
go before: with a fair policy, those of flows with less of a backlog. What stands ahead is served
while more of it comes, which takes longer by 1 / (1 - o), as for a lower class behind a higher one
(Cobham, 1954).

How many stand ahead in its band depends on whose turn it is. A fair policy gives the other flows so
many turns x before it (`FairnessPolicy.turns`), of which a flow with n waiting uses min(n, x). That
sum over all flows is the number of waiting requests with fewer than x of their own flow before
them; `backlogs` counts them by that place, in classes. The error is less than what is in the one
class that x falls into. The same classes tell o: of the last some hundred requests that came, those
at a place below the turns that remain, over what was dispatched meanwhile. Remaining are half of x
on average, and less is counted, because arrivals of its own flow stand near x. With a third,
medians of predicted over realised waits are 0.9 to 1.25, and half of all lie within a third of 1
for weighted tokens and round robin (tests: test_forecast); exact to 10 % for a single line.

That is the raw wait. What is said is an interval: the wait that half of all stay within, and the
one that nine in ten do. How far they lie from the raw one is learnt from every wait that comes
true, for each band, as a quantile of log(real / raw) by stochastic approximation (Robbins and
Monro, 1951): up by a share p of the step for each wait beyond it, down by 1 - p for each within, so
that in the long run the share within is p whatever the distribution is, and whatever is wrong with
the formula. An evicted request waited longer than was said, if that is what it had waited already;
else it says nothing. Before anything came true nine in ten are said to stay within twice the raw
wait. What it cannot know is what has not come true yet: of a job that is dropped in one piece all
waits are forecast before the first is over.

A forecast costs as much as the rest of an admission, and most are never looked at. So one is
computed when it is asked for, and at admission only for a sample to learn from: the first 64 waits
of a band, then one in eight. A time between two samples was rejected: of a burst it would take the
first request only, whose wait is the shortest.
"""

from bisect import bisect_left
from math import exp, log
from typing import Final, NamedTuple, final

from flowcontrol.retry import DrainRate

_SECOND_NS: Final = 1_000_000_000
_SHORT_NS: Final = 50_000_000
"""Below it a wait is as good as none: ratios of such waits mean nothing."""
_MIDDLE, _LATE = 0.5, 0.92
"""A little beyond nine in ten: what is learnt is behind what happens."""
_STEP_FIRST, _STEP_MIN, _STEP_COUNT = 0.15, 0.02, 16.0
"""How far one wait moves them: at first, in the end, and when half way."""
_MIDDLE_FIRST, _MIDDLE_MIN, _MIDDLE_COUNT = 0.1, 0.006, 32.0
"""The same of the middle, which moves less in the end."""
_LENGTHS_NS: Final = (_SECOND_NS, 10 * _SECOND_NS)
"""Short, middling and long waits are wrong in ways of their own."""
_FURTHEST: Final = 3.0
"""A factor of 20 either way, no more."""
_SAMPLED_FIRST, _SAMPLED_OF = 64, 8
"""So many waits of a band are all learnt from, and then one of so many."""


class Ahead(NamedTuple):
    """What is before a request in its own band."""

    requests: int
    overtaking: float = 0.0
    """Which part of what is dispatched comes later and goes before."""
    tied: int = 0
    """Requests that go before because their flows, with equal accounts, came first. Part of the
    position alone: intervals are learnt from forecasts at admission, which do not look for them."""


class Forecast(NamedTuple):
    """What a waiting request can expect."""

    position: int
    """How many stand ahead of it, higher bands included."""
    wait_ns: int | None
    """From now, that half of all stay within; None when nothing has been dispatched lately, or not
    of its band for too long, or there is no endpoint."""
    late_ns: int | None = None
    """The same, that nine in ten stay within."""
    raw_ns: int | None = None
    """By the rates alone."""


@final
class Calibration:
    """What waits of one band came to, against what the rates said, short and long apart. O(1)."""

    __slots__ = ("_begun", "_counts", "_lates", "_middles")

    def __init__(self) -> None:
        lengths = len(_LENGTHS_NS) + 1
        self._begun = 0
        """Waits that have begun."""
        self._counts = [0] * lengths
        self._middles = [0.0] * lengths
        """Logarithms of real over raw waits that half of them stay within."""
        self._lates = [log(2)] * lengths
        """The same, of nine in ten."""

    def is_due(self) -> bool:
        """Count a wait that begins; whether it is one to learn from."""
        self._begun += 1
        return self._begun <= _SAMPLED_FIRST or self._begun % _SAMPLED_OF == 0

    def learn(self, raw_ns: int, waited_ns: int, *, is_over: bool) -> None:
        """Take in what one wait came to.

        Args:
            raw_ns: what the rates said.
            waited_ns: what it was so far.
            is_over: whether it ended by dispatch; else it would have been longer.
        """
        length = bisect_left(_LENGTHS_NS, raw_ns)
        ratio = log((waited_ns + _SHORT_NS) / (raw_ns + _SHORT_NS))
        count = self._counts[length] = self._counts[length] + 1
        step = _STEP_MIN + (_STEP_FIRST - _STEP_MIN) / (1 + count / _STEP_COUNT)
        fine = _MIDDLE_MIN + (_MIDDLE_FIRST - _MIDDLE_MIN) / (1 + count / _MIDDLE_COUNT)
        middle = _moved(self._middles[length], ratio, _MIDDLE, fine, is_over=is_over)
        late = _moved(self._lates[length], ratio, _LATE, step, is_over=is_over)
        self._middles[length] = middle
        self._lates[length] = late if late > middle else middle

    def apply(self, said: Forecast) -> Forecast:
        """Return what is to be said, given what the rates say."""
        raw_ns = said.raw_ns
        if raw_ns is None:
            return said
        length = bisect_left(_LENGTHS_NS, raw_ns)
        middle_ns = round((raw_ns + _SHORT_NS) * exp(self._middles[length])) - _SHORT_NS
        late_ns = round((raw_ns + _SHORT_NS) * exp(self._lates[length])) - _SHORT_NS
        return Forecast(said.position, max(0, middle_ns), max(0, late_ns), raw_ns)

    def late(self, raw_ns: int) -> int:
        """Return what nine in ten stay within of a wait that the rates say; no less than that."""
        length = bisect_left(_LENGTHS_NS, raw_ns)
        return round(raw_ns * max(1.0, exp(self._lates[length])))


def _moved(quantile: float, ratio: float, part: float, step: float, *, is_over: bool) -> float:
    """Return an estimated quantile after one more ratio."""
    if ratio > quantile:
        quantile += step * part
    elif is_over:
        quantile -= step * (1 - part)
    return min(max(quantile, -_FURTHEST), _FURTHEST)


def forecast(
    above: int, ahead: Ahead, own: DrainRate, everything: DrainRate, now_ns: int
) -> Forecast:
    """Return what a request can expect.

    Args:
        above: requests waiting in higher bands.
        ahead: what goes before it in its own band.
        own: how fast its band drains.
        everything: how fast all bands together drain.
        now_ns: the time.
    """
    own_rate, rate = own.per_second(now_ns), everything.per_second(now_ns)
    wait_s = 0.0
    if own_rate > 0:
        wait_s = (ahead.requests + 1) / (own_rate * (1 - ahead.overtaking))
    if rate > 0:
        wait_s = max(wait_s, (above + ahead.requests + 1) / rate)
    wait_ns = round(wait_s * _SECOND_NS)
    is_refuted = own_rate == 0 and own.busy_ns(now_ns) > wait_ns
    raw_ns = None if is_refuted or not wait_ns else wait_ns
    return Forecast(above + ahead.requests + ahead.tied, raw_ns, raw_ns, raw_ns)

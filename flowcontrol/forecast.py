"""Pure. How long will it still wait?

Drain rates say how fast queues empty (`retry`); how much stands ahead says how long that takes. For
a request with `ahead` requests before it in its own band and `above` in higher ones,

    max( (ahead + 1) / (rate of its band (1 - o)), (above + ahead + 1) / rate of all bands )

The first term knows what arrivals above cost the band. Of a band that was seldom seen waiting the
rate counts one dispatch at the rate of all beside its own. The second term is for what waits above,
and for a band that was not served lately: until a request has waited there for longer than it says,
unserved. Then nothing is known, for the band may be gated. The part o of the band's rate goes to
requests that come later and go before: with a fair policy, those of flows with less of a backlog.
What stands ahead is served while more of it comes, which takes longer by 1 / (1 - o), as for a
lower class behind a higher one (Cobham, 1954).

How many stand ahead in its band depends on whose turn it is. A fair policy gives the other flows so
many turns x before it (`FairnessPolicy.turns`), of which a flow with n waiting uses min(n, x). That
sum over all flows is the number of waiting requests with fewer than x of their own flow before
them; `backlogs` counts them by that place, in classes. The error is less than what is in the one
class that x falls into. The same classes tell o: of the last some hundred requests that came, those
at a place below the turns that remain, over what was dispatched meanwhile. Remaining are half of x
on average, and less is counted, because arrivals of its own flow stand near x. What came to a
shorter queue would overtake nobody now, so never more is counted than x turns of each other flow;
but for least-attained-service, where one that was away has more. With a third,
medians of predicted over realised waits are 0.9 to 1.25, and half of all lie within a third of 1
for weighted tokens and round robin (tests: test_forecast); exact to 10 % for a single line.

Where places are free and only prompts that were sent there have to be read (`auto`), it is known to
the millisecond when the next request goes. Most waits of people beside a job are of this kind. Then
the rates count for those that stand ahead alone.

That is the raw wait: the mean, if the rates are right. What is said is an interval: the wait that
half of all stay within, and the one that nine in ten do. If departures come at random, n of them
take an Erlang time, whose quantiles are known: for n = 1 half wait less than 0.69 of the mean, and
one in ten more than 2.3 times; for n = 100 it is 1.00 and 1.13. That is the first guess. A factor
on it is learnt from every wait that comes true, for each band, and apart for waits of a known end
and for short, middling and long ones: a quantile of real over guess by stochastic approximation
(Robbins and Monro, 1951), up by a share p of the step for each wait beyond it, down by 1 - p for
each within, steps being parts of it, so that in the long run the share within is p whatever the
distribution is, and whatever is wrong with the formula. An evicted request waited longer than was
said, if that is what it had waited already; else it says nothing. What it cannot know is what has
not come true yet: of a job that is dropped in one piece all waits are forecast before the first is
over. And that those ahead have deadlines, too, is left out: where a flow asks for more than it
gets, waits end near the time to live whatever is said.

A forecast costs as much as the rest of an admission, and most are never looked at. So one is
computed when it is asked for, and at admission only for a sample to learn from: the first 64 waits
of a band, then one in eight. A time between two samples was rejected: of a burst it would take the
first request only, whose wait is the shortest.
"""

from bisect import bisect_left
from math import sqrt
from typing import Final, NamedTuple, final

from flowcontrol.retry import DrainRate

_SECOND_NS: Final = 1_000_000_000
_SHORT_NS: Final = 50_000_000
"""Below it a wait is as good as none: ratios of such waits mean nothing."""
_EARLY, _MIDDLE, _LATE = range(3)
_PARTS: Final[tuple[float, ...]] = (0.01, 0.5, 0.92)
"""Of waits within each; a little beyond nine in ten, as what is learnt is behind what happens."""
_NORMAL: Final[tuple[float, ...]] = (-2.33, 0.0, 1.41)
"""The same quantiles of the normal distribution."""
_FIRST: Final[tuple[float, ...]] = (0.4, 1.0, 2.0)
"""What to guess, before anything came true, beyond what random departures explain."""
_FIRST_KNOWN: Final[tuple[float, ...]] = (0.4, 1.0, 1.5)
"""The same of waits of a known end."""
_STEPS_FIRST: Final[tuple[float, ...]] = (0.15, 0.1, 0.15)
_STEPS_MIN: Final[tuple[float, ...]] = (0.02, 0.006, 0.02)
_STEPS_COUNT: Final[tuple[float, ...]] = (16.0, 32.0, 16.0)
"""How far one wait moves them: at first, in the end, and when half way."""
_LENGTHS_NS: Final[tuple[int, ...]] = (_SECOND_NS, 10 * _SECOND_NS)
"""Between short, middling and long waits."""
_FURTHEST: Final = 20.0
"""A factor either way, no more."""
_SAMPLED_FIRST, _SAMPLED_OF = 64, 8
"""So many waits of a band are all learnt from, and then one of so many."""


class Ahead(NamedTuple):
    """What is before a request in its own band."""

    requests: int
    overtaking: float = 0.0
    """Part of the dispatches that are of requests that come later and overtake."""
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
    departures: int = 1
    """How many must go until it has gone itself; 0 where it is known when it goes."""


@final
class Calibration:
    """What waits of one band came to, against what was guessed. O(1)."""

    __slots__ = ("_begun", "_counts", "_learned")

    def __init__(self) -> None:
        kinds = len(_LENGTHS_NS) + 2
        self._begun = 0
        """Waits that have begun."""
        self._counts = [0] * kinds
        self._learned = [list(_FIRST if kind else _FIRST_KNOWN) for kind in range(kinds)]
        """Quantiles of real waits, over those of random departures."""

    def is_due(self) -> bool:
        """Count a wait that begins; whether it is one to learn from."""
        self._begun += 1
        return self._begun <= _SAMPLED_FIRST or self._begun % _SAMPLED_OF == 0

    def learn(self, said: Forecast, waited_ns: int, *, is_over: bool) -> None:
        """Take in what one wait came to.

        Args:
            said: what was said as it began; nothing is learnt where that was unknown.
            waited_ns: what it was so far.
            is_over: whether it ended by dispatch; else it would have been longer.
        """
        raw_ns = said.raw_ns
        if raw_ns is None:
            return
        kind = _kind(raw_ns, said)
        count = self._counts[kind] = self._counts[kind] + 1
        learned = self._learned[kind]
        for index in range(len(_PARTS)):
            guess_ns = raw_ns * _erlang(index, said.departures)
            ratio = (waited_ns + _SHORT_NS) / (guess_ns + _SHORT_NS)
            learned[index] = _moved(index, learned[index], ratio, count, is_over=is_over)

    def apply(self, said: Forecast) -> Forecast:
        """Return what is to be said, given what the rates say."""
        raw_ns = said.raw_ns
        if raw_ns is None:
            return said
        wait_ns = self._quantile(_MIDDLE, raw_ns, said)
        late_ns = max(wait_ns, self._quantile(_LATE, raw_ns, said))
        return Forecast(said.position, wait_ns, late_ns, raw_ns, said.departures)

    def early(self, said: Forecast) -> int | None:
        """Return what one in a hundred stays within, None while the wait is unknown."""
        return None if said.raw_ns is None else self._quantile(_EARLY, said.raw_ns, said)

    def late(self, raw_ns: int) -> int:
        """Return what nine in ten stay within of a long wait that the rates say; no less."""
        learned = self._learned[1 + bisect_left(_LENGTHS_NS, raw_ns)][_LATE]
        return round(raw_ns * max(1.0, learned))

    def _quantile(self, index: int, raw_ns: int, said: Forecast) -> int:
        guess_ns = raw_ns * _erlang(index, said.departures)
        learned = self._learned[_kind(raw_ns, said)][index]
        return max(0, round((guess_ns + _SHORT_NS) * learned) - _SHORT_NS)


def _kind(raw_ns: int, said: Forecast) -> int:
    """Return which waits are wrong in the same way: those of a known end, and others by length."""
    return 1 + bisect_left(_LENGTHS_NS, raw_ns) if said.departures else 0


def _erlang(index: int, departures: int) -> float:
    """Return a quantile over the mean of the time that so many departures at random take.

    By Wilson and Hilferty, 1931: the cube root of such a time is about normal.
    """
    ninth = 1 / (9 * departures) if departures else 0.0
    root: float = 1 - ninth + _NORMAL[index] * sqrt(ninth)
    return root * root * root if root > 0 else 0.0


def _moved(index: int, quantile: float, ratio: float, count: int, *, is_over: bool) -> float:
    """Return an estimated quantile after one more ratio; `count` with it."""
    is_beyond = ratio > quantile
    if not (is_beyond or is_over):
        return quantile
    least = _STEPS_MIN[index]
    step = least + (_STEPS_FIRST[index] - least) / (1 + count / _STEPS_COUNT[index])
    quantile *= 1 + step * (_PARTS[index] if is_beyond else _PARTS[index] - 1)
    return min(max(quantile, 1 / _FURTHEST), _FURTHEST)


def forecast(
    above: int,
    ahead: Ahead,
    rates: tuple[DrainRate, DrainRate],
    now_ns: int,
    held_ns: int | None = None,
) -> Forecast:
    """Return what a request can expect.

    Args:
        above: requests waiting in higher bands.
        ahead: what goes before it in its own band.
        rates: how fast its band drains, and all bands together.
        now_ns: the time.
        held_ns: when the next one goes, where that is known.
    """
    own, everything = rates
    rate = everything.per_second(now_ns)
    own_rate = own.per_second_of(rate, now_ns)
    itself = 1 if held_ns is None else 0
    before = ahead.requests + itself
    wait_s = 0.0
    if own_rate > 0:
        wait_s = before / (own_rate * (1 - ahead.overtaking))
    if rate > 0 and (above or not wait_s):
        wait_s = max(wait_s, (above + before) / rate)
    wait_ns = round(wait_s * _SECOND_NS)
    position = above + ahead.requests + ahead.tied
    departures = above + before
    if departures and not wait_ns:
        return Forecast(position, None)
    if own_rate == 0 and own.busy_ns(now_ns) > wait_ns + (held_ns or 0):
        return Forecast(position, None)
    raw_ns = wait_ns + (held_ns or 0)
    return Forecast(position, raw_ns, raw_ns, raw_ns, departures)

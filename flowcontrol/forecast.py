"""Pure. How long will a request still wait?

The raw forecast. Drain rates say how fast queues empty (`retry`). For a request with `ahead`
requests before it in its own band and `above` requests in higher bands, the wait is

    max( (ahead + 1) / (rate of its band (1 - o)), (above + ahead + 1) / rate of all bands )

The first term includes what arrivals in higher bands cost the band. If the band was seldom seen
waiting, its rate also counts one dispatch at the rate of all bands. The second term covers what
waits above, and a band that was not served lately. That holds until a request has waited there
unserved for longer than the term says. Then the wait is unknown, because the band may be gated.

The part o of the band's rate serves requests that arrive later and go first: with a fair policy,
those of flows with a shorter backlog. The requests ahead are served while more of them arrive,
which takes longer by 1 / (1 - o), as for a lower class behind a higher one (Cobham, 1954).

How many are ahead in its band depends on the fairness policy. It gives every other flow x turns
before the request (`FairnessPolicy.turns`), of which a flow with n waiting uses min(n, x). The sum
over all flows is the number of waiting requests with fewer than x of their own flow before them.
`backlogs` counts requests by that place, in classes; the error is less than the content of the
class that contains x.

The same classes give o: the recent arrivals at a place below the remaining turns, over the
dispatches in the same time. On average half of x remains; a third is counted, because arrivals of
the request's own flow stand near x. Arrivals at a queue that was shorter then would not overtake
now, so o is bounded by x turns of each other flow, except with least-attained-service, where a flow
that was away has more. With a third, medians of predicted over real waits are 0.9 to 1.25, and half
of all lie within a third of 1, for weighted tokens and round robin (tests: test_forecast). A single
queue is exact to 10 %.

If places are free and only prompts have to be read first (`auto`), it is known to the millisecond
when the next request is dispatched. Most waits of people beside a job are of this kind. Then the
rates count only for the requests ahead.

The interval. The raw wait is the mean, if the rates are right. What is reported is the wait within
which half of all requests stay, and the one within which nine in ten do. If departures come at
random, n of them take an Erlang time, whose quantiles are known: for n = 1, half wait less than
0.69 of the mean and one in ten more than 2.3 times the mean; for n = 100 it is 1.00 and 1.13. That
is the first guess. A factor on it is learnt from every wait that ends, for each band, separately
for waits with a known end and for short, medium and long ones. It is a quantile of the real wait
over the guess, by stochastic approximation (Robbins and Monro, 1951): for each wait beyond it, it
rises by a share p of the step, for each wait within, it falls by 1 - p of the step. A step is a
part of the factor. So in the long run the share within is p, whatever the distribution and whatever
is wrong with the formula. An evicted request counts as a wait beyond the factor if it had already
waited that long; else it is ignored.

What it does not see: waits that have not ended yet. If a job arrives in one piece, all its waits
are forecast before the first one is over. Nor does it see that requests ahead have deadlines: if a
flow asks for more than it gets, waits end near the time to live, whatever the forecast.

A forecast costs as much as the rest of an admission, and most are never looked at. So it is
computed on demand, and at admission only for a sample to learn from: the first 64 waits of a band,
then one in eight. To sample by time was rejected: of a burst it would take only the first request,
whose wait is the shortest.
"""

from bisect import bisect_left
from math import sqrt
from typing import Final, NamedTuple, final

from flowcontrol.retry import DrainRate

_SECOND_NS: Final = 1_000_000_000
_SHORT_NS: Final = 50_000_000
"""Added to waits before their ratio is taken: ratios of shorter waits mean little."""
_EARLY, _MIDDLE, _LATE = range(3)
_PARTS: Final[tuple[float, ...]] = (0.01, 0.5, 0.92)
"""Part of the waits within each quantile; 0.92 for nine in ten, because learning lags."""
_NORMAL: Final[tuple[float, ...]] = (-2.33, 0.0, 1.41)
"""The same quantiles of the normal distribution."""
_FIRST: Final[tuple[float, ...]] = (0.4, 1.0, 2.0)
"""The factors before anything was learnt."""
_FIRST_KNOWN: Final[tuple[float, ...]] = (0.4, 1.0, 1.5)
"""The same for waits with a known end."""
_STEPS_FIRST: Final[tuple[float, ...]] = (0.15, 0.1, 0.15)
_STEPS_MIN: Final[tuple[float, ...]] = (0.02, 0.006, 0.02)
_STEPS_COUNT: Final[tuple[float, ...]] = (16.0, 32.0, 16.0)
"""How far one wait moves a factor: at first, in the end, and after how many waits half way."""
_LENGTHS_NS: Final[tuple[int, ...]] = (_SECOND_NS, 10 * _SECOND_NS)
"""Bounds between short, medium and long waits."""
_FURTHEST: Final = 20.0
"""A factor is at most this, and at least its inverse."""
_SAMPLED_FIRST, _SAMPLED_OF = 64, 8
"""The first so many waits of a band are learnt from, and then one in so many."""


class Ahead(NamedTuple):
    """What goes before a request in its own band."""

    requests: int
    overtaking: float = 0.0
    """Part of the dispatches that serve requests which arrive later and overtake."""
    tied: int = 0
    """Requests that go before because their flows, with equal accounts, came first. They count for
    the position only: forecasts at admission, which intervals are learnt from, omit them."""


class Forecast(NamedTuple):
    """What a waiting request can expect."""

    position: int
    """Requests ahead of it, including those in higher bands."""
    wait_ns: int | None
    """Wait from now within which half of all requests stay. None: nothing has been dispatched
    lately, or nothing of its band for too long, or there is no endpoint."""
    late_ns: int | None = None
    """The same for nine in ten."""
    raw_ns: int | None = None
    """The wait by the rates alone."""
    departures: int = 1
    """Dispatches until it is dispatched itself; 0: the time of its dispatch is known."""


@final
class Calibration:
    """Learns how the waits of one band compare with the raw forecast. O(1)."""

    __slots__ = ("_begun", "_counts", "_learned")

    def __init__(self) -> None:
        kinds = len(_LENGTHS_NS) + 2
        self._begun = 0
        """Waits counted so far."""
        self._counts = [0] * kinds
        self._learned = [list(_FIRST if kind else _FIRST_KNOWN) for kind in range(kinds)]
        """By kind of wait: quantiles of real waits over those of random departures."""

    def is_due(self) -> bool:
        """Count a wait that begins; return whether to learn from it."""
        self._begun += 1
        return self._begun <= _SAMPLED_FIRST or self._begun % _SAMPLED_OF == 0

    def learn(self, said: Forecast, waited_ns: int, *, is_over: bool) -> None:
        """Learn from a wait that has ended.

        Args:
            said: the forecast when it began; nothing is learnt if that was unknown.
            waited_ns: how long it lasted.
            is_over: whether it ended by dispatch; else it would have lasted longer.
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
        """Return the forecast to report for a raw one."""
        raw_ns = said.raw_ns
        if raw_ns is None:
            return said
        wait_ns = self._quantile(_MIDDLE, raw_ns, said)
        late_ns = max(wait_ns, self._quantile(_LATE, raw_ns, said))
        return Forecast(said.position, wait_ns, late_ns, raw_ns, said.departures)

    def early(self, said: Forecast) -> int | None:
        """Return the wait within which one in a hundred stays; None: unknown."""
        return None if said.raw_ns is None else self._quantile(_EARLY, said.raw_ns, said)

    def late(self, raw_ns: int) -> int:
        """Return the wait within which nine in ten stay, for a raw wait; at least the raw wait."""
        learned = self._learned[1 + bisect_left(_LENGTHS_NS, raw_ns)][_LATE]
        return round(raw_ns * max(1.0, learned))

    def _quantile(self, index: int, raw_ns: int, said: Forecast) -> int:
        guess_ns = raw_ns * _erlang(index, said.departures)
        learned = self._learned[_kind(raw_ns, said)][index]
        return max(0, round((guess_ns + _SHORT_NS) * learned) - _SHORT_NS)


def _kind(raw_ns: int, said: Forecast) -> int:
    """Return the kind of a wait: 0 with a known end, else by length."""
    return 1 + bisect_left(_LENGTHS_NS, raw_ns) if said.departures else 0


def _erlang(index: int, departures: int) -> float:
    """Return a quantile of the time of so many random departures, over its mean.

    By Wilson and Hilferty, 1931: the cube root of such a time is nearly normal.
    """
    ninth = 1 / (9 * departures) if departures else 0.0
    root: float = 1 - ninth + _NORMAL[index] * sqrt(ninth)
    return root * root * root if root > 0 else 0.0


def _moved(index: int, quantile: float, ratio: float, count: int, *, is_over: bool) -> float:
    """Return an estimated quantile after one more ratio, the `count`th."""
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
    """Return the raw forecast of a request.

    Args:
        above: requests waiting in higher bands.
        ahead: what goes before it in its own band.
        rates: drain rates of its band, and of all bands together.
        now_ns: the time.
        held_ns: when the next request is dispatched, from now; None: unknown.
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

"""Pure. How long will it still wait?

Drain rates say how fast queues empty (`retry`); how much stands ahead says how long that takes. For
a request with `ahead` requests before it in its own band and `above` in higher ones,

    max( (ahead + 1) / rate of its band, (above + ahead + 1) / rate of all bands )

The first term knows what arrivals above cost the band, the second also covers a band that was not
served lately.

How many stand ahead in its band depends on whose turn it is. A fair policy gives the other flows so
many turns x before it (`FairnessPolicy.turns`), of which a flow with n waiting uses min(n, x). That
sum over all flows is the number of waiting requests with fewer than x of their own flow before
them, and it must not cost a look at every flow: requests are counted by that place, in classes that
double in width (0, 1, 2-3, 4-7, ...), and within a class evenly. The error is less than half of the
one class that x falls into.
"""

from typing import NamedTuple, final

from flowcontrol.retry import DrainRate

_SECOND_NS = 1_000_000_000
_CLASSES = 64
"""More than any count has bits."""


@final
class Places:
    """How many requests have how many of their own flow before them, by powers of two."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * _CLASSES

    def add(self, place: int) -> None:
        """Count one more request with so many before it: its flow has become so much longer."""
        self._counts[place.bit_length()] += 1

    def remove(self, place: int) -> None:
        """Count one less: a flow has become so short. O(1)."""
        assert self._counts[place.bit_length()] > 0, "nobody is in such a place"
        self._counts[place.bit_length()] -= 1

    def before(self, turns: float) -> float:
        """Return about how many go while every flow has so many turns; O(log turns)."""
        total = 0.0
        low = 0
        for count in self._counts:
            high = 2 * low or 1
            if turns < high:
                return total + count * (turns - low) / (high - low)
            total += count
            low = high
        return total


class Forecast(NamedTuple):
    """What a waiting request can expect."""

    position: int
    """How many stand ahead of it, higher bands included."""
    wait_ns: int | None
    """From now; None when nothing has been dispatched lately."""


def forecast(
    above: int, ahead: int, own: DrainRate, everything: DrainRate, now_ns: int
) -> Forecast:
    """Return what a request can expect.

    Args:
        above: requests waiting in higher bands.
        ahead: requests of its own band that go before it.
        own: how fast its band drains.
        everything: how fast all bands together drain.
        now_ns: the time.
    """
    own_rate, rate = own.per_second(now_ns), everything.per_second(now_ns)
    wait_s = (ahead + 1) / own_rate if own_rate > 0 else 0.0
    if rate > 0:
        wait_s = max(wait_s, (above + ahead + 1) / rate)
    return Forecast(above + ahead, round(wait_s * _SECOND_NS) if wait_s > 0 else None)

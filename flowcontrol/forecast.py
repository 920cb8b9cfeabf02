"""Pure. How long will it still wait?

Drain rates say how fast queues empty; how much stands ahead says how long that takes. For a request
with `ahead` requests before it in its own band and `above` in higher ones,

    max( (ahead + 1) / rate of its band, (above + ahead + 1) / rate of all bands )

The first term knows what arrivals above cost the band, the second also covers a band that was not
served lately. In its band, a fair policy takes turns between F flows, so before the n-th of a flow
go about n F, and never more than wait: the number is exact for flows of equal backlogs and one
flow, an estimate otherwise. With global-strict it is whatever waits.
"""

from typing import NamedTuple

from flowcontrol.band import Band
from flowcontrol.config import Fairness
from flowcontrol.retry import DrainRate

_SECOND_NS = 1_000_000_000


class Forecast(NamedTuple):
    """What a waiting request can expect."""

    position: int
    """How many stand ahead of it, higher bands included."""
    wait_ns: int | None
    """From now; None when nothing has been dispatched lately."""


def forecast(above: int, place: int, band: Band, everything: DrainRate, now_ns: int) -> Forecast:
    """Return what a request of a band can expect.

    Args:
        above: requests waiting in higher bands.
        place: how many of its own flow go before it.
        band: its band, in which it waits.
        everything: how fast all bands together drain.
        now_ns: the time.
    """
    flows = band.waiting_flows
    if band.settings.fairness is Fairness.GLOBAL_STRICT:
        ahead = band.waiting - 1
    else:
        ahead = min(band.waiting - 1, place * flows + (flows - 1) // 2)
    own, all_bands = band.drain_rate.per_second(now_ns), everything.per_second(now_ns)
    waits = [(ahead + 1) / own] if own > 0 else []
    waits += [(above + ahead + 1) / all_bands] if all_bands > 0 else []
    wait_ns = round(max(waits) * _SECOND_NS) if waits else None
    return Forecast(above + ahead, wait_ns)

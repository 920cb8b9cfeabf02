"""Pure. Between bands: strict priority, and two exceptions to it with bounds.

Strict: the highest band with work waiting is served; if it is gated, nobody below it is.

Promotion: a request that waited `promote_after_ns` goes before everybody else, promoted ones in the
order they became due. Its bound: once due, it is dispatched after at most as many dispatches as
there were requests due before it, whatever arrives above it.

Share: a band with `share_min` s > 0 earns credit, s times the cost of every dispatch while it has
work waiting, and pays the cost of its own; while its credit is above zero it goes next, higher
bands first. Credit is gone when nothing waits, so a band that comes back has no claim to the past;
being served in strict order is free beyond what credit there is, so a quiet night is not held
against it. Shares that sum up to more than 1 are scaled down to 1. Its bound: over any interval in
which the band waits without pause and T is the cost dispatched, it gets at least s T - (k + 1) C,
with C the largest cost of one request and k the number of bands that have shares, themselves
included.

Both exceptions ignore the ceilings and need only a pool that is not full: a band that is gated for
good would otherwise never get what it was promised.
"""

from collections.abc import Iterable
from typing import final

from flowcontrol.band import Band
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap


@final
class Across:
    """The accounts of promotion and share. O(log waiting) a request, O(shares) a dispatch.

    Told of every admission, of every departure from the queue and of every dispatch.
    """

    def __init__(self) -> None:
        self._promotions: KeyedHeap[Lease, int] = KeyedHeap()
        """Waiting requests of bands that promote, by when they become due."""
        self._credits: dict[Band, float] = {}
        """Of the bands that have a share, highest first."""

    def set_bands(self, bands: Iterable[Band]) -> None:
        """Take the bands there are, highest first; those that stay keep their credit."""
        self._credits = {
            band: self._credits.get(band, 0.0) for band in bands if band.settings.share_min > 0
        }

    def admitted(self, lease: Lease, band: Band) -> None:
        """Take up a request that waits from now on, or whose band has been reconfigured."""
        after_ns = band.settings.promote_after_ns
        if after_ns is None:
            self._promotions.discard(lease)
        else:
            self._promotions.put(lease, lease.arrived_ns + after_ns)

    def removed(self, lease: Lease, band: Band) -> None:
        """Let go of a request that waits no longer."""
        self._promotions.discard(lease)
        if band in self._credits and not band.waiting:
            self._credits[band] = 0.0

    def next_exception(self, now_ns: int) -> Lease | None:
        """Return the request that goes before strict order, if there is one."""
        first = self._promotions.first()
        if first is not None and first[0] <= now_ns:
            return first[1]
        for band, credit in self._credits.items():
            if credit > 0 and band.waiting:
                return band.next()
        return None

    def next_promotion_ns(self) -> int | None:
        """Return when the next request becomes due, or became."""
        first = self._promotions.first()
        return None if first is None else first[0]

    def dispatched(self, served: Band, cost: float) -> None:
        """Earn and pay for one dispatch; call it before `removed`."""
        if not self._credits:
            return
        scale = max(1.0, sum(band.settings.share_min for band in self._credits))
        for band, credit in self._credits.items():
            earned = credit
            if band.waiting:
                earned += cost * band.settings.share_min / scale
            if band is served:
                earned = earned - cost if credit > 0 else max(earned - cost, min(credit, 0.0))
            self._credits[band] = earned

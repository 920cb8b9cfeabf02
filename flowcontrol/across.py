"""Pure. Between bands: strict priority, and two exceptions to it with bounds.

Strict: the highest band with work waiting is served; if it is gated, no lower band is.

Promotion: a request that has waited for `promote_after_ns` goes before all others; promoted
requests go in the order in which they became due. The bound: once due, a request is dispatched
after at most as many dispatches as there were requests due before it, whatever arrives above it.

Share: a band with `share_min` s > 0 keeps a credit. While it has work waiting, it earns s times the
cost of every dispatch that is not a promotion. While its credit is above zero it goes next, higher
bands first, and pays the cost of what it dispatches. When it is served in strict order without
credit, it neither earns nor pays, so that a quiet night does not count against it. When none of its
requests waits any more, its credit is dropped, so that it has no claim to the past when it returns.
Debt stays, because otherwise a band that sends one request at a time would never pay. Shares that
sum to more than 1 are scaled down to 1. (This is surplus round robin, after deficit round robin of
Shreedhar and Varghese, SIGCOMM 1995, with strict priority in place of the round.)

Its bound. Let C be the largest cost of one request and k the number of bands with shares. A band
pays only from credit above zero, so no debt exceeds C. All credits and debts together never exceed
C: without credit anywhere, one strict dispatch makes at most C of it; with credit, a dispatch earns
all bands together no more than its cost, which is paid. So one credit is at most C and the debts of
the k - 1 others: k C. What a band was served is what it earned, less the change of its credit, from
at least -C to at most k C. Hence over any interval in which it waits without pause, T being the
cost of what was dispatched but for promotions, it gets

    at least  s T - (k + 1) C

and its next request goes before (k + 1) C / s of other cost has been dispatched. A band that is
declared again begins without debt: within an interval, each that does so adds C. Costs are those
estimated at dispatch.

In both, a request that may only go to endpoints without room is passed over. Meanwhile it does not
wait in the sense of the bounds: others go first, and it is next when there is room.

Both exceptions ignore the ceilings, and only need a pool that is not full: otherwise a band that is
always gated would never get what it was promised.
"""

from collections.abc import Iterable
from typing import final

from flowcontrol.band import Band
from flowcontrol.bands import Bands
from flowcontrol.flow import Lease
from flowcontrol.lines import HasRoom, Lines


@final
class Across:
    """The accounts of promotion and share.

    O(log waiting) for a request, O(shares + subsets) for a dispatch. Must be called for every
    admission, every departure from the queue and every dispatch.
    """

    def __init__(self) -> None:
        self.is_active = False
        """Whether any band has or had a share or promotion; else nothing here need be called."""
        self._promotions: Lines[Lease, int] = Lines()
        """Waiting requests of bands that promote, by the time at which they become due."""
        self._shares: dict[Band, float] = {}
        """Shares of the bands that have one, highest first, together at most 1."""
        self._credits: dict[Band, float] = {}
        """Credits of the same bands; below zero is debt."""

    def set_bands(self, bands: Iterable[Band]) -> None:
        """Replace the bands, highest first; those that stay keep their credit."""
        shares: dict[Band, float] = {}
        self.is_active = bool(self._promotions)
        for band in bands:
            if band.settings.share_min > 0:
                shares[band] = band.settings.share_min
            if shares or band.settings.promote_after_ns is not None:
                self.is_active = True
        scale = max(1.0, sum(shares.values()))
        self._shares = {band: share / scale for band, share in shares.items()}
        self._credits = {band: self._credits.get(band, 0.0) for band in shares}

    def reconfigured(self, waiting: Iterable[Lease], bands: Bands) -> None:
        """Rebuild the accounts of waiting requests for the present bands. O(waiting)."""
        for lease in waiting:
            if lease.is_admitted:
                self.admitted(lease, bands.by_priority[lease.flow.key.priority])

    def admitted(self, lease: Lease, band: Band) -> None:
        """Add a request that waits from now on."""
        after_ns = band.settings.promote_after_ns
        if after_ns is None:
            self._promotions.discard(lease)
        else:
            due_ns = lease.arrived_ns + after_ns
            self._promotions.put(lease, due_ns, lease.request.subset)

    def removed(self, lease: Lease, band: Band) -> None:
        """Remove a request that no longer waits."""
        self._promotions.discard(lease)
        if not band.waiting and self._credits.get(band, 0.0) > 0:
            self._credits[band] = 0.0

    def next_exception(self, now_ns: int, has_room: HasRoom) -> Lease | None:
        """Return the request that overrides strict order, if there is one with room."""
        promoted = self._promoted(now_ns, has_room)
        if promoted is not None:
            return promoted
        for band, credit in self._credits.items():
            if credit > 0 and band.waiting:
                lease = band.next(has_room)
                if lease is not None:
                    return lease
        return None

    def is_due(self, now_ns: int, has_room: HasRoom) -> bool:
        """Whether a request with room is due for promotion."""
        return self._promoted(now_ns, has_room) is not None

    def next_promotion_ns(self, has_room: HasRoom) -> int | None:
        """Return when the first request with room becomes, or became, due."""
        first = self._promotions.first(has_room)
        return None if first is None else first[0]

    def dispatched(self, lease: Lease, served: Band, now_ns: int, has_room: HasRoom) -> None:
        """Account for a dispatch, before the request is `removed` or charged to the pool."""
        if not self._credits:
            return
        is_promotion = self._promoted(now_ns, has_room) is lease
        for band, share in self._shares.items():
            has_credit = self._credits[band] > 0
            if band.waiting and not is_promotion and (has_credit or band is not served):
                self._credits[band] += share * lease.cost
            if has_credit and band is served:
                self._credits[band] -= lease.cost

    def _promoted(self, now_ns: int, has_room: HasRoom) -> Lease | None:
        first = self._promotions.first(has_room)
        return first[1] if first is not None and first[0] <= now_ns else None

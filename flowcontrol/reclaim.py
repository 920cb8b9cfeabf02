"""Pure. Ending requests in flight so that more important ones can go: which, and how many.

Only sheddable requests (negative priority) are ended: the lowest band first, and within a band the
newest first, so that the least work is lost. They are ended only for requests of a higher band that
wait because the pool is full for them.

Never more than needed. One request in flight adds c = saturation / in flight. A band with ceiling h
is dispatched while n c < h for n in flight, so at most m + 1 requests fit, m being the largest such
n. If d of them wait, at most m + 1 can go, and for that

    min(d, m + 1) - (m + 1) + in flight

must end in all. This includes requests that are already being ended and still in flight (the
pending debit). The arithmetic is exact for the concurrency detector and an estimate for the others,
so the number ended at once is bounded, and each is awaited before the next.

Where the engine picks, a request that is being ended frees a slot at one endpoint. Each such slot
is assigned to one waiting request that may go there, which then counts for no other slot. A request
that never leaves is given up after a while, so that it does not block the rest for ever.
"""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import final

from flowcontrol.config import Reclaim
from flowcontrol.flow import Lease
from flowcontrol.lines import Lines, Subset
from flowcontrol.pool import Pool


def needed(in_flight: int, saturation: float, ceiling: float, demand: int) -> int:
    """Return how many requests in flight must end in all, so that the demand can go."""
    if not in_flight or ceiling <= 0:
        return 0
    worth = saturation / in_flight
    if worth <= 0:
        return 0
    fit = ceil(round(ceiling / worth, 9))
    return max(0, min(demand, fit) - fit + in_flight)


@final
class Demand:
    """Waiting requests of one band, to be assigned to slots that become free. O(subsets).

    Args:
        waiting: requests that wait.
        bound: how many of these may go to some endpoints only, by subset.
    """

    def __init__(self, waiting: int, bound: Mapping[Subset, int]) -> None:
        self._bound = dict(bound)
        self._anywhere = waiting - sum(bound.values())

    def includes(self, slot: Subset) -> bool:
        """Whether a waiting request without a slot can use this one."""
        return self._anywhere > 0 or self._bound_to(slot) is not None

    def take(self, slot: Subset) -> None:
        """Assign a waiting request to a slot; one with a subset, if there is one."""
        subset = self._bound_to(slot)
        if subset is None:
            self._anywhere -= 1
        else:
            self._bound[subset] -= 1

    def _bound_to(self, slot: Subset) -> Subset | None:
        for subset, count in self._bound.items():
            if count > 0 and not set(slot).isdisjoint(subset):
                return subset
        return None


@final
class Reclaimer:
    """Keeps the requests that may be ended, and those being ended. O(log in flight) for each."""

    def __init__(self, settings: Reclaim) -> None:
        self._settings = settings
        self._candidates: Lines[Lease, tuple[int, int]] = Lines()
        """Sheddable requests in flight: the lowest band first, and within it the newest; by
        endpoint, if the engine picked it."""
        self._ending: dict[Lease, int] = {}
        """Requests that are being ended and still in flight, with the time to give them up."""
        self._dispatch_count = 0

    def reconfigure(self, settings: Reclaim, leases: Iterable[Lease]) -> None:
        """Apply other settings; O(requests)."""
        self._settings = settings
        self._candidates = Lines()
        if not settings.is_enabled:
            self._ending.clear()
            return
        for lease in leases:
            if lease.is_reclaimable and not lease.is_reclaimed:
                self._take_up(lease)

    def dispatched(self, lease: Lease) -> None:
        """Add a dispatched request; those from before reclaiming was enabled are left alone."""
        if self._settings.is_enabled and lease.flow.key.priority < 0:
            self._dispatch_count += 1
            lease.dispatch_index = self._dispatch_count
            lease.is_reclaimable = True
            lease.is_watched = self._settings.is_only_before_first_byte
            self._take_up(lease)

    def _take_up(self, lease: Lease) -> None:
        may_have_answered = lease.has_answered or not lease.is_watched
        if not (self._settings.is_only_before_first_byte and may_have_answered):
            order = lease.flow.key.priority, -lease.dispatch_index
            self._candidates.put(lease, order, _slot(lease))

    def answered(self, lease: Lease) -> None:
        """Note that the first byte of a request has been seen, from the endpoint of its lease."""
        lease.has_answered = True
        self._candidates.discard(lease)
        if self._settings.is_enabled and lease.is_reclaimable and not lease.is_reclaimed:
            self._take_up(lease)

    def left(self, lease: Lease) -> None:
        """Remove a request that has ended."""
        self._candidates.discard(lease)
        self._ending.pop(lease, None)

    def give_up(self, now_ns: int) -> None:
        """Stop waiting for requests that should have left by now."""
        for lease, given_up_ns in list(self._ending.items()):
            if given_up_ns <= now_ns:
                del self._ending[lease]

    def victims(
        self, must_end: int, below_priority: int, demand: Demand, pool: Pool, now_ns: int
    ) -> list[Lease]:
        """Return the requests to end now, each only once. O(log in flight + endpoints) each.

        Args:
            must_end: in all, by `needed`; includes those already being ended.
            below_priority: only bands below this priority.
            demand: what waits; a slot counts only if some of it can use the slot.
            pool: only requests that hold a slot of it.
            now_ns: the time.
        """
        chosen: list[Lease] = []
        room = min(must_end, self._settings.at_once_max) - len(self._ending)
        for lease in self._ending:
            _set_against(demand, lease)
        while room > len(chosen) and (first := self._candidates.first(demand.includes)) is not None:
            (priority, _newest), lease = first
            if priority >= below_priority:
                break
            self._candidates.discard(lease)
            if not pool.counts(lease):
                continue
            _set_against(demand, lease)
            self._ending[lease] = now_ns + self._settings.patience_ns
            lease.is_reclaimed = True
            chosen.append(lease)
        return chosen

    def next_change_ns(self) -> int | None:
        """Return when the next request that does not end is given up; None: never."""
        return min(self._ending.values(), default=None)


def _set_against(demand: Demand, lease: Lease) -> None:
    """Assign a waiting request to the slot of one that ends, if that is known and fits."""
    slot = _slot(lease)
    if slot is not None and demand.includes(slot):
        demand.take(slot)


def _slot(lease: Lease) -> Subset | None:
    """Return the endpoint where a request holds a slot; None: Envoy's choice."""
    return None if lease.endpoint is None else (lease.endpoint,)

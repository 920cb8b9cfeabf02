"""Pure. A flow and the leases that its requests hold on it."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from flowcontrol.capacity import Capacity
from flowcontrol.config import Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.request import FlowKey, Request, Scope

_NEVER = 1 << 62
"""Beyond any time; orders what has no deadline after all that has."""


@final
@dataclass(slots=True, eq=False)
class Lease:
    """A live request: waiting in its flow, or in flight. Compared by identity."""

    request: Request
    flow: "Flow"
    arrival_index: int
    """Position among all arrivals; settles every tie."""
    arrived_ns: int
    budget_from_ns: int
    """Since when its time to live counts: its arrival, or the one change of regime after it."""
    tokens: Tokens
    """What it is expected to take."""
    cost: float
    """The same as one number: what its flow is charged."""
    deadline_ns: int | None = None
    """When it will have waited too long."""
    is_admitted: bool = False
    """Whether it counts against the limits. A newcomer does not until it is found to fit."""
    is_in_flight: bool = False
    dispatch_index: int = 0
    """Position among the dispatches of what may be told to end."""
    is_reclaimable: bool = False
    """Whether it may be told to end."""
    is_watched: bool = False
    """Whether somebody looks out for its first byte."""
    has_answered: bool = False
    """Whether its first byte has been seen."""
    is_reclaimed: bool = False
    """Whether it has been told to end."""
    is_settled: bool = False
    """Whether what it really took is known."""
    dispatched_ns: int = 0
    endpoint: str | None = None
    fallbacks: tuple[str, ...] = ()
    expected_wait_ns: int | None = None
    """What its wait was expected to be when it was admitted."""
    position: int = 0
    """How many stood ahead of it then."""
    without_room: tuple[Scope, ...] = ()
    """Whose limits have no room for it, when it is about to be rejected."""


def order_of(lease: Lease, ordering: Ordering) -> tuple[int, int]:
    """Return where a request stands in its flow: the smallest goes first."""
    due_ns = 0
    if ordering is Ordering.EDF:
        due_ns = _NEVER if lease.deadline_ns is None else lease.deadline_ns
    elif ordering is Ordering.SLO_DEADLINE:
        slo_ns = lease.request.ttft_slo_ns
        due_ns = _NEVER if slo_ns is None else lease.arrived_ns + slo_ns
    return due_ns, lease.arrival_index


@final
class Flow:
    """The requests of one tenant at one priority: those that wait, in order, and those in flight.

    O(1) with fcfs, else O(log waiting). No dead entry is ever kept: what leaves is removed at once.
    """

    __slots__ = (
        *("_admitted", "_new", "_ordered"),
        *("capacity", "in_flight", "key", "ordering", "waiting"),
    )

    def __init__(self, key: FlowKey, ordering: Ordering, limits: Limits) -> None:
        self.key = key
        self.ordering = ordering
        self.capacity = Capacity(limits)
        """What has been admitted."""
        self.waiting = 0
        """How many wait, newcomers included."""
        self.in_flight = 0
        self._admitted: OrderedDict[int, Lease] = OrderedDict()
        """By request id, in order of arrival; the newcomers came later."""
        self._new: OrderedDict[int, Lease] = OrderedDict()
        self._ordered: KeyedHeap[Lease, tuple[int, int]] | None = None
        """The same in another order; None with fcfs, where the order of arrival is the order."""
        if ordering is not Ordering.FCFS:
            self._ordered = KeyedHeap()

    def __len__(self) -> int:
        return self.waiting

    @property
    def head(self) -> Lease:
        """The one to go next; there must be one."""
        if self._ordered is None:
            return self.oldest
        first = self._ordered.first()
        assert first is not None, "nothing waits here"
        return first[1]

    @property
    def oldest(self) -> Lease:
        """The one that arrived first; there must be one."""
        waiting = self._admitted or self._new
        return waiting[next(iter(waiting))]

    def newest_first(self) -> Iterator[Lease]:
        """Iterate what has been admitted, who gives up its place first coming first."""
        return reversed(self._admitted.values())

    def order_of(self, lease: Lease) -> tuple[int, int]:
        """Return where a request of this flow stands."""
        return order_of(lease, self.ordering)

    def push(self, lease: Lease) -> bool:
        """Queue a newcomer; whether it is the head now."""
        request_id = lease.request.request_id
        assert request_id not in self._new, "a request waits once"
        assert request_id not in self._admitted, "a request waits once"
        self._new[request_id] = lease
        self.waiting += 1
        if self._ordered is None:
            return self.waiting == 1
        self._ordered.put(lease, self.order_of(lease))
        return self.head is lease

    def admit(self, lease: Lease) -> None:
        """Count a newcomer against the limits from now on; newcomers are admitted in order."""
        self._admitted[lease.request.request_id] = self._new.pop(lease.request.request_id)
        self.capacity.take(lease.request.byte_size)
        lease.is_admitted = True

    def remove(self, lease: Lease) -> None:
        """Take a request out, wherever it stands."""
        if lease.is_admitted:
            del self._admitted[lease.request.request_id]
            self.capacity.give_back(lease.request.byte_size)
        else:
            del self._new[lease.request.request_id]
        self.waiting -= 1
        if self._ordered is not None:
            self._ordered.discard(lease)

    def move(self, lease: Lease) -> None:
        """Find the place of a waiting request anew, after its deadline has changed."""
        if self._ordered is not None:
            self._ordered.put(lease, self.order_of(lease))

    def reorder(self, ordering: Ordering) -> None:
        """Order by another rule; O(waiting log waiting)."""
        self.ordering = ordering
        self._ordered = None if ordering is Ordering.FCFS else KeyedHeap()
        for lease in self.leases():
            self.move(lease)

    def place(self, lease: Lease) -> int:
        """Return how many of this flow go before a waiting request; O(waiting)."""
        mine = self.order_of(lease)
        return sum(self.order_of(other) < mine for other in self.leases())

    def leases(self) -> list[Lease]:
        """Return all that wait, in order of arrival; O(waiting)."""
        return [*self._admitted.values(), *self._new.values()]

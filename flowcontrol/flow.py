"""Pure. A flow and the leases that its requests hold on it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, final

from flowcontrol.capacity import Capacity
from flowcontrol.config import Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.forecast import Forecast  # noqa: TC001 - the compiler reads it
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.request import FlowKey, Request, Scope

_NEVER: Final = 1 << 62
"""Later than any time: requests without a deadline are ordered behind all that have one."""


@final
class Lease:
    """A live request: waiting in its flow, or in flight. Compared by identity.

    Args:
        request: as the gate describes it.
        flow: where it waits, or waited.
        arrival_index: position among all arrivals; breaks every tie.
        arrived_ns: when it arrived.
        tokens: what it is expected to use.
        cost: what its flow is charged for that.
    """

    __slots__ = (
        *("after", "arrival_index", "arrived_ns", "before", "budget_from_ns", "cost"),
        *("deadline_ns", "dispatch_index", "dispatched_ns", "endpoint", "fallbacks"),
        *("flow", "forecast", "has_answered", "is_admitted", "is_in_flight", "is_reclaimable"),
        *("is_reclaimed", "is_settled", "is_watched", "request", "tokens"),
        *("tokens_total", "without_room"),
    )

    def __init__(  # noqa: PLR0913, PLR0917 - what is known when it comes
        self,
        request: Request,
        flow: "Flow",
        arrival_index: int,
        arrived_ns: int,
        tokens: Tokens,
        cost: float,
    ) -> None:
        self.request = request
        self.flow = flow
        self.arrival_index = arrival_index
        self.arrived_ns = arrived_ns
        self.budget_from_ns = arrived_ns
        """Start of its time to live: its arrival, or the first change of regime after it."""
        self.tokens = tokens
        self.tokens_total = tokens.input + tokens.output
        """Prompt and answer: what it adds to the load of the pool."""
        self.cost = cost
        self.deadline_ns: int | None = None
        """When it has waited too long; None: never."""
        self.before: Lease | None = None
        """Link of its flow: the waiting request that arrived before it."""
        self.after: Lease | None = None
        """Link of its flow: the waiting request that arrived after it."""
        self.is_admitted = False
        """Whether it counts against the limits. A newcomer does not until it fits."""
        self.is_in_flight = False
        self.is_settled = False
        """Whether its actual usage is known."""
        self.is_reclaimable = False
        """Whether it may be ended in flight."""
        self.is_watched = False
        """Whether its first byte must be reported to the engine."""
        self.has_answered = False
        """Whether its first byte has been seen."""
        self.is_reclaimed = False
        """Whether it is being ended."""
        self.dispatch_index = 0
        """Position among the dispatches of requests that may be ended in flight."""
        self.dispatched_ns = 0
        self.endpoint: str | None = None
        self.fallbacks: tuple[str, ...] = ()
        self.forecast: Forecast | None = None
        """The forecast at its admission, if one was made."""
        self.without_room: tuple[Scope, ...] = ()
        """The scopes whose limits have no room for it, when it is rejected."""


def order_of(lease: Lease, ordering: Ordering) -> tuple[int, int]:
    """Return the sort key of a request in its flow: the smallest goes first."""
    if ordering is Ordering.FCFS:
        return lease.arrived_ns, lease.arrival_index
    if ordering is Ordering.EDF:
        due_ns = _NEVER if lease.deadline_ns is None else lease.deadline_ns
    else:
        assert ordering is Ordering.SLO_DEADLINE
        slo_ns = lease.request.ttft_slo_ns
        due_ns = _NEVER if slo_ns is None else lease.arrived_ns + slo_ns
    return due_ns, lease.arrival_index


@final
class Flow:
    """The requests of one tenant at one priority: those waiting, in order, and those in flight.

    Waiting requests form a doubly linked list in the order in which they were handed over, so that
    any of them can be removed without a search. O(1) with fcfs, else O(log waiting). With fcfs, a
    request that is older than the last one here (it waited at another replica) makes it
    O(log waiting) until nothing waits.
    """

    __slots__ = (
        *("_newest", "_newest_admitted", "_oldest", "_ordered"),
        *("capacity", "counter", "in_flight", "key", "ordering", "waiting"),
    )

    def __init__(
        self, key: FlowKey, ordering: Ordering, limits: Limits, around: Capacity | None = None
    ) -> None:
        self.key = key
        self.ordering = ordering
        self.capacity = Capacity(limits, around)
        """Admitted requests; counted in the scopes around, too."""
        self.waiting = 0
        """Waiting requests, including newcomers."""
        self.in_flight = 0
        self.counter = 0.0
        """Counter of the band's fairness policy, while something waits."""
        self._oldest: Lease | None = None
        self._newest: Lease | None = None
        self._newest_admitted: Lease | None = None
        self._ordered: KeyedHeap[Lease, tuple[int, int]] | None = None
        """The requests by sort key; None: the list already has that order."""
        if ordering is not Ordering.FCFS:
            self._ordered = KeyedHeap()

    def __len__(self) -> int:
        return self.waiting

    @property
    def head(self) -> Lease:
        """The request to go next; there must be one."""
        if self._ordered is None:
            head = self._oldest
            assert head is not None, "nothing waits here"
            return head
        first = self._ordered.first()
        assert first is not None, "nothing waits here"
        return first[1]

    @property
    def oldest(self) -> Lease:
        """The request that was handed over first; there must be one."""
        assert self._oldest is not None, "nothing waits here"
        return self._oldest

    def newest_first(self) -> Iterator[Lease]:
        """Iterate admitted requests, the first to be displaced first."""
        lease = self._newest_admitted
        while lease is not None:
            yield lease
            lease = lease.before

    def order_of(self, lease: Lease) -> tuple[int, int]:
        """Return the sort key of a request of this flow."""
        return order_of(lease, self.ordering)

    def push(self, lease: Lease) -> bool:
        """Queue a newcomer; return whether it is now the head."""
        newest = self._newest
        assert newest is not lease, "a request waits once"
        if newest is None:
            self._oldest = lease
        else:
            lease.before = newest
            newest.after = lease
        self._newest = lease
        self.waiting += 1
        if self._ordered is None:
            if newest is None or newest.arrived_ns <= lease.arrived_ns:
                return newest is None
            self._ordered = KeyedHeap()
            for each in self.leases():
                self.move(each)
            return self.head is lease
        self._ordered.put(lease, self.order_of(lease))
        return self.head is lease

    def admit(self, lease: Lease) -> None:
        """Count a newcomer against the limits from now on; newcomers are admitted in order."""
        assert lease.before is self._newest_admitted, "newcomers are admitted in order"
        self._newest_admitted = lease
        lease.is_admitted = True
        self.capacity.take(lease.request.byte_size)

    def remove(self, lease: Lease) -> None:
        """Take a request out, wherever it stands."""
        before, after = lease.before, lease.after
        if before is None:
            assert self._oldest is lease, "it does not wait here"
            self._oldest = after
        else:
            before.after = after
            lease.before = None
        if after is None:
            self._newest = before
        else:
            after.before = before
            lease.after = None
        self.waiting -= 1
        if lease.is_admitted:
            if self._newest_admitted is lease:
                self._newest_admitted = before
            self.capacity.give_back(lease.request.byte_size)
        if self._ordered is not None:
            self._ordered.discard(lease)
            if not self.waiting and self.ordering is Ordering.FCFS:
                self._ordered = None

    def move(self, lease: Lease) -> None:
        """Move a waiting request to its place, after its deadline has changed."""
        if self._ordered is not None:
            self._ordered.put(lease, self.order_of(lease))

    def reorder(self, ordering: Ordering) -> None:
        """Change the ordering. O(waiting log waiting)."""
        self.ordering = ordering
        leases = self.leases()
        is_linked = ordering is Ordering.FCFS and all(
            before.arrived_ns <= after.arrived_ns for before, after in pairwise(leases)
        )
        self._ordered = None if is_linked else KeyedHeap()
        for lease in leases:
            self.move(lease)

    def place(self, lease: Lease) -> int:
        """Return how many of this flow go before a waiting request; O(waiting)."""
        mine = self.order_of(lease)
        return sum(self.order_of(other) < mine for other in self.leases())

    def leases(self) -> list[Lease]:
        """Return the waiting requests in the order in which they were handed over. O(waiting)."""
        leases = []
        lease = self._oldest
        while lease is not None:
            leases.append(lease)
            lease = lease.after
        return leases

"""Pure. Requests in flight that another process dispatched: a predecessor, or the leader before.

Each holds its slot until the access log reports its end, or its endpoint reports fewer requests
than are held there, or it is older than a bound. Requests that no store recorded are found in the
first report (scrape) of an endpoint: what it works on beyond the requests known to be in flight
there is counted, too.

A request dispatched just now may not have reached its endpoint yet, and one that has ended there is
in flight here a moment longer. So from the number missing in a report, subtract what was dispatched
since the report before, and what ends here until the next: at least so many leases are over. If
requests are so short that nothing is left, the number over is the least that was missing in every
report of some seconds. Where Envoy picks, the sums over all endpoints are compared.
"""

from typing import Final, NamedTuple, final

from flowcontrol.config import Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.events import LeasesRecovered, LoadObserved, RecoveredLease
from flowcontrol.flow import Flow, Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.pool import Pool
from flowcontrol.request import DEFAULT_PRIORITY, FlowKey, Request

MISSING_NS: Final = 5_000_000_000
"""Requests missing from all reports of their endpoint for so long are over."""
APART_NS: Final = 250_000_000
"""Least time between reports that are compared: requests reach their endpoints, and ends are known
here, in less. Where Envoy picks, each endpoint has reported again within it."""


class _Missing(NamedTuple):
    """Requests in flight here and not at their endpoint."""

    requests: int
    """The fewest of all reports since then."""
    since_ns: int


class _Report(NamedTuple):
    """The state of a place at one report."""

    at_ns: int
    begun: int
    """Requests dispatched so far."""
    requests: int
    """Requests in flight."""
    missing: int
    """Requests in flight here and not at the endpoint."""
    on_the_way: int
    """Most requests of this process that may not have reached the endpoint yet."""


@final
class Recovery:
    """Holds the slots of recovered leases. O(log leases) for each, O(leases) for a report.

    Args:
        pool: whose slots they are.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._flow = Flow(FlowKey(DEFAULT_PRIORITY, ""), Ordering.FCFS, Limits())
        """Belongs to no band, as recovered requests do."""
        self._leases: dict[str, Lease] = {}
        """By ticket."""
        self._due: KeyedHeap[str, int] = KeyedHeap()
        """When each is too old."""
        self._age_max_ns = 0
        self._is_counting_until_ns: int | None = None
        self._counted: set[str | None] = set()
        """Places that have reported since the recovery; None: the pool as a whole."""
        self._reports: dict[str, int] = {}
        """Requests at each endpoint, by its latest report since the recovery."""
        self._missing: dict[str | None, _Missing] = {}
        """By place."""
        self._latest: dict[str | None, _Report] = {}
        """By place, the latest report to compare with."""
        self._taken_up = 0
        """Leases taken up so far; their request ids are negative, unlike those of this process."""

    @property
    def count(self) -> int:
        """Leases that hold a slot."""
        return len(self._leases)

    @property
    def tickets(self) -> frozenset[str]:
        """Their tickets; O(leases)."""
        return frozenset(self._leases)

    def recover(self, recovered: LeasesRecovered, now_ns: int) -> None:
        """Replace the recovered leases."""
        for ticket in list(self._leases):
            self._release(ticket, now_ns)
        self._age_max_ns = recovered.age_max_ns
        self._is_counting_until_ns = now_ns + recovered.count_running_within_ns
        self._counted.clear()
        self._reports.clear()
        self._missing.clear()
        self._latest.clear()
        for lease in recovered.leases:
            if lease.age_ns < recovered.age_max_ns and lease.ticket not in self._leases:
                self._take_up(lease, now_ns)

    def ended(self, ticket: str, now_ns: int) -> None:
        """Free the slot of a lease whose end was reported."""
        if ticket in self._leases:
            self._release(ticket, now_ns)

    def expire(self, now_ns: int) -> None:
        """Free the slots of leases that are too old."""
        while (first := self._due.first()) is not None and first[0] <= now_ns:
            self._release(first[1], now_ns)

    def next_due_ns(self) -> int | None:
        """Return when the next lease is too old; None: there is none."""
        first = self._due.first()
        return None if first is None else first[0]

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Compare a report with the leases held, and free the slots of those that are over."""
        counts_until_ns = self._is_counting_until_ns
        is_counting = counts_until_ns is not None and now_ns < counts_until_ns
        if load.running is None or not (self._leases or is_counting):
            return
        self._reports[load.address] = load.running + load.waiting
        place: str | None = load.address
        if not self._pool.picks:
            place = None
            if any(each.address not in self._reports for each in self._pool.endpoints):
                return
        if place is not None and place not in self._pool.loads:
            return
        in_flight = self._pool.total if place is None else self._pool.loads[place]
        missing = in_flight.requests - self._reported(place)
        if is_counting and place not in self._counted:
            for _ in range(-missing):
                unknown = f"unknown.{self._taken_up + 1}"
                self._take_up(RecoveredLease(unknown, place), now_ns)
        self._counted.add(place)
        held = [ticket for ticket, each in self._leases.items() if place in {None, each.endpoint}]
        report = _Report(
            now_ns, in_flight.begun, in_flight.requests, missing, in_flight.requests - len(held)
        )
        over = max(self._certainly_over(place, report), self._long_missing(place, missing, now_ns))
        if over > 0:
            self._missing.pop(place, None)
            self._latest.pop(place, None)
            for ticket in held[:over]:  # the oldest first
                self._release(ticket, now_ns)

    def _certainly_over(self, place: str | None, report: _Report) -> int:
        """Return how many leases were over at the report before this one."""
        before = self._latest.get(place)
        if before is not None and report.at_ns - before.at_ns < APART_NS:
            return 0
        self._latest[place] = report
        if before is None:
            return 0
        begun = report.begun - before.begun
        ended = before.requests + begun - report.requests
        if begun < 0 or ended < 0:  # the endpoint was gone meanwhile
            return 0
        self._latest[place] = report._replace(on_the_way=min(report.on_the_way, begun))
        return before.missing - before.on_the_way - ended

    def _long_missing(self, place: str | None, missing: int, now_ns: int) -> int:
        """Return how many requests have been missing from every report for long enough."""
        if missing <= 0:
            self._missing.pop(place, None)
            return 0
        noted = self._missing.get(place)
        if noted is None:
            self._missing[place] = _Missing(missing, now_ns)
            return 0
        count = min(noted.requests, missing)
        if now_ns - noted.since_ns < MISSING_NS:
            self._missing[place] = _Missing(count, noted.since_ns)
            return 0
        return count

    def _reported(self, place: str | None) -> int:
        if place is not None:
            return self._reports[place]
        return sum(self._reports[each.address] for each in self._pool.endpoints)

    def _take_up(self, recovered: RecoveredLease, now_ns: int) -> None:
        self._taken_up += 1
        dispatched_ns = now_ns - recovered.age_ns
        lease = Lease(
            Request(-self._taken_up), self._flow, 0, dispatched_ns, Tokens(recovered.tokens, 0), 0.0
        )
        lease.is_in_flight = True
        lease.dispatched_ns = dispatched_ns
        lease.endpoint = recovered.endpoint
        self._leases[recovered.ticket] = lease
        self._due.put(recovered.ticket, dispatched_ns + self._age_max_ns)
        self._pool.take_up(lease)

    def _release(self, ticket: str, now_ns: int) -> None:
        self._due.discard(ticket)
        self._pool.release(self._leases.pop(ticket), now_ns)

"""Pure. The machine: facts and the time go in, decisions and the next wake-up come out.

The life of a request is four states; every move is made here and nowhere else:

    (new) ──Arrived──▶ WAITING ──dispatched──▶ IN FLIGHT ──Left──▶ (gone)
      │                   │
      └─▶ REJECTED_*      └──deadline │ Left │ displaced │ drained──▶ EVICTED_*

`handle` only takes facts in: a newcomer stands in its flow at once, but is not yet admitted.
`poll` then decides, always in the same order: expire, dispatch, displace, reject. So a burst that
fits is served in order of priority and never refused because of how it was cut into batches.
"""

from heapq import nlargest
from typing import assert_never, final

from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.config import ControllerConfig
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    Left,
    LoadObserved,
    ObjectivesChanged,
    Settled,
)
from flowcontrol.flow import Flow, Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.request import DEFAULT_PRIORITY, Outcome, Request
from flowcontrol.retry import DrainRate
from flowcontrol.saturation import FULL, ConcurrencyDetector
from flowcontrol.snapshot import BandSnapshot, EndpointSnapshot, FlowSnapshot, Snapshot
from flowcontrol.tally import Tally

_ELSEWHERE_NS = 1_000_000_000
"""Retry-After when this process is going away: another replica, or its successor, is soon there."""


@final
class FlowController:
    """Decides every request exactly once.

    Not thread-safe; owned by whoever calls it. `now_ns` is monotonic and never goes back.
    """

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        self._config = config
        self._capacity = Capacity(config.limits)
        self._drain_rate = DrainRate(now_ns)
        self._detector = ConcurrencyDetector(config.in_flight_max, config.picker)
        self._bands: dict[int, Band] = {}
        self._order: list[Band] = []
        """The bands, highest priority first."""
        self._objectives: dict[str, int] = {}
        self._unknown_objectives = 0
        self._leases: dict[int, Lease] = {}
        """Every live request, waiting or in flight."""
        self._newcomers: list[Lease] = []
        self._deadlines: KeyedHeap[Lease] = KeyedHeap()
        self._drain_until_ns: int | None = None
        self._arrived_count = 0
        self._ended_count = 0
        self._tallies: dict[int, Tally] = {}
        """By priority; as many as priorities were ever declared."""
        self._decisions: list[Decision] = []

    # Facts

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Take in one fact; O(log waiting), but O(waiting) when the pool empties or revives."""
        match fact:
            case Arrived(request):
                self._arrive(request, now_ns)
            case Left(request_id):
                self._leave(request_id, now_ns)
            case ObjectivesChanged(priorities):
                self._objectives = dict(priorities)
                self._declare({*self._objectives.values(), DEFAULT_PRIORITY}, now_ns)
            case EndpointsChanged(addresses):
                self._change_endpoints(addresses, now_ns)
            case Settled() | LoadObserved():
                pass
            case DrainBegan(budget_ns):
                if self._drain_until_ns is None:
                    self._drain_until_ns = now_ns + budget_ns
            case _:
                assert_never(fact)

    def _arrive(self, request: Request, now_ns: int) -> None:
        assert request.request_id not in self._leases, "a request arrives once"
        priority = self._priority(request.objective)
        self._arrived_count += 1
        if self._drain_until_ns is not None:
            self._ended_count += 1
            self._tally(priority).count(Outcome.REJECTED_DRAINING, 0)
            self._decisions.append(
                Decision(
                    request.request_id,
                    Outcome.REJECTED_DRAINING,
                    priority,
                    request.flow_id,
                    waited_ns=0,
                    retry_after_ns=_ELSEWHERE_NS,
                    saturation=self._detector.saturation(),
                )
            )
            return
        band = self._bands.get(priority) or self._add_band(priority, now_ns)
        lease = Lease(request, band.flow(request.flow_id), self._arrived_count, now_ns, now_ns)
        self._leases[request.request_id] = lease
        self._newcomers.append(lease)
        band.queue(lease)

    def _priority(self, objective: str | None) -> int:
        if objective is None:
            return DEFAULT_PRIORITY
        priority = self._objectives.get(objective)
        if priority is None:
            self._unknown_objectives += 1
            return DEFAULT_PRIORITY
        return priority

    def _leave(self, request_id: int, now_ns: int) -> None:
        lease = self._leases.get(request_id)
        if lease is None:
            return  # refused already; the decision crossed the departure
        if not lease.is_in_flight:
            self._end_waiting(lease, Outcome.EVICTED_CANCELLED, now_ns)
            return
        del self._leases[request_id]
        self._ended_count += 1
        band = self._bands[lease.flow.key.priority]
        self._detector.release(lease.endpoint)
        self._tally(band.priority).completed += 1
        band.complete(lease)
        self._drop_if_done(band)

    def _change_endpoints(self, addresses: tuple[str, ...], now_ns: int) -> None:
        was_empty = self._detector.is_empty
        self._detector.set_endpoints(addresses)
        if self._detector.is_empty == was_empty:
            return
        for lease in self._leases.values():
            if lease.is_in_flight:
                continue
            if lease.budget_from_ns == lease.arrived_ns:
                lease.budget_from_ns = now_ns  # once: a flapping pool extends no wait
            if lease.is_admitted:
                # Judged by its new budget only after this turn: a pool that revives serves first.
                self._set_deadline(lease, now_ns + 1)

    def _declare(self, priorities: set[int], now_ns: int) -> None:
        for band in list(self._order):
            band.is_declared = band.priority in priorities
            self._drop_if_done(band)
        for priority in sorted(priorities - {DEFAULT_PRIORITY} - self._bands.keys()):
            self._add_band(priority, now_ns)

    def _add_band(self, priority: int, now_ns: int) -> Band:
        band = Band(priority, self._config.settings_for(priority), now_ns)
        self._bands[priority] = band
        self._order.append(band)
        self._order.sort(key=lambda each: -each.priority)
        return band

    def _drop_if_done(self, band: Band) -> None:
        if not band.is_declared and band.is_idle:
            del self._bands[band.priority]
            self._order.remove(band)

    # Decisions

    def poll(self, now_ns: int) -> list[Decision]:
        """Decide all that can be decided now; O(log waiting) per decision."""
        self._expire(now_ns)
        self._dispatch(now_ns)
        self._make_room(now_ns)
        if self._drain_until_ns is not None and now_ns >= self._drain_until_ns:
            for lease in self._waiting_leases():
                self._end_waiting(lease, Outcome.EVICTED_DRAINED, now_ns, _ELSEWHERE_NS)
        assert self._arrived_count == len(self._leases) + self._ended_count, "a request was lost"
        decisions, self._decisions = self._decisions, []
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Return when `poll` must be called even if nothing happens; None when it need not be."""
        first = self._deadlines.first()
        deadline_ns = None if first is None else first[0]
        if self._drain_until_ns is None or not self.waiting:
            return deadline_ns
        return (
            self._drain_until_ns if deadline_ns is None else min(deadline_ns, self._drain_until_ns)
        )

    def _expire(self, now_ns: int) -> None:
        while (first := self._deadlines.first()) is not None and first[0] <= now_ns:
            self._end_waiting(first[1], self._expired, now_ns)

    @property
    def _expired(self) -> Outcome:
        is_empty = self._detector.is_empty
        return Outcome.EVICTED_NO_ENDPOINTS if is_empty else Outcome.EVICTED_TTL

    def _dispatch(self, now_ns: int) -> None:
        detector = self._detector
        for band in self._order:
            while band.waiting and detector.saturation() < FULL:
                lease = band.next()
                lease.endpoint = detector.charge()
                self._deadlines.discard(lease)
                if lease.is_admitted:
                    self._capacity.give_back(lease.request.byte_size)
                band.dispatch(lease)
                band.drain_rate.dispatched(now_ns)
                self._drain_rate.dispatched(now_ns)
                self._decide(lease, Outcome.DISPATCHED, now_ns)
            if band.waiting:
                return  # gated with work waiting: no lower band may overtake

    def _make_room(self, now_ns: int) -> None:
        """Admit, or refuse, each newcomer that was not dispatched.

        From the lowest band up, so that whoever can be displaced has itself been admitted before.
        """
        newcomers, self._newcomers = self._newcomers, []
        if len(newcomers) > 1:
            newcomers.sort(key=lambda lease: lease.flow.key.priority)
        for lease in newcomers:
            if lease.is_in_flight or lease.request.request_id not in self._leases:
                continue
            deadline_ns = self._deadline_ns(lease)
            if deadline_ns is not None and deadline_ns <= now_ns:
                self._end_waiting(lease, self._expired, now_ns)  # it came to go now or never
                continue
            size = lease.request.byte_size
            band = self._bands[lease.flow.key.priority]
            scopes = [] if band.capacity.fits(size) else [band.drain_rate]
            if not self._capacity.fits(size) and (scopes or not self._displace_for(lease, now_ns)):
                scopes.append(self._drain_rate)
            if scopes:
                self._refuse(lease, scopes, now_ns)
            else:
                self._admit(lease, band)

    def _displace_for(self, lease: Lease, now_ns: int) -> bool:
        """Evict waiting work of lower bands until the newcomer fits; nobody, if it never would."""
        size = lease.request.byte_size
        lower = [band for band in self._order if band.priority < lease.flow.key.priority]
        freed_requests = sum(band.capacity.requests for band in lower)
        freed_bytes = sum(band.capacity.bytes for band in lower)
        if not freed_requests or not self._capacity.fits(
            size, freed_requests=freed_requests, freed_bytes=freed_bytes
        ):
            return False
        while not self._capacity.fits(size):
            while not lower[-1].waiting:
                lower.pop()
            most_ns = self._config.retry_after_max_ns
            retry_after_ns = self._drain_rate.promise(now_ns, most_ns)
            victim = lower[-1].first_to_give_way()
            self._end_waiting(victim, Outcome.EVICTED_DISPLACED, now_ns, retry_after_ns)
        return True

    def _admit(self, lease: Lease, band: Band) -> None:
        lease.is_admitted = True
        band.capacity.take(lease.request.byte_size)
        self._capacity.take(lease.request.byte_size)
        self._set_deadline(lease)

    def _refuse(self, lease: Lease, scopes: list[DrainRate], now_ns: int) -> None:
        """Reject a newcomer; where two limits refuse it, the slower one says when to come back."""
        if self._detector.is_empty:
            self._end_waiting(lease, Outcome.REJECTED_NO_ENDPOINTS, now_ns)
            return
        most_ns = self._config.retry_after_max_ns
        promises = [scope.promise(now_ns, most_ns) for scope in scopes]
        retry_after_ns = max((each for each in promises if each is not None), default=None)
        self._end_waiting(lease, Outcome.REJECTED_CAPACITY, now_ns, retry_after_ns)

    def _set_deadline(self, lease: Lease, earliest_ns: int = 0) -> None:
        deadline_ns = self._deadline_ns(lease)
        if deadline_ns is None:
            self._deadlines.discard(lease)
        else:
            self._deadlines.put(lease, max(deadline_ns, earliest_ns))

    def _deadline_ns(self, lease: Lease) -> int | None:
        """Return when it will have waited too long: the earliest of all that bounds its wait."""
        ttl_ns = self._bands[lease.flow.key.priority].settings.ttl_ns
        empty_ttl_ns = self._config.no_endpoint_ttl_ns
        current_ns = empty_ttl_ns if self._detector.is_empty else ttl_ns
        deadlines = []
        if current_ns is not None:
            deadlines.append(lease.budget_from_ns + current_ns)
        if ttl_ns is not None and empty_ttl_ns is not None:
            deadlines.append(lease.arrived_ns + ttl_ns + empty_ttl_ns)
        if lease.request.ttl_ns is not None:
            deadlines.append(lease.arrived_ns + lease.request.ttl_ns)
        return min(deadlines, default=None)

    def _end_waiting(
        self, lease: Lease, outcome: Outcome, now_ns: int, retry_after_ns: int | None = None
    ) -> None:
        """Take a request out of the queue undispatched: the one way there is."""
        del self._leases[lease.request.request_id]
        self._ended_count += 1
        self._deadlines.discard(lease)
        band = self._bands[lease.flow.key.priority]
        if lease.is_admitted:
            self._capacity.give_back(lease.request.byte_size)
        band.remove(lease)
        self._decide(lease, outcome, now_ns, retry_after_ns)
        self._drop_if_done(band)

    def _decide(
        self, lease: Lease, outcome: Outcome, now_ns: int, retry_after_ns: int | None = None
    ) -> None:
        key = lease.flow.key
        waited_ns = now_ns - lease.arrived_ns
        self._tally(key.priority).count(outcome, waited_ns)
        self._decisions.append(
            Decision(
                lease.request.request_id,
                outcome,
                key.priority,
                key.flow_id,
                waited_ns,
                lease.endpoint,
                retry_after_ns,
                self._detector.saturation(),
                self._bands[key.priority].waiting,
            )
        )

    def _tally(self, priority: int) -> Tally:
        tally = self._tallies.get(priority)
        if tally is None:
            tally = self._tallies[priority] = Tally()
        return tally

    # What there is to see

    @property
    def waiting(self) -> int:
        """Requests waiting, newcomers included."""
        return sum(band.waiting for band in self._order)

    @property
    def is_drained(self) -> bool:
        """Whether draining has begun and every waiting request is decided."""
        return self._drain_until_ns is not None and not self.waiting

    def snapshot(self, now_ns: int, flows_max: int) -> Snapshot:
        """Return the state, frozen, with at most so many flows a band; O(bands + flows)."""
        in_flight_max = self._config.in_flight_max
        return Snapshot(
            saturation=self._detector.saturation(),
            waiting=self.waiting,
            waiting_bytes=self._capacity.bytes,
            in_flight=len(self._leases) - self.waiting,
            is_draining=self._drain_until_ns is not None,
            bands=tuple(_band_snapshot(band, now_ns, flows_max) for band in self._order),
            totals={priority: tally.totals() for priority, tally in self._tallies.items()},
            endpoints=tuple(
                EndpointSnapshot(address, count, in_flight_max)
                for address, count in self._detector.in_flight().items()
            ),
            objectives=dict(self._objectives),
            unknown_objectives=self._unknown_objectives,
        )

    def check_invariants(self) -> None:
        """Count everything anew and hold it against the accounts; O(requests). For tests."""
        assert not self._newcomers, "newcomers are decided in the turn they came in"
        waiting = self._waiting_leases()
        assert all(lease.is_admitted for lease in waiting)
        assert len(waiting) == self.waiting == self._capacity.requests
        assert self._capacity.bytes == sum(lease.request.byte_size for lease in waiting)
        assert [band.priority for band in self._order] == sorted(self._bands, reverse=True)
        for band in self._order:
            flows = band.flows.values()
            mine = [lease for lease in waiting if lease.flow.key.priority == band.priority]
            assert len(mine) == band.waiting == band.capacity.requests == sum(map(len, flows))
            assert band.capacity.bytes == sum(flow.waiting_bytes for flow in flows)
            assert band.in_flight == sum(flow.in_flight for flow in flows)
            assert all(flow or flow.in_flight for flow in flows), "an idle flow is forgotten"
            assert band.is_declared or not band.is_idle, "an undeclared idle band is forgotten"
        in_flight = sum(band.in_flight for band in self._order)
        assert in_flight == len(self._leases) - len(waiting)
        assert not waiting or self._detector.saturation() >= FULL, "work waits beside a free slot"

    def _waiting_leases(self) -> list[Lease]:
        return [lease for lease in self._leases.values() if not lease.is_in_flight]


def _band_snapshot(band: Band, now_ns: int, flows_max: int) -> BandSnapshot:
    flows = [_flow_snapshot(flow, now_ns) for flow in band.flows.values()]
    waits = [flow.oldest_wait_ns for flow in flows if flow.oldest_wait_ns is not None]
    return BandSnapshot(
        priority=band.priority,
        is_declared=band.is_declared,
        waiting=band.waiting,
        waiting_bytes=band.capacity.bytes,
        in_flight=band.in_flight,
        oldest_wait_ns=max(waits, default=None),
        ceiling=FULL,
        requests_max=band.settings.limits.requests_max,
        bytes_max=band.settings.limits.bytes_max,
        flow_count=len(flows),
        flows=tuple(nlargest(flows_max, flows, key=lambda flow: (flow.waiting, flow.in_flight))),
    )


def _flow_snapshot(flow: Flow, now_ns: int) -> FlowSnapshot:
    return FlowSnapshot(
        flow_id=flow.key.flow_id,
        waiting=len(flow),
        waiting_bytes=flow.waiting_bytes,
        in_flight=flow.in_flight,
        oldest_wait_ns=now_ns - flow.head.arrived_ns if flow else None,
    )

"""Pure. The state machine: facts and the time go in, decisions and the next wake-up come out.

A request has four states. Every transition is made here:

    (new) ──Arrived──▶ WAITING ──dispatched──▶ IN FLIGHT ──Left──▶ (gone)
      │                   │                        └──reclaimed: ended by Envoy, then Left
      └─▶ REJECTED_*      └──deadline │ Left │ displaced │ drained──▶ EVICTED_*

`handle` only takes in facts: a newcomer is put into its flow at once, but not yet admitted. `poll`
then decides, always in the same order: expire, dispatch, displace, reject. So a burst that fits is
served in order of priority, and is never refused because of how it was cut into batches.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Final, assert_never, final

from flowcontrol.across import Across
from flowcontrol.band import Band
from flowcontrol.bands import Bands
from flowcontrol.capacity import Capacity
from flowcontrol.ceilings import BandCeilings
from flowcontrol.charges import Charges
from flowcontrol.config import RETRY_AFTER_MAX_NS, Ceilings, ControllerConfig, Ordering, Role
from flowcontrol.decisions import Decisions
from flowcontrol.events import (
    Answered,
    Arrived,
    Change,
    Decision,
    DrainBegan,
    Endpoint,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    LeasesRecovered,
    Left,
    LoadObserved,
    MemoryRestored,
    ObjectivesChanged,
    Reconfigured,
    RecoveredLeaseEnded,
    Settled,
    SettlementLost,
)
from flowcontrol.expiry import Expiry, earlier
from flowcontrol.flow import Lease
from flowcontrol.forecast import Ahead, Forecast, forecast
from flowcontrol.learned import Learned
from flowcontrol.picker import FULL
from flowcontrol.pool import Pool
from flowcontrol.reading import ReadingShare
from flowcontrol.reclaim import Demand, Reclaimer, needed
from flowcontrol.recovery import Recovery
from flowcontrol.request import DEFAULT_PRIORITY, Outcome, Request, Scope
from flowcontrol.reserve import Reserve
from flowcontrol.retry import DrainRate, latest_promise
from flowcontrol.room import displaced_for, without_room
from flowcontrol.saturation import make_detectors

_RETRY_MIN_NS: Final = 1_000_000_000
"""Retry-After of a refusal while no drain rate is known."""
_ELSEWHERE_NS: Final = 1_000_000_000
"""Retry-After when this process ends: another replica, or its successor, soon takes over."""


@final
class FlowController:
    """Decides every request exactly once.

    Not thread-safe: one caller owns it. `now_ns` is monotonic and never goes back.
    """

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        self.config = config
        self.capacity = Capacity(config.limits)
        self.bands = Bands(config, self.capacity)
        self.pool = Pool(config.picker, make_detectors(config.detectors), config.fallbacks_max)
        self.recovery = Recovery(self.pool)
        self.charges = Charges(config.prices)
        self.decisions = Decisions(self.bands, self.pool)
        self._drain_rate = DrainRate(now_ns)
        self._across = Across()
        self._expiry = Expiry(config, self.bands)
        self._reclaimer = Reclaimer(config.reclaim)
        self._leases: dict[int, Lease] = {}
        """Every live request, waiting or in flight."""
        self._newcomers: list[Lease] = []
        self._drain_until_ns: int | None = None
        self._arrived_count = 0
        self._ended_count = 0
        self._turn_count = 0
        """Dispatches, departures and scrapes: the clock of soft-reflective ceilings."""
        self._ceilings = BandCeilings(config.ceilings, [])
        self._reserve = Reserve(now_ns)
        self._has_reserve = config.ceilings.policy is Ceilings.RESERVE
        self._reading = ReadingShare()
        self._held_until_ns: int | None = None
        """When a lower band may go on that has places but waits for prompts; None: none does."""
        self.waiting = 0
        """Requests waiting, including newcomers."""

    # Facts

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Take in one fact; O(log waiting), but O(waiting) when regime or settings change."""
        if isinstance(fact, Arrived):  # a match by position takes five times as long
            self._arrive(fact.request, now_ns)
        elif isinstance(fact, Left):
            self._leave(fact, now_ns)
        elif isinstance(fact, Settled):
            self._settle(fact, now_ns)
        elif isinstance(fact, Answered):
            if (lease := self._leases.get(fact.request_id)) is not None:
                self.pool.moved(lease, fact.endpoint, now_ns)
                self._reclaimer.answered(lease)
        elif isinstance(fact, LoadObserved):
            self._turn_count += 1
            self.pool.observed(fact, now_ns)
            self.recovery.observed(fact, now_ns)
        else:
            self._change(fact, now_ns)

    def _change(self, fact: Change, now_ns: int) -> None:
        match fact:
            case ObjectivesChanged(priorities):
                self.bands.declare(priorities, now_ns)
                self._bands_changed(now_ns)
            case EndpointsChanged():
                self._change_endpoints(fact, now_ns)
            case Reconfigured(config):
                self._reconfigure(config, now_ns)
            case FlowEvicted(priority, flow_id):
                for lease in self.bands.waiting_of(priority, flow_id):
                    self._end_waiting(lease, Outcome.EVICTED_OPERATOR, now_ns)
            case DrainBegan(budget_ns):
                if self._drain_until_ns is None:
                    self._drain_until_ns = now_ns + budget_ns
            case _:
                self._change_in_flight(fact, now_ns)

    def _change_in_flight(
        self,
        fact: LeasesRecovered | RecoveredLeaseEnded | MemoryRestored | SettlementLost,
        now_ns: int,
    ) -> None:
        match fact:
            case LeasesRecovered():
                self.recovery.recover(fact, now_ns)
            case RecoveredLeaseEnded(ticket):
                self.recovery.ended(ticket, now_ns)
            case MemoryRestored(memory):
                if DEFAULT_PRIORITY in {band.priority for band in memory.bands}:
                    self.bands.needed(DEFAULT_PRIORITY, now_ns)
                    self._bands_changed(now_ns)
                self.learned.restore(memory, now_ns)
            case SettlementLost(request_id):
                self.charges.lost(request_id)
            case _:
                assert_never(fact)

    @property
    def learned(self) -> Learned:
        """Access to what was learnt, to save or restore it."""
        reserve = self._reserve if self._has_reserve else None
        return Learned(self.bands, self.pool, self.charges.estimator, self._drain_rate, reserve)

    def _arrive(self, request: Request, now_ns: int) -> None:
        assert request.request_id not in self._leases, "a request arrives once"
        priority = self.bands.priority_of(request.objective)
        self._arrived_count += 1
        if self._drain_until_ns is not None:
            self._ended_count += 1
            self.decisions.turn_away(request, priority, Outcome.REJECTED_DRAINING, _ELSEWHERE_NS)
            return
        band = self.bands.by_priority.get(priority)
        if band is None:
            band = self.bands.needed(priority, now_ns)
            self._bands_changed(now_ns)
        if self._has_reserve:
            self._reserve.arrived(priority, now_ns)
        tokens, cost = self.charges.estimate(request)
        flow = band.flow(request.flow_id)
        arrived_ns = request.arrived_ns
        if arrived_ns is None or arrived_ns > now_ns:
            arrived_ns = now_ns
        lease = Lease(request, flow, self._arrived_count, arrived_ns, tokens, cost)
        if band.settings.ordering is Ordering.EDF:
            self._expiry.appoint(lease, band)
        self._leases[request.request_id] = lease
        self._newcomers.append(lease)
        self.waiting += 1
        band.queue(lease, now_ns)

    def _leave(self, left: Left, now_ns: int) -> None:
        lease = self._leases.get(left.request_id)
        if lease is None:
            return  # refused already; the decision crossed the departure
        if not lease.is_in_flight:
            self._end_waiting(lease, left.outcome, now_ns)
            return
        del self._leases[left.request_id]
        self._ended_count += 1
        self._turn_count += 1
        band = self.bands.by_priority[lease.flow.key.priority]
        self.pool.release(lease, now_ns)
        if self._has_reserve:
            self._reserve.left(now_ns)
        if self.config.reclaim.is_enabled:
            self._reclaimer.left(lease)
        self.decisions.tally(band.priority).completed += 1
        band.complete(lease)
        self.charges.ended(lease)
        self._drop_if_done(band, now_ns)

    def _settle(self, settled: Settled, now_ns: int) -> None:
        """Correct the estimated charge of a request, once, before or after it has left."""
        early = self.charges.early(settled.request_id)
        if early is not None:
            self.decisions.settled(early, settled)
        news = self.charges.settle(settled, self._leases.get(settled.request_id))
        if news is None:
            return
        lease, error = news
        band = self.bands.by_priority.get(lease.flow.key.priority)
        if band is not None:
            band.fairness.correct(lease.flow.key.flow_id, error, now_ns)
        self.pool.settled(lease, settled, now_ns)
        self.decisions.settled(lease, settled)

    def _change_endpoints(self, change: EndpointsChanged, now_ns: int) -> None:
        endpoints = [Endpoint(each, change.roles.get(each, Role.BOTH)) for each in change.addresses]
        self.pool.set_endpoints(endpoints, now_ns)
        self._expiry.change_regime(self._waiting(), now_ns, is_empty=self.pool.is_empty)
        self._reclaimer.reconfigure(self.config.reclaim, self._leases.values())

    def _reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Apply other settings; requests keep their places, and accounts stay. O(requests)."""
        self.config = config
        self.capacity.limits = config.limits
        self.charges.prices = config.prices
        self.bands.reconfigure(config, now_ns)
        self.pool.reconfigure(config.picker, make_detectors(config.detectors), now_ns)
        self.pool.fallbacks_max = config.fallbacks_max
        waiting = self._waiting()
        self._expiry.reconfigure(config, waiting, now_ns)
        self._across.reconfigured(waiting, self.bands)
        self._bands_changed(now_ns)
        self._reclaimer.reconfigure(config.reclaim, self._leases.values())

    def _bands_changed(self, now_ns: int) -> None:
        self._across.set_bands(self.bands)
        priorities = [band.priority for band in self.bands]
        self._ceilings = BandCeilings(self.config.ceilings, priorities)
        self._has_reserve = self.config.ceilings.policy is Ceilings.RESERVE
        if self._has_reserve:
            self._reserve.set_bands(priorities, self.config, now_ns)
        else:
            self.pool.spare_readers(is_on=False)

    # Decisions

    def poll(self, now_ns: int) -> list[Decision]:
        """Decide everything that can be decided now. O(log waiting) per decision."""
        if self.pool.has_timer:
            self.pool.advance(now_ns)
        self.recovery.expire(now_ns)
        while (late := self._expiry.first_due(now_ns)) is not None:
            self._end_waiting(late, self._expiry.outcome, now_ns)
        self._dispatch(now_ns)
        if self._newcomers:
            ended_count = self._ended_count
            self._make_room(now_ns)
            is_promoted = self._across.is_active and self._across.is_due(
                now_ns, self.pool.has_room_in
            )
            if self._ended_count != ended_count or is_promoted:
                self._dispatch(now_ns)  # the head of its flow may have had no room before
        if self._drain_until_ns is not None and now_ns >= self._drain_until_ns:
            for lease in self._waiting():
                self._end_waiting(lease, Outcome.EVICTED_DRAINED, now_ns, _ELSEWHERE_NS)
        if self.config.reclaim.is_enabled and self.waiting:
            self._reclaim(now_ns)
        assert self._arrived_count == len(self._leases) + self._ended_count, "a request was lost"
        return self.decisions.take()

    def next_wakeup_ns(self) -> int | None:
        """Return when `poll` must be called even if nothing happens; None: it need not be."""
        if not self.waiting:
            return None
        first_ns = self._expiry.next_due_ns()
        if self._drain_until_ns is not None:
            first_ns = earlier(first_ns, self._drain_until_ns)
        if self.pool.has_timer:
            first_ns = earlier(first_ns, self.pool.next_change_ns())
        first_ns = earlier(first_ns, self.recovery.next_due_ns())
        first_ns = earlier(first_ns, self._held_until_ns)
        if self.config.reclaim.is_enabled:
            first_ns = earlier(first_ns, self._reclaimer.next_change_ns())
        if self._across.is_active and self.pool.saturation() < FULL:  # bands may be gated
            promotion_ns = self._across.next_promotion_ns(self.pool.has_room_in)
            first_ns = earlier(first_ns, promotion_ns)
        return first_ns

    def _dispatch(self, now_ns: int) -> None:
        """Dispatch what may go: the highest band first, and within it the flow whose turn it is.

        A gated band with work waiting ends the pass, so that no lower band overtakes it. Only a
        promotion or a share (`across`) overrides this order. A request whose endpoints have no room
        is passed over: those that go take no place that it could have.
        """
        saturation = self.pool.saturation()
        self._held_until_ns = None
        if self._has_reserve:
            self._reserve.renew(self.pool.load(), self.config.ceilings.ceiling_max, now_ns)
            self.pool.spare_readers(is_on=self._reading.is_shared(now_ns))
        if saturation >= FULL:
            return
        has_room = self.pool.has_room_in
        for rank, band in enumerate(self.bands):
            while band.waiting:
                lease = None
                if self._across.is_active:
                    lease = self._across.next_exception(now_ns, has_room)
                if lease is not None:
                    self._send(lease, self.bands.by_priority[lease.flow.key.priority], now_ns)
                elif self._is_gated(rank, saturation, now_ns):
                    return
                else:
                    lease = band.next(has_room)
                    if lease is None:
                        break
                    self._send(lease, band, now_ns)
                saturation = self.pool.saturation()
                if saturation >= FULL:
                    return

    def _send(self, lease: Lease, band: Band, now_ns: int) -> None:
        """Dispatch a request."""
        if self._across.is_active:
            self._across.dispatched(lease, band, now_ns, self.pool.has_room_in)
        before = self.pool.load()
        self.pool.charge(lease, now_ns)
        if self._has_reserve:
            self._reserve.sent(band.priority, self.pool.load() - before)
            self._reading.sent(self.pool.reading_ns(lease), now_ns)
        self._drain_rate.dispatched(now_ns)
        band.dispatch(lease, now_ns)
        self._forget_waiting(lease, band, now_ns)
        lease.dispatched_ns = now_ns
        self._learn_wait(lease, band, now_ns, is_over=True)
        if self.config.reclaim.is_enabled:
            self._reclaimer.dispatched(lease)
        self._turn_count += 1
        self.decisions.add(lease, band, Outcome.DISPATCHED, now_ns)

    def _is_gated(self, rank: int, saturation: float, now_ns: int) -> bool:
        """Whether a band has no place, or must wait for prompts to be read first."""
        is_lower = self._is_lower(rank)
        if saturation >= self._ceiling(rank, saturation):
            if is_lower:
                self._reading.filled(now_ns)
            return True
        if not is_lower or not self._reading.holds(now_ns):
            return False
        self._held_until_ns = self._reading.until_ns
        return True

    def _is_lower(self, rank: int) -> bool:
        return self._has_reserve and self._reserve.is_lower(rank)

    def _rank(self, band: Band) -> int:
        return sum(each.priority > band.priority for each in self.bands)

    def held_until_ns(self, band: Band) -> int | None:
        """Return when a band may go on that has places but waits for prompts. O(bands).

        None: it does not wait for that.
        """
        return self._held_until_ns if self._is_lower(self._rank(band)) else None

    def _ceiling(self, rank: int, saturation: float) -> float:
        if self._has_reserve:
            return self._reserve.ceilings[rank]
        return self._ceilings.of(rank, saturation, self._turn_count)

    def gates(self) -> list[tuple[Band, float]]:
        """Return every band, highest first, with the saturation at which it is gated; O(bands)."""
        saturation = self.pool.saturation()
        return [(band, self._ceiling(rank, saturation)) for rank, band in enumerate(self.bands)]

    def _make_room(self, now_ns: int) -> None:
        """Admit or refuse each newcomer that was not dispatched.

        From the lowest band up, so that requests to displace have been admitted before.
        """
        newcomers, self._newcomers = self._newcomers, []
        if len(newcomers) > 1 and self.waiting:
            newcomers.sort(key=lambda lease: lease.flow.key.priority)
        for lease in newcomers:
            if lease.is_in_flight or lease.request.request_id not in self._leases:
                continue
            band = self.bands.by_priority[lease.flow.key.priority]
            self._expiry.appoint(lease, band)
            if lease.deadline_ns is not None and lease.deadline_ns <= now_ns:
                self._end_waiting(lease, self._expiry.outcome, now_ns)  # it may not wait at all
                continue
            if lease.request.subset is not None and not self.pool.serves(lease):
                self._end_waiting(lease, Outcome.REJECTED_NO_ENDPOINTS, now_ns)
            elif self._has_room(lease, band, now_ns):
                self._admit(lease, band, now_ns)
            else:
                self._refuse(lease, band, now_ns)

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        """Whether a newcomer fits; displaces requests for it, if that makes it fit."""
        if lease.flow.capacity.has_room(lease.request.byte_size):
            return True
        victims = displaced_for(lease, band, self.bands, self.capacity)
        if victims is None:
            return False
        for victim in victims:
            is_equal = victim.flow.key.priority == band.priority
            self._displace(victim, band.drain_rate if is_equal else self._drain_rate, now_ns)
        return True

    def _displace(self, victim: Lease, rate: DrainRate, now_ns: int) -> None:
        retry_after_ns = rate.promise(now_ns, RETRY_AFTER_MAX_NS)
        self._end_waiting(victim, Outcome.EVICTED_DISPLACED, now_ns, retry_after_ns)

    def _admit(self, lease: Lease, band: Band, now_ns: int) -> None:
        band.admit(lease, now_ns)
        if self.capacity.requests == 1:
            self._drain_rate.began(now_ns)
        self._expiry.admit(lease)
        if self._across.is_active:
            self._across.admitted(lease, band)
        if band.calibration.is_due() or self.config.forecasts:
            place = lease.flow.capacity.requests - 1  # as if in order of arrival: O(1)
            lease.forecast = self._expected(lease, band, band.ahead(lease, place), now_ns)

    def _refuse(self, lease: Lease, band: Band, now_ns: int) -> None:
        """Reject a newcomer; of several limits without room, the slowest sets Retry-After."""
        if self.pool.is_empty:
            self._end_waiting(lease, Outcome.REJECTED_NO_ENDPOINTS, now_ns)
            return
        lease.without_room = without_room(lease, band, self.capacity)
        rates = {
            self._drain_rate if scope is Scope.ALL else band.drain_rate
            for scope in lease.without_room
        }
        retry_after_ns = latest_promise(rates, now_ns, RETRY_AFTER_MAX_NS)
        if retry_after_ns is not None:
            retry_after_ns = min(band.calibration.late(retry_after_ns), RETRY_AFTER_MAX_NS)
        else:
            retry_after_ns = self._longest_known(band, now_ns)
        self._end_waiting(lease, Outcome.REJECTED_CAPACITY, now_ns, retry_after_ns)

    def _longest_known(self, band: Band, now_ns: int) -> int:
        """Return Retry-After for a scope of which no drain rate is known.

        Bands above may drain, and this one drains no faster; or else nothing has moved for a time,
        and the same time may pass again. The longer counts.
        """
        promised_ns = self._drain_rate.promise(now_ns, RETRY_AFTER_MAX_NS) or _RETRY_MIN_NS
        busy_ns = max(band.drain_rate.busy_ns(now_ns), self._drain_rate.busy_ns(now_ns))
        return min(max(promised_ns, busy_ns), RETRY_AFTER_MAX_NS)

    def _reclaim(self, now_ns: int) -> None:
        """End sheddable requests in flight for more important ones that a full pool holds up."""
        self._reclaimer.give_up(now_ns)
        saturation = self.pool.unheld()  # ending a request frees no time for reading
        band, ceiling = next((band, ceiling) for band, ceiling in self.gates() if band.waiting)
        if self.pool.is_empty or saturation < ceiling:
            return
        must_end = needed(self.pool.total.requests, saturation, ceiling, band.waiting)
        demand = Demand(band.waiting, band.bound if self.pool.picks else {})
        for victim in self._reclaimer.victims(must_end, band.priority, demand, self.pool, now_ns):
            retry_after_ns = self._drain_rate.promise(now_ns, RETRY_AFTER_MAX_NS)
            its_band = self.bands.by_priority[victim.flow.key.priority]
            self.decisions.add(victim, its_band, Outcome.RECLAIMED, now_ns, retry_after_ns)

    def _end_waiting(
        self, lease: Lease, outcome: Outcome, now_ns: int, retry_after_ns: int | None = None
    ) -> None:
        """Remove a request from the queue undispatched; the only place that does."""
        del self._leases[lease.request.request_id]
        self._ended_count += 1
        band = self.bands.by_priority[lease.flow.key.priority]
        band.remove(lease, now_ns)
        self._learn_wait(lease, band, now_ns, is_over=False)
        self._forget_waiting(lease, band, now_ns)
        self.decisions.add(lease, band, outcome, now_ns, retry_after_ns)
        self._drop_if_done(band, now_ns)

    def _forget_waiting(self, lease: Lease, band: Band, now_ns: int) -> None:
        self.waiting -= 1
        if lease.is_admitted:
            if not self.capacity.requests:
                self._drain_rate.ended(now_ns)
            self._expiry.remove(lease)
            if self._across.is_active:
                self._across.removed(lease, band)

    def _drop_if_done(self, band: Band, now_ns: int) -> None:
        if not band.is_declared and band.is_idle:
            self.bands.drop_if_done(band)
            self._bands_changed(now_ns)

    # Queries

    @property
    def in_flight(self) -> int:
        """Requests dispatched and not ended."""
        return len(self._leases) - self.waiting

    @property
    def is_draining(self) -> bool:
        """Whether arrivals are refused."""
        return self._drain_until_ns is not None

    @property
    def is_drained(self) -> bool:
        """Whether draining has begun and every waiting request is decided."""
        return self.is_draining and not self.waiting

    def expected(self, request_id: int, now_ns: int) -> Forecast | None:
        """Return the forecast of a waiting request; None: it does not wait. O(waiting)."""
        lease = self._leases.get(request_id)
        if lease is None or lease.is_in_flight:
            return None
        band = self.bands.by_priority[lease.flow.key.priority]
        return self._expected(lease, band, band.ahead_now(lease), now_ns)

    def forecast(self, band: Band, ahead: Ahead, now_ns: int) -> Forecast:
        """Return the forecast of a request with so much of its band ahead of it. O(bands)."""
        above = self.bands.waiting_above(band)
        if self.pool.is_empty:
            return Forecast(above + ahead.requests + ahead.tied, None)
        held_ns = self.pool.held_ns(now_ns)
        if held_ns is not None:
            load = self.pool.load()
            held_ns = held_ns if load < self._ceiling(self._rank(band), load) else None
        elif (until_ns := self.held_until_ns(band)) is not None:
            held_ns = max(0, until_ns - now_ns)
        rates = band.drain_rate, self._drain_rate
        return band.calibration.apply(forecast(above, ahead, rates, now_ns, held_ns))

    def _expected(self, lease: Lease, band: Band, ahead: Ahead, now_ns: int) -> Forecast:
        """Return a forecast; without a time if the request has a subset: rates are of all."""
        expected = self.forecast(band, ahead, now_ns)
        is_bound = lease.request.subset is not None and self.pool.picks
        return Forecast(expected.position, None) if is_bound else expected

    @staticmethod
    def _learn_wait(lease: Lease, band: Band, now_ns: int, *, is_over: bool) -> None:
        if lease.forecast is not None:
            band.calibration.learn(lease.forecast, now_ns - lease.arrived_ns, is_over=is_over)

    @property
    def leases(self) -> Mapping[int, Lease]:
        """Every live request by id, in order of arrival; read-only."""
        return self._leases

    def check_invariants(self) -> None:
        """Recount everything and compare it with the accounts. O(requests). For tests."""
        assert not self._newcomers, "newcomers are decided in the turn they came in"
        waiting = self._waiting()
        assert len(waiting) == self.waiting == self.capacity.requests
        assert self.capacity.bytes == sum(lease.request.byte_size for lease in waiting)
        self.bands.check_invariants(waiting)
        priorities = [band.priority for band in self.bands]
        assert self._ceilings.priorities == priorities, "ceilings of other bands"
        assert self.in_flight == sum(band.in_flight for band in self.bands)
        could = (gate for gate in self.gates() if any(map(self.pool.has_room_for, gate[0].heads())))
        for band, ceiling in islice(could, 1):
            is_held = self.held_until_ns(band) is not None
            assert is_held or self.pool.saturation() >= ceiling, "a free slot"

    def _waiting(self) -> list[Lease]:
        return [lease for lease in self._leases.values() if not lease.is_in_flight]

"""The controller against a ledger that knows nothing of how it works.

Facts collect between polls into batches of any cut; time passes only between turns, and never past
the wake-up that the controller asked for. After each poll the ledger checks what the decisions say.
That the checks can fail is shown by controllers with a planted bug.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import TypeAlias

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flowcontrol.band import Band
from flowcontrol.bands import Bands
from flowcontrol.config import (
    RETRY_AFTER_MAX_NS,
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Limits,
    Picker,
    Reclaim,
    Role,
)
from flowcontrol.controller import FlowController
from flowcontrol.decisions import Decisions
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Left,
    LoadObserved,
    ObjectivesChanged,
    Reconfigured,
    Settled,
)
from flowcontrol.events import Fact as AnyFact
from flowcontrol.expiry import Expiry
from flowcontrol.flow import Lease
from flowcontrol.lines import HasRoom
from flowcontrol.picker import FULL, EndpointPicker
from flowcontrol.request import Outcome, Request
from flowcontrol.retry import DrainRate
from flowcontrol.room import DISPLACED_MAX
from flowcontrol.views.snapshot import BandSnapshot, Snapshot
from flowcontrol.views.view import take_snapshot

SECOND = 1_000_000_000
OBJECTIVES = {"scraps": -2, "batch": -1, "chat": 10, "urgent": 20}
ELSEWHERE_NS = SECOND
LEFT = (Outcome.EVICTED_CANCELLED, Outcome.EVICTED_STOOD_DOWN, Outcome.EVICTED_MOVED)
EXPIRED = (Outcome.EVICTED_TTL, Outcome.EVICTED_NO_ENDPOINTS)
REFUSED = (Outcome.REJECTED_CAPACITY, Outcome.REJECTED_NO_ENDPOINTS, Outcome.EVICTED_DISPLACED)


def seconds(most: int) -> st.SearchStrategy[int]:
    """Return whole seconds: few enough that deadlines and departures often coincide."""
    return st.integers(0, most).map(lambda count: count * SECOND)


def limits(requests_max: int, bytes_max: int) -> st.SearchStrategy[Limits]:
    """Return limits up to these, or none."""
    return st.builds(
        Limits,
        requests_max=st.none() | st.integers(0, requests_max),
        bytes_max=st.none() | st.none() | st.integers(0, bytes_max),
    )


band_settings = st.builds(
    BandSettings,
    limits=st.just(Limits()) | limits(requests_max=5, bytes_max=50),
    flow_limits=st.just(Limits()) | limits(requests_max=3, bytes_max=30),
    ttl_ns=st.none() | seconds(5),
    fairness=st.sampled_from(Fairness),
)
configs = st.builds(
    ControllerConfig,
    limits=limits(requests_max=6, bytes_max=80),
    templates=st.tuples(st.builds(BandTemplate, priority_max=st.just(-1), settings=band_settings)),
    default_settings=band_settings,
    no_endpoint_ttl_ns=st.none() | seconds(9),
    detectors=st.integers(1, 3).map(lambda most: (Concurrency(requests_max=most),)),
    # A reserve refuses beside a free slot: its tests are its own.
    ceilings=st.just(CeilingSettings(policy=Ceilings.STATIC)),
    picker=st.sampled_from(Picker),
    weights=st.just({}) | st.just({"a": 3.0, "b": 0.5}),
    reclaim=st.just(Reclaim())
    | st.builds(
        Reclaim,
        is_enabled=st.just(value=True),
        is_only_before_first_byte=st.booleans(),
        at_once_max=st.integers(1, 3),
        patience_ns=st.integers(1, 4).map(lambda count: count * SECOND),
    ),
)
arrivals = st.sampled_from(
    tuple(
        product(
            [None, "batch", "chat", "urgent", "nobody"],
            ["a", "b", "c"],
            [0, 1, 10, 20],
            [None, None, None, 0, SECOND, 3 * SECOND],
        )
    )
)
"""In one draw: what Hypothesis spends is spent on draws."""
Arrival: TypeAlias = tuple[str | None, str, int, int | None]


@dataclass(slots=True)
class Entry:
    """What the ledger knows of one request."""

    request: Request
    priority: int
    arrived_ns: int
    regime_changed_ns: int | None = None
    """When, after its arrival, the pool first emptied or revived: its budget begins again, once."""
    spared_until_ns: int = 0
    """Just after the turn in which the pool last emptied or revived: no wait is judged before."""
    has_waited: bool = False
    """Whether it was left waiting by a poll."""
    has_left: bool = False
    left_as: Outcome = Outcome.EVICTED_CANCELLED
    """What becomes of it if it waits until it leaves."""
    decision: Decision | None = None
    is_watched: bool = False
    """Whether it was dispatched while the engine watched for its first byte."""
    is_reclaimable: bool = False
    has_answered: bool = False
    dispatch_index: int = 0
    told_until_ns: int | None = None
    """When the engine stops waiting for its end, once it is being ended."""

    @property
    def flow(self) -> tuple[int, str]:
        """The flow it belongs to."""
        return self.priority, self.request.flow_id

    @property
    def is_in_flight(self) -> bool:
        """Whether it was dispatched and its stream has not ended."""
        return self.ended_as(Outcome.DISPATCHED) and not self.has_left

    def ended_as(self, *outcomes: Outcome) -> bool:
        """Whether it is decided, and as one of these."""
        return self.decision is not None and self.decision.outcome in outcomes


class ControllerLedger(RuleBasedStateMachine):
    """Tells the controller anything in any order, and holds its decisions against the rules."""

    controller_class: type[FlowController] = FlowController

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.entries: dict[int, Entry] = {}
        self.objectives: dict[str, int] = {}
        self.unknown_objectives = 0
        self.endpoints: tuple[str, ...] = ()
        self.roles: dict[str, Role] = {}
        self.dispatched = 0
        self.is_overfull = False
        """Whether limits may be exceeded, since they were lowered while requests waited."""
        self.drain_until_ns: int | None = None
        self.is_sound = False
        """Whether the last poll passed all checks."""

    @initialize(config=configs, endpoint_count=st.integers(0, 3))
    def begin(self, config: ControllerConfig, endpoint_count: int) -> None:
        """Begin with any configuration and any pool."""
        self.config = config
        self.controller = self.controller_class(config, self.now_ns)
        self.change_objectives(set(OBJECTIVES))
        self.change_endpoints(endpoint_count)

    # Facts

    @rule(burst=st.lists(arrivals, min_size=1, max_size=6))
    def arrive(self, burst: list[Arrival]) -> None:
        """Let some requests arrive."""
        for objective, flow_id, size, ttl_ns in burst:
            request = Request(len(self.entries), flow_id, objective, size, ttl_ns)
            self.unknown_objectives += objective is not None and objective not in self.objectives
            priority = self.objectives.get(objective or "", 0)
            self.entries[request.request_id] = Entry(request, priority, self.now_ns)
            self.controller.handle(Arrived(request), self.now_ns)

    @precondition(lambda self: self.entries)
    @rule(index=st.integers(0, 99), times=st.integers(1, 2))
    def leave(self, index: int, times: int) -> None:
        """End a stream, whatever state its request is in; to say it again means nothing."""
        entry, outcome = self.entries[index % len(self.entries)], LEFT[index % len(LEFT)]
        if not entry.has_left:
            entry.has_left, entry.left_as = True, outcome
        for _ in range(times):
            self.controller.handle(Left(entry.request.request_id, outcome), self.now_ns)

    @rule(count=st.integers(1, 4))
    def finish(self, count: int) -> None:
        """End the streams that have been in flight longest."""
        in_flight = [entry for entry in self.entries.values() if entry.is_in_flight]
        for entry in in_flight[:count]:
            entry.has_left = True
            self.controller.handle(Left(entry.request.request_id), self.now_ns)

    @rule(
        objective=st.sampled_from(["batch", "scraps"]),
        batch=st.integers(1, 5),
        answered=st.sampled_from([None, None, 0, 1, 2]),
        persons=st.integers(1, 4),
    )
    def hold_up(self, objective: str, batch: int, answered: int | None, persons: int) -> None:
        """Let sheddable work fill the pool, begin to answer perhaps, and better work come."""
        self.arrive([(objective, "a", 0, None)] * batch)
        self.poll()
        in_flight = [entry for entry in self.entries.values() if entry.is_in_flight]
        if answered is not None and in_flight:
            self.answer(in_flight[-1 - answered % len(in_flight)].request.request_id)
        self.arrive([("chat", "b", 0, None)] * persons)
        self.poll()

    @precondition(lambda self: self.entries)
    @rule(index=st.integers(0, 99))
    def answer(self, index: int) -> None:
        """Report the first byte of a response, where it is watched for."""
        entry = self.entries[index % len(self.entries)]
        if entry.is_in_flight and entry.is_watched:
            entry.has_answered = True
            picked = entry.decision.endpoint if entry.decision is not None else None
            self.controller.handle(Answered(entry.request.request_id, picked or ""), self.now_ns)

    @rule(index=st.integers(0, 99), tokens=st.integers(0, 5000), is_success=st.booleans())
    def settle(self, index: int, tokens: int, *, is_success: bool) -> None:
        """Say what some request took: before or after it left, again, or though it never went."""
        settled = Settled(index, tokens, tokens // 2, tokens, is_success=is_success)
        self.controller.handle(settled, self.now_ns)

    @rule(index=st.integers(0, 3), waiting=st.integers(0, 9))
    def observe(self, index: int, waiting: int) -> None:
        """Report the load of an endpoint, or of one that is not there; no detector goes by it."""
        load = LoadObserved(f"10.0.0.{index}:8000", waiting, 1, 0.5)
        self.controller.handle(load, self.now_ns)

    @rule(config=configs)
    def reconfigure(self, config: ControllerConfig) -> None:
        """Go by other settings: whatever waits keeps its place."""
        self.config = config
        self.controller.handle(Reconfigured(config), self.now_ns)
        self.is_overfull = True
        for entry in self.undecided():
            if entry.has_waited:
                entry.spared_until_ns = self.now_ns + 1
        if not config.reclaim.is_enabled:
            for entry in self.entries.values():
                if entry.told_until_ns is not None:
                    entry.told_until_ns = 0  # no longer waited for, and never told again

    @rule(count=st.integers(0, 3), roles=st.lists(st.sampled_from(Role), min_size=3, max_size=3))
    def change_roles(self, count: int, roles: list[Role]) -> None:
        """Let prefill and decode run apart."""
        self.change_endpoints(count, roles)

    @rule(count=st.integers(0, 3))
    def change_endpoints(self, count: int, roles: list[Role] | None = None) -> None:
        """Grow, shrink or empty the pool."""
        was_empty = self.is_empty
        self.endpoints = tuple(f"10.0.0.{index}:8000" for index in range(count))
        self.roles = dict(zip(self.endpoints, roles or [Role.BOTH] * 3, strict=False))
        self.controller.handle(EndpointsChanged(self.endpoints, self.roles), self.now_ns)
        if was_empty == self.is_empty:
            return
        for entry in self.undecided():
            if entry.has_waited:
                entry.spared_until_ns = self.now_ns + 1
            if entry.regime_changed_ns is None and entry.arrived_ns < self.now_ns:
                entry.regime_changed_ns = self.now_ns

    @rule(names=st.sets(st.sampled_from(sorted(OBJECTIVES))))
    def change_objectives(self, names: set[str]) -> None:
        """Declare any subset; bands come and drain."""
        self.objectives = {name: OBJECTIVES[name] for name in sorted(names)}
        self.controller.handle(ObjectivesChanged(self.objectives), self.now_ns)

    @precondition(lambda self: self.now_ns > 9 * SECOND)
    @rule(budget_ns=seconds(4))
    def drain(self, budget_ns: int) -> None:
        """Begin to drain; to begin again means nothing."""
        if self.drain_until_ns is None:
            self.drain_until_ns = self.now_ns + budget_ns
        self.controller.handle(DrainBegan(budget_ns), self.now_ns)

    # Decisions

    @rule(passed_ns=seconds(4))
    def sleep(self, passed_ns: int) -> None:
        """End the turn, and let time pass, never beyond the wake-up."""
        self.poll()
        wakeup_ns = self.controller.next_wakeup_ns()
        then_ns = self.now_ns + passed_ns
        self.now_ns = then_ns if wakeup_ns is None else min(then_ns, wakeup_ns)

    @rule(passed_ns=seconds(4))
    def lose_pool(self, passed_ns: int) -> None:
        """Empty the pool for a while."""
        count = len(self.endpoints)
        self.change_endpoints(0)
        self.sleep(passed_ns)
        self.change_endpoints(count)

    @rule()
    def poll(self) -> None:
        """Ask for decisions, enter them in the ledger, and check everything."""
        self.is_sound = False
        alive = self.undecided()
        decisions = self.controller.poll(self.now_ns)
        for decision in decisions:
            self.enter(decision)
        decisions = self.check_reclaim(decisions)
        self.check_dispatch_order(decisions, alive)
        self.check_endpoints(decisions)
        self.check_refusals(alive)
        self.check_room(decisions, alive)
        self.check_deadlines(alive)
        snapshot = take_snapshot(self.controller, self.now_ns, 10)
        self.check_accounts(snapshot)
        self.check_waiting_counts(decisions, snapshot)
        self.controller.check_invariants()
        for entry in self.undecided():
            entry.has_waited = True
        self.is_sound = True

    def teardown(self) -> None:
        """Drain at the end of every run: what still waits is decided by then."""
        if not self.is_sound:
            return
        self.controller.handle(DrainBegan(SECOND), self.now_ns)
        if self.drain_until_ns is None:
            self.drain_until_ns = self.now_ns + SECOND
        self.poll()
        while (wakeup_ns := self.controller.next_wakeup_ns()) is not None:
            self.now_ns = wakeup_ns
            self.poll()

        assert not self.undecided()
        assert self.controller.is_drained

    # The ledger

    def undecided(self) -> list[Entry]:
        """Return the entries without a decision, in order of arrival."""
        return [entry for entry in self.entries.values() if entry.decision is None]

    def enter(self, decision: Decision) -> None:
        """Enter one decision, which must be the first, and true in itself."""
        entry = self.entries[decision.request_id]
        if decision.outcome is Outcome.RECLAIMED:
            return
        assert entry.decision is None, "decided twice"
        entry.decision = decision
        assert decision.waited_ns == self.now_ns - entry.arrived_ns
        if decision.outcome is Outcome.DISPATCHED:
            reclaim = self.config.reclaim
            self.dispatched += 1
            entry.dispatch_index = self.dispatched
            entry.is_reclaimable = reclaim.is_enabled and entry.priority < 0
            entry.is_watched = entry.is_reclaimable and reclaim.is_only_before_first_byte
        assert decision.is_reclaimable == entry.is_reclaimable
        assert decision.awaits_answer == entry.is_watched
        assert (decision.priority, decision.flow_id) == entry.flow
        if decision.outcome in LEFT:
            assert (entry.has_left, entry.left_as) == (True, decision.outcome)
        retry_after_ns = decision.retry_after_ns
        match decision.outcome:
            case Outcome.REJECTED_DRAINING | Outcome.EVICTED_DRAINED:
                assert self.drain_until_ns is not None
                assert retry_after_ns == ELSEWHERE_NS
            case Outcome.REJECTED_CAPACITY:
                assert retry_after_ns is not None
                assert 0 < retry_after_ns <= RETRY_AFTER_MAX_NS
            case Outcome.EVICTED_DISPLACED:
                assert retry_after_ns is None or retry_after_ns <= RETRY_AFTER_MAX_NS
            case _:
                assert retry_after_ns is None

    def deadline_ns(self, entry: Entry) -> int | None:
        """Return when a waiting request's time is over, as the pool is now."""
        ttl_ns = self.config.settings_for(entry.priority).ttl_ns
        empty_ttl_ns = self.config.no_endpoint_ttl_ns
        since_ns = entry.arrived_ns if entry.regime_changed_ns is None else entry.regime_changed_ns
        ends = []
        if (current_ns := empty_ttl_ns if self.is_empty else ttl_ns) is not None:
            ends.append(since_ns + current_ns)
        if ttl_ns is not None and empty_ttl_ns is not None:
            ends.append(entry.arrived_ns + ttl_ns + empty_ttl_ns)
        if entry.request.ttl_ns is not None:
            ends.append(entry.arrived_ns + entry.request.ttl_ns)
        return max(min(ends), entry.spared_until_ns) if ends else None

    def loads(self) -> Counter[str]:
        """Return the requests in flight by endpoint; all of them under "" when Envoy picks."""
        return Counter(
            entry.decision.endpoint or ""
            for entry in self.entries.values()
            if entry.is_in_flight and entry.decision is not None
        )

    def stage(self, role: Role) -> list[str]:
        """Return the endpoints that do this part of the work."""
        return [each for each in self.endpoints if self.roles[each] in (role, Role.BOTH)]

    @property
    def is_empty(self) -> bool:
        """Whether nobody answers: there is no endpoint, or none that decodes."""
        return not self.stage(Role.DECODE)

    def total_in_flight(self) -> int:
        """Return what is in flight, but for what was sent to endpoints that have left."""
        loads = self.loads()
        return loads[""] + sum(loads[each] for each in self.endpoints)

    def slots(self) -> int:
        """Return how many may be in flight at once, wherever they go."""
        if self.is_empty:
            return 0
        in_flight_max = in_flight_max_of(self.config)
        stages = [len(self.stage(role)) for role in (Role.PREFILL, Role.DECODE)]
        return in_flight_max * min([each for each in stages if each], default=0)

    def free_slots(self) -> int:
        """Return how many more requests could be in flight now."""
        in_flight_max, loads = in_flight_max_of(self.config), self.loads()
        free = self.slots() - self.total_in_flight()
        if self.config.picker is Picker.OFF:
            return free
        picked = self.stage(Role.DECODE)
        free_there = sum(max(0, in_flight_max - loads[address]) for address in picked)
        if self.stage(Role.PREFILL) != picked or loads[""]:
            return min(free_there, max(0, self.prefill_free()))
        return free_there

    def prefill_free(self) -> int:
        """Return the free slots of the pool as a whole, where the picker does not know places."""
        in_flight_max = in_flight_max_of(self.config)
        stages = [self.stage(Role.PREFILL)]
        if self.loads()[""]:
            stages.append(self.stage(Role.DECODE))
        free = [len(each) * in_flight_max - self.total_in_flight() for each in stages if each]
        return min(free, default=in_flight_max * 99)

    # The rules

    def check_dispatch_order(self, decisions: list[Decision], alive: list[Entry]) -> None:
        """Hold dispatches against strict priority and first come, first served.

        When a request is dispatched, all of a higher band and all before it in its own flow were
        decided before: dispatched, cancelled or expired. So no poll that dispatches from a band
        leaves anybody waiting, or refuses anybody, above it.
        """
        decided: set[int] = set()
        for decision in decisions:
            if decision.outcome is Outcome.DISPATCHED:
                chosen = self.entries[decision.request_id]
                for other in alive:
                    if other.request.request_id not in decided:
                        assert other.priority <= chosen.priority, "overtook a higher band"
                        is_later = other.request.request_id >= decision.request_id
                        assert is_later or other.flow != chosen.flow, "overtook in its own flow"
            decided.add(decision.request_id)

    def check_endpoints(self, decisions: list[Decision]) -> None:
        """Hold dispatches against the slots there are and, where the engine picks, the loads."""
        sent = [each for each in decisions if each.outcome is Outcome.DISPATCHED]
        loads = self.loads()
        if self.config.picker is Picker.OFF:
            assert all(each.endpoint is None for each in sent)
            assert not sent or self.free_slots() >= 0, "more in flight than there are slots"
            return
        if sent and loads[""]:
            assert self.total_in_flight() <= self.slots(), "more in flight than there are slots"
        most = in_flight_max_of(self.config)
        assert all(loads[str(each.endpoint)] <= most for each in sent), "endpoint overfull"
        loads.subtract(str(each.endpoint) for each in sent)
        picked = self.stage(Role.DECODE)
        for each in sent:
            assert each.endpoint in picked, "sent to an endpoint that is not there"
            fewest = min(loads[address] for address in picked)
            assert loads[each.endpoint] == fewest, "sent to an endpoint that is not least loaded"
            loads[each.endpoint] += 1

    def check_reclaim(self, decisions: list[Decision]) -> list[Decision]:
        """Hold requests told to end against need, rank and promise; return the other decisions."""
        told = [each for each in decisions if each.outcome is Outcome.RECLAIMED]
        reclaim = self.config.reclaim
        assert not told or reclaim.is_enabled, "reclaimed though that is off"
        for entry in self.entries.values():
            if entry.told_until_ns is not None and entry.told_until_ns <= self.now_ns:
                entry.told_until_ns = 0  # given up on
        pending = [e for e in self.entries.values() if e.told_until_ns and e.is_in_flight]
        waiting = self.undecided()
        top = max((each.priority for each in waiting), default=0)
        demand = sum(each.priority == top for each in waiting)
        slots, total = self.slots(), self.total_in_flight()
        must_end = max(0, min(demand, slots) - slots + total) if waiting else 0
        for decision in told:
            entry = self.entries[decision.request_id]
            assert entry.is_in_flight, "reclaimed though not in flight"
            assert entry.told_until_ns is None, "told to end twice"
            assert entry in self.may_end(top), "not to be reclaimed"
            ranks = [(each.priority, -each.dispatch_index) for each in self.may_end(top)]
            assert (entry.priority, -entry.dispatch_index) == min(ranks), (
                "not the newest of the low"
            )
            entry.told_until_ns = self.now_ns + reclaim.patience_ns
            pending.append(entry)
        if told:
            assert len(pending) <= reclaim.at_once_max, "too many at once"
            assert len(pending) <= must_end, "more than needed"
        elif reclaim.is_enabled and not self.is_empty and self.config.picker is Picker.OFF:
            idle = not pending and must_end and self.may_end(top)
            assert not idle, "held up beside what may be ended"
        return [each for each in decisions if each.outcome is not Outcome.RECLAIMED]

    def holds_slot(self, entry: Entry) -> bool:
        """Whether it is in flight at an endpoint that is there, or Envoy knows where."""
        endpoint = entry.decision.endpoint if entry.decision is not None else None
        return endpoint is None or endpoint in self.endpoints

    def may_end(self, below: int) -> list[Entry]:
        """Return what may be ended for a band."""
        reclaim = self.config.reclaim
        return [
            entry
            for entry in self.entries.values()
            if entry.is_in_flight
            and entry.is_reclaimable
            and entry.told_until_ns is None
            and entry.priority < below
            and self.holds_slot(entry)
            and not (
                reclaim.is_only_before_first_byte and (entry.has_answered or not entry.is_watched)
            )
        ]

    def check_refusals(self, alive: list[Entry]) -> None:
        """Nothing waits or is refused beside a free slot."""
        waiting = [entry for entry in alive if entry.decision is None]
        refused = [entry for entry in alive if entry.ended_as(*REFUSED)]
        if self.free_slots() > 0:
            assert not waiting, "waits beside a free slot"
            assert not refused, "refused beside a free slot"
        for entry in refused:
            assert entry.ended_as(Outcome.REJECTED_NO_ENDPOINTS) <= self.is_empty

    def check_room(self, decisions: list[Decision], alive: list[Entry]) -> None:
        """What came and was not dispatched is judged again, one by one, as the rules say.

        From the lowest band up, in order of arrival. What is admitted takes room at once. Ties
        between flows of equal backlog may be broken either way; all else must be as computed. Where
        more would have to go than one newcomer displaces, it may be refused.
        """
        never = (Outcome.DISPATCHED, Outcome.REJECTED_DRAINING, *LEFT)
        gone = (*never, *EXPIRED)
        room = Room(
            self.config,
            [each for each in alive if each.has_waited and not each.ended_as(*gone)],
        )
        came = [each for each in alive if not each.has_waited and not each.ended_as(*never)]
        fates = [each for each in decisions if each.outcome in (*REFUSED, *EXPIRED)]
        fates = [each for each in fates if not self.is_expiry_of_old(each)]
        for entry in sorted(came, key=lambda each: each.priority):
            deadline_ns = self.deadline_ns(entry)
            if deadline_ns is not None and deadline_ns <= self.now_ns:
                fate = fates.pop(0) if fates else None
                is_late = fate is not None and fate.request_id == entry.request.request_id
                assert is_late, "waits past its deadline"
                continue
            while not room.fits(entry):
                fate = fates.pop(0) if fates else None
                assert fate is not None, "more waits than may"
                if fate.request_id == entry.request.request_id:
                    is_bounded = len(room.due(entry)) > DISPLACED_MAX
                    assert is_bounded or not room.has_claim(entry), "refused though it had a claim"
                    break
                victim = self.entries[fate.request_id]
                assert room.has_claim(entry), "displaced in vain"
                room.check_victim(victim, entry)
                room.remove(victim)
            else:
                room.admitted.append(entry)
        assert not fates, "refused though it would fit"

    def is_expiry_of_old(self, decision: Decision) -> bool:
        """Whether it is about a request that waited before and whose time was over."""
        return decision.outcome in EXPIRED and self.entries[decision.request_id].has_waited

    def check_deadlines(self, alive: list[Entry]) -> None:
        """What waited too long is evicted at that moment, nothing else, and nothing later."""
        for entry in alive:
            deadline_ns = self.deadline_ns(entry)
            if entry.ended_as(*EXPIRED):
                expected = Outcome.EVICTED_NO_ENDPOINTS if self.is_empty else Outcome.EVICTED_TTL
                assert entry.ended_as(expected)
                assert deadline_ns == self.now_ns, "not evicted at its deadline"
            elif entry.decision is None:
                assert deadline_ns is None or deadline_ns > self.now_ns, "waits past its deadline"
            elif entry.ended_as(Outcome.DISPATCHED) and entry.has_waited:
                assert deadline_ns is None or deadline_ns > self.now_ns, "dispatched too late"
            self.check_bound(entry)
        waiting = self.undecided()
        ends = [each for entry in waiting if (each := self.deadline_ns(entry)) is not None]
        if waiting and self.drain_until_ns is not None:
            assert self.now_ns < self.drain_until_ns, "waits past the end of the drain"
            ends.append(self.drain_until_ns)
        times = [entry.told_until_ns for entry in self.entries.values()]
        told = [each for each in times if each is not None and each > 0]
        if waiting and self.config.reclaim.is_enabled:
            ends += told
        wakeup_ns = self.controller.next_wakeup_ns()
        if told:  # some of them have left, or are at endpoints that have
            assert wakeup_ns is None or wakeup_ns >= min(ends, default=0), "wrong wake-up"
        else:
            assert wakeup_ns == min(ends, default=None), "wrong wake-up"

    def check_bound(self, entry: Entry) -> None:
        """However the pool flaps, nothing waits longer than both budgets together.

        But for the turn in which the pool changes: it dispatches before it evicts.
        """
        ttl_ns = self.config.settings_for(entry.priority).ttl_ns
        empty_ttl_ns = self.config.no_endpoint_ttl_ns
        if ttl_ns is not None and empty_ttl_ns is not None:
            most_ns = max(entry.arrived_ns + ttl_ns + empty_ttl_ns, entry.spared_until_ns)
            assert self.now_ns <= most_ns, "waited beyond both budgets"

    def check_accounts(self, snapshot: Snapshot) -> None:
        """Arrived = waiting + in flight + ended + refused, and no limit is exceeded."""
        entries = self.entries.values()
        finished = [each for each in entries if each.ended_as(Outcome.DISPATCHED) and each.has_left]
        waiting = self.undecided()
        assert snapshot.waiting == self.controller.waiting == len(waiting)
        assert snapshot.in_flight == sum(entry.is_in_flight for entry in entries)
        assert sum(totals.completed for totals in snapshot.totals.values()) == len(finished)
        self.check_totals(snapshot)
        assert snapshot.unknown_objectives == self.unknown_objectives
        assert snapshot.objectives == self.objectives
        assert self.is_overfull or fits(waiting, self.config.limits), "more waits than may"
        for band in snapshot.bands:
            mine = [entry for entry in waiting if entry.priority == band.priority]
            own = self.config.settings_for(band.priority).limits
            assert self.is_overfull or fits(mine, own), "band overfull"
            assert (band.waiting, band.waiting_bytes) == (len(mine), size_of(mine))
            self.check_flows(band, mine)
        live = {entry.priority for entry in entries if entry.decision is None or entry.is_in_flight}
        assert {band.priority for band in snapshot.bands} - {0} == (
            live | set(self.objectives.values())
        ) - {0}, "a band is missing or has outlived its last request"
        is_over = self.drain_until_ns is not None and not waiting
        assert self.controller.is_drained == is_over

    def check_totals(self, snapshot: Snapshot) -> None:
        """The totals are those of the decisions in the ledger; reclaims are counted beside."""
        counts: Counter[tuple[int, Outcome]] = Counter()
        waits_ns: Counter[tuple[int, Outcome]] = Counter()
        for entry in self.entries.values():
            if entry.decision is not None:
                counts[entry.priority, entry.decision.outcome] += 1
                waits_ns[entry.priority, entry.decision.outcome] += entry.decision.waited_ns
        assert counts == {
            (priority, outcome): count
            for priority, totals in snapshot.totals.items()
            for outcome, count in totals.outcomes.items()
            if outcome is not Outcome.RECLAIMED
        }
        assert waits_ns == {
            (priority, outcome): sum_ns
            for priority, totals in snapshot.totals.items()
            for outcome, sum_ns in totals.wait_sum_ns.items()
            if outcome is not Outcome.RECLAIMED
        }

    def check_flows(self, band: BandSnapshot, waiting: list[Entry]) -> None:
        """The flows of a band are those that have something alive, with what they have."""
        in_flight = Counter(
            entry.request.flow_id
            for entry in self.entries.values()
            if entry.is_in_flight and entry.priority == band.priority
        )
        backlogs = Counter(entry.request.flow_id for entry in waiting)
        assert {flow.flow_id: (flow.waiting, flow.in_flight) for flow in band.flows} == {
            flow_id: (backlogs[flow_id], in_flight[flow_id]) for flow_id in in_flight | backlogs
        }

    def check_waiting_counts(self, decisions: list[Decision], snapshot: Snapshot) -> None:
        """Each decision of the poll says how many were left waiting in its band just then."""
        left = {band.priority: band.waiting for band in snapshot.bands}
        for decision in reversed(decisions):
            if decision.outcome in (Outcome.REJECTED_DRAINING, *LEFT):
                break  # decided while facts were still coming in
            assert decision.waiting == left.setdefault(decision.priority, 0)
            left[decision.priority] += 1


class Room:
    """What has been admitted, judged by brute force: everything is counted again each time."""

    def __init__(self, config: ControllerConfig, admitted: list[Entry]) -> None:
        self.config = config
        self.admitted = admitted

    def remove(self, victim: Entry) -> None:
        """Take one request out."""
        self.admitted = [each for each in self.admitted if each is not victim]

    def of_flow(self, flow: tuple[int, str]) -> list[Entry]:
        """Return what one flow has here, in order of arrival."""
        return [each for each in self.admitted if each.flow == flow]

    def fits_band(self, entry: Entry, gone: list[Entry]) -> bool:
        """Whether the newcomer's band has room, were some gone."""
        own = self.config.settings_for(entry.priority).limits
        stays = [
            each for each in self.admitted if each.priority == entry.priority and each not in gone
        ]
        return fits([*stays, entry], own)

    def fits_in_all(self, entry: Entry, gone: list[Entry]) -> bool:
        """Whether there is room over all bands, were some gone."""
        stays = [each for each in self.admitted if each not in gone]
        return fits([*stays, entry], self.config.limits)

    def fits_flow(self, entry: Entry) -> bool:
        """Whether the newcomer's flow has room; nothing is displaced for that."""
        own = self.config.settings_for(entry.priority).flow_limits
        return fits([*self.of_flow(entry.flow), entry], own)

    def fits(self, entry: Entry) -> bool:
        """Whether the newcomer may wait as things are."""
        fits_both = self.fits_band(entry, []) and self.fits_in_all(entry, [])
        return fits_both and self.fits_flow(entry)

    def lower(self, entry: Entry) -> list[Entry]:
        """Return all that waits below a newcomer's band."""
        return [each for each in self.admitted if each.priority < entry.priority]

    def due(self, entry: Entry) -> list[Entry]:
        """Return what flows of the newcomer's band have beyond its own flow's backlog."""
        own = len(self.of_flow(entry.flow)) + 1
        flows = {each.flow for each in self.admitted if each.priority == entry.priority}
        return [each for flow in sorted(flows) for each in self.of_flow(flow)[own:]]

    def has_claim(self, entry: Entry) -> bool:
        """Whether it would fit, were all gone that may be displaced."""
        gone = [*self.lower(entry), *self.due(entry)]
        fits_both = self.fits_band(entry, gone) and self.fits_in_all(entry, gone)
        return fits_both and self.fits_flow(entry)

    def check_victim(self, victim: Entry, entry: Entry) -> None:
        """Compare what is displaced with what should be."""
        assert victim in self.admitted, "displaced though it did not wait"
        mine = self.of_flow(victim.flow)
        assert victim is mine[-1], "displaced before a newer one"
        flows = {each.flow for each in self.admitted if each.priority == victim.priority}
        longest = max(len(self.of_flow(flow)) for flow in flows)
        assert len(mine) == longest, "a longer backlog was spared"
        lower = self.lower(entry)
        if victim.priority == entry.priority:
            assert victim in self.due(entry), "displaced for nobody"
            is_needed = not (self.fits_band(entry, []) and self.fits_in_all(entry, lower))
            assert is_needed, "displaced though lower bands had room to give"
        else:
            assert victim in lower, "displaced for nobody"
            assert victim.priority == min(each.priority for each in lower), "not the lowest band"


def in_flight_max_of(config: ControllerConfig) -> int:
    """Return how many may be in flight at one endpoint."""
    (detector,) = config.detectors
    assert isinstance(detector, Concurrency)
    assert detector.requests_max is not None
    return detector.requests_max


def fits(entries: Iterable[Entry], most: Limits) -> bool:
    """Whether so many may wait at once."""
    crowd = list(entries)
    return (most.requests_max is None or len(crowd) <= most.requests_max) and (
        most.bytes_max is None or size_of(crowd) <= most.bytes_max
    )


def size_of(entries: Iterable[Entry]) -> int:
    """Return the bytes of some requests."""
    return sum(entry.request.byte_size for entry in entries)


TestControllerLedger = pytest.mark.slow(ControllerLedger.TestCase)
TestControllerLedger.settings = settings(max_examples=150, stateful_step_count=50)


# Planted bugs: subclasses of final classes, each of which breaks one thing.


class ExpiresLate(FlowController):  # type: ignore[misc]  # planted
    """Evicts one nanosecond after the deadline."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self._expiry = LateExpiry(config, self.bands)


class LateExpiry(Expiry):  # type: ignore[misc]  # planted
    """Finds nothing due at the very moment of a deadline."""

    def first_due(self, now_ns: int) -> Lease | None:
        """Return who was due a nanosecond ago."""
        return super().first_due(now_ns - 1)


class ForgetsOwnTtl(FlowController):  # type: ignore[misc]  # planted
    """Looks at the band's time to live only."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self._expiry = ForgetfulExpiry(config, self.bands)


class ForgetfulExpiry(Expiry):  # type: ignore[misc]  # planted
    """Never looks at what a request says of itself."""

    def _deadline_ns(self, lease: Lease, band: Band) -> int | None:
        ttl_ns, lease.request.ttl_ns = lease.request.ttl_ns, None
        deadline_ns = super()._deadline_ns(lease, band)
        lease.request.ttl_ns = ttl_ns
        return deadline_ns


class RestartsEveryFlap(FlowController):  # type: ignore[misc]  # planted
    """Begins the budget again whenever the pool empties or revives."""

    def _change_endpoints(self, change: EndpointsChanged, now_ns: int) -> None:
        for lease in self._leases.values():
            lease.budget_from_ns = lease.arrived_ns
        super()._change_endpoints(change, now_ns)


class AdmitsOneTooMany(FlowController):  # type: ignore[misc]  # planted
    """Counts wrongly in the account over all bands."""

    wrong_by = 1

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self._miscount(config)

    def _reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        super()._reconfigure(config, now_ns)
        self._miscount(config)

    def _miscount(self, config: ControllerConfig) -> None:
        most = config.limits.requests_max
        if most is not None:
            limits = replace(config.limits, requests_max=max(0, most + self.wrong_by))
            self.capacity.limits = limits


class RefusesExactFit(AdmitsOneTooMany):  # type: ignore[misc]  # planted
    """Counts wrongly in the account over all bands, the other way."""

    wrong_by = -1


class RefusesBeforeDispatch(FlowController):  # type: ignore[misc]  # planted
    """Makes room first: the trap of a burst that comes in one batch."""

    def _dispatch(self, now_ns: int) -> None:
        self._make_room(now_ns)
        super()._dispatch(now_ns)


class DisplacesEquals(FlowController):  # type: ignore[misc]  # planted
    """Takes a place from the newcomer's own band as well, whose ever it is."""

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        if not self.capacity.fits(lease.request.byte_size) and band.capacity.requests:
            head = next(iter(band.heads()))
            self._end_waiting(head, Outcome.EVICTED_DISPLACED, now_ns)
        return super()._has_room(lease, band, now_ns)


class Reversed(Bands):  # type: ignore[misc]  # planted
    """The bands, lowest priority first."""

    is_reversed = False

    def __iter__(self) -> Iterator[Band]:
        """Iterate the wrong way round."""
        bands = list(super().__iter__())
        return iter(bands[::-1] if self.is_reversed else bands)


class DisplacesFromTheTop(FlowController):  # type: ignore[misc]  # planted
    """Takes the place of the best of the lower bands."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self.bands = self.reversible = Reversed(config, self.capacity)
        self._expiry = Expiry(config, self.bands)
        self.decisions = Decisions(self.bands, self.pool)

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        self.reversible.is_reversed = True
        has_room = super()._has_room(lease, band, now_ns)
        self.reversible.is_reversed = False
        return has_room


class ServesLowestFirst(DisplacesFromTheTop):  # type: ignore[misc]  # planted
    """Takes a smaller priority for a better one."""

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        return super(DisplacesFromTheTop, self)._has_room(lease, band, now_ns)

    def _dispatch(self, now_ns: int) -> None:
        self.reversible.is_reversed = True
        super()._dispatch(now_ns)
        self.reversible.is_reversed = False


class NewestFirst(Band):  # type: ignore[misc]  # planted
    """Serves the newest request of the flow whose turn it is."""

    def next(self, has_room: HasRoom) -> Lease | None:
        """Return the newest of the flow."""
        lease = super().next(has_room)
        return None if lease is None else lease.flow.leases()[-1]


class OldestGivesWay(Band):  # type: ignore[misc]  # planted
    """Displaces the request that has waited longest."""

    def newest_of_longest(self) -> Lease:
        """Return the oldest of the flow with the longest backlog."""
        return super().newest_of_longest().flow.oldest


class ServesNewestFirst(FlowController):  # type: ignore[misc]  # planted
    """Turns the queue of a flow into a stack."""

    band_class: type[Band] = NewestFirst

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self.bands = OtherBands(config, self.capacity)
        self.bands.band_class = self.band_class
        self._expiry = Expiry(config, self.bands)
        self.decisions = Decisions(self.bands, self.pool)


class OtherBands(Bands):  # type: ignore[misc]  # planted
    """Makes bands of another kind."""

    band_class: type[Band]

    def _add(self, priority: int, now_ns: int) -> Band:
        super()._add(priority, now_ns)
        band = self.band_class(priority, self._config, self._everything, now_ns)
        self._order = [band if each.priority == priority else each for each in self._order]
        self.by_priority[priority] = band
        return band


class DisplacesOldest(ServesNewestFirst):  # type: ignore[misc]  # planted
    """Takes the place of the request that has waited longest."""

    band_class = OldestGivesWay


class DisplacesInVain(FlowController):  # type: ignore[misc]  # planted
    """Evicts for a newcomer that is refused all the same."""

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        has_room = super()._has_room(lease, band, now_ns)
        if not has_room and band.capacity.requests:
            self._displace(band.newest_of_longest(), band.drain_rate, now_ns)
        return has_room


class DisplacesInTurns(FlowController):  # type: ignore[misc]  # planted
    """Lets two flows of one length displace each other for ever."""

    def _has_room(self, lease: Lease, band: Band, now_ns: int) -> bool:
        flow = lease.flow
        if not band.capacity.fits(lease.request.byte_size) and band.capacity.requests:
            victim = band.newest_of_longest()
            if victim.flow is not flow and len(victim.flow) <= flow.capacity.requests + 1:
                self._displace(victim, band.drain_rate, now_ns)
        return super()._has_room(lease, band, now_ns)


class LetsOthersPay(FlowController):  # type: ignore[misc]  # planted
    """Lets the flow pay that has least."""

    def _displace(self, victim: Lease, rate: DrainRate, now_ns: int) -> None:
        flows = self.bands.by_priority[victim.flow.key.priority].flows.values()
        shortest = min((each for each in flows if each.capacity.requests), key=len)
        super()._displace(next(shortest.newest_first()), rate, now_ns)


class LosesSlots(FlowController):  # type: ignore[misc]  # planted
    """Does not give back the slot of a request that has ended."""

    def _leave(self, left: Left, now_ns: int) -> None:
        lease = self._leases.get(left.request_id)
        super()._leave(left, now_ns)
        is_over = lease is not None and lease.is_in_flight and not self.pool.picks
        if lease is not None and is_over and self.pool.saturation() < FULL:
            self.pool.charge(lease, now_ns)


class MostLoaded(EndpointPicker):  # type: ignore[misc]  # planted
    """Sends a request where the most are in flight."""

    def best(self) -> str | None:
        """Return the fullest endpoint."""
        best = super().best()
        return best and max(self._loads, key=lambda address: self._loads[address])


class PicksMostLoaded(FlowController):  # type: ignore[misc]  # planted
    """Piles requests up at one endpoint."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        super().__init__(config, now_ns)
        self.pool.picker = MostLoaded()


class DecidesTwice(FlowController):  # type: ignore[misc]  # planted
    """Says of a displaced request that it is displaced, and says it again."""

    def poll(self, now_ns: int) -> list[Decision]:
        """Return the decisions, some of them twice."""
        decisions = super().poll(now_ns)
        return decisions + [each for each in decisions if each.outcome in REFUSED]


class ForgetsTheDebit(FlowController):  # type: ignore[misc]  # planted
    """Ends the next as if none were being ended."""

    def _reclaim(self, now_ns: int) -> None:
        self._reclaimer.give_up(now_ns + 99 * SECOND)
        super()._reclaim(now_ns)


class EndsWhatHasAnswered(FlowController):  # type: ignore[misc]  # planted
    """Does not hear that an answer has begun."""

    def handle(self, fact: AnyFact, now_ns: int) -> None:
        """Take in any other fact."""
        if not isinstance(fact, Answered):
            super().handle(fact, now_ns)


class KeepsOldLimits(FlowController):  # type: ignore[misc]  # planted
    """Goes by the limits it began with."""

    def _reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        limits = self.capacity.limits
        super()._reconfigure(config, now_ns)
        self.capacity.limits = limits


class KeepsEmptyBands(FlowController):  # type: ignore[misc]  # planted
    """Lets a removed band outlive its last request."""

    def _drop_if_done(self, band: Band, now_ns: int) -> None:
        """Keep it."""


PLANTED = {
    ExpiresLate: "waits past its deadline|wrong wake-up",
    ForgetsOwnTtl: "waits past its deadline|wrong wake-up",
    RestartsEveryFlap: "wrong wake-up|not evicted at its deadline|waits past its deadline",
    AdmitsOneTooMany: "more waits than may|displaced in vain|displaced though it did not wait",
    RefusesExactFit: "refused though|displaced in vain",
    RefusesBeforeDispatch: "refused beside a free slot|refused though",
    DisplacesEquals: "displaced",
    DisplacesOldest: "displaced before a newer one",
    DisplacesFromTheTop: "not the lowest band|ceilings of other bands",
    DisplacesInVain: "displaced in vain",
    DisplacesInTurns: "displaced for nobody|displaced in vain",
    LetsOthersPay: "a longer backlog was spared|refused|displaced",
    ServesLowestFirst: "overtook a higher band",
    ServesNewestFirst: "overtook in its own flow",
    LosesSlots: "waits beside a free slot|refused beside a free slot|more than needed",
    PicksMostLoaded: "sent to an endpoint that is not least loaded|endpoint overfull",
    DecidesTwice: "decided twice",
    ForgetsTheDebit: "more than needed|too many at once",
    EndsWhatHasAnswered: "not to be reclaimed|not the newest",
    KeepsOldLimits: "refused though|displaced in vain|more waits than may",
    KeepsEmptyBands: "outlived its last request",
}
"""Each planted bug, and what the ledger says when it finds it."""


@pytest.mark.interpreted
class TestPlantedBugs:
    """The ledger's checks can fail."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("build", "expected"), PLANTED.items(), ids=[each.__name__ for each in PLANTED]
    )
    def test_ledger_finds_the_bug(self, build: type[FlowController], expected: str) -> None:
        """A controller that breaks one rule is caught, for breaking that rule."""

        class Planted(ControllerLedger):
            controller_class = build

        with pytest.raises(AssertionError, match=expected):
            run_state_machine_as_test(
                Planted,
                settings=settings(
                    max_examples=1000,
                    stateful_step_count=30,
                    phases=[Phase.generate],
                    report_multiple_bugs=False,
                ),
            )


Fact: TypeAlias = Arrived | Left | EndpointsChanged


def turns(
    controller: FlowController, facts: list[Fact], batch_sizes: list[int], now_ns: int
) -> list[Decision]:
    """Tell the facts in batches of these sizes, over and over; return the decisions.

    A refusal beside a free slot is an error, in every cut.
    """
    decisions: list[Decision] = []
    left, sizes = list(facts), cycle(batch_sizes)
    while left:
        size = next(sizes)
        batch, left = left[:size], left[size:]
        for fact in batch:
            controller.handle(fact, now_ns)
        made = controller.poll(now_ns)
        if controller.pool.saturation() < 1:
            assert not [each for each in made if each.outcome in REFUSED], "refused in vain"
        decisions += made
    return decisions


def burst(build: type[FlowController] = FlowController) -> tuple[FlowController, list[Fact]]:
    """Return a controller with 64 free slots where 4 may wait, and 16 arrivals."""
    config = ControllerConfig(
        limits=Limits(requests_max=4), detectors=(Concurrency(requests_max=64),)
    )
    controller = build(config, 0)
    controller.handle(EndpointsChanged(("a",)), 0)
    return controller, [Arrived(Request(index)) for index in range(16)]


batch_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


class TestCuts:
    """How events are cut into batches changes no outcome."""

    @pytest.mark.parametrize("size", [1, 3, 5, 16])
    def test_burst_that_fits_is_never_refused(self, size: int) -> None:
        """16 arrivals for 64 slots all go, though only 4 may wait."""
        controller, arrived = burst()

        decisions = turns(controller, arrived, [size], 0)

        outcomes = [decision.outcome for decision in decisions]

        assert outcomes == [Outcome.DISPATCHED] * 16

    @pytest.mark.interpreted
    def test_trap_is_noticed(self) -> None:
        """A controller that makes room first refuses 12 of them, in one batch only."""
        controller, arrived = burst(RefusesBeforeDispatch)
        turns(controller, arrived, [1], 0)

        controller, arrived = burst(RefusesBeforeDispatch)
        with pytest.raises(AssertionError, match="refused in vain"):
            turns(controller, arrived, [16], 0)

    @pytest.mark.slow
    @given(data=st.data(), config=configs, before=st.lists(arrivals, max_size=12))
    @settings(max_examples=150)
    def test_no_cut_refuses_beside_a_free_slot(
        self, data: st.DataObject, config: ControllerConfig, before: list[Arrival]
    ) -> None:
        """Whatever comes and goes at one moment, in one batch or in many."""
        first: list[Fact] = [EndpointsChanged(("a", "b")[: data.draw(st.integers(1, 2))])]
        first += [Arrived(request) for request in requests_of(before, 0)]
        burst = data.draw(st.lists(arrivals, max_size=12))
        gone = data.draw(st.sets(st.sampled_from(range(len(before))))) if before else set()
        then: list[Fact] = [Arrived(request) for request in requests_of(burst, len(before))]
        then += [Left(request_id) for request_id in sorted(gone)]
        then = data.draw(st.permutations(then))

        for cut in (data.draw(batch_sizes), [24], [1]):
            controller = FlowController(config, 0)
            turns(controller, first, [24], 0)
            turns(controller, then, cut, SECOND // 2)
            controller.check_invariants()

    @pytest.mark.slow
    @given(
        config=configs,
        endpoint_count=st.integers(1, 3),
        burst=st.lists(arrivals, max_size=24),
        sizes=batch_sizes,
    )
    @settings(max_examples=150)
    def test_no_cut_changes_how_many_go(
        self, config: ControllerConfig, endpoint_count: int, burst: list[Arrival], sizes: list[int]
    ) -> None:
        """As many are dispatched as there are slots, in one batch or in many."""
        facts: list[Fact] = [EndpointsChanged(tuple(str(each) for each in range(endpoint_count)))]
        facts += [Arrived(request) for request in requests_of(burst, 0)]
        expected = min(len(burst), endpoint_count * in_flight_max_of(config))

        for cut in (sizes, [len(facts)], [1]):
            decisions = turns(FlowController(config, 0), facts, cut, 0)

            assert expected == sum(each.outcome is Outcome.DISPATCHED for each in decisions)


def requests_of(burst: list[Arrival], first_id: int) -> list[Request]:
    """Return the requests of some arrivals, numbered from there."""
    return [
        Request(request_id, flow_id, objective, size, ttl_ns)
        for request_id, (objective, flow_id, size, ttl_ns) in enumerate(burst, first_id)
    ]

"""Requests that another process dispatched hold their slots here, and give them back."""

import itertools
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import Concurrency, ControllerConfig, Picker
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    Decision,
    EndpointsChanged,
    Fact,
    LeasesRecovered,
    Left,
    LoadObserved,
    RecoveredLease,
    RecoveredLeaseEnded,
    Settled,
    SettlementLost,
)
from flowcontrol.recovery import APART_NS, MISSING_NS
from flowcontrol.request import Request
from flowcontrol.views.view import take_snapshot

A, B = "10.0.0.1:80", "10.0.0.2:80"
AGE_MAX_NS = 600_000_000_000
S = 1_000_000_000


@final
class House:
    """A controller in front of A and B, with two slots at each."""

    def __init__(self, picker: Picker = Picker.LEAST_LOADED) -> None:
        config = ControllerConfig(detectors=(Concurrency(requests_max=2),), picker=picker)
        self.controller = FlowController(config, 0)
        self.now_ns = 0
        self._arrived = 0
        self.tell(EndpointsChanged((A, B)))

    def tell(self, *facts: Fact) -> list[Decision]:
        """Tell it facts at once; return what it decides."""
        for fact in facts:
            self.controller.handle(fact, self.now_ns)
        return self.controller.poll(self.now_ns)

    def arrive(self, count: int) -> list[str | None]:
        """Let requests arrive; return where those go that are dispatched at once."""
        arrivals = []
        for _ in range(count):
            self._arrived += 1
            arrivals.append(Arrived(Request(self._arrived)))
        return [each.endpoint for each in self.tell(*arrivals)]

    @property
    def recovered(self) -> int:
        """Recovered leases that hold a slot."""
        return take_snapshot(self.controller, self.now_ns, 10).recovered


def lease(ticket: str, endpoint: str | None = A, age_ns: int = 0) -> RecoveredLease:
    """Return a recovered lease."""
    return RecoveredLease(ticket, endpoint, age_ns=age_ns)


def test_recovered_leases_hold_their_endpoints_slots() -> None:
    """Only what is free beside them is dispatched to."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"), lease("x.2"), lease("x.3", B))))

    assert house.recovered == 3
    assert house.arrive(3) == [B]
    assert house.controller.waiting == 2


def test_a_reported_end_frees_the_slot() -> None:
    """Once; a ticket that is not known changes nothing."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"), lease("x.2"), lease("x.3", B), lease("x.4", B))))
    house.arrive(2)
    unknown = house.tell(RecoveredLeaseEnded("y.9"))
    ended = house.tell(RecoveredLeaseEnded("x.1"))
    again = house.tell(RecoveredLeaseEnded("x.1"))

    assert (unknown, again) == ([], [])
    assert [each.endpoint for each in ended] == [A]
    assert house.recovered == 3


def test_an_old_lease_frees_its_slot() -> None:
    """When its age since its dispatch passes the bound; the engine asks to be woken for that."""
    house = House()
    leases = (lease("x.1", A, AGE_MAX_NS), lease("x.2", A, AGE_MAX_NS - 5 * S), lease("x.3"))
    house.tell(LeasesRecovered((*leases, lease("x.4", B), lease("x.5", B)), AGE_MAX_NS))
    house.arrive(1)
    wakeup_ns = house.controller.next_wakeup_ns()
    house.now_ns = 5 * S - 1
    before = house.tell()
    house.now_ns = 5 * S
    after = house.tell()

    assert wakeup_ns == 5 * S
    assert before == []
    assert house.recovered == 3
    assert [each.endpoint for each in after] == [A]


@pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
def test_an_endpoint_that_reports_fewer(picker: Picker) -> None:
    """As many leases are over as were missing, says the next report; where Envoy picks, of all."""
    house = House(picker)
    at = A if picker is Picker.LEAST_LOADED else None
    house.tell(LeasesRecovered((lease("x.1", at), lease("x.2", at))))
    house.tell(LoadObserved(B, 0, 0, None), LoadObserved(A, 1, 0, None))
    house.now_ns = APART_NS - 1
    house.tell(LoadObserved(A, 0, 0, None))
    before = house.recovered
    house.now_ns = APART_NS
    house.tell(LoadObserved(A, 0, None, None))
    unknown = house.recovered
    house.tell(LoadObserved(A, 0, 0, None))
    one = house.recovered
    house.now_ns = 2 * APART_NS
    house.tell(LoadObserved(A, 0, 1, None))
    house.now_ns = 3 * APART_NS
    house.tell(LoadObserved(A, 0, 0, None))

    assert (before, unknown, one, house.recovered) == (2, 2, 1, 1)


def test_what_may_be_on_its_way_or_has_just_ended_is_not_over() -> None:
    """Of what was missing it is taken off; what has ended is known by the next report."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"), lease("x.2", B), lease("x.3", B))))
    house.arrive(1)
    house.tell(LoadObserved(A, 0, 1, None))
    house.now_ns = APART_NS
    house.tell(LoadObserved(A, 0, 1, None))
    on_the_way = house.recovered
    house.now_ns = 2 * APART_NS
    house.tell(Left(1), LoadObserved(A, 0, 1, None))
    ended = house.recovered
    house.now_ns = 3 * APART_NS
    house.tell(LoadObserved(A, 0, 0, None))
    there = house.recovered
    house.now_ns = 4 * APART_NS
    house.tell(LoadObserved(A, 0, 0, None))

    assert (on_the_way, ended, there, house.recovered) == (3, 3, 3, 2)


def test_what_is_missing_for_a_moment_is_on_its_way() -> None:
    """One report in which all is there again, and the time begins again."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"),)))
    house.arrive(3)
    for now_ns, running in ((0, 1), (MISSING_NS - 1, 2), (MISSING_NS, 1), (2 * MISSING_NS - 1, 1)):
        house.now_ns = now_ns
        house.tell(LoadObserved(A, 0, running, None))
    before = house.recovered
    house.now_ns = 2 * MISSING_NS
    house.tell(LoadObserved(A, 0, 1, None))

    assert (before, house.recovered) == (1, 0)


@pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
def test_what_endpoints_work_on_at_the_start_counts(picker: Picker) -> None:
    """The first report of each adds what is not known; later ones add nothing."""
    house = House(picker)
    house.tell(LeasesRecovered((), AGE_MAX_NS, S))
    house.tell(LoadObserved(A, 1, 1, None), LoadObserved(B, 0, 1, None))
    house.tell(LoadObserved(A, 5, 5, None))
    dispatched = len(house.arrive(3))
    at_start = house.recovered
    for house.now_ns in (0, MISSING_NS):
        house.tell(LoadObserved(A, 0, 0, None), LoadObserved(B, 0, 0, None))

    assert (at_start, dispatched) == (3, 1)
    assert house.recovered == 0


def test_reports_later_than_the_start_add_nothing() -> None:
    """Nor does any where nothing was said of a recovery."""
    house = House()
    house.tell(LeasesRecovered((), AGE_MAX_NS, S))
    house.now_ns = S
    house.tell(LoadObserved(A, 5, 5, None))

    assert house.recovered == 0


def test_a_later_recovery_replaces_the_one_before() -> None:
    """A leader that is elected again goes by what the book says then."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"), lease("x.2"))))
    house.tell(LeasesRecovered((lease("x.2"), lease("x.2"))))

    assert house.recovered == 1
    assert house.arrive(4) == [B, A, B]


def test_an_endpoint_that_leaves_takes_its_leases_along() -> None:
    """They count again when it comes back, and are freed without harm when it does not."""
    house = House()
    house.tell(LeasesRecovered((lease("x.1"), lease("x.2"))))
    house.tell(EndpointsChanged((B,)))
    without = house.controller.pool.total.requests
    house.tell(EndpointsChanged((A, B)))
    again = house.controller.pool.total.requests
    house.tell(EndpointsChanged((B,)))
    house.tell(RecoveredLeaseEnded("x.1"), RecoveredLeaseEnded("x.2"))
    house.tell(EndpointsChanged((A, B)))

    assert (without, again) == (0, 2)
    assert house.controller.pool.total.requests == 0


def test_a_lost_settlement_is_forgotten() -> None:
    """Else as many as can be waited for stay for ever."""
    house = House()
    house.arrive(2)
    house.tell(Settled(1), Left(1), Left(2))
    house.tell(SettlementLost(2), SettlementLost(77))
    late = house.tell(Settled(2, output_tokens=5))
    unsettled = house.controller.charges.unsettled

    assert late == []
    assert unsettled == 0


SLOTS = 12
REPORTS_NS = 200_000_000


@final
class Busy:
    """One endpoint that is always full, with recovered leases of which some are over already.

    Each request reaches it a while after its dispatch, and its end is known a while later.
    """

    def __init__(self, chance: Random, live: int, over: int, *, service_ns: int) -> None:
        config = ControllerConfig(
            detectors=(Concurrency(requests_max=SLOTS),), picker=Picker.LEAST_LOADED
        )
        self.controller = FlowController(config, 0)
        self.running = live
        """Requests that the endpoint really works on."""
        self.running_most = live
        self._chance = chance
        self._service_ns = service_ns
        self._number = itertools.count(1)
        self._events: list[tuple[int, int, Callable[[int], None]]] = []
        leases = tuple(RecoveredLease(f"x.{number}", A) for number in range(live + over))
        self._tell(0, EndpointsChanged((A,)), LeasesRecovered(leases, AGE_MAX_NS))
        self._tell(0, LoadObserved(A, 0, live, None))
        self._tell(0, *(Arrived(Request(next(self._number))) for _ in range(100)))
        self._at(REPORTS_NS, self._report)

    def run(self, until_ns: int) -> None:
        """Let time pass."""
        while self._events[0][0] <= until_ns:
            now_ns, _, act = heappop(self._events)
            act(now_ns)

    @property
    def recovered(self) -> int:
        """Recovered leases that hold a slot."""
        return self.controller.recovery.count

    def _at(self, at_ns: int, act: Callable[[int], None]) -> None:
        heappush(self._events, (at_ns, next(self._number), act))

    def _lag_ns(self) -> int:
        return self._chance.randrange(150_000_000)

    def _tell(self, now_ns: int, *facts: Fact) -> None:
        for fact in facts:
            self.controller.handle(fact, now_ns)
        for decision in self.controller.poll(now_ns):
            self._at(now_ns + self._lag_ns(), partial(self._reach, decision.request_id))
            self._at(now_ns, self._arrive)

    def _arrive(self, now_ns: int) -> None:
        self._tell(now_ns, Arrived(Request(next(self._number))))

    def _reach(self, request_id: int, now_ns: int) -> None:
        self.running += 1
        self.running_most = max(self.running_most, self.running)
        self._at(now_ns + self._service_ns, partial(self._end, request_id))

    def _end(self, request_id: int, now_ns: int) -> None:
        self.running -= 1
        self._at(now_ns + self._lag_ns(), lambda at_ns: self._tell(at_ns, Left(request_id)))

    def _report(self, now_ns: int) -> None:
        page = LoadObserved(A, 0, self.running, None)
        self._at(now_ns + self._chance.randrange(20_000_000), lambda at_ns: self._tell(at_ns, page))
        self._at(now_ns + REPORTS_NS, self._report)


@pytest.mark.parametrize("service_ns", [30_000_000, 3 * S])
@given(st.integers(0), st.integers(0, SLOTS), st.integers(0, SLOTS))
@settings(max_examples=40)
def test_what_still_runs_keeps_its_slot(service_ns: int, seed: int, live: int, over: int) -> None:
    """However short the requests beside it: its endpoint never works on more than its limit."""
    busy = Busy(Random(seed), live, min(over, SLOTS - live), service_ns=service_ns)
    busy.run(5 * S)

    assert busy.running_most <= SLOTS
    assert busy.recovered >= live


@pytest.mark.parametrize("service_ns", [30_000_000, 3 * S])
@given(st.integers(0), st.integers(0, SLOTS))
@settings(max_examples=20)
def test_what_is_over_gives_its_slot_back(service_ns: int, seed: int, live: int) -> None:
    """At once where nothing else is there, else within some seconds."""
    busy = Busy(Random(seed), live, SLOTS - live, service_ns=service_ns)
    busy.run(S)
    soon = busy.recovered
    busy.run(20 * S)

    assert soon == live
    assert busy.recovered <= live

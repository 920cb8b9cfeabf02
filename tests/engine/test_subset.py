"""Requests that may go to some endpoints only: they go to no others, and hold up no others."""

from collections import Counter
from dataclasses import replace
from typing import final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    Concurrency,
    ControllerConfig,
    Fairness,
    Limits,
    Ordering,
    Picker,
    Reclaim,
    TokenPrices,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Left,
    ObjectivesChanged,
    Reconfigured,
)
from flowcontrol.lines import Subset
from flowcontrol.pool import Pool
from flowcontrol.reclaim import Demand
from flowcontrol.request import Outcome, Request
from flowcontrol.views.explain import Gate, explain

A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"
BY_PROMPT = TokenPrices(output=0.0)


def config(
    fairness: Fairness = Fairness.ROUND_ROBIN,
    *,
    limit: int = 1,
    picker: Picker = Picker.LEAST_LOADED,
    fallbacks_max: int = 0,
) -> ControllerConfig:
    """So many requests at each endpoint, which the engine picks."""
    return ControllerConfig(
        default_settings=BandSettings(fairness=fairness),
        detectors=(Concurrency(requests_max=limit),),
        picker=picker,
        fallbacks_max=fallbacks_max,
    )


@final
class House:
    """A controller in front of endpoints A and B, or what a test says."""

    def __init__(self, settings: ControllerConfig, *addresses: str) -> None:
        self.controller = FlowController(settings, 0)
        self.now_ns = 0
        self._count = 0
        self.tell(EndpointsChanged(addresses or (A, B)), ObjectivesChanged({"high": 10}))

    def tell(self, *facts: object) -> list[Decision]:
        """Tell facts, and return what is decided; the account must be right afterwards."""
        self.now_ns += 1
        for fact in facts:
            self.controller.handle(fact, self.now_ns)  # type: ignore[arg-type]  # facts, all of them
        decisions = self.controller.poll(self.now_ns)
        self.controller.check_invariants()
        return decisions

    def arrived(
        self, *subset: str, flow_id: str = "f", objective: str | None = None, anywhere: bool = False
    ) -> Arrived:
        """A request that may go to these; its id counts from 1."""
        self._count += 1
        only = None if anywhere else subset
        return Arrived(Request(self._count, flow_id, objective, subset=only))

    def anybody(self, flow_id: str = "f", objective: str | None = None) -> Arrived:
        """A request that may go anywhere."""
        return self.arrived(flow_id=flow_id, objective=objective, anywhere=True)


def places(decisions: list[Decision]) -> list[tuple[int, str | None]]:
    """Who was dispatched, and where to."""
    return [(d.request_id, d.endpoint) for d in decisions if d.outcome is Outcome.DISPATCHED]


class TestPicking:
    """Where such a request goes."""

    def test_only_there(self) -> None:
        """Although another endpoint has more room."""
        house = House(config(limit=2))
        decisions = house.tell(*(house.arrived(A) for _ in range(2)))

        assert places(decisions) == [(1, A), (2, A)]

    def test_least_loaded_of_them(self) -> None:
        """Of several the least loaded, the longest unused first."""
        house = House(config(limit=2), A, B, C)
        house.tell(house.arrived(A))
        decisions = house.tell(*(house.arrived(A, B) for _ in range(3)))

        assert places(decisions) == [(2, B), (3, A), (4, B)]

    def test_waits_for_room_there(self) -> None:
        """A full endpoint keeps its limit: the request waits, with room elsewhere."""
        house = House(config())
        house.tell(house.arrived(A))
        waiting = house.tell(house.arrived(A))
        elsewhere = house.tell(house.anybody("g"))
        freed = house.tell(Left(1))

        assert (waiting, places(elsewhere), places(freed)) == ([], [(3, B)], [(2, A)])

    def test_behind_one_that_is_refused(self) -> None:
        """Who stood behind a newcomer without room, for which the queue has none, goes at once."""
        narrow = BandSettings(ordering=Ordering.EDF, limits=Limits(requests_max=1))
        house = House(replace(config(), default_settings=narrow))
        house.tell(house.arrived(A))
        second, hurried = house.anybody(), Arrived(Request(9, "f", ttl_ns=1000, subset=(A,)))
        decisions = house.tell(second, hurried)

        assert [(d.request_id, d.outcome) for d in decisions] == [
            (9, Outcome.REJECTED_CAPACITY),
            (2, Outcome.DISPATCHED),
        ]

    def test_strangers_are_ignored(self) -> None:
        """Addresses that are not in the pool are no places to go to."""
        house = House(config())

        assert places(house.tell(house.arrived("10.9.9.9:80", B))) == [(1, B)]

    def test_envoy_picks(self) -> None:
        """Where Envoy picks, a subset is Envoy's business."""
        house = House(config(picker=Picker.OFF))

        assert places(house.tell(house.arrived("10.9.9.9:80"))) == [(1, None)]


class TestNobodyThere:
    """No endpoint of the subset is in the pool."""

    @pytest.mark.parametrize("subset", [(), ("10.9.9.9:80",)])
    def test_refused_at_once(self, subset: tuple[str, ...]) -> None:
        """As the endpoint picker protocol has it: unavailable, and no use in waiting."""
        house = House(config())
        (decision,) = house.tell(house.arrived(*subset))

        assert decision.outcome is Outcome.REJECTED_NO_ENDPOINTS

    def test_empty_pool(self) -> None:
        """While the pool is empty every request waits for endpoints."""
        house = House(config())
        house.tell(EndpointsChanged(()))
        waiting = house.tell(house.arrived(C))
        come = house.tell(EndpointsChanged((C,)))

        assert (waiting, places(come)) == ([], [(1, C)])

    def test_endpoint_leaves(self) -> None:
        """Who waits for an endpoint that leaves waits on: it may come back."""
        house = House(config())
        house.tell(house.arrived(A))
        house.tell(house.arrived(A))
        gone = house.tell(EndpointsChanged((B,)))
        house.tell(Left(1))
        back = house.tell(EndpointsChanged((A, B)))

        assert (gone, places(back)) == ([], [(2, A)])


class TestNobodysWay:
    """A request that waits for its endpoint holds up no other, and keeps its place."""

    @pytest.mark.parametrize("fairness", Fairness)
    def test_flows_and_bands_pass(self, fairness: Fairness) -> None:
        """Other flows of the band, and lower bands, use the room that it cannot."""
        house = House(config(fairness), A, B, C)
        house.tell(house.arrived(A, objective="high"))
        decisions = house.tell(
            house.arrived(A, flow_id="tied", objective="high"),
            house.anybody("free", objective="high"),
            house.anybody("low"),
        )

        assert sorted(i for i, _ in places(decisions)) == [3, 4]
        assert places(house.tell(Left(1))) == [(2, A)]

    @pytest.mark.parametrize("fairness", Fairness)
    def test_keeps_its_turn(self, fairness: Fairness) -> None:
        """Passed over again and again, it is the first when its endpoint has room."""
        house = House(config(fairness))
        house.tell(house.arrived(A), house.anybody("g"))
        house.tell(house.arrived(A, flow_id="tied"))
        house.tell(*(house.anybody(flow) for flow in "xyz" * 4))
        served: list[int] = []
        for _ in range(5):
            ((request_id, endpoint),) = places(house.tell(Left(2 if not served else served[-1])))
            assert endpoint == B
            served.append(request_id)

        assert places(house.tell(Left(1))) == [(3, A)]

    @pytest.mark.parametrize("passes", [1, 2])
    def test_order_of_those_passed_over(self, passes: int) -> None:
        """However often they are passed over, equal turns stay in their order."""
        house = House(config(Fairness.ROUND_ROBIN))
        house.tell(house.arrived(A), house.anybody("g"))
        house.tell(house.arrived(A, flow_id="p"), house.arrived(A, flow_id="q"))
        last = 2
        for _ in range(passes):
            house.tell(house.anybody("z"))
            ((last, _),) = places(house.tell(Left(last)))

        assert places(house.tell(Left(1))) == [(3, A)]
        assert places(house.tell(Left(3))) == [(4, A)]

    @pytest.mark.parametrize("fairness", Fairness)
    def test_leaves_while_passed_over(self, fairness: Fairness) -> None:
        """It can go away like any other."""
        house = House(config(fairness))
        house.tell(house.arrived(A))
        house.tell(house.arrived(A, flow_id="tied"), house.arrived(A, flow_id="other"))
        (gone,) = house.tell(Left(2))

        assert gone.outcome is Outcome.EVICTED_CANCELLED
        assert places(house.tell(Left(1))) == [(3, A)]

    @pytest.mark.parametrize(
        ("weights", "costs"),
        [({"gold": 9.0}, {"gold": 100, "tin": 100}), ({}, {"a": 10, "b": 1000})],
    )
    def test_weights_hold_while_passed_over(
        self, weights: dict[str, float], costs: dict[str, int]
    ) -> None:
        """Endpoint B has room all the time, so those tied to A are passed over in every turn."""
        settings = replace(config(Fairness.WEIGHTED_TOKENS), weights=weights, prices=BY_PROMPT)
        controller = FlowController(settings, 0)
        controller.handle(EndpointsChanged((A, B)), 0)
        served: Counter[str] = Counter()
        came = [flow_id for flow_id in costs for _ in range(3)]
        for now_ns in range(2000):
            first_id = 3 * len(costs) + now_ns if now_ns else 1
            for request_id, flow_id in enumerate(came, first_id):
                request = Request(request_id, flow_id, input_tokens=costs[flow_id], subset=(A,))
                controller.handle(Arrived(request), now_ns)
            (sent,) = controller.poll(now_ns)
            controller.handle(Left(sent.request_id), now_ns)
            came = [sent.flow_id]
            served[sent.flow_id] += costs[sent.flow_id]

        one, other = costs
        ratio = served[one] / served[other]
        assert ratio == pytest.approx(weights.get(one, 1.0) / weights.get(other, 1.0), rel=0.05)

    @pytest.mark.interpreted
    def test_crowd_is_passed_over_with_one_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many flows wait for an endpoint, a turn in which none of them goes is short."""
        asked: list[Subset] = []
        has_room_in = Pool.has_room_in

        def listening(pool: Pool, subset: Subset) -> bool:
            asked.append(subset)
            return has_room_in(pool, subset)

        monkeypatch.setattr(Pool, "has_room_in", listening)
        house = House(config(Fairness.WEIGHTED_TOKENS))
        house.tell(house.arrived(A))
        house.tell(*(house.arrived(A, flow_id=f"f{number}") for number in range(500)))
        asked.clear()
        house.controller.poll(house.now_ns + 1)

        assert asked == [(A,)]


class TestPromotion:
    """Who waited too long goes first, of those that can go."""

    def promoting(self) -> House:
        """Requests of band 0 are due after 10 ns."""
        templates = (BandTemplate(priority_max=0, settings=BandSettings(promote_after_ns=10)),)
        house = House(replace(config(), templates=templates))
        house.tell(house.arrived(A, objective="high"), house.arrived(B, objective="high"))
        return house

    def test_who_cannot_go_hides_nobody(self) -> None:
        """The first that is due waits for A; the second may go anywhere, and goes."""
        house = self.promoting()
        house.tell(house.arrived(A))
        house.tell(house.anybody("second"), house.arrived(B, flow_id="z", objective="high"))
        house.now_ns += 20

        assert places(house.tell(Left(2))) == [(4, B)]
        assert places(house.tell(Left(1))) == [(3, A)]

    def test_nobody_is_woken_for_who_cannot_go(self) -> None:
        """Due and without room, it is no reason to wake up; else the processor would spin."""
        house = self.promoting()
        house.tell(Left(2), house.arrived(A))
        before = house.controller.next_wakeup_ns()
        house.now_ns += 20

        assert house.tell() == []
        assert (before, house.controller.next_wakeup_ns()) == (None, None)


class TestReclaim:
    """Ending a request in flight helps only who may go where it was."""

    def test_nobody_ends_in_vain(self) -> None:
        """The newest is at B, where the one that waits must not go; the one at A is ended."""
        reclaim = Reclaim(is_enabled=True, is_only_before_first_byte=False)
        house = House(replace(config(), reclaim=reclaim))
        house.tell(ObjectivesChanged({"high": 10, "low": -1}))
        house.tell(house.arrived(A, objective="low"), house.arrived(B, objective="low"))
        (told,) = house.tell(house.arrived(A, objective="high"))

        assert (told.request_id, told.outcome) == (1, Outcome.RECLAIMED)

    def test_where_it_is_served(self) -> None:
        """One that was sent to A, and is served by B, leaves no place at A."""
        reclaim = Reclaim(is_enabled=True, is_only_before_first_byte=False)
        house = House(replace(config(), reclaim=reclaim))
        house.tell(ObjectivesChanged({"high": 10, "low": -1}))
        house.tell(house.arrived(A, objective="low"))
        house.tell(Answered(1, B))
        house.tell(house.arrived(A, objective="high"))

        assert house.tell(house.arrived(A, objective="high")) == []
        (told,) = house.tell(house.arrived(B, objective="high"))
        assert (told.request_id, told.outcome) == (1, Outcome.RECLAIMED)

    def test_as_many_as_can_go(self) -> None:
        """Two wait for A, one may go anywhere: of two slots at A and two at B, one at B is left."""
        demand = Demand(3, {(A,): 2})
        taken = []
        for slot in (B, B, A, A):
            if demand.includes((slot,)):
                demand.take((slot,))
                taken.append(slot)

        assert taken == [B, A, A]


class TestExplained:
    """An explanation says so."""

    def test_held_by_its_subset(self) -> None:
        """There is room, but not for this one."""
        house = House(config())
        house.tell(house.arrived(A))
        house.tell(house.arrived(A))
        explained = explain(house.controller, 2, house.now_ns)

        assert explained is not None
        assert explained.gate is Gate.SUBSET
        assert explained.expected_wait_ns is None

    def test_held_by_the_first_of_its_flow(self) -> None:
        """Nor does one that may go anywhere, behind such a one, go in the next turns."""
        house = House(config())
        house.tell(house.arrived(A))
        house.tell(house.arrived(A))
        house.tell(house.anybody())
        explained = explain(house.controller, 3, house.now_ns)

        assert explained is not None
        assert explained.gate is Gate.SUBSET


class TestFallbacks:
    """Where else to send a request."""

    def test_next_best(self) -> None:
        """As many as wanted, the least loaded first, and not the one picked."""
        house = House(config(limit=4, fallbacks_max=1), A, B, C)
        house.tell(house.arrived(A), house.arrived(A), house.arrived(B))
        (decision,) = house.tell(house.anybody())

        assert (decision.endpoint, decision.fallbacks) == (C, (B,))

    def test_within_the_subset(self) -> None:
        """Never an endpoint that the request may not go to; none, if there is no other."""
        house = House(config(limit=4, fallbacks_max=5), A, B, C)
        both, one = house.tell(house.arrived(A, C), house.arrived(B))

        assert (both.endpoint, both.fallbacks) == (A, (C,))
        assert (one.endpoint, one.fallbacks) == (B, ())

    def test_changed(self) -> None:
        """How many is a setting that can change; by default none."""
        house = House(config(limit=4))
        (none,) = house.tell(house.anybody())
        house.tell(Reconfigured(config(limit=4, fallbacks_max=2)))
        (one,) = house.tell(house.anybody())

        assert (none.fallbacks, one.fallbacks) == ((), (none.endpoint,))


@final
class Crowd(RuleBasedStateMachine):
    """Requests with and without subsets, endpoints that come and go, against a ledger."""

    LIMIT = 2

    def __init__(self) -> None:
        super().__init__()
        fairness = list(Fairness)
        templates = tuple(
            BandTemplate(
                priority_min=n,
                priority_max=n,
                settings=BandSettings(
                    fairness=each,
                    share_min=0.2 if n == 1 else 0.0,
                    promote_after_ns=5 if n == 0 else None,
                ),
            )
            for n, each in enumerate(fairness)
        )
        self.controller = FlowController(
            ControllerConfig(
                templates=templates,
                detectors=(Concurrency(requests_max=self.LIMIT),),
                picker=Picker.LEAST_LOADED,
                fallbacks_max=1,
            ),
            0,
        )
        self.now_ns = 0
        self.count = 0
        self.requests: dict[int, Request] = {}
        self.at: dict[int, str] = {}
        self.waiting: set[int] = set()
        self.pool: tuple[str, ...] = (A, B)
        objectives = {str(n): n for n in range(len(fairness))}
        self.tell(EndpointsChanged(self.pool), ObjectivesChanged(objectives))

    def tell(self, *facts: object) -> None:
        """Tell facts, and hold what is decided against the ledger."""
        self.now_ns += 1
        for fact in facts:
            self.controller.handle(fact, self.now_ns)  # type: ignore[arg-type]  # facts, all of them
        for decision in self.controller.poll(self.now_ns):
            self.waiting.remove(decision.request_id)
            if decision.outcome is not Outcome.DISPATCHED:
                continue
            subset = self.requests[decision.request_id].subset
            assert decision.endpoint in self.pool
            assert decision.endpoint not in decision.fallbacks
            for each in (decision.endpoint, *decision.fallbacks):
                assert each is not None
                assert subset is None or each in subset
            self.at[decision.request_id] = decision.endpoint
            assert list(self.at.values()).count(decision.endpoint) <= self.LIMIT

    @rule(
        subset=st.none() | st.lists(st.sampled_from([A, B, C]), unique=True).map(tuple),
        flow_id=st.sampled_from("xyz"),
        objective=st.sampled_from("0123"),
        times=st.integers(1, 4),
    )
    def arrive(
        self, subset: tuple[str, ...] | None, flow_id: str, objective: str, times: int
    ) -> None:
        """Some requests arrive at once."""
        facts = []
        for _ in range(times):
            self.count += 1
            request = Request(self.count, flow_id, objective, subset=subset)
            self.requests[self.count] = request
            self.waiting.add(self.count)
            facts.append(Arrived(request))
        self.tell(*facts)

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A request in flight ends."""
        request_id = data.draw(st.sampled_from(sorted(self.at)))
        del self.at[request_id]
        self.tell(Left(request_id))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client goes away."""
        self.tell(Left(data.draw(st.sampled_from(sorted(self.waiting)))))

    @rule(pool=st.lists(st.sampled_from([A, B, C]), unique=True).map(tuple))
    def change_pool(self, pool: tuple[str, ...]) -> None:
        """Endpoints come and go."""
        self.pool = pool
        self.tell(EndpointsChanged(pool))

    @invariant()
    def is_right(self) -> None:
        """The account is right, nothing waits that could go, and the next turn is later."""
        self.controller.check_invariants()
        wakeup_ns = self.controller.next_wakeup_ns()
        assert wakeup_ns is None or wakeup_ns > self.now_ns
        for address in self.pool:
            if list(self.at.values()).count(address) < self.LIMIT:
                could = [
                    i
                    for i in self.waiting
                    if self.requests[i].subset is None or address in (self.requests[i].subset or ())
                ]
                heads = {self.head_of(i) for i in could}
                assert not heads & set(could), "a head waits beside room it could have"

    def head_of(self, request_id: int) -> int:
        """The first that waits of the same flow."""
        mine = self.requests[request_id]
        same = [
            i
            for i in self.waiting
            if (self.requests[i].flow_id, self.requests[i].objective)
            == (mine.flow_id, mine.objective)
        ]
        return min(same)

    def teardown(self) -> None:
        """When endpoints are there and all requests end, all are decided."""
        self.pool = (A, B, C)
        self.tell(EndpointsChanged(self.pool))
        while self.at:
            ended = list(self.at)
            self.at.clear()
            self.tell(*(Left(request_id) for request_id in ended))
        self.tell(DrainBegan(0))
        assert not self.waiting


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

"""The policies through the whole engine: what tenants and bands get of a pool, and when."""

from collections.abc import Mapping
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    Concurrency,
    ControllerConfig,
    Fairness,
    Limits,
    Ordering,
    TokenPrices,
)
from flowcontrol.controller import FlowController
from flowcontrol.estimates import Tokens
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged, Settled
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import FlowKey, Request
from tests.support.oracles import unfairness, water_filling

SECOND = 1_000_000_000
CAPACITY = 100
"""Tokens a second that the one server of these tests takes in."""
RUN_NS = 100 * SECOND


class Tenant(NamedTuple):
    """Who asks for how much."""

    demand: int
    """Tokens a second."""
    cost: int
    """Tokens of each request."""
    weight: float


tenants = st.builds(
    Tenant, st.integers(10, 120), st.sampled_from([10, 20, 50]), st.sampled_from([1.0, 2.0, 3.0])
)


def served(
    fairness: Fairness, wanted: Mapping[str, Tenant], *, is_estimated: bool
) -> dict[str, float]:
    """Return the tokens a second that each tenant gets of one server that takes one at a time.

    Args:
        fairness: of the band.
        wanted: by flow id.
        is_estimated: whether the engine has to guess what requests cost, and learns it afterwards.
    """
    controller = FlowController(
        ControllerConfig(
            detectors=(Concurrency(requests_max=1),),
            default_settings=BandSettings(fairness=fairness),
            weights={flow_id: tenant.weight for flow_id, tenant in wanted.items()},
            prices=TokenPrices(input=1.0, output=1.0),
        ),
        0,
    )
    controller.handle(EndpointsChanged(("a",)), 0)
    arrivals = sorted(
        (round(index * tenant.cost / tenant.demand * SECOND), flow_id)
        for flow_id, tenant in wanted.items()
        for index in range(tenant.demand * RUN_NS // SECOND // tenant.cost)
    )
    got = dict.fromkeys(wanted, 0.0)
    now_ns, at, in_flight = 0, 0, None
    while now_ns < RUN_NS:
        while at < len(arrivals) and arrivals[at][0] <= now_ns:
            flow_id = arrivals[at][1]
            known = None if is_estimated else wanted[flow_id].cost
            request = Request(
                at, flow_id, input_tokens=known, output_tokens_max=None if is_estimated else 0
            )
            controller.handle(Arrived(request), now_ns)
            at += 1
        for decision in controller.poll(now_ns):
            in_flight = decision
        if in_flight is None:
            now_ns = arrivals[at][0] if at < len(arrivals) else RUN_NS
            continue
        cost = wanted[in_flight.flow_id].cost
        now_ns += round(cost / CAPACITY * SECOND)
        got[in_flight.flow_id] += cost
        controller.handle(Settled(in_flight.request_id, cost // 2, 0, cost - cost // 2), now_ns)
        controller.handle(Left(in_flight.request_id), now_ns)
        in_flight = None
    return {flow_id: cost * SECOND / RUN_NS for flow_id, cost in got.items()}


def farthest(
    fairness: Fairness, wanted: Mapping[str, Tenant], *, is_estimated: bool = False
) -> float:
    """Return how far the worst tenant is from its max-min fair share, in parts of the capacity."""
    got = served(fairness, wanted, is_estimated=is_estimated)
    shares = water_filling(
        {flow_id: tenant.demand for flow_id, tenant in wanted.items()},
        {flow_id: tenant.weight for flow_id, tenant in wanted.items()},
        CAPACITY,
    )
    return max(abs(got[each] - shares[each]) for each in wanted) / CAPACITY


class TestWaterFilling:
    """The oracle itself."""

    @pytest.mark.parametrize(
        ("demands", "weights", "shares"),
        [
            ({"a": 10, "b": 10}, {"a": 1, "b": 1}, {"a": 10, "b": 10}),
            ({"a": 90, "b": 90}, {"a": 1, "b": 1}, {"a": 30, "b": 30}),
            ({"a": 90, "b": 10}, {"a": 1, "b": 1}, {"a": 50, "b": 10}),
            ({"a": 90, "b": 90}, {"a": 2, "b": 1}, {"a": 40, "b": 20}),
            (
                {"a": 90, "b": 12, "c": 21},
                {"a": 1, "b": 1, "c": 1},
                {"a": 27, "b": 12, "c": 21},
            ),
        ],
    )
    def test_by_hand(
        self, demands: dict[str, float], weights: dict[str, float], shares: dict[str, float]
    ) -> None:
        """Of a capacity of 60."""
        assert water_filling(demands, weights, 60) == pytest.approx(shares)

    @given(
        flows=st.dictionaries(
            st.sampled_from("abcdef"),
            st.tuples(st.floats(0.1, 100), st.floats(0.1, 10)),
            min_size=1,
        ),
        capacity=st.floats(1, 200),
    )
    @settings(max_examples=100)
    def test_is_max_min_fair(self, flows: dict[str, tuple[float, float]], capacity: float) -> None:
        """No flow gets more than asked for, nothing is left over, none has less than it could."""
        demands = {each: demand for each, (demand, _) in flows.items()}
        weights = {each: weight for each, (_, weight) in flows.items()}
        shares = water_filling(demands, weights, capacity)

        assert all(shares[each] <= demands[each] + 1e-9 for each in flows)
        assert sum(shares.values()) == pytest.approx(min(capacity, sum(demands.values())))
        assert unfairness(shares, demands, weights) <= 1e-6

    def test_shares_by_demand_are_not(self) -> None:
        """The check can fail: the flow that asks for most would get most."""
        assert unfairness({"a": 45, "b": 15}, {"a": 90, "b": 30}, {"a": 1, "b": 1}) == 30


class TestShares:
    """What tenants get of a full pool."""

    @given(wanted=st.dictionaries(st.sampled_from("abcd"), tenants, min_size=2))
    @settings(max_examples=25)
    def test_weighted_tokens_are_max_min_fair(self, wanted: dict[str, Tenant]) -> None:
        """Within four parts in a hundred of the capacity, whatever each asks for and weighs."""
        assert farthest(Fairness.WEIGHTED_TOKENS, wanted) < 0.04

    @given(wanted=st.dictionaries(st.sampled_from("abcd"), tenants, min_size=2))
    @settings(max_examples=25)
    def test_although_costs_are_guessed(self, wanted: dict[str, Tenant]) -> None:
        """Costs are corrected afterwards, and that is enough."""
        assert farthest(Fairness.WEIGHTED_TOKENS, wanted, is_estimated=True) < 0.04

    @pytest.mark.parametrize("fairness", [Fairness.ROUND_ROBIN, Fairness.GLOBAL_STRICT])
    def test_other_policies_are_not(self, fairness: Fairness) -> None:
        """The check refuses equal turns, and one line for all."""
        wanted = {"a": Tenant(120, 50, 1.0), "b": Tenant(80, 10, 1.0), "c": Tenant(10, 10, 1.0)}

        assert farthest(fairness, wanted) > 0.08
        assert farthest(Fairness.WEIGHTED_TOKENS, wanted) < 0.04

    def test_weights_count(self) -> None:
        """The check refuses who takes them for equal."""
        wanted = {"a": Tenant(120, 10, 3.0), "b": Tenant(120, 10, 1.0)}
        equal = {flow_id: each._replace(weight=1.0) for flow_id, each in wanted.items()}
        got = served(Fairness.WEIGHTED_TOKENS, equal, is_estimated=False)

        assert farthest(Fairness.WEIGHTED_TOKENS, wanted) < 0.04
        assert got["a"] < 75 * 0.8

    def test_least_attained_service_shares_evenly(self) -> None:
        """Tenants that always wait attain the same."""
        wanted = {"a": Tenant(120, 50, 1.0), "b": Tenant(120, 10, 1.0)}

        assert farthest(Fairness.LEAST_ATTAINED_SERVICE, wanted) < 0.04


class TestOrdering:
    """Which of its own a flow sends first, held against a sorted list."""

    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["push", "push", "pop", "remove", "move"]),
                st.integers(0, 9),
                st.none() | st.integers(0, 5),
            ),
            max_size=60,
        ),
        ordering=st.sampled_from(Ordering),
    )
    @settings(max_examples=150)
    def test_is_a_sorted_list(
        self, steps: list[tuple[str, int, int | None]], ordering: Ordering
    ) -> None:
        """By arrival, by deadline, or by when the first token is due; ties by arrival."""
        flow = Flow(FlowKey(0, "a"), ordering, Limits())
        line: list[Lease] = []
        for index, (what, number, due) in enumerate(steps):
            if what == "push":
                request = Request(index, ttft_slo_ns=due)
                lease = Lease(request, flow, index, number, Tokens(1, 1), 1)
                lease.deadline_ns = due
                flow.push(lease)
                line.append(lease)
            elif what == "move" and line:
                line[number % len(line)].deadline_ns = due
                flow.move(line[number % len(line)])
            elif line:
                lease = line[0] if what == "pop" else line[number % len(line)]
                line.remove(lease)
                flow.remove(lease)
            line.sort(key=lambda lease: _rank(lease, ordering))
            assert len(flow) == len(line)
            assert not line or flow.head is line[0]
            assert [flow.place(lease) for lease in line] == list(range(len(line)))

    def test_orders_differ(self) -> None:
        """The check can fail: each order has another head."""
        heads = []
        for ordering in Ordering:
            flow = Flow(FlowKey(0, "a"), ordering, Limits())
            for index, (deadline_ns, slo_ns) in enumerate(((3, 3), (1, 2), (2, 1))):
                request = Request(index, ttft_slo_ns=slo_ns)
                lease = Lease(request, flow, index, 0, Tokens(1, 1), 1)
                lease.deadline_ns = deadline_ns
                flow.push(lease)
            heads.append(flow.head.arrival_index)

        assert heads == [0, 1, 2]


def _rank(lease: Lease, ordering: Ordering) -> tuple[bool, int, int]:
    """Return where a request stands: those with a time first, by it, then by arrival."""
    due_ns: int | None = lease.arrived_ns
    if ordering is Ordering.EDF:
        due_ns = lease.deadline_ns
    elif ordering is Ordering.SLO_DEADLINE:
        slo_ns = lease.request.ttft_slo_ns
        due_ns = None if slo_ns is None else lease.arrived_ns + slo_ns
    return due_ns is None, due_ns or 0, lease.arrival_index


class Pool:
    """One slot, a high band that never runs out of work, and a low one with exceptions."""

    def __init__(self, low: BandSettings) -> None:
        self.controller = FlowController(
            ControllerConfig(
                detectors=(Concurrency(requests_max=1),),
                templates=(BandTemplate(priority_max=-1, settings=low),),
            ),
            0,
        )
        self.now_ns = 0
        self.count = 0
        self.controller.handle(EndpointsChanged(("a",)), 0)
        self.declare("high", "low")

    def declare(self, *objectives: str) -> None:
        """Declare these."""
        known = {"high": 10, "low": -1, "other": -5}
        self.controller.handle(
            ObjectivesChanged({each: known[each] for each in objectives}), self.now_ns
        )

    def arrive(self, objective: str, count: int = 1) -> None:
        """Let requests of one token come."""
        for _ in range(count):
            self.count += 1
            request = Request(self.count, objective=objective, input_tokens=1, output_tokens_max=0)
            self.controller.handle(Arrived(request), self.now_ns)

    def dispatch(self, seconds: int) -> list[tuple[int, int]]:
        """Serve one a second, the high band refilled; return priority and wait of each."""
        sent = []
        for _ in range(seconds):
            self.arrive("high")
            for decision in self.controller.poll(self.now_ns):
                sent.append((decision.priority, decision.waited_ns // SECOND))
                self.now_ns += SECOND
                self.controller.handle(Left(decision.request_id), self.now_ns)
        return sent


class TestLowBand:
    """What a low band gets under a permanent high one."""

    def test_nothing_in_strict_order(self) -> None:
        """The negative control: it starves."""
        pool = Pool(BandSettings())
        pool.arrive("low", 5)
        pool.arrive("high", 5)

        assert {priority for priority, _ in pool.dispatch(60)} == {10}

    def test_its_share_although_bands_come_and_go(self) -> None:
        """At least s T - (k + 1) C, and C less for each time another with a share is declared."""
        pool = Pool(BandSettings(share_min=0.2))
        pool.arrive("low", 100)
        sent = []
        for turn in range(20):
            pool.declare("high", "low", *(["other"] if turn % 2 else []))
            if turn % 2:
                pool.arrive("other", 3)
            sent += [priority for priority, _ in pool.dispatch(10)]

        for start in range(0, 200, 20):
            assert sent[start : start + 40].count(-1) >= 0.2 * 40 - 3 - 2
        assert sent.count(-1) >= 0.2 * 200 - 3

    def test_its_oldest_after_the_time_of_promotion(self) -> None:
        """Each waits so long, and then for those that were due before it."""
        pool = Pool(BandSettings(promote_after_ns=10 * SECOND))
        pool.arrive("high", 3)
        pool.arrive("low", 4)
        sent = pool.dispatch(30)

        assert [wait for priority, wait in sent if priority == -1] == [10, 11, 12, 13]
        assert [priority for priority, _ in sent[:10]] == [10] * 10

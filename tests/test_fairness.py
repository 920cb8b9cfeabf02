"""Whose turn it is: bounds that hold for the policies, and that an unfair one breaks."""

from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import Fairness
from flowcontrol.fairness import FairnessPolicy, GlobalStrict, RoundRobin, make_fairness
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import FlowKey, Request

FLOW_IDS = "abcde"
steps = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive", "dispatch", "leave"]), st.integers(0, 99)),
    max_size=80,
)
Step = tuple[str, int]


class Queue:
    """Flows under a policy, told what a band tells it."""

    def __init__(self, policy: FairnessPolicy) -> None:
        self.policy = policy
        self.flows = {flow_id: Flow(FlowKey(0, flow_id)) for flow_id in FLOW_IDS}
        self.arrived_count = 0

    @property
    def waiting(self) -> list[Lease]:
        """All that wait, flow by flow."""
        return [lease for flow in self.flows.values() for lease in flow.leases()]

    def arrive(self, flow_id: str) -> Lease:
        """Queue a request."""
        self.arrived_count += 1
        flow = self.flows[flow_id]
        lease = Lease(Request(self.arrived_count), flow, self.arrived_count, 0, 0)
        flow.push(lease)
        if len(flow) == 1:
            self.policy.enter(flow)
        return lease

    def leave(self, lease: Lease) -> None:
        """Take a request out, dispatched or not."""
        was_head = lease.flow.head is lease
        lease.flow.remove(lease)
        if not lease.flow:
            self.policy.leave(lease.flow)
        elif was_head:
            self.policy.head_moved(lease.flow)

    def dispatch(self) -> Lease:
        """Let the policy choose, and send the head of that flow."""
        flow = self.policy.pick()
        lease = flow.head
        self.policy.charge(flow)
        self.leave(lease)
        return lease

    def run(self, steps: Iterable[Step]) -> list[Lease]:
        """Take steps, as far as they are possible; return whom was dispatched."""
        dispatched = []
        for step, number in steps:
            if step == "arrive":
                self.arrive(FLOW_IDS[number % len(FLOW_IDS)])
            elif not self.waiting:
                continue
            elif step == "dispatch":
                dispatched.append(self.dispatch())
            else:
                self.leave(self.waiting[number % len(self.waiting)])
        return dispatched


def turns_missed(policy: FairnessPolicy, steps: Iterable[Step]) -> int:
    """Return by how much the worst head overran its bound; 0 when every bound was kept.

    Whoever is the head of a flow while F flows wait goes within F dispatches.
    """
    queue = Queue(policy)
    due: dict[Flow, int] = {}
    missed = dispatch_count = 0
    for step in steps:
        served = {lease.flow for lease in queue.run([step])}
        dispatch_count += len(served)
        waiting = [flow for flow in queue.flows.values() if flow]
        due = {
            flow: due[flow] if flow in due and flow not in served else dispatch_count + len(waiting)
            for flow in waiting
        }
        missed = max([missed, *(dispatch_count - due[flow] + 1 for flow in waiting)])
    return missed


class LongestFirst:
    """An unfair policy: whoever has the most waiting goes."""

    def __init__(self) -> None:
        self.flows: dict[Flow, None] = {}

    def enter(self, flow: Flow) -> None:
        """Take up the flow."""
        self.flows[flow] = None

    def head_moved(self, flow: Flow) -> None:
        """Take no notice."""

    def leave(self, flow: Flow) -> None:
        """Let go of the flow."""
        del self.flows[flow]

    def pick(self) -> Flow:
        """Return the flow with the longest backlog."""
        return max(self.flows, key=len)

    def charge(self, flow: Flow) -> None:
        """Keep no account."""


class TestRoundRobin:
    """Equal turns."""

    @pytest.mark.slow
    @given(steps=steps)
    @settings(max_examples=150)
    def test_head_goes_within_as_many_dispatches_as_flows_wait(self, steps: list[Step]) -> None:
        """Whatever comes, goes and is cancelled meanwhile."""
        assert turns_missed(RoundRobin(), steps) == 0

    def test_unfair_policy_breaks_the_bound(self) -> None:
        """The check fails where one flow is served while another waits its turn."""
        steps = [("arrive", 0)] * 9 + [("arrive", 1)] + [("dispatch", 0)] * 9

        assert turns_missed(RoundRobin(), steps) == 0
        assert turns_missed(LongestFirst(), steps) > 0

    @pytest.mark.parametrize("rival", range(1, 8))
    def test_backlog_buys_nothing(self, rival: int) -> None:
        """Two flows alternate, whether the other has one more request or many."""
        queue = Queue(RoundRobin())
        queue.run([("arrive", 0)] * (rival * 10) + [("arrive", 1)] * 5)

        served = [lease.flow.key.flow_id for lease in queue.run([("dispatch", 0)] * 10)]

        assert served == ["a", "b"] * 5

    def test_flow_that_comes_back_stands_behind_all(self) -> None:
        """An empty flow keeps no place in the line."""
        queue = Queue(RoundRobin())
        queue.run([("arrive", 0), ("arrive", 1), ("arrive", 1), ("dispatch", 0), ("arrive", 0)])

        served = [lease.flow.key.flow_id for lease in queue.run([("dispatch", 0)] * 3)]

        assert served == ["b", "a", "b"]

    def test_head_that_gives_up_does_not_cost_its_flow_the_turn(self) -> None:
        """The next of the flow goes in its place."""
        queue = Queue(RoundRobin())
        first, second = queue.arrive("a"), queue.arrive("a")
        queue.arrive("b")
        queue.leave(first)

        assert queue.dispatch() is second


class TestGlobalStrict:
    """One queue."""

    @pytest.mark.slow
    @given(steps=steps)
    @settings(max_examples=150)
    def test_is_one_queue(self, steps: list[Step]) -> None:
        """The order of dispatch is that of a single line without any flows."""
        queue = Queue(GlobalStrict())
        line: deque[int] = deque()
        for step in steps:
            before = {lease.request.request_id for lease in queue.waiting}
            dispatched = [lease.request.request_id for lease in queue.run([step])]
            after = {lease.request.request_id for lease in queue.waiting}

            assert dispatched == ([line[0]] if dispatched else [])

            line.extend(after - before)
            for request_id in before - after:
                line.remove(request_id)

    def test_unfair_policy_is_no_queue(self) -> None:
        """Served by backlog, or in turns, the order is another."""
        steps = [("arrive", 0), ("arrive", 1), ("arrive", 1), *[("dispatch", 0)] * 3]
        expected = [1, 2, 3]

        assert [each.request.request_id for each in Queue(GlobalStrict()).run(steps)] == expected
        assert [each.request.request_id for each in Queue(LongestFirst()).run(steps)] != expected

    def test_next_of_a_flow_stands_where_it_arrived(self) -> None:
        """A head that leaves does not pass its place on to the next."""
        queue = Queue(GlobalStrict())
        first, second, third = (queue.arrive(flow_id) for flow_id in "aba")
        queue.leave(first)

        assert [queue.dispatch(), queue.dispatch()] == [second, third]

    def test_nobody_waiting_is_an_error(self) -> None:
        """It is asked only while something waits."""
        with pytest.raises(AssertionError, match="pick needs a flow with something waiting"):
            GlobalStrict().pick()


class TestMakeFairness:
    """The table of policies."""

    @pytest.mark.parametrize(
        ("fairness", "expected"),
        [(Fairness.ROUND_ROBIN, RoundRobin), (Fairness.GLOBAL_STRICT, GlobalStrict)],
    )
    def test_makes_what_is_configured(self, fairness: Fairness, expected: type) -> None:
        """Each kind of fairness has its policy, a new one for each band."""
        policy = make_fairness(fairness)

        assert type(policy) is expected
        assert make_fairness(fairness) is not policy

    @pytest.mark.parametrize("fairness", Fairness)
    def test_every_kind_serves_everybody(self, fairness: Fairness) -> None:
        """Whoever waits is dispatched, each once, and in order within its flow."""
        queue = Queue(make_fairness(fairness))
        queue.run([("arrive", number) for number in (0, 0, 3, 1, 0, 1, 2, 2, 3, 0)])

        served = queue.run([("dispatch", 0)] * 10)

        assert not queue.waiting
        assert len({lease.request.request_id for lease in served}) == 10
        for flow in queue.flows.values():
            mine = [lease.arrival_index for lease in served if lease.flow is flow]
            assert mine == sorted(mine)

"""Whose turn it is: bounds that hold for the policies, and that an unfair one breaks."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol import fairness as fairness_module
from flowcontrol import weighted_tokens
from flowcontrol.config import BandSettings, ControllerConfig, Fairness, Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.fairness import (
    FairnessPolicy,
    GlobalStrict,
    LeastAttainedService,
    RoundRobin,
    make_fairness,
)
from flowcontrol.flow import Flow, Lease
from flowcontrol.lines import Subset
from flowcontrol.request import FlowKey, Request
from flowcontrol.weighted_tokens import WeightedTokens
from tests.support.queues import FLOW_IDS, NaivePolicy, NaiveTokens, Queue, Step, everywhere

WEIGHTS = {"a": 2.0, "b": 0.5, "c": 3.0}
HALF_LIFE_NS = 1000
ENDPOINT = "10.0.0.1:80"
TOLERANCE = 1e-6
"""Of sums of a few hundred floats."""


def made(fairness: Fairness) -> FairnessPolicy:
    """Return a policy of one kind, with the weights and the half-life of these tests."""
    config = ControllerConfig(weights=WEIGHTS, attained_half_life_ns=HALF_LIFE_NS)
    return make_fairness(BandSettings(fairness=fairness), config, 0)


def arrivals(flow_ids: str, cost: int = 1, true_cost: int | None = None) -> list[Step]:
    """Return steps that queue a request of each of these flows."""
    true_cost = cost if true_cost is None else true_cost
    return [("arrive", FLOW_IDS.index(each), cost, true_cost) for each in flow_ids]


def dispatches(count: int) -> list[Step]:
    """Return steps that dispatch so often."""
    return [("dispatch", 0, 0, 0)] * count


def served(queue: Queue, count: int) -> str:
    """Return the flows of the next dispatches."""
    return "".join(lease.flow.key.flow_id for lease in queue.run(dispatches(count)))


def steps_of(*kinds: str) -> st.SearchStrategy[list[Step]]:
    """Return steps of these kinds, with costs from 1 to 9."""
    step = st.tuples(
        st.sampled_from(kinds), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)
    )
    return st.lists(step, max_size=80)


def long_run(seed: int) -> list[Step]:
    """Return many steps of a seeded generator; requests of a and c are ten times what is said."""
    chance = Random(seed)
    kinds = ["arrive"] * 6 + ["dispatch"] * 4 + ["settle"] * 4 + ["cancel", "pass"]
    steps = []
    for _ in range(2000):
        number, cost = chance.randrange(100), chance.randint(1, 9)
        true_cost = 10 * cost if FLOW_IDS[number % len(FLOW_IDS)] in "ac" else cost
        steps.append((chance.choice(kinds), number, cost, true_cost))
    return steps


def right(steps: Iterable[Step]) -> list[Step]:
    """Return the same steps with every estimate true."""
    return [(what, number, cost, cost) for what, number, cost, _ in steps]


def turns_missed(policy: FairnessPolicy, steps: Iterable[Step]) -> int:
    """Return by how much the worst head overran its bound; 0 when every bound was kept.

    The head of a flow, while F flows wait, goes within F dispatches.
    """
    queue = Queue(policy)
    due: dict[str, int] = {}
    missed = dispatch_count = 0
    for step in steps:
        flows = {lease.flow.key.flow_id for lease in queue.run([step])}
        dispatch_count += len(flows)
        waiting = [flow_id for flow_id, flow in queue.flows.items() if flow]
        due = {
            flow: due[flow] if flow in due and flow not in flows else dispatch_count + len(waiting)
            for flow in waiting
        }
        missed = max([missed, *(dispatch_count - due[flow] + 1 for flow in waiting)])
    return missed


class Account:
    """What a flow was truly served over its weight, and what its bound is made of."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.service = 0.0
        self.cost_max = 0.0
        self.error = self.error_min = self.error_max = 0.0

    def err(self, error: float) -> None:
        """Add to the error of what is unsettled."""
        self.error += error
        self.error_min = min(self.error_min, self.error)
        self.error_max = max(self.error_max, self.error)

    @property
    def slack(self) -> float:
        """This flow's part of the bound."""
        return (self.cost_max + self.error_max - self.error_min) / self.weight


def gap_excess(
    policy: FairnessPolicy, steps: Iterable[Step], weights: Mapping[str, float]
) -> float:
    """Return by how much the worst service gap exceeds its bound; at most 0 when all are kept.

    For every pair of flows and every interval in which both wait: the difference of what they were
    served, against (A + R) / w of both, as the text of `flowcontrol.weighted_tokens` derives it.
    """
    queue = Queue(policy)
    accounts = {each: Account(weights.get(each, 1.0)) for each in FLOW_IDS}
    ranges: dict[tuple[str, str], tuple[float, float]] = {}
    worst = -inf
    for step in steps:
        lease = queue.take(step)
        if lease is not None:
            account = accounts[lease.flow.key.flow_id]
            error = lease.cost - lease.tokens.input
            if step[0] == "dispatch":
                account.service += lease.tokens.input / account.weight
                account.cost_max = max(account.cost_max, lease.tokens.input)
            account.err(error if step[0] == "dispatch" else -error)
        for pair in combinations(FLOW_IDS, 2):
            one, other = accounts[pair[0]], accounts[pair[1]]
            gap = one.service - other.service
            low, high = ranges.get(pair, (gap, gap))
            ranges[pair] = min(low, gap), max(high, gap)
            worst = max(worst, ranges[pair][1] - ranges[pair][0] - one.slack - other.slack)
            if not (queue.flows[pair[0]] and queue.flows[pair[1]]):
                del ranges[pair]
    return worst


def line_gap_excess(policy: FairnessPolicy, steps: Iterable[Step]) -> float:
    """Return the same of flows whose heads stand in one line, while another has room or not.

    Requests of odd numbers may go to one endpoint only, which has room or has none in turns. Every
    interval in which both flows of a pair have heads of the same kind is held against the bound,
    with the one term more that a line which is passed over has.
    """
    queue = Queue(policy)
    is_open = True
    queue.has_room = lambda _subset: is_open
    accounts = {each: Account(1.0) for each in FLOW_IDS}
    ranges: dict[tuple[str, str], tuple[Subset | None, float, float]] = {}
    worst, dearest = -inf, 0.0
    for what, number, cost, true_cost in steps:
        flow_id = FLOW_IDS[number % len(FLOW_IDS)]
        if what == "pass":
            is_open = not is_open
        elif what == "arrive":
            dearest = max(dearest, cost)
            queue.arrive(flow_id, cost, true_cost, (ENDPOINT,) if number % 2 else None)
        elif what == "settle" and queue.unsettled:
            lease = queue.settle(number)
            accounts[lease.flow.key.flow_id].err(lease.tokens.input - lease.cost)
        elif what == "dispatch" and (flow := policy.pick(queue.has_room)) is not None:
            lease = queue.send(flow.head)
            account = accounts[flow.key.flow_id]
            account.service += lease.tokens.input
            account.cost_max = max(account.cost_max, lease.tokens.input)
            account.err(lease.cost - lease.tokens.input)
        for pair in combinations(FLOW_IDS, 2):
            one, other = accounts[pair[0]], accounts[pair[1]]
            flows = queue.flows[pair[0]], queue.flows[pair[1]]
            heads = [flow.head.request.subset for flow in flows if flow]
            before = ranges.pop(pair, None)
            if len(heads) == 2 and heads[0] == heads[1]:
                gap = one.service - other.service
                low, high = before[1:] if before and before[0] == heads[0] else (gap, gap)
                ranges[pair] = heads[0], min(low, gap), max(high, gap)
                width = ranges[pair][2] - ranges[pair][1]
                worst = max(worst, width - one.slack - other.slack - dearest)
    return worst


class ForgetsWhoIsPassedOver(WeightedTokens):  # type: ignore[misc]  # planted
    """Lets a flow that was passed over begin again, as if it had been away."""

    def _lift(self, subset: Subset) -> None:
        for flow in list(self._lines):
            if self._lines.subset_of(flow) == subset:
                flow.counter = self._level - flow.head.cost
                self._lines.put(flow, flow.counter, subset)


class TestRoundRobin:
    """Equal turns."""

    @given(steps=steps_of("arrive", "arrive", "dispatch", "cancel"))
    @settings(max_examples=100)
    def test_head_goes_within_as_many_dispatches_as_flows_wait(self, steps: list[Step]) -> None:
        """Whatever comes, goes and is cancelled meanwhile."""
        assert turns_missed(RoundRobin(), steps) == 0

    def test_unfair_policy_breaks_the_bound(self) -> None:
        """The check fails where one flow is served while another waits its turn."""
        steps = arrivals("aaaaaaaaab") + dispatches(9)

        assert turns_missed(RoundRobin(), steps) == 0
        assert turns_missed(NaivePolicy(), steps) > 0

    @pytest.mark.parametrize("rival", range(1, 8))
    def test_backlog_buys_nothing(self, rival: int) -> None:
        """Two flows alternate, whether the other has one more request or many."""
        queue = Queue(RoundRobin())
        queue.run(arrivals("a" * rival * 10 + "b" * 5))

        assert served(queue, 10) == "ab" * 5

    def test_flow_that_comes_back_stands_behind_all(self) -> None:
        """An empty flow keeps no place in the line."""
        queue = Queue(RoundRobin())
        queue.run([*arrivals("abb"), *dispatches(1), *arrivals("a")])

        assert served(queue, 3) == "bab"

    def test_head_that_gives_up_does_not_cost_its_flow_the_turn(self) -> None:
        """The next of the flow goes in its place."""
        queue = Queue(RoundRobin())
        first, second = queue.arrive("a"), queue.arrive("a")
        queue.arrive("b")
        queue.leave(first)

        assert queue.dispatch() is second

    def test_cost_and_settlement_make_no_difference(self) -> None:
        """Turns are turns."""
        queue = Queue(RoundRobin())
        queue.run([*arrivals("aa", 1, 1000), *arrivals("bb", 1), *dispatches(1)])
        queue.settle(0)

        assert served(queue, 3) == "bab"


class TestGlobalStrict:
    """One queue."""

    @pytest.mark.parametrize("ordering", Ordering)
    @given(steps=steps_of("arrive", "arrive", "dispatch", "cancel", "pass"))
    @settings(max_examples=50)
    def test_is_one_sorted_line(self, ordering: Ordering, steps: list[Step]) -> None:
        """The order of dispatch is that of a sorted list without any flows."""
        queue = Queue(GlobalStrict(), ordering)
        for step in steps:
            line = sorted(queue.waiting, key=lambda lease: lease.flow.order_of(lease))

            assert queue.run([step]) == (line[:1] if step[0] == "dispatch" else [])

    def test_unfair_policy_is_no_queue(self) -> None:
        """Served by backlog the order is another."""
        steps = arrivals("abb") + dispatches(3)

        assert [lease.arrival_index for lease in Queue(GlobalStrict()).run(steps)] == [1, 2, 3]
        assert [lease.arrival_index for lease in Queue(NaivePolicy()).run(steps)] != [1, 2, 3]

    def test_next_of_a_flow_stands_where_it_arrived(self) -> None:
        """A head that leaves does not pass its place on to the next."""
        queue = Queue(GlobalStrict())
        first, second, third = (queue.arrive(flow_id) for flow_id in "aba")
        queue.leave(first)

        assert [queue.dispatch(), queue.dispatch()] == [second, third]


class TestWeightedTokens:
    """Equal token cost by weight, within a bound."""

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "settle", "cancel", "pass"))
    @settings(max_examples=150)
    def test_gap_within_a_line_is_bounded(self, steps: list[Step]) -> None:
        """Also of flows that are passed over for a while, and change lines from head to head."""
        assert line_gap_excess(WeightedTokens({}), steps) <= TOLERANCE

    @pytest.mark.parametrize("seed", range(5))
    def test_gap_within_a_line_is_bounded_for_long(self, seed: int) -> None:
        """The same, for two thousand steps."""
        assert line_gap_excess(WeightedTokens({}), long_run(seed)) <= TOLERANCE

    @pytest.mark.interpreted
    def test_forgetting_who_is_passed_over_breaks_the_bound(self) -> None:
        """Of two flows tied to an endpoint the dear one would get everything."""
        steps = [("arrive", n, cost, cost) for n, cost in ((1, 9), (3, 1)) for _ in range(30)]
        steps += [("arrive", 0, 9, 9) for _ in range(60)]
        for _ in range(20):
            steps += [("pass", 0, 0, 0), ("dispatch", 0, 0, 0), ("pass", 0, 0, 0)]
            steps += [("dispatch", 0, 0, 0)]

        assert line_gap_excess(WeightedTokens({}), steps) <= TOLERANCE
        assert line_gap_excess(ForgetsWhoIsPassedOver({}), steps) > 10

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "settle", "cancel"))
    @settings(max_examples=150)
    def test_gap_between_waiting_flows_is_bounded_under_wrong_estimates(
        self, steps: list[Step]
    ) -> None:
        """However wrong, and whenever they are corrected."""
        assert gap_excess(WeightedTokens(WEIGHTS), steps, WEIGHTS) <= TOLERANCE

    @pytest.mark.parametrize("seed", range(4))
    def test_gap_does_not_grow_with_time(self, seed: int) -> None:
        """Hundreds of requests of some flows ten times as large as thought change nothing."""
        steps = long_run(seed)

        assert gap_excess(WeightedTokens(WEIGHTS), steps, WEIGHTS) <= TOLERANCE
        assert gap_excess(NaiveTokens(WEIGHTS, "no correction"), steps, WEIGHTS) > 100

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "settle", "cancel"))
    @settings(max_examples=100)
    def test_gap_is_one_request_of_each_when_estimates_are_right(self, steps: list[Step]) -> None:
        """A/w of both, the bound of start-time fair queueing."""
        assert gap_excess(WeightedTokens(WEIGHTS), right(steps), WEIGHTS) <= TOLERANCE

    @pytest.mark.parametrize(
        ("flaw", "steps"),
        [
            # b comes when a was served for long, and is served alone until it has as much.
            ("no lift", arrivals("a" * 30) + dispatches(20) + arrivals("b" * 30) + dispatches(20)),
            # a is said to be cheap, is not, and goes on as if it were.
            (
                "no correction",
                arrivals("a" * 30, 1, 9)
                + arrivals("b" * 30, 9, 9)
                + [*dispatches(1), ("settle", 0, 0, 0)] * 30,
            ),
            # Weights 2 and 0.5 are taken for equal.
            ("no weights", arrivals("ab" * 30) + dispatches(40)),
            # Nothing is settled yet, so the first burst costs nothing: the reference's way.
            ("charged late", arrivals("ab" * 30) + dispatches(20)),
        ],
    )
    def test_flawed_policy_breaks_the_bound(self, flaw: str, steps: list[Step]) -> None:
        """Each part of the algorithm is needed, and the check sees when it is missing."""
        assert gap_excess(NaiveTokens(WEIGHTS, flaw), steps, WEIGHTS) > 1
        assert gap_excess(NaiveTokens(WEIGHTS, ""), steps, WEIGHTS) <= TOLERANCE
        assert gap_excess(WeightedTokens(WEIGHTS), steps, WEIGHTS) <= TOLERANCE

    @pytest.mark.parametrize("unfair", [RoundRobin, GlobalStrict, NaivePolicy])
    def test_other_policies_break_the_bound(self, unfair: type[FairnessPolicy]) -> None:
        """Equal turns are not equal tokens."""
        steps = [*arrivals("a" * 30, 9), *arrivals("b" * 20, 1), *dispatches(40)]

        assert gap_excess(unfair(), steps, {}) > 1
        assert gap_excess(WeightedTokens({}), steps, {}) <= TOLERANCE

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "settle", "cancel"))
    @settings(max_examples=100)
    def test_chooses_as_a_policy_without_heaps(self, steps: list[Step]) -> None:
        """Who is chosen has a counter as low as the naive one's lowest."""
        queue, naive = Queue(WeightedTokens(WEIGHTS)), NaiveTokens(WEIGHTS, "")
        for step in steps:
            flows = {flow_id: bool(flow) for flow_id, flow in queue.flows.items()}
            lease = queue.take(step)
            if lease is not None and step[0] == "dispatch":
                lowest = naive.counters[naive.pick().key.flow_id]
                assert naive.counters[lease.flow.key.flow_id] <= lowest + TOLERANCE
                naive.served(lease.flow, lease.cost, 0)
            elif lease is not None:
                naive.correct(lease.flow.key.flow_id, lease.tokens.input - lease.cost, 0)
            for flow_id, flow in queue.flows.items():
                if flow and not flows[flow_id]:
                    naive.enter(flow, 0)
                elif flow in naive.flows and not flow:
                    naive.leave(flow)

    def test_large_and_small_requests_get_equal_tokens(self) -> None:
        """One flow of 8-token requests and one of 2-token ones: one turn to four."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a" * 10, 8), *arrivals("b" * 40, 2)])

        assert served(queue, 20).count("b") == 16

    def test_heavier_tenant_gets_its_weight(self) -> None:
        """Four times the weight, four times the turns."""
        queue = Queue(WeightedTokens({"a": 4.0}))
        queue.run(arrivals("ab" * 40))

        assert served(queue, 20).count("a") == 16

    def test_absence_earns_nothing(self) -> None:
        """Who comes late shares from then on, and is not paid for the time before."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a" * 40), *dispatches(20), *arrivals("b" * 20)])

        assert served(queue, 10).count("b") == 5

    def test_debt_is_not_forgiven_by_leaving(self) -> None:
        """A request that took ten times what was thought is paid for by the next ones."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a", 1, 10), *arrivals("b" * 20), *dispatches(1)])
        queue.settle(0)
        queue.run(arrivals("a" * 20))

        assert served(queue, 10) == "b" * 10
        assert served(queue, 10).count("a") == 5

    def test_refund_is_paid_to_a_flow_that_waits(self) -> None:
        """A request that took less than was thought lets the next ones go sooner."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a" * 20, 6, 1), *arrivals("b" * 20), *dispatches(1)])
        queue.settle(0)

        assert served(queue, 3) == "bab"

    def test_refund_of_all_that_wait_is_not_held_against_who_comes(self) -> None:
        """Requests of two flows took a hundredth of what was thought; a third comes, and shares."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("ab" * 60, 100, 1), *dispatches(20)])
        for _ in range(20):
            queue.settle(0)
        queue.run(arrivals("c" * 20, 100, 1))

        assert served(queue, 12).count("c") == 4

    def test_refund_of_one_that_waits_is_its_own(self) -> None:
        """Who comes then stands beside the others, not before them."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a" * 60, 100, 1), *arrivals("b" * 60, 100), *dispatches(20)])
        for _ in range(20):
            queue.settle(0)
        queue.run(arrivals("c" * 20, 100))
        order = served(queue, 40)

        assert order.startswith("a" * 8)
        assert abs(order.count("b") - order.count("c")) <= 1

    def test_refund_is_lost_to_a_flow_that_is_away(self) -> None:
        """It would be credit for absence."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a", 6, 1), *arrivals("b" * 9), *dispatches(1)])
        queue.settle(0)
        queue.run(arrivals("a" * 9))

        assert served(queue, 4).count("a") == 2

    def test_quiet_night_is_not_held_against_anybody(self) -> None:
        """What was served while no other flow waited leaves no debt."""
        queue = Queue(WeightedTokens({}))
        for _ in range(50):
            queue.run([*arrivals("a"), *dispatches(1)])
        queue.run(arrivals("ab" * 10))

        assert served(queue, 4).count("a") == 2

    def test_last_before_an_idle_hour_leaves_no_debt(self) -> None:
        """Who was served last, alone, begins the next busy time like anybody else."""
        queue = Queue(WeightedTokens({}))
        queue.run([*arrivals("a", 90), *dispatches(1), *arrivals("ba" * 10)])

        assert served(queue, 4).count("a") == 2

    def test_out_of_turn_is_charged_and_moves_nobody_else(self) -> None:
        """A promoted request of a flow in debt does not lift newcomers to that debt."""
        policy = WeightedTokens({})
        queue = Queue(policy)
        queue.run([*arrivals("a" * 3, 50), *arrivals("b" * 9), *dispatches(1)])
        promoted = queue.flows["a"].head
        queue.send(promoted)
        queue.run(arrivals("c" * 9))

        assert served(queue, 8).count("c") == 4

    def test_other_weights_count_from_now_on(self) -> None:
        """Accounts stand, and the next request is charged by the new weight."""
        policy = WeightedTokens({})
        queue = Queue(policy)
        queue.run([*arrivals("ab" * 40), *dispatches(10)])
        policy.reconfigure(ControllerConfig(weights={"a": 3.0}), 0)

        assert served(queue, 20).count("a") == 15

    def test_paid_debts_are_dropped(self) -> None:
        """A thousand that come once, each in debt until the others have had as much."""
        policy = WeightedTokens({})
        flows = [
            Flow(FlowKey(0, f"once-{index}"), Ordering.FCFS, Limits()) for index in range(1000)
        ]
        busy = Flow(FlowKey(0, "busy"), Ordering.FCFS, Limits())
        busy.push(Lease(Request(0), busy, 0, 0, Tokens(1, 0), 1))
        policy.enter(busy, 0)
        kept = []
        for flow in flows:
            lease = Lease(Request(1), flow, 1, 0, Tokens(10, 0), 10)
            flow.push(lease)
            policy.enter(flow, 0)
            flow.remove(lease)
            policy.served(flow, 10, 0)
            policy.served(busy, 1, 0)
            kept.append(len(policy._away))  # noqa: SLF001 - forgetting is what cannot be seen

        assert max(kept) <= 22  # the last ten or eleven are in debt

    def test_of_two_debts_the_smaller_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids are the clients' to invent, so accounts are bounded."""
        monkeypatch.setattr(weighted_tokens, "ACCOUNTS_MAX", 2)
        queue = Queue(WeightedTokens({}))
        queue.run(arrivals("e" * 9, 5))
        for flow_id, debt in (("a", 30), ("b", 10), ("c", 20)):
            queue.policy.correct(flow_id, debt, 0)
        queue.run([*arrivals("a", 5), *arrivals("b", 5), *arrivals("c", 5)])

        assert served(queue, 12) == "ebeeeceeaeee"[:12]


class FadingAccounts:
    """What each flow attained, every account halved as time passes."""

    def __init__(self) -> None:
        self.costs = dict.fromkeys(FLOW_IDS, 0.0)
        self.now_ns = 0

    def add(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Let all fade until now, then add to one."""
        fade = 0.5 ** ((now_ns - self.now_ns) / HALF_LIFE_NS)
        self.costs = {each: attained * fade for each, attained in self.costs.items()}
        self.now_ns = now_ns
        self.costs[flow_id] = max(0.0, self.costs[flow_id] + cost)


def attained_excess(policy: FairnessPolicy, steps: Sequence[Step]) -> float:
    """Return how much more than the least of those waiting who was chosen had attained, at most."""
    queue, accounts = Queue(policy), FadingAccounts()
    worst = 0.0
    for what, number, cost, true_cost in steps:
        waiting = [flow_id for flow_id, flow in queue.flows.items() if flow]
        lease = queue.take((what, number, cost * 97 if what == "pass" else cost, true_cost))
        if lease is None:
            continue
        flow_id = lease.flow.key.flow_id
        if what == "dispatch":
            accounts.add(flow_id, 0.0, queue.now_ns)
            least = min(accounts.costs[each] for each in waiting)
            worst = max(worst, accounts.costs[flow_id] - least)
            accounts.add(flow_id, lease.cost, queue.now_ns)
        else:
            accounts.add(flow_id, lease.tokens.input - lease.cost, queue.now_ns)
    return worst


class TestLeastAttainedService:
    """The flow that got least lately."""

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "settle", "cancel", "pass"))
    @settings(max_examples=150)
    def test_chooses_who_attained_least(self, steps: list[Step]) -> None:
        """Held against accounts that are all halved as time passes."""
        policy = LeastAttainedService(HALF_LIFE_NS, 0)

        assert attained_excess(policy, steps) <= TOLERANCE

    def test_long_runs_are_counted_anew_without_a_change(self) -> None:
        """Over hundreds of half-lives numbers stay small; what has faded to nothing is dropped."""
        long_silence: Step = ("pass", 0, 10**5, 0)
        steps = [*long_run(1), long_silence, *long_run(2)]
        policy = LeastAttainedService(HALF_LIFE_NS, 0)

        assert attained_excess(policy, steps) <= 1.0

    def test_another_half_life_would_choose_otherwise(self) -> None:
        """Nine tenths of the right one is found out."""
        policy = LeastAttainedService(HALF_LIFE_NS * 9 // 10, 0)

        assert attained_excess(policy, long_run(1)) > 1.0

    @pytest.mark.parametrize("unfair", [RoundRobin, GlobalStrict, NaivePolicy])
    def test_other_policies_choose_otherwise(self, unfair: type[FairnessPolicy]) -> None:
        """The check fails for them."""
        steps = [*arrivals("a" * 30, 9), *arrivals("b" * 20, 1), *dispatches(40)]

        assert attained_excess(unfair(), steps) > 1

    def test_without_fading_it_would_choose_otherwise(self) -> None:
        """What was long ago must not count."""
        steps = [
            *arrivals("aaa", 9),
            *dispatches(3),
            *[("pass", 0, 9, 0)] * 20,
            *arrivals("b" * 9, 2),
            *dispatches(2),
            *arrivals("a" * 9, 2),
            *dispatches(8),
        ]

        assert attained_excess(LeastAttainedService(HALF_LIFE_NS, 0), steps) <= TOLERANCE
        assert attained_excess(LeastAttainedService(HALF_LIFE_NS * 10**9, 0), steps) > 1

    @given(steps=steps_of("dispatch", "dispatch", "pass"))
    @settings(max_examples=50)
    def test_waiting_flows_stay_within_one_request(self, steps: list[Step]) -> None:
        """The one ahead is ahead by the largest cost at most."""
        queue, accounts = Queue(LeastAttainedService(HALF_LIFE_NS, 0)), FadingAccounts()
        queue.run([*arrivals("a" * 80, 9), *arrivals("b" * 80, 1), *arrivals("c" * 80, 4)])
        for step in steps:
            for lease in queue.run([step]):
                accounts.add(lease.flow.key.flow_id, lease.cost, queue.now_ns)
            costs = [accounts.costs[each] for each in "abc"]
            assert max(costs) - min(costs) <= 9 + TOLERANCE

    def test_newcomer_goes_until_it_has_caught_up(self) -> None:
        """No lift: that is the point of it."""
        queue = Queue(LeastAttainedService(HALF_LIFE_NS, 0))
        queue.run([*arrivals("a" * 40), *dispatches(20), *arrivals("b" * 40)])

        assert served(queue, 19) == "b" * 19
        assert served(queue, 10).count("b") in {5, 6}

    def test_another_half_life_counts_from_now_on(self) -> None:
        """What has faded has faded; the rest fades at the new pace."""
        policy = LeastAttainedService(HALF_LIFE_NS, 0)
        queue = Queue(policy)
        queue.run([*arrivals("a" * 20, 8), *dispatches(5)])
        queue.now_ns += HALF_LIFE_NS
        policy.reconfigure(ControllerConfig(attained_half_life_ns=10**15), queue.now_ns)
        queue.now_ns += 50 * HALF_LIFE_NS
        queue.run(arrivals("b" * 20, 8))

        assert served(queue, 3) == "bbb"
        assert served(queue, 4).count("a") == 2

    def test_largest_accounts_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids are the clients' to invent, so accounts are bounded; who attained most is known."""
        monkeypatch.setattr(fairness_module, "ACCOUNTS_MAX", 2)
        queue = Queue(LeastAttainedService(HALF_LIFE_NS, 0))
        for number, flow_id in enumerate("abcdefgh"):
            queue.policy.correct(flow_id, 10 * (8 - number), 0)
        queue.run(arrivals("abc"))

        assert served(queue, 3) == "cba"


class TestTurns:
    """How many turns the others have before a request, for those who forecast."""

    def test_of_round_robin_are_places_and_the_rest_of_the_line(self) -> None:
        """One for each of its own before it, and the part of the line that stands before it."""
        queue = Queue(RoundRobin())
        queue.run(arrivals("aabbccdd"))
        line = [queue.policy.turns(queue.flows[each].head, 0, 1.0) for each in "abcd"]

        assert line == [0.0, 0.25, 0.5, 0.75]
        assert queue.policy.turns(queue.flows["b"].leases()[1], 1, 1.0) == 1.25

        queue.run(dispatches(1))
        again = [queue.policy.turns(queue.flows[each].head, 0, 1.0) for each in "abcd"]
        assert again == [0.75, 0.0, 0.25, 0.5]

    def test_of_one_line_are_without_end(self) -> None:
        """All others go before the last in the line."""
        queue = Queue(GlobalStrict())

        assert queue.policy.turns(queue.arrive("a"), 0, 1.0) == inf

    def test_of_weighted_tokens_are_cost_and_lead_over_weight(self) -> None:
        """In requests of the others: what its own before it cost, and what it owes."""
        queue = Queue(WeightedTokens({"a": 2.0}))
        queue.run([*arrivals("aaa", 8), *arrivals("b", 4)])
        last = queue.flows["a"].leases()[-1]
        assert queue.policy.turns(last, 2, 4.0) == 2 * 8 / 2.0 / 4

        queue.run(dispatches(1))
        assert queue.policy.turns(last, 1, 4.0) == (8 / 2.0 + 8 / 2.0) / 4

    def test_of_least_attained_service_are_cost_and_lead(self) -> None:
        """What it attained more than the least, as of the last charge."""
        queue = Queue(LeastAttainedService(HALF_LIFE_NS, 0))
        queue.now_ns = HALF_LIFE_NS
        queue.run([*arrivals("aaa", 8), *arrivals("b", 4), *dispatches(1)])
        last = queue.flows["a"].leases()[-1]

        assert queue.policy.turns(last, 1, 4.0) == (8 + 8) / 4


class TestMakeFairness:
    """The table of policies."""

    @pytest.mark.parametrize(
        ("fairness", "expected"),
        [
            (Fairness.WEIGHTED_TOKENS, WeightedTokens),
            (Fairness.ROUND_ROBIN, RoundRobin),
            (Fairness.GLOBAL_STRICT, GlobalStrict),
            (Fairness.LEAST_ATTAINED_SERVICE, LeastAttainedService),
        ],
    )
    def test_makes_what_is_configured(self, fairness: Fairness, expected: type) -> None:
        """Each kind of fairness has its policy, a new one for each band."""
        policy = made(fairness)

        assert type(policy) is expected
        assert made(fairness) is not policy

    @pytest.mark.parametrize("fairness", Fairness)
    def test_every_kind_serves_everybody(self, fairness: Fairness) -> None:
        """What waits is dispatched, each once, and in order within its flow."""
        queue = Queue(made(fairness))
        queue.run(arrivals("aadbabccda"))

        leases = queue.run(dispatches(10))

        assert not queue.waiting
        assert len({lease.request.request_id for lease in leases}) == 10
        for flow in queue.flows.values():
            mine = [lease.arrival_index for lease in leases if lease.flow is flow]
            assert mine == sorted(mine)

    @pytest.mark.parametrize("fairness", Fairness)
    def test_nobody_waiting(self, fairness: Fairness) -> None:
        """No request is next then."""
        assert made(fairness).pick(everywhere) is None

    @pytest.mark.parametrize("fairness", Fairness)
    def test_reconfigured_in_place_everybody_is_still_served(self, fairness: Fairness) -> None:
        """What waits keeps its place."""
        queue = Queue(made(fairness))
        queue.run(arrivals("aadbabccda"))
        queue.policy.reconfigure(ControllerConfig(), 0)

        assert sorted(served(queue, 10)) == sorted("aadbabccda")

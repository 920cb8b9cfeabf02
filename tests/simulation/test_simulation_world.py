"""The simulated world, number by number: what is served when, and which facts the engine gets."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from flowcontrol.config import BandSettings, Limits, Picker, Role
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
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Ending
from flowcontrol.simulation.distributions import Fixed
from flowcontrol.simulation.faults import (
    ClockJumped,
    DecisionsSlow,
    DrainBegins,
    EndpointGone,
    EngineStalled,
    Fault,
    MetricsLie,
    MetricsStale,
    ObjectivesEdited,
    SettlementsLost,
    SettlementsSlow,
)
from flowcontrol.simulation.gates import ForgetfulGate, OpenGate
from flowcontrol.simulation.pool import Balancer, ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.safety import Slots
from flowcontrol.simulation.workload import AtOnce, ClosedLoop, Independent, Retry
from flowcontrol.simulation.world import World
from tests.support.simulated import (
    MILLISECOND,
    SECOND,
    SERVER,
    Listening,
    make_controller,
    make_plan,
    rows,
    run,
    workload,
)


class Refusing:
    """Refuses the first so many requests with a Retry-After, then lets everything go on."""

    def __init__(self, refusals: int, retry_after_ns: int | None) -> None:
        self.open = OpenGate()
        self.refusals = refusals
        self.retry_after_ns = retry_after_ns

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Pass on."""
        self.open.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Refuse what would go on, while there are refusals left."""
        decisions = self.open.poll(now_ns)
        for decision in decisions[: self.refusals]:
            decision.outcome = Outcome.REJECTED_CAPACITY
            decision.retry_after_ns = self.retry_after_ns
        self.refusals = max(0, self.refusals - len(decisions))
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Nothing waits."""
        return None

    def check_invariants(self) -> None:
        """There are none."""


class Reclaiming:
    """Ends request 1 in flight as soon as it hears of request 2."""

    def __init__(self) -> None:
        self.open = OpenGate()
        self.reclaims = False

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Listen for request 2."""
        self.open.handle(fact, now_ns)
        if isinstance(fact, Arrived) and fact.request.request_id == 2:
            self.reclaims = True

    def poll(self, now_ns: int) -> list[Decision]:
        """Let everything go on, and reclaim once."""
        decisions = self.open.poll(now_ns)
        if self.reclaims:
            self.reclaims = False
            decisions.append(Decision(1, Outcome.RECLAIMED, 0, "default-flow", waited_ns=0))
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Nothing waits."""
        return None

    def check_invariants(self) -> None:
        """There are none."""


def endings(results: Results) -> dict[Ending, int]:
    """Return how all calls ended."""
    total: Counter[Ending] = Counter()
    for figures in results.tenants.values():
        total += figures.endings
    return dict(total)


def told(listening: Listening, kind: type[Fact]) -> list[tuple[float, Fact]]:
    """Return the facts an engine got, with times in milliseconds."""
    return [(now_ns / MILLISECOND, fact) for now_ns, fact in listening.told(kind)]


def asked_ms(listening: Listening) -> list[float]:
    """Return when requests arrived."""
    return [at for at, _ in told(listening, Arrived)]


class TestService:
    """A server of two places, 10 ms a step, ten tokens an answer: 100 ms each.

    A request that finds the server idle begins at once; the next one, with the next step.
    """

    def test_alone(self) -> None:
        """One request alone does not wait: first token after a step, answer after ten."""
        results = run(make_plan(workload(rows(0))))

        figures = results.tenants[0, "default-flow"]
        assert figures.waits_ns == [0]
        assert figures.ttfts == [(0, 10 * MILLISECOND)]
        assert figures.tokens_served == 20
        assert results.ended_ns == 10 * SECOND
        assert results.transcript == ["0 1 dispatched 0 default-flow 0 s0 -"]
        (server,) = results.servers
        assert server.tokens_generated == 10
        assert server.utilisation == pytest.approx(0.01)
        assert server.running_mean == pytest.approx(0.01)

    def test_waiting(self) -> None:
        """The third waits at the gate until the first two have left."""
        results = run(make_plan(workload(rows(0, 0, 30))), slots=Slots(2, is_picked=True))

        figures = results.tenants[0, "default-flow"]
        assert figures.waits_ns == [0, 0, 70 * MILLISECOND]
        assert figures.ttfts[-1] == (30 * MILLISECOND, 90 * MILLISECOND)
        assert (results.waiting_most, results.in_flight_most) == (1, 2)
        assert [server.waiting_most for server in results.servers] == [1]

    def test_without_a_gate(self) -> None:
        """It waits inside the server, where the gateway does not see it."""
        results = run(make_plan(workload(rows(0, 0, 30))), OpenGate())

        figures = results.tenants[0, "default-flow"]
        assert figures.waits_ns == [0, 0, 0]
        assert figures.ttfts[-1] == (30 * MILLISECOND, 80 * MILLISECOND)
        assert (results.waiting_most, results.in_flight_most) == (0, 3)

    def test_bands(self) -> None:
        """Of two who wait, the one with the higher objective goes first."""
        low = workload(rows(0, 0, 10), "low", objective="batch")
        high = workload(rows(20), "high", objective="chat")
        results = run(make_plan(low, high))

        assert results.priorities == (10, -1)
        assert results.band(10).waits_ns == [80 * MILLISECOND]
        assert results.band(-1).waits_ns == [0, 0, 100 * MILLISECOND]

    def test_request(self) -> None:
        """The engine gets what the gateway knows of a request, and no more."""
        settings: dict[str, object] = {
            "objective": "chat",
            "tenants": {"ann": 1.0},
            "output_tokens_max": 8,
            "ttft_slo_ns": SECOND,
            "ttl_ns": 2 * SECOND,
            "model": "llama",
        }
        known = workload(rows(0), **settings)
        unknown = replace(known, name="mute", announces_prompt=False, announces_slo=False)
        listening = Listening(make_controller())
        run(make_plan(known, unknown), listening)

        requests = [fact.request for _, fact in told(listening, Arrived) if type(fact) is Arrived]
        seen = [(r.byte_size, r.input_tokens, r.output_tokens_max, r.ttft_slo_ns) for r in requests]
        assert seen == [(40, 10, 8, SECOND), (40, None, 8, None)]
        assert {(r.flow_id, r.objective, r.ttl_ns, r.model) for r in requests} == {
            ("ann", "chat", 2 * SECOND, "llama")
        }
        settled = [fact for _, fact in told(listening, Settled) if type(fact) is Settled]
        assert [fact.output_tokens for fact in settled] == [8, 8]  # a longer answer is cut

    def test_too_long(self) -> None:
        """What a server can never run fails there, and its slot is free."""
        long = workload(AtOnce(1), lengths=Independent(Fixed(990), Fixed(20)))
        listening = Listening(make_controller())
        results = run(make_plan(long), listening)

        assert endings(results) == {Ending.FAILED: 1}
        assert told(listening, Left) == [(0, Left(1))]

    def test_one_batch_for_one_moment(self) -> None:
        """All that happens at one moment reaches the engine before it is polled, once."""
        listening = Listening(make_controller())
        run(make_plan(workload(AtOnce(5), from_ns=SECOND)), listening)

        assert asked_ms(listening) == [1000] * 5
        assert listening.polls.count(SECOND) == 1


class TestBalancer:
    """Envoy chooses where the engine does not."""

    @pytest.mark.parametrize(("balancer", "most"), [(Balancer.ROUND_ROBIN, [4, 4, 4])])
    def test_round_robin(self, balancer: Balancer, most: list[int]) -> None:
        """Each in turn."""
        plan = replace(make_plan(workload(AtOnce(12)), servers=3), balancer=balancer)
        results = run(plan, OpenGate())
        assert most == [server.in_flight_most for server in results.servers]

    def test_least_request(self) -> None:
        """The fewer of two drawn by chance: no server has far more than another."""
        plan = replace(make_plan(workload(AtOnce(300)), servers=3), balancer=Balancer.LEAST_REQUEST)
        results = run(plan, OpenGate())
        most = [server.in_flight_most for server in results.servers]
        assert sum(most) == 300
        assert max(most) - min(most) < 12

    def test_nobody_to_choose(self) -> None:
        """Without an endpoint Envoy answers 503 at once."""
        plan = replace(
            make_plan(workload(AtOnce(3))),
            servers=(ServerSpec(address="late", config=SERVER, from_ns=5 * SECOND),),
        )
        assert endings(run(plan, OpenGate())) == {Ending.FAILED: 3}


class TestLegs:
    """Prefill and decode run apart: a request passes one server of each kind.

    Ten tokens of prompt are read in a step of 10 ms, the answer takes ten more.
    """

    PLAN = replace(
        make_plan(workload(rows(0))),
        servers=(
            ServerSpec(address="p0", config=SERVER, role=Role.PREFILL),
            ServerSpec(address="d0", config=SERVER, role=Role.DECODE),
        ),
    )

    def test_one_after_the_other(self) -> None:
        """The first token comes from the server that decodes, the slot is given back at the end."""
        listening = Listening(make_controller())
        results = run(self.PLAN, listening)

        assert results.transcript == ["0 1 dispatched 0 default-flow 0 d0 -"]
        assert results.tenants[0, "default-flow"].ttfts == [(0, 20 * MILLISECOND)]
        assert told(listening, Left) == [(110, Left(1))]
        assert [server.tokens_generated for server in results.servers] == [1, 10]
        assert results.in_flight_most == 1

    def test_envoy_chooses_who_decodes(self) -> None:
        """Nothing is sent whole to a server that only prefills."""
        plan = replace(self.PLAN, workloads=(workload(AtOnce(6)),))
        results = run(plan, OpenGate())
        assert endings(results) == {Ending.ANSWERED: 6}
        assert [server.tokens_generated for server in results.servers] == [6, 60]

    def test_least_busy_prefills(self) -> None:
        """Of two that prefill each has half."""
        prefill = [ServerSpec(address=f"p{n}", config=SERVER, role=Role.PREFILL) for n in (0, 1)]
        plan = replace(
            self.PLAN,
            servers=(*prefill, self.PLAN.servers[1]),
            workloads=(workload(AtOnce(6)),),
        )
        most = [server.in_flight_most for server in run(plan, OpenGate()).servers]
        assert most[:2] == [3, 3]

    def test_nobody_prefills(self) -> None:
        """Who decodes does all of it then, as a sidecar does that is given no other server."""
        plan = replace(self.PLAN, servers=self.PLAN.servers[1:])
        results = run(plan, OpenGate())
        assert results.tenants[0, "default-flow"].ttfts == [(0, 10 * MILLISECOND)]

    @pytest.mark.parametrize("patience_ms", [5, 10, 15])
    def test_hanging_up_on_the_way(self, patience_ms: int) -> None:
        """Before, at, and after the hand-over both servers are left, and the slot is free."""
        hasty = workload(rows(0), patience=Fixed(patience_ms * MILLISECOND))
        listening = Listening(make_controller())
        results = run(replace(self.PLAN, workloads=(hasty,)), listening)

        assert endings(results) == {Ending.GAVE_UP: 1}
        assert told(listening, Left) == [(patience_ms, Left(1))]
        assert results.servers[1].tokens_generated == 0

    @pytest.mark.parametrize(
        ("address", "left_ms"),
        [("p0", 5), ("d0", 5010)],  # the second is missed at the hand-over
    )
    def test_a_leg_breaks(self, address: str, left_ms: int) -> None:
        """Whichever server crashes, the request fails."""
        gone = EndpointGone(address=address, from_ns=5 * MILLISECOND, until_ns=SECOND)
        listening = Listening(make_controller())
        results = run(replace(self.PLAN, faults=(gone,)), listening)

        assert endings(results) == {Ending.FAILED: 1}
        assert told(listening, Left) == [(left_ms, Left(1))]


class TestClients:
    """They leave, come back, and think."""

    def test_patience_while_waiting(self) -> None:
        """A client that leaves at the gate is never dispatched."""
        patient = workload(rows(0, 0))
        hasty = workload(rows(10), "hasty", patience=Fixed(50 * MILLISECOND))
        listening = Listening(make_controller())
        results = run(make_plan(patient, hasty), listening)

        assert endings(results) == {Ending.ANSWERED: 2, Ending.GAVE_UP: 1}
        assert results.transcript[-1] == (
            "60000000 3 evicted-cancelled 0 default-flow 50000000 - -"
        )
        assert (60, Left(3)) in told(listening, Left)

    def test_patience_at_the_server(self) -> None:
        """A client that leaves there frees its place, unless its first token has come."""
        queued = workload(rows(0, 0, 0), patience=Fixed(50 * MILLISECOND))
        listening = Listening(OpenGate())
        results = run(make_plan(queued), listening)

        assert endings(results) == {Ending.ANSWERED: 2, Ending.GAVE_UP: 1}
        assert told(listening, Left) == [(50, Left(3)), (100, Left(1)), (110, Left(2))]
        assert (1050, Settled(3)) in told(listening, Settled)

    def test_the_answer_just_in_time(self) -> None:
        """An answer that is complete when the client leaves counts."""
        lengths = Independent(Fixed(10), Fixed(1))
        hasty = workload(AtOnce(1), lengths=lengths, patience=Fixed(10 * MILLISECOND))
        assert endings(run(make_plan(hasty))) == {Ending.ANSWERED: 1}

    @pytest.mark.parametrize(
        ("told_ns", "honours", "least_ms", "most_ms"),
        [
            (2100 * MILLISECOND, True, 3000, 3000),  # spread by up to a quarter, in whole seconds
            (30_000 * MILLISECOND, True, 30_000, 30_000),  # the most there is
            (2100 * MILLISECOND, False, 500, 1500),
            (900 * MILLISECOND, True, 500, 1500),  # below a second there is no Retry-After
            (None, True, 500, 1500),
        ],
    )
    def test_retry(
        self,
        told_ns: int | None,
        honours: bool,  # noqa: FBT001 - a table
        least_ms: int,
        most_ms: int,
    ) -> None:
        """A client returns after Retry-After; without one after a second, give or take a half."""
        retry = Retry(attempts_max=2, honours_retry_after=honours)
        listening = Listening(Refusing(1, told_ns))
        results = run(make_plan(workload(rows(0), retry=retry)), listening)

        first, second = asked_ms(listening)
        assert first == 0
        assert least_ms <= second <= most_ms
        assert endings(results) == {Ending.ANSWERED: 1}
        figures = results.tenants[0, "default-flow"]
        assert (figures.call_count, figures.refused_attempts) == (1, 1)
        assert figures.ttfts == [(0, round(second * MILLISECOND) + 10 * MILLISECOND)]

    def test_retry_after_failure(self) -> None:
        """Whose server crashes asks again; the first token that counts is the one he kept."""
        gone = EndpointGone(address="s0", from_ns=50 * MILLISECOND, until_ns=100 * MILLISECOND)
        again = workload(rows(0), retry=Retry(attempts_max=2))
        listening = Listening(make_controller())
        results = run(make_plan(again, faults=(gone,)), listening)

        assert endings(results) == {Ending.ANSWERED: 1}
        second_ns = listening.told(Arrived)[1][0]
        assert results.tenants[0, "default-flow"].ttfts == [(0, second_ns + 10 * MILLISECOND)]

    def test_backoff_doubles_up_to_its_bound(self) -> None:
        """1, 2, 4, 4 seconds, each give or take a half; then they give in."""
        retry = Retry(attempts_max=5, backoff_max_ns=4 * SECOND)
        listening = Listening(Refusing(9, None))
        results = run(make_plan(workload(rows(0), retry=retry)), listening)

        at = asked_ms(listening)
        gaps = [(after - before) / 1000 for before, after in pairwise(at)]
        assert gaps == [pytest.approx(gap, rel=0.5) for gap in (1, 2, 4, 4)]
        assert endings(results) == {Ending.REFUSED: 1}

    def test_retry_after_patience(self) -> None:
        """A client that leaves and asks again is one call with two attempts."""
        retry = Retry(attempts_max=2, after_patience=True)
        hasty = workload(rows(10), "hasty", patience=Fixed(50 * MILLISECOND), retry=retry)
        results = run(make_plan(workload(rows(0, 0)), hasty))

        assert endings(results) == {Ending.ANSWERED: 3}
        assert results.tenants[0, "default-flow"].outcomes == {
            Outcome.DISPATCHED: 3,
            Outcome.EVICTED_CANCELLED: 1,
        }

    def test_closed_loop(self) -> None:
        """Two users, 100 ms an answer and 150 ms to think: four questions each in a second."""
        arrivals = ClosedLoop(2, Fixed(150 * MILLISECOND), ramp_ns=100 * MILLISECOND)
        listening = Listening(make_controller())
        plan = make_plan(workload(arrivals, tenants={"a": 1, "b": 1}), duration_ns=SECOND)
        results = run(plan, listening)

        assert asked_ms(listening) == [0, 50, 250, 300, 500, 550, 750, 800]
        assert {key: each.call_count for key, each in results.tenants.items()} == {
            (0, "a"): 4,
            (0, "b"): 4,
        }

    def test_a_refused_user_backs_off(self) -> None:
        """A user without a thought does not ask a thousand times a second."""
        listening = Listening(Refusing(1000, None))
        run(make_plan(workload(ClosedLoop(1)), duration_ns=5 * SECOND), listening)
        assert asked_ms(listening) == [0, 1000, 2000, 3000, 4000]

    def test_same_traffic_whatever_is_decided(self) -> None:
        """Open loop: the same seed asks the same at the same times, with a gate or without."""
        plan = make_plan(workload(AtOnce(20), tenants={"a": 1, "b": 2}), servers=2)
        gated, bare = Listening(make_controller()), Listening(OpenGate())
        for listening in (gated, bare):
            run(plan, listening)
        assert told(gated, Arrived) == told(bare, Arrived)


class TestFeedback:
    """What the engine gets of requests and servers."""

    def test_settled(self) -> None:
        """A second after its end, with the true times and tokens."""
        listening = Listening(make_controller())
        run(make_plan(workload(rows(0))), listening)
        assert told(listening, Left) == [(100, Left(1))]
        settled = Settled(
            1,
            input_tokens=10,
            output_tokens=10,
            ttft_ns=10 * MILLISECOND,
            generation_ns=90 * MILLISECOND,
        )
        assert told(listening, Settled) == [(1100, settled)]

    def test_settlement_faults(self) -> None:
        """Slow or lost, by when the request ended."""
        faults: tuple[Fault, ...] = (
            SettlementsSlow(from_ns=SECOND, until_ns=2 * SECOND, delay_ns=4 * SECOND),
            SettlementsLost(from_ns=2 * SECOND, until_ns=3 * SECOND),
        )
        listening = Listening(make_controller())
        run(make_plan(workload(rows(0, 1000, 2000, 3000)), faults=faults), listening)
        assert [at for at, _ in told(listening, Settled)] == [1100, 4100, 5100]

    def test_no_settlement(self) -> None:
        """Without an access log nothing is settled."""
        listening = Listening(make_controller())
        run(replace(make_plan(workload(rows(0))), settlement_delay_ns=None), listening)
        assert told(listening, Settled) == []

    def test_scrapes(self) -> None:
        """What a server says of itself, at an interval; stale is silence, a lie is a lie."""
        faults: tuple[Fault, ...] = (
            MetricsStale(from_ns=100 * MILLISECOND, until_ns=150 * MILLISECOND),
            MetricsLie(from_ns=150 * MILLISECOND, until_ns=200 * MILLISECOND, waiting=7),
        )
        plan = make_plan(
            workload(AtOnce(3)),
            duration_ns=200 * MILLISECOND,
            faults=faults,
            scrape_interval_ns=50 * MILLISECOND,
        )
        listening = Listening(OpenGate())
        run(plan, listening)
        assert told(listening, LoadObserved)[:3] == [
            (50, LoadObserved("s0", 1, 2, kv_usage=29 / 1000, kv_tokens=1000)),
            (150, LoadObserved("s0", 7, 0, kv_usage=0.0)),
            (200, LoadObserved("s0", 0, 0, kv_usage=0.0, kv_tokens=1000)),
        ]


class TestFaults:
    """What goes wrong, and how it is reported."""

    def test_endpoint_gone(self) -> None:
        """What it had fails; it is no endpoint until it is back; the rest waits."""
        gone = EndpointGone(
            address="s0", from_ns=50 * MILLISECOND, until_ns=SECOND, noticed_after_ns=0
        )
        listening = Listening(make_controller())
        results = run(make_plan(workload(rows(0, 500)), faults=(gone,)), listening)

        assert endings(results) == {Ending.FAILED: 1, Ending.ANSWERED: 1}
        assert told(listening, EndpointsChanged) == [
            (0, EndpointsChanged(("s0",))),
            (50, EndpointsChanged(())),
            (1000, EndpointsChanged(("s0",))),
        ]
        assert (
            1050,
            Settled(1, ttft_ns=10_000_000, generation_ns=40_000_000, is_success=False),
        ) in (told(listening, Settled))
        assert results.tenants[0, "default-flow"].waits_ns == [0, 500 * MILLISECOND]

    def test_endpoint_gone_unnoticed(self) -> None:
        """What is sent to a server believed there fails when Envoy gives up connecting."""
        gone = EndpointGone(
            address="s0", from_ns=0, until_ns=9 * SECOND, noticed_after_ns=500 * MILLISECOND
        )
        listening = Listening(make_controller())
        results = run(make_plan(workload(rows(10)), faults=(gone,)), listening)

        assert endings(results) == {Ending.FAILED: 1}
        assert told(listening, Left) == [(5010, Left(1))]

    def test_two_reasons_to_be_gone(self) -> None:
        """Who is missed twice is back when both reasons are over."""
        faults = tuple(
            EndpointGone(address="s0", from_ns=n * SECOND, until_ns=(n + 2) * SECOND)
            for n in (1, 2)
        )
        results = run(make_plan(workload(rows(1500)), faults=faults))
        assert results.tenants[0, "default-flow"].waits_ns == [2500 * MILLISECOND]

    def test_joins_late(self) -> None:
        """A server that joins later is no endpoint before."""
        plan = replace(
            make_plan(workload(rows(0))),
            servers=(ServerSpec(address="late", config=SERVER, from_ns=3 * SECOND),),
        )
        assert run(plan).tenants[0, "default-flow"].waits_ns == [3 * SECOND]

    def test_clock_jump(self) -> None:
        """The engine's clock jumps and its deadlines with it; the world's clock does not."""
        controller = make_controller(default_settings=BandSettings(ttl_ns=60 * SECOND))
        blocked = workload(AtOnce(3), lengths=Independent(Fixed(10), Fixed(500)))
        jump = ClockJumped(at_ns=SECOND, by_ns=90 * SECOND)
        results = run(make_plan(blocked, faults=(jump,)), controller)

        assert results.transcript[-1] == f"{SECOND} 3 evicted-ttl 0 default-flow {SECOND} - -"
        assert endings(results) == {Ending.ANSWERED: 2, Ending.REFUSED: 1}

    def test_stall(self) -> None:
        """Facts of a stall come in one batch after it; what is due by the clock comes late too."""
        listening = Listening(make_controller(default_settings=BandSettings(ttl_ns=SECOND)))
        stall = EngineStalled(from_ns=SECOND, until_ns=3 * SECOND)
        results = run(make_plan(workload(rows(1500, 2000, 2500)), faults=(stall,)), listening)

        assert asked_ms(listening) == [3000, 3000, 3000]
        assert endings(results) == {Ending.ANSWERED: 3}
        assert results.tenants[0, "default-flow"].waits_ns[0] == 1500 * MILLISECOND

    def test_slow_decisions(self) -> None:
        """A client who leaves while his decision is on its way is never served."""
        slow = DecisionsSlow(from_ns=0, until_ns=SECOND, delay_ns=100 * MILLISECOND)
        hasty = workload(rows(0), "hasty", patience=Fixed(50 * MILLISECOND))
        results = run(make_plan(workload(rows(0)), hasty, faults=(slow,)))

        assert endings(results) == {Ending.ANSWERED: 1, Ending.GAVE_UP: 1}
        assert results.tenants[0, "default-flow"].outcomes == {Outcome.DISPATCHED: 2}
        assert results.servers[0].tokens_generated == 10

    def test_objectives_edited(self) -> None:
        """From then on requests have the new priorities, in the engine and in the results."""
        edited = ObjectivesEdited(at_ns=SECOND, priorities={"chat": 3})
        listening = Listening(make_controller())
        plan = make_plan(workload(rows(0, 1000), objective="chat"), faults=(edited,))
        results = run(plan, listening)

        assert results.priorities == (10, 3)
        assert told(listening, ObjectivesChanged) == [
            (0, ObjectivesChanged({"chat": 10, "batch": -1})),
            (1000, ObjectivesChanged({"chat": 3})),
        ]

    def test_drain(self) -> None:
        """After a drain has begun arrivals are refused."""
        listening = Listening(make_controller())
        drain = DrainBegins(at_ns=SECOND, budget_ns=SECOND)
        results = run(make_plan(workload(rows(0, 2000)), faults=(drain,)), listening)

        assert endings(results) == {Ending.ANSWERED: 1, Ending.REFUSED: 1}
        assert told(listening, DrainBegan) == [(1000, DrainBegan(SECOND))]


class TestReclaim:
    """An engine may end what is in flight."""

    @pytest.mark.parametrize(("attempts", "ending"), [(1, Ending.REFUSED), (2, Ending.ANSWERED)])
    def test_reclaimed(self, attempts: int, ending: Ending) -> None:
        """The server is freed, the client is refused, and may ask again."""
        plan = make_plan(workload(rows(0, 50), retry=Retry(attempts_max=attempts)))
        listening = Listening(Reclaiming())
        results = run(plan, listening)

        assert told(listening, Left)[0] == (50, Left(1))
        expected = Counter({Ending.ANSWERED: 1})
        expected[ending] += 1
        assert expected == endings(results)
        assert results.servers[0].tokens_generated == 5 + 10 * attempts
        assert told(listening, Settled)[0] == (
            1050,
            Settled(1, ttft_ns=10 * MILLISECOND, generation_ns=40 * MILLISECOND),
        )

    def test_at_once(self) -> None:
        """What is dispatched and reclaimed in one turn may have failed in between."""
        gone = EndpointGone(address="s0", from_ns=0, until_ns=SECOND, noticed_after_ns=1)
        results = run(make_plan(workload(rows(50, 50)), faults=(gone,)), Reclaiming())

        assert endings(results) == {Ending.FAILED: 2}

    def test_on_its_way(self) -> None:
        """What still waits for a connection to its server ends as well, and the engine hears it."""
        gone = EndpointGone(address="s0", from_ns=0, until_ns=SECOND, noticed_after_ns=100 * SECOND)
        listening = Listening(Reclaiming())
        results = run(make_plan(workload(rows(0, 50)), faults=(gone,)), listening)

        assert told(listening, Left)[0] == (50, Left(1))
        assert endings(results) == {Ending.REFUSED: 1, Ending.FAILED: 1}

    def test_too_late(self) -> None:
        """What has just ended cannot be reclaimed any more."""
        slow = DecisionsSlow(from_ns=50 * MILLISECOND, until_ns=SECOND, delay_ns=50 * MILLISECOND)
        results = run(make_plan(workload(rows(0, 50)), faults=(slow,)), Reclaiming())
        assert endings(results) == {Ending.ANSWERED: 2}


class TestForgetfulGate:
    """A gate that takes for ended what is in flight too long."""

    def test_forgets(self) -> None:
        """It sends a third where two are, as soon as it has forgotten the first."""
        engine = ForgetfulGate(make_controller(), 30 * MILLISECOND)
        results = run(make_plan(workload(AtOnce(5))), engine)
        assert results.in_flight_most == 5
        waits = results.tenants[0, "default-flow"].waits_ns
        assert waits == [0, 0, 30 * MILLISECOND, 30 * MILLISECOND, 60 * MILLISECOND]

    def test_remembers(self) -> None:
        """What ends in time is not forgotten."""
        plan = make_plan(workload(AtOnce(5)))
        forgetful = run(plan, ForgetfulGate(make_controller(), SECOND))
        assert run(plan).transcript == forgetful.transcript


class TestRunning:
    """A run can be taken in pieces."""

    def test_in_pieces(self) -> None:
        """However it is cut, it is the same run."""
        plan = make_plan(workload(AtOnce(50)), workload(ClosedLoop(3), "users"), servers=2)
        whole = run(plan)
        world = World(make_controller(), plan, 1)
        for at_ns in range(0, plan.duration_ns, 77 * MILLISECOND):
            world.run_until(at_ns)
            assert at_ns == world.now_ns
        assert whole.digest == world.finish().digest
        assert [sample.at_ns for sample in whole.samples[:3]] == [0, 25_000_000, 50_000_000]

    def test_refusals_are_counted(self) -> None:
        """Every decision that is a no, by its outcome."""
        controller = make_controller(limits=Limits(requests_max=1), picker=Picker.OFF)
        results = run(make_plan(workload(AtOnce(5))), controller)
        figures = results.tenants[0, "default-flow"]
        assert figures.outcomes == {Outcome.DISPATCHED: 3, Outcome.REJECTED_CAPACITY: 2}
        assert endings(results) == {Ending.ANSWERED: 3, Ending.REFUSED: 2}

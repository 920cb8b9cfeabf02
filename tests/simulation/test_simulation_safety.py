"""Safety and liveness of the engine in worlds by chance; and that what is wrong is caught.

Each seed makes a configuration and a plan: any mix of clients, servers that come and go, stale and
lying metrics, stalls, clock jumps, edited objectives, a drain. `World` holds every turn against the
ledger and the engine's own accounts, and does not end before all calls are over.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from flowcontrol.config import BandSettings, Concurrency, Role
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Decision,
    EndpointsChanged,
    Fact,
    Left,
    MemoryRestored,
    Reconfigured,
)
from flowcontrol.picker import EndpointPicker
from flowcontrol.pool import Pool
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Ending
from flowcontrol.simulation.distributions import Fixed
from flowcontrol.simulation.faults import EndpointGone
from flowcontrol.simulation.gates import Decider, ForgetfulGate
from flowcontrol.simulation.model_server import ModelServer
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.safety import (
    LivenessError,
    SafetyAccounts,
    SafetyError,
    Slots,
    slots_of,
)
from flowcontrol.simulation.workload import AtOnce, ClosedLoop, Independent
from flowcontrol.simulation.world import World
from tests.support.simulated import (
    MILLISECOND,
    SECOND,
    Listening,
    make_controller,
    make_plan,
    random_config,
    random_plan,
    rows,
    run,
    workload,
)

SEEDS = range(100)
PICKED = Slots(2, is_picked=True)


def run_seed(seed: int) -> Results:
    """Run the world of a seed with every check."""
    chance = Random(seed)
    config = random_config(chance)
    plan = random_plan(chance)
    has_roles = any(spec.role is not Role.BOTH for spec in plan.servers)
    slots = None if has_roles else slots_of(config)
    world = World(FlowController(config, 0), plan, seed, slots=slots, is_checked=True)
    return world.finish()


class TestRandomWorlds:
    """Nothing is lost, nothing is decided twice, nothing waits beside a free slot, all end."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test_safe_and_live(self, seed: int) -> None:
        """Every call ends in one way, and every attempt is decided once."""
        print(f"seed {seed}")  # noqa: T201 - shown when the test fails
        results = run_seed(seed)

        for figures in results.tenants.values():
            assert figures.call_count == sum(figures.endings.values())
        lines = [line.split() for line in results.transcript]
        ids = [number for _, number, outcome, *_ in lines if outcome != Outcome.RECLAIMED.value]
        assert len(set(ids)) == len(ids)

    @pytest.mark.slow
    def test_all_of_it_happens(self) -> None:
        """Every outcome and every ending occurs in some world: they test what they should."""
        missing = {
            *Ending,
            *(Outcome.DISPATCHED, Outcome.REJECTED_CAPACITY, Outcome.REJECTED_NO_ENDPOINTS),
            *(Outcome.EVICTED_TTL, Outcome.EVICTED_NO_ENDPOINTS, Outcome.EVICTED_CANCELLED),
            *(Outcome.EVICTED_DISPLACED, Outcome.REJECTED_DRAINING, Outcome.RECLAIMED),
        }
        for seed in reversed(SEEDS):
            for figures in run_seed(seed).tenants.values():
                missing -= {*figures.outcomes, *figures.endings}
            if not missing:
                return
        pytest.fail(f"in no world: {missing}")


class Changing(Listening):
    """An engine whose configuration changes at any time, and that goes on with what it learnt."""

    def __init__(self, chance: Random) -> None:
        super().__init__(FlowController(random_config(chance), 0))
        self.chance = chance

    def poll(self, now_ns: int) -> list[Decision]:
        """Change something first, now and then."""
        assert isinstance(self.engine, FlowController)
        if self.chance.random() < 0.01:
            self.engine.handle(Reconfigured(random_config(self.chance)), now_ns)
        if self.chance.random() < 0.005:
            memory = self.engine.learned.memory(now_ns)
            memory.check()
            self.engine.handle(MemoryRestored(memory), now_ns)
        return super().poll(now_ns)


@pytest.mark.parametrize("seed", range(50))
def test_changes(seed: int) -> None:
    """Whatever an operator changes meanwhile, and whatever is known from before, it is the same."""
    chance = Random(seed)
    plan = random_plan(chance)
    results = World(Changing(chance), plan, seed, is_checked=True).finish()

    for figures in results.tenants.values():
        assert figures.call_count == sum(figures.endings.values())


class Wrong(Listening):
    """An engine with a fault of its own: what it decides is changed on its way out.

    Args:
        wrong: what becomes of the decisions of a turn.
    """

    def __init__(self, wrong: Callable[[list[Decision]], list[Decision]]) -> None:
        super().__init__(make_controller())
        self.wrong = wrong

    def poll(self, now_ns: int) -> list[Decision]:
        """Decide wrongly."""
        return self.wrong(super().poll(now_ns))


class Deaf(Listening):
    """An engine that gets no departures."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Overhear those."""
        if not isinstance(fact, Left):
            super().handle(fact, now_ns)


class Sleeper(Listening):
    """An engine that never asks to be woken."""

    def next_wakeup_ns(self) -> int | None:
        """Sleep on."""
        return None


class Restless(Listening):
    """An engine that asks to be polled again at once, for ever."""

    def next_wakeup_ns(self) -> int | None:
        """Be due."""
        return 0


def changed(**changes: object) -> Callable[[list[Decision]], list[Decision]]:
    """Return a fault that changes every decision in the same way."""
    return lambda decisions: [replace(each, **changes) for each in decisions]  # type: ignore[arg-type]  # keywords of a test


PLAN = make_plan(workload(ClosedLoop(5), patience=Fixed(250 * MILLISECOND)), duration_ns=SECOND)


class TestWrongEngines:
    """Each planted fault is caught, and named."""

    @pytest.mark.parametrize(
        ("engine", "message"),
        [
            (Wrong(lambda decisions: decisions[1:]), "waits while 1 of 2 slots are taken"),
            (Wrong(lambda decisions: decisions * 2), "is not waiting: decided twice"),
            (Wrong(changed(flow_id="somebody")), "came for another band or flow"),
            (Wrong(changed(priority=10)), "came for another band or flow"),
            (Wrong(changed(waited_ns=-1)), "waited another time"),
            (Wrong(changed(request_id=99)), "decided twice, or never arrived"),
            (Wrong(changed(endpoint="elsewhere")), "goes to no endpoint of the pool"),
            (Wrong(changed(outcome=Outcome.EVICTED_CANCELLED)), "has not left"),
            (Wrong(changed(outcome=Outcome.RECLAIMED)), "is not in flight"),
            (Deaf(make_controller()), "waits while 1 of 2 slots are taken"),
            (Restless(make_controller()), "polled at 0, and asks to be polled at 0"),
            (make_controller(detectors=(Concurrency(requests_max=3),)), "finds no free slot"),
            (
                make_controller(detectors=(Concurrency(requests_max=1),)),
                "waits while 1 of 2 slots are taken",
            ),
            (ForgetfulGate(make_controller(), 30 * MILLISECOND), "finds no free slot"),
        ],
    )
    def test_caught(self, engine: Decider, message: str) -> None:
        """The run stops at the first turn in which it shows."""
        with pytest.raises(SafetyError, match=message):
            run(PLAN, engine, slots=PICKED)

    def test_the_right_one_passes(self) -> None:
        """The same plan and slots find nothing wrong with the engine itself."""
        assert run(PLAN, slots=PICKED).transcript

    @pytest.mark.interpreted
    @pytest.mark.parametrize(
        ("says", "message"),
        [(0.0, "finds no free slot"), (1.0, "waits while 0 of 2 slots are taken")],
    )
    def test_wrong_detector(
        self, says: float, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pool that always has room, or never, is not believed."""
        monkeypatch.setattr(Pool, "saturation", lambda _: says)
        monkeypatch.setattr(EndpointPicker, "best", lambda _: "s0")
        with pytest.raises(SafetyError, match=message):
            World(make_controller(), PLAN, 1, slots=PICKED).finish()

    def test_uneven(self) -> None:
        """Two at one endpoint and none at the other are a slot too many there."""
        engine = Wrong(changed(endpoint="s0"))
        with pytest.raises(SafetyError, match="goes to a full endpoint"):
            run(make_plan(workload(AtOnce(2)), servers=2), engine, slots=Slots(1, is_picked=True))

    def test_out_of_its_subset(self) -> None:
        """A request goes nowhere but where it may, and waits for that beside room elsewhere."""
        tied = make_plan(workload(AtOnce(3), subset=("s0",)), servers=2)
        engine = Wrong(changed(endpoint="s1"))
        with pytest.raises(SafetyError, match="goes where it may not"):
            run(tied, engine, slots=Slots(2, is_picked=True))

        results = run(tied, slots=PICKED)
        assert [server.in_flight_most for server in results.servers] == [2, 0]

    def test_deaf(self) -> None:
        """Who leaves the queue must be decided in that turn."""
        lengths = Independent(Fixed(10), Fixed(500))
        hasty = workload(AtOnce(3), lengths=lengths, patience=Fixed(50 * MILLISECOND))
        with pytest.raises(SafetyError, match="request 3 has left and was not decided"):
            run(make_plan(hasty), Deaf(make_controller()), slots=PICKED)

    def test_sleeper(self) -> None:
        """An engine that never wakes up lets a request wait for ever when nothing else happens."""
        settings = BandSettings(ttl_ns=SECOND)
        plan = make_plan(workload(rows(0)), servers=0)
        awake = make_controller(default_settings=settings, no_endpoint_ttl_ns=SECOND)
        asleep = Sleeper(make_controller(default_settings=settings, no_endpoint_ttl_ns=SECOND))
        assert run(plan, awake).tenants[0, "default-flow"].endings == {Ending.REFUSED: 1}
        with pytest.raises(LivenessError, match="still open when nothing more happens: 1"):
            run(plan, asleep)

    def test_reclaims_once(self) -> None:
        """What is in flight may be reclaimed, but not twice."""
        ledger = SafetyAccounts(None)
        engine = Listening(make_controller())
        World(engine, PLAN, 1).run_until(0)
        for now_ns, fact in engine.facts:
            ledger.handle(fact, now_ns)
        decision = Decision(1, Outcome.DISPATCHED, 0, "default-flow", waited_ns=0)
        reclaimed = replace(decision, outcome=Outcome.RECLAIMED)
        ledger.decided(decision, 0)
        ledger.decided(reclaimed, 0)
        with pytest.raises(SafetyError, match="was reclaimed before"):
            ledger.decided(reclaimed, 0)


class TestWrongWorlds:
    """A world that does not keep its own rules is caught as well."""

    def test_lost_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request that no server ever works on is not forgotten."""

        def swallow(*_: object, **__: object) -> None:
            pass

        monkeypatch.setattr(ModelServer, "submit", swallow)
        with pytest.raises(LivenessError, match="still open when nothing more happens: 1"):
            run(make_plan(workload(rows(0))))

    def test_leak(self) -> None:
        """A slot that is not given back at the end is found."""
        ledger = SafetyAccounts(PICKED)
        engine = Listening(make_controller())
        World(engine, make_plan(workload(rows(0))), 1).run_until(0)
        for now_ns, fact in engine.facts:
            ledger.handle(fact, now_ns)
        assert any(isinstance(fact, EndpointsChanged) for _, fact in engine.facts)
        ledger.decided(Decision(1, Outcome.DISPATCHED, 0, "default-flow", 0, "s0"), 0)
        with pytest.raises(SafetyError, match="all calls are over, but not 1"):
            ledger.check_over()

    def test_names_not_too_many(self) -> None:
        """An error names the first few requests and counts the rest."""
        plan = make_plan(workload(AtOnce(9)), servers=0)
        with pytest.raises(LivenessError, match=r": 1, 2, 3, 4, 5 and 4 more$"):
            run(plan)


def test_plans_are_quiet_in_the_end() -> None:
    """A plan knows when its last fault is over; liveness counts from then."""
    gone = EndpointGone(address="s0", from_ns=0, until_ns=20 * SECOND, noticed_after_ns=SECOND)
    plan = make_plan(workload(rows(0)), faults=(gone,))
    assert plan.quiet_ns == 21 * SECOND
    assert replace(plan, faults=()).quiet_ns == plan.duration_ns == 10 * SECOND

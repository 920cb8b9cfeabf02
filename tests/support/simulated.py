"""Small simulated worlds for tests: plans to adapt, engines that record facts, random plans."""

from dataclasses import replace
from random import Random

from flowcontrol import config as engine_config
from flowcontrol.controller import FlowController
from flowcontrol.events import Decision, Fact
from flowcontrol.simulation import faults
from flowcontrol.simulation.distributions import Exponential, Fixed, Lognormal, Uniform
from flowcontrol.simulation.gates import Decider
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import Balancer, ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.safety import Slots
from flowcontrol.simulation.traces import TraceRow
from flowcontrol.simulation.workload import (
    Arrivals,
    AtOnce,
    ClosedLoop,
    Independent,
    Poisson,
    Replayed,
    Retry,
    Window,
    Workload,
)
from flowcontrol.simulation.world import World

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
SERVER = ModelServerConfig(
    sequences_max=2,
    kv_tokens=1000,
    batched_tokens_max=100,
    step_base_ns=10 * MILLISECOND,
    sequence_ns=0,
    prefill_token_ns=0,
    context_token_ns=0,
)
"""Each step takes 10 ms, so an answer of n tokens to a short prompt takes n x 10 ms."""
TEN_TOKENS = Independent(Fixed(10), Fixed(10))


class Listening:
    """Lets an engine decide, and records its facts with their times."""

    def __init__(self, engine: Decider) -> None:
        self.engine = engine
        self.facts: list[tuple[int, Fact]] = []
        self.polls: list[int] = []

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Record the fact."""
        self.facts.append((now_ns, fact))
        self.engine.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Record the time."""
        self.polls.append(now_ns)
        return self.engine.poll(now_ns)

    def next_wakeup_ns(self) -> int | None:
        """Delegate."""
        return self.engine.next_wakeup_ns()

    def check_invariants(self) -> None:
        """Delegate."""
        self.engine.check_invariants()

    def told(self, kind: type[Fact]) -> list[tuple[int, Fact]]:
        """Return the facts of a type, each with its time."""
        return [(now_ns, fact) for now_ns, fact in self.facts if isinstance(fact, kind)]


def make_plan(
    *workloads: Workload,
    duration_ns: int = 10 * SECOND,
    servers: int = 1,
    faults: tuple[faults.Fault, ...] = (),
    scrape_interval_ns: int | None = None,
) -> Plan:
    """Return a plan with servers s0, s1 and so on, all present from the beginning."""
    return Plan(
        duration_ns=duration_ns,
        servers=tuple(ServerSpec(address=f"s{n}", config=SERVER) for n in range(servers)),
        workloads=workloads,
        objectives={"chat": 10, "batch": -1},
        faults=faults,
        scrape_interval_ns=scrape_interval_ns,
    )


def make_controller(**settings: object) -> FlowController:
    """Return an engine that picks, by default with two requests at each endpoint."""
    usual = {
        "detectors": (engine_config.Concurrency(requests_max=2),),
        "picker": engine_config.Picker.LEAST_LOADED,
    }
    config = engine_config.ControllerConfig(**{**usual, **settings})  # type: ignore[arg-type]  # keywords of a test
    return FlowController(config, 0)


def run(plan: Plan, engine: Decider | None = None, *, slots: Slots | None = None) -> Results:
    """Run a plan to its end with all checks."""
    engine = make_controller() if engine is None else engine
    return World(engine, plan, 1, slots=slots, is_checked=True).finish()


def workload(arrivals: Arrivals, name: object = "people", **settings: object) -> Workload:
    """Return a workload of ten tokens in, ten tokens out."""
    return Workload(**{"name": name, "arrivals": arrivals, "lengths": TEN_TOKENS, **settings})  # type: ignore[arg-type]  # keywords of a test


def rows(*at_ms: int) -> Replayed:
    """Return arrivals at these times, with ten tokens of prompt and answer."""
    return Replayed(tuple(TraceRow(at * MILLISECOND, 10, 10) for at in at_ms))


def random_config(chance: Random) -> engine_config.ControllerConfig:
    """Return a random configuration of the engine."""

    def settings() -> engine_config.BandSettings:
        return engine_config.BandSettings(
            limits=engine_config.Limits(requests_max=chance.choice([None, 0, 3, 50])),
            flow_limits=engine_config.Limits(requests_max=chance.choice([None, None, 2, 20])),
            ttl_ns=chance.choice([None, SECOND // 2, 5 * SECOND, 60 * SECOND]),
            fairness=chance.choice(list(engine_config.Fairness)),
            ordering=chance.choice(list(engine_config.Ordering)),
            share_min=chance.choice([0.0, 0.0, 0.1, 0.4]),
            promote_after_ns=chance.choice([None, None, SECOND]),
        )

    return engine_config.ControllerConfig(
        limits=engine_config.Limits(
            requests_max=chance.choice([None, 2, 20, 200]),
            bytes_max=chance.choice([None, 20_000]),
        ),
        templates=(engine_config.BandTemplate(priority_max=-1, settings=settings()),),
        default_settings=settings(),
        no_endpoint_ttl_ns=chance.choice([None, SECOND, 30 * SECOND]),
        detectors=_random_detectors(chance),
        ceilings=engine_config.CeilingSettings(
            policy=chance.choice([engine_config.Ceilings.STATIC, *engine_config.Ceilings]),
            ceiling_min=chance.uniform(0.1, 0.9),
        ),
        picker=chance.choice(list(engine_config.Picker)),
        weights=chance.choice([{}, {"a": 3.0, "b": 0.5}]),
        reclaim=engine_config.Reclaim(
            is_enabled=chance.random() < 0.5,
            is_only_before_first_byte=chance.random() < 0.5,
            at_once_max=chance.randint(1, 3),
        ),
        forecasts=chance.random() < 0.5,
    )


def _random_detectors(chance: Random) -> tuple[engine_config.Detector, ...]:
    """Return detectors that let everything through eventually, if there are scrapes."""
    counted = engine_config.Concurrency(requests_max=chance.randint(1, 6))
    others: list[engine_config.Detector] = [
        engine_config.Concurrency(requests_max=None, tokens_max=chance.choice([50, 500])),
        engine_config.Concurrency(requests_max=chance.randint(1, 6), tokens_max=500),
        engine_config.Utilization(
            waiting_max=chance.randint(1, 5), staleness=chance.choice(list(engine_config.Staleness))
        ),
        engine_config.Adaptive(limit_first=chance.randint(1, 8)),
        engine_config.Auto(),
    ]
    if chance.random() < 0.4:
        return (counted,)
    return tuple(chance.sample([counted, *others], chance.randint(1, 3)))


def random_plan(chance: Random) -> Plan:
    """Return a random plan of half a minute with almost every kind of event."""
    duration_ns = 30 * SECOND
    server_count = chance.randint(1, 4)
    is_plain = chance.random() < 0.7
    specs = tuple(
        ServerSpec(
            address=f"s{n}",
            config=ModelServerConfig(
                sequences_max=chance.randint(1, 8),
                kv_tokens=chance.choice([600, 2000, 20_000]),
                batched_tokens_max=chance.choice([16, 256]),
                step_base_ns=chance.choice([5, 20]) * MILLISECOND,
            ),
            from_ns=chance.choice([0, 0, 0, 8 * SECOND]),
            role=engine_config.Role.BOTH if is_plain else chance.choice(list(engine_config.Role)),
        )
        for n in range(server_count)
    )
    if specs[0].role is engine_config.Role.PREFILL:  # else requests for s0 may never be served
        specs = (replace(specs[0], role=engine_config.Role.DECODE), *specs[1:])
    return Plan(
        duration_ns=duration_ns,
        servers=specs,
        workloads=tuple(_random_workload(chance, n) for n in range(chance.randint(1, 4))),
        objectives={"chat": 10, "batch": -1},
        faults=tuple(_random_fault(chance, server_count) for _ in range(chance.randint(0, 6))),
        balancer=chance.choice(list(Balancer)),
        settlement_delay_ns=chance.choice([None, 0, SECOND]),
        scrape_interval_ns=chance.choice([SECOND // 2, SECOND]),
    )


def _random_workload(chance: Random, number: int) -> Workload:
    arrivals: list[Arrivals] = [
        Poisson(chance.choice([1, 10]), (Window(5 * SECOND, 15 * SECOND, chance.choice([0, 3])),)),
        Poisson(20, on_ns=SECOND, off_ns=4 * SECOND),
        AtOnce(chance.randint(1, 60)),
        ClosedLoop(chance.randint(1, 12), Exponential(SECOND), ramp_ns=SECOND),
        ClosedLoop(chance.randint(1, 12)),
    ]
    return Workload(
        name=f"workload-{number}",
        arrivals=chance.choice(arrivals),
        lengths=Independent(Lognormal(60, 0.8, 400), Uniform(1, 60)),
        tenants=chance.choice([{"a": 1.0}, {"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 1.0, "c": 1.0}]),
        objective=chance.choice(["chat", "batch", "nobody", None]),
        from_ns=chance.choice([0, 3 * SECOND]),
        until_ns=chance.choice([None, 20 * SECOND]),
        ttft_slo_ns=chance.choice([None, SECOND]),
        ttl_ns=chance.choice([None, None, 0, 2 * SECOND]),
        patience=chance.choice([None, Fixed(SECOND), Exponential(2 * SECOND)]),
        retry=Retry(
            attempts_max=chance.choice([1, 3]),
            honours_retry_after=chance.random() < 0.5,
            after_patience=chance.random() < 0.5,
        ),
        subset=chance.choice([None, None, None, ("s0",), ("s0", "s1")]),
    )


def _random_fault(chance: Random, server_count: int) -> faults.Fault:
    from_ns = round(chance.uniform(0, 25) * SECOND)
    until_ns = from_ns + round(chance.uniform(0.1, 10) * SECOND)
    delay_ns = chance.choice([MILLISECOND, SECOND])
    address = f"s{chance.randrange(server_count)}"
    edited = {"chat": 10} if chance.random() < 0.5 else {"chat": 5, "batch": 5}
    possible: list[faults.Fault] = [
        faults.EndpointGone(address=address, from_ns=from_ns, until_ns=until_ns),
        faults.EndpointGone(
            address=address, from_ns=from_ns, until_ns=until_ns, noticed_after_ns=delay_ns
        ),
        faults.MetricsStale(from_ns=from_ns, until_ns=until_ns),
        faults.MetricsLie(from_ns=from_ns, until_ns=until_ns, waiting=100, kv_usage=1.0),
        faults.SettlementsSlow(from_ns=from_ns, until_ns=until_ns, delay_ns=10 * SECOND),
        faults.SettlementsLost(from_ns=from_ns, until_ns=until_ns),
        faults.DecisionsSlow(from_ns=from_ns, until_ns=until_ns, delay_ns=delay_ns),
        faults.EngineStalled(from_ns=from_ns, until_ns=until_ns),
        faults.ClockJumped(at_ns=from_ns, by_ns=round(chance.uniform(0, 90) * SECOND)),
        faults.ObjectivesEdited(at_ns=from_ns, priorities=edited),
        faults.DrainBegins(at_ns=round(chance.uniform(20, 29) * SECOND), budget_ns=2 * SECOND),
    ]
    return chance.choice(possible)

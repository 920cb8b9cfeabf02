"""Traffic on which a limit and a reserve are judged: people alone, and people beside a job.

Two public traces (Azure conversations and code, Patel et al., ISCA 2024) and synthetic shapes. Each
case belongs to one of two halves. Constants were chosen on the first half only, so the second half
shows their quality on traffic that they were not tuned for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import final

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    ControllerConfig,
    Detector,
    Picker,
    Role,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import MemoryRestored
from flowcontrol.simulation.distributions import Exponential, Lognormal
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.traces import TraceRow, per_second, read_trace
from flowcontrol.simulation.workload import (
    AtOnce,
    ClosedLoop,
    Independent,
    Poisson,
    Replayed,
    Window,
    Workload,
)
from flowcontrol.simulation.world import World
from tests.support.overloads import MINUTE, OVERLOADS, POOLS, SECOND, STRENGTH, Overload

TRACES = {
    "conversations": "AzureLLMInferenceTrace_conv.csv",
    "code": "AzureLLMInferenceTrace_code.csv",
}
OBJECTIVES = {"chat": 10, "agents": 0, "batch": -1}
SERVER = ModelServerConfig(
    sequences_max=256,
    kv_tokens=512 * 1024,
    batched_tokens_max=8192,
    step_base_ns=15_000_000,
    sequence_ns=200_000,
    prefill_token_ns=40_000,
    context_token_ns=20,
)
"""About an 8 B model on a GPU of 80 GB, for the cases of real traffic."""
SMALL = ModelServerConfig()
"""The model server of the demo."""
LIMITS_SMALL = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 32)
LIMITS_LARGE = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)


Workloads = Callable[[Mapping[str, tuple[TraceRow, ...]]], tuple[Workload, ...]]


@final
@dataclass(frozen=True)
class Case:
    """One kind of traffic on one pool."""

    name: str
    is_tuned: bool
    """Whether it belongs to the half on which constants were chosen."""
    servers: tuple[ServerSpec, ...]
    workloads: Workloads
    """Returns the workloads, given the traces by name."""
    trace: str | None = None
    minutes: float = 10
    ttl_s: float = 120
    job_ttl_s: float = 3000
    limits: tuple[int, ...] = LIMITS_LARGE
    """Fixed limits of the sweep."""
    objectives: Mapping[str, int] = field(default_factory=lambda: OBJECTIVES)

    @property
    def has_job(self) -> bool:
        """Whether a job runs beside the people."""
        return any(each.objective == "batch" for each in self.workloads(_NO_TRACES))


_NO_TRACES = {name: (TraceRow(0, 1, 1),) for name in TRACES}


def _pool(*configs: ModelServerConfig, roles: tuple[Role, ...] = ()) -> tuple[ServerSpec, ...]:
    padded = roles or (Role.BOTH,) * len(configs)
    return tuple(
        ServerSpec(address=f"s{n}", config=config, role=role)
        for n, (config, role) in enumerate(zip(configs, padded, strict=True))
    )


def replayed(rows: tuple[TraceRow, ...], rate: float) -> Replayed:
    """Return a trace at another rate."""
    natural = per_second(list(rows)) or 1.0
    return Replayed(tuple(row._replace(at_ns=round(row.at_ns * natural / rate)) for row in rows))


def people(
    arrivals: Poisson | Replayed | ClosedLoop,
    slo_s: float,
    prompt: int = 400,
    output: int = 150,
    *,
    spread: float = 0.7,
    longest: int = 16_000,
    objective: str = "chat",
    tenants: int = 10,
) -> Workload:
    """Return people, who wait for an answer."""
    return Workload(
        name=objective,
        arrivals=arrivals,
        lengths=Independent(
            Lognormal(prompt, spread, longest), Lognormal(output, min(spread, 0.7), 8 * output)
        ),
        objective=objective,
        tenants={f"{objective}-{n}": 1 / (n + 1) for n in range(tenants)},
        ttft_slo_ns=round(slo_s * SECOND),
    )


def job(
    count: int,
    prompt: int = 2000,
    output: int = 300,
    *,
    spread: float = 0.8,
    longest: int = 30_000,
    from_s: float = 60,
) -> Workload:
    """Return a job whose requests arrive at the same time."""
    return Workload(
        name="job",
        arrivals=AtOnce(count),
        lengths=Independent(
            Lognormal(prompt, spread, longest), Lognormal(output, 0.6, max(1, 7 * output))
        ),
        objective="batch",
        tenants={"nightly": 1.0},
        from_ns=round(from_s * SECOND),
    )


def _azure(
    name: str, trace: str, rate: float, slo_s: float, *, kv: int = 512, batch: int = 0, tuned: bool
) -> Case:
    config = replace(SERVER, kv_tokens=kv * 1024)
    return Case(
        name,
        is_tuned=tuned,
        servers=_pool(*[config] * 8),
        workloads=lambda traces: (
            people(replayed(traces[trace], rate), slo_s),
            *([job(batch)] if batch else ()),
        ),
        trace=trace,
        minutes=20,
    )


def _overloads() -> list[Case]:
    tuned = {"short chat", "long prompts", "changing"}
    return [
        Case(
            name=f"{overload.name}, {pool}",
            is_tuned=overload.name in tuned,
            servers=_pool(*POOLS[pool]),
            workloads=_stronger(overload, STRENGTH[pool]),
            ttl_s=overload.ttl_s,
            limits=LIMITS_SMALL,
            objectives={},
        )
        for pool in ("uniform", "mixed")
        for overload in OVERLOADS.values()
    ]


def _stronger(overload: Overload, factor: float) -> Workloads:
    workloads = tuple(
        replace(each, arrivals=_times(each.arrivals, factor)) for each in overload.workloads
    )
    return lambda _: workloads


def _times(arrivals: object, factor: float) -> Poisson:
    assert isinstance(arrivals, Poisson)
    return replace(arrivals, per_second=arrivals.per_second * factor)


def _day(rate: float) -> Poisson:
    """Return a day in half an hour: from a fifth of the rate up to the full rate and down again."""
    shares = (0.2, 0.3, 0.5, 0.8, 1.0, 1.0, 0.8, 0.5, 0.3, 0.2)
    step = 3 * MINUTE
    return Poisson(
        rate, tuple(Window(n * step, (n + 1) * step, share) for n, share in enumerate(shares))
    )


_SLOW = replace(
    SERVER,
    kv_tokens=128 * 1024,
    sequences_max=128,
    step_base_ns=30_000_000,
    sequence_ns=400_000,
    prefill_token_ns=80_000,
    context_token_ns=40,
)
_MEMORY = replace(SERVER, kv_tokens=96 * 1024)

CASES = {
    each.name: each
    for each in (
        *_overloads(),
        _azure("conversations and job", "conversations", 40, 5, batch=6000, tuned=True),
        _azure("conversations, overload", "conversations", 120, 2, tuned=False),
        _azure("code and job", "code", 20, 2, batch=6000, tuned=False),
        _azure("code, overload", "code", 60, 2, tuned=True),
        _azure(
            "conversations and job, small KV",
            "conversations",
            30,
            5,
            kv=96,
            batch=4000,
            tuned=False,
        ),
        _azure("code and job, small KV", "code", 16, 2, kv=96, batch=4000, tuned=True),
        Case(
            "long prompts near the KV limit",
            is_tuned=False,
            servers=_pool(*[_MEMORY] * 4),
            workloads=lambda _: (
                people(Poisson(3), 8, 8000, 150, spread=0.5, longest=40_000),
                job(400, 12_000, 200, spread=0.4, longest=40_000),
            ),
        ),
        Case(
            "agents with long outputs",
            is_tuned=True,
            servers=_pool(*[replace(SERVER, kv_tokens=192 * 1024, sequences_max=128)] * 4),
            workloads=lambda _: (
                people(Poisson(6), 2, 300, 100),
                people(
                    ClosedLoop(300, Exponential(5 * SECOND), 30 * SECOND),
                    20,
                    2500,
                    900,
                    objective="agents",
                ),
            ),
        ),
        Case(
            "embeddings",
            is_tuned=False,
            servers=_pool(*[SERVER] * 2),
            workloads=lambda _: (
                people(Poisson(40), 1, 300, 1, spread=0.8, longest=8000),
                job(20_000, 500, 1),
            ),
        ),
        Case(
            "tiny prompts at a high rate",
            is_tuned=True,
            servers=_pool(*[SERVER] * 2),
            workloads=lambda _: (
                people(Poisson(120), 0.5, 20, 8, spread=0.5, longest=200),
                job(30_000, 30, 12, spread=0.5, longest=200),
            ),
            minutes=5,
        ),
        Case(
            "three bands",
            is_tuned=False,
            servers=_pool(*[SERVER] * 4),
            workloads=lambda _: (
                people(Poisson(8), 2, 400, 200),
                people(
                    ClosedLoop(60, Exponential(4 * SECOND), 20 * SECOND),
                    5,
                    1500,
                    300,
                    objective="agents",
                ),
                job(3000),
            ),
        ),
        Case(
            "unequal servers",
            is_tuned=True,
            servers=_pool(SERVER, SERVER, _SLOW, _SLOW),
            workloads=lambda traces: (people(replayed(traces["conversations"], 12), 5), job(2000)),
            trace="conversations",
            minutes=30,
        ),
        Case(
            "pool of one",
            is_tuned=False,
            servers=_pool(SERVER),
            workloads=lambda _: (people(Poisson(2), 2, 500, 150), job(600)),
        ),
        Case(
            "a day and a job",
            is_tuned=True,
            servers=_pool(*[SERVER] * 4),
            workloads=lambda _: (people(_day(24), 2, 600, 200), job(6000)),
            minutes=30,
        ),
        Case(
            "prefill and decode apart",
            is_tuned=False,
            servers=_pool(
                *[replace(SERVER, kv_tokens=256 * 1024)] * 6,
                roles=(Role.PREFILL,) * 2 + (Role.DECODE,) * 4,
            ),
            workloads=lambda _: (people(Poisson(8), 2, 500, 200), job(2000)),
        ),
        Case(
            "demo's servers and a job",
            is_tuned=True,
            servers=_pool(*[SMALL] * 3),
            workloads=lambda _: (
                people(Poisson(4), 2, 256, 64, spread=0.6, longest=2000),
                job(600, 512, 128, spread=0.1),
            ),
            limits=LIMITS_SMALL,
        ),
    )
}


@final
@dataclass(frozen=True)
class Effect:
    """The effect of one run on people and on the job."""

    people: float
    """Share of the people whose first token came in time."""
    p99_s: float
    """p99 of their time to first token."""
    job_s: float | None
    """When the last answer of the job came, since its arrival."""
    in_flight: int
    """Most requests in flight, after the first minute."""
    jain: float | None
    """Jain's index of tokens among the tenants of the people; 1 is fair."""
    median: float | None
    """Median of real over predicted waits of the people."""
    within: float | None
    """Share of their waits within the forecast for nine in ten."""
    foretold: int
    """Number of their waits that were forecast."""
    waited: float
    """Share of the people that had to wait."""
    queued_s: float
    """p99 of their waits in our queue; the rest of the time to first token is the engine's."""


def run(
    case: Case,
    detector: Detector,
    traces: Mapping[str, tuple[TraceRow, ...]],
    *,
    ceilings: CeilingSettings | None = None,
    seed: int = 889,
    settles: bool = True,
    scrapes: bool = True,
    picker: Picker = Picker.LEAST_LOADED,
    has_job: bool = True,
    has_engine_priority: bool = False,
    is_known: bool = False,
) -> Results:
    """Run a case to its end.

    Args:
        case: the traffic and the pool.
        detector: the detector that limits it.
        traces: the traces, by name.
        ceilings: the part of the pool that each band may fill; None: all of it.
        seed: seed of arrivals and lengths.
        settles: whether an access log reports the actual usage of requests.
        scrapes: whether endpoints report their load.
        picker: which component picks endpoints.
        has_job: whether the job arrives.
        has_engine_priority: whether engines prefer higher bands.
        is_known: whether the engine starts with the memory of an earlier run of such traffic, made
            with another seed.
    """
    workloads = case.workloads(traces)
    plan = Plan(
        duration_ns=round(case.minutes * MINUTE),
        servers=case.servers,
        workloads=tuple(w for w in workloads if has_job or w.objective != "batch"),
        objectives=case.objectives,
        settlement_delay_ns=SECOND if settles else None,
        scrape_interval_ns=SECOND if scrapes else None,
        has_engine_priority=has_engine_priority,
    )
    config = ControllerConfig(
        detectors=(detector,),
        picker=picker,
        ceilings=ceilings or CeilingSettings(policy=Ceilings.STATIC),
        default_settings=BandSettings(ttl_ns=round(case.ttl_s * SECOND)),
        templates=(
            BandTemplate(
                priority_max=-1, settings=BandSettings(ttl_ns=round(case.job_ttl_s * SECOND))
            ),
        ),
        forecasts=True,
    )
    engine = FlowController(config, 0)
    world = World(engine, plan, seed)
    if is_known:
        before = FlowController(config, 0)
        ended_ns = World(before, plan, seed + 1).finish().ended_ns
        world.run_until(0)
        engine.handle(MemoryRestored(before.learned.memory(ended_ns)), 0)
    return world.finish()


def effect(case: Case, results: Results) -> Effect:
    """Return the effect of a run."""
    calls = [f for f in results.tenants.values() if f.slo_count]
    met, asked = (sum(getattr(f, key) for f in calls) for key in ("slo_met_count", "slo_count"))
    ttfts = sorted(ttft for f in calls for _, ttft in f.ttfts)
    batch = results.band(case.objectives.get("batch", -1))
    started = next((w.from_ns for w in case.workloads(_NO_TRACES) if w.objective == "batch"), 0)
    top = max(results.priorities)
    said = results.calibration(top)
    waits = sorted(results.band(top).waits_ns)
    late = [sample.in_flight for sample in results.samples if sample.at_ns > MINUTE]
    return Effect(
        met / asked,
        ttfts[int(len(ttfts) * 0.99)] / SECOND if ttfts else float("inf"),
        (batch.ended_ns - started) / SECOND if batch.call_count else None,
        max(late, default=0),
        results.jain(top),
        said.ratio if said else None,
        said.within if said else None,
        said.predicted_count if said else 0,
        sum(each > 0 for each in waits) / max(1, len(waits)),
        waits[int(len(waits) * 0.99)] / SECOND if waits else 0.0,
    )


@cache
def load_traces(directory: Path) -> dict[str, tuple[TraceRow, ...]]:
    """Read the traces that exist."""
    found = {}
    for name, file_name in TRACES.items():
        path = directory / file_name
        if path.exists():
            with path.open() as lines:
                found[name] = tuple(read_trace(lines))
    return found

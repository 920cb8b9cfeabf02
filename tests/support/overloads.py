"""Overloaded pools, on which a limit of requests in flight is judged.

Requests that wait at the gate for longer than some time are refused. Requests that are served must
have the first token within a time that allows for that wait and the prompt, but not for a queue
inside a model server. So a limit that is too low leaves servers idle, and one that is too high
lets work queue where it can no longer be refused. Both show in one number: answers in time per
second.
"""

from dataclasses import dataclass, replace
from typing import final

from flowcontrol.config import BandSettings, ControllerConfig, Detector, Picker
from flowcontrol.controller import FlowController
from flowcontrol.simulation.distributions import Distribution, Lognormal
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.workload import Independent, Poisson, Workload
from flowcontrol.simulation.world import World

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


@final
@dataclass(frozen=True)
class Overload:
    """One kind of traffic, and its longest wait."""

    name: str
    workloads: tuple[Workload, ...]
    ttl_s: float
    """Longest wait at the gate."""


def _traffic(
    arrivals: Poisson,
    lengths: tuple[Distribution, Distribution],
    slo_s: float,
    name: str = "people",
    *,
    from_ns: int = 0,
    until_ns: int | None = None,
) -> Workload:
    return Workload(
        name=name,
        arrivals=arrivals,
        lengths=Independent(*lengths),
        ttft_slo_ns=round(slo_s * SECOND),
        from_ns=from_ns,
        until_ns=until_ns,
    )


CHAT = Lognormal(200, 0.6, 2000), Lognormal(64, 0.6, 500)
BOOKS = Lognormal(3000, 0.4, 8000), Lognormal(40, 0.5, 200)
ESSAYS = Lognormal(120, 0.6, 1000), Lognormal(500, 0.4, 1500)
HEAVY = Lognormal(300, 1.3, 8000), Lognormal(90, 1.2, 2000)
OVERLOADS = {
    each.name: each
    for each in (
        Overload("short chat", (_traffic(Poisson(15), CHAT, 3),), ttl_s=1.5),
        Overload("long prompts", (_traffic(Poisson(3.4), BOOKS, 8),), ttl_s=4),
        Overload("long outputs", (_traffic(Poisson(2.8), ESSAYS, 10),), ttl_s=5),
        Overload("heavy tails", (_traffic(Poisson(6.5), HEAVY, 6),), ttl_s=3),
        Overload(
            "bursts",
            (_traffic(Poisson(16, on_ns=20 * SECOND, off_ns=15 * SECOND), HEAVY, 8),),
            ttl_s=4,
        ),
        Overload(
            "changing",
            (
                _traffic(Poisson(15), CHAT, 4, "chat", until_ns=5 * MINUTE),
                _traffic(Poisson(3.4), BOOKS, 6, "books", from_ns=5 * MINUTE),
            ),
            ttl_s=2,
        ),
    )
}
_LARGE = ModelServerConfig(
    sequences_max=256,
    kv_tokens=60_000,
    batched_tokens_max=2048,
    step_base_ns=20_000_000,
    sequence_ns=150_000,
    prefill_token_ns=100_000,
    context_token_ns=100,
)


def _scaled(config: ModelServerConfig, speed: float) -> ModelServerConfig:
    return ModelServerConfig(
        sequences_max=config.sequences_max,
        kv_tokens=config.kv_tokens,
        batched_tokens_max=config.batched_tokens_max,
        step_base_ns=round(config.step_base_ns / speed),
        sequence_ns=round(config.sequence_ns / speed),
        prefill_token_ns=round(config.prefill_token_ns / speed),
        context_token_ns=round(config.context_token_ns / speed),
    )


_USUAL = ModelServerConfig()
POOLS = {
    "uniform": [_USUAL] * 3,
    "mixed": [_scaled(_USUAL, 1.5)] * 2 + [_scaled(_USUAL, 0.5)] * 2,
    "large": [_LARGE] * 2,
}
"""Three equal servers; fast and slow ones; two with large batches, limited only by memory."""
STRENGTH = {"uniform": 1.0, "mixed": 4 / 3, "large": 2.5}
"""Factor on the traffic of the first pool with which each pool is overloaded."""


def run(
    overload: Overload,
    pool: str,
    detector: Detector,
    *,
    seed: int = 889,
    minutes: float = 10,
    settles: bool = True,
    picker: Picker = Picker.LEAST_LOADED,
) -> Results:
    """Run it to the end, and return the results."""
    plan = Plan(
        duration_ns=round(minutes * MINUTE),
        servers=tuple(
            ServerSpec(address=f"s{n}", config=config) for n, config in enumerate(POOLS[pool])
        ),
        workloads=tuple(_times(each, STRENGTH[pool]) for each in overload.workloads),
        settlement_delay_ns=SECOND if settles else None,
    )
    config = ControllerConfig(
        detectors=(detector,),
        picker=picker,
        default_settings=BandSettings(ttl_ns=round(overload.ttl_s * SECOND)),
    )
    return World(FlowController(config, 0), plan, seed).finish()


def _times(workload: Workload, factor: float) -> Workload:
    arrivals = workload.arrivals
    assert isinstance(arrivals, Poisson)
    return replace(workload, arrivals=replace(arrivals, per_second=arrivals.per_second * factor))


def goodput(results: Results) -> float:
    """Return the answers in time per second."""
    met = sum(figures.slo_met_count for figures in results.tenants.values())
    return met * SECOND / results.duration_ns

"""How much faster than real time is the simulation?

Question: how many seconds of traffic does one second of CPU simulate, on a recorded trace at ten
requests a second and four model servers?

Method: the shipped scenario replayed-trace.yaml with the trace given, cut after so many requests,
at 10 requests/s; the whole run, ledger included, is timed, reading of files is not. Two engines:
the flow controller, and none (gate: off), whose difference is what the controller costs. Then the
same on slower servers, so that the pool is full and a queue stands. Engines take turns; medians
are given with their spread. CPU time of the process, as the machine may be shared.

Caveats: the cost of a run depends on how many requests run side by side, which a change of the
servers changes. The trace's lengths matter: conversations have long answers, code has long prompts.
The engine's own checks (is_checked) are for tests and not part of it.

    python tests/benchmarks/simulation_speed.py TRACE [--rounds 5] [--requests 6000]
"""

import argparse
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from flowcontrol.simulation.workload import Replayed
from flowcontrol.simulation.world import World
from flowcontrol_server.tools.simulate.scenario import Scenario, load_scenario

SCENARIO = Path(__file__).parents[2] / "scenarios" / "replayed-trace.yaml"
SECOND_NS = 1_000_000_000


@dataclass
class Measured:
    """One run."""

    simulated_s: float
    cpu_s: float
    request_count: int
    busy: float
    waiting_most: int

    @property
    def times_real(self) -> float:
        """How many times faster than real time."""
        return self.simulated_s / self.cpu_s


def measure(scenario: Scenario, trace: Path, requests_max: int) -> Measured:
    """Run a scenario once on the first requests of a trace."""
    plan = scenario.plan(trace)
    (workload,) = plan.workloads
    assert isinstance(workload.arrivals, Replayed)
    rows = workload.arrivals.rows[:requests_max]
    cut = replace(workload, arrivals=Replayed(rows))
    plan = replace(plan, workloads=(cut,), duration_ns=rows[-1].at_ns + 1)
    engine = scenario.engine()
    began_s = time.process_time()
    results = World(engine, plan, scenario.seed, slots=scenario.slots()).finish()
    cpu_s = time.process_time() - began_s
    return Measured(
        simulated_s=results.ended_ns / SECOND_NS,
        cpu_s=cpu_s,
        request_count=len(rows),
        busy=statistics.fmean(server.running_mean for server in results.servers),
        waiting_most=results.waiting_most,
    )


def slowed(scenario: Scenario, speed: float) -> Scenario:
    """Return the same scenario with slower servers."""
    servers = tuple(each.model_copy(update={"speed": speed}) for each in scenario.servers)
    return scenario.model_copy(update={"servers": servers})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=6000)
    options = parser.parse_args()
    scenario = load_scenario(SCENARIO)
    cases = {
        "flow controller": scenario,
        "no gate": scenario.model_copy(update={"gate": "off"}),
        "flow controller, full pool": slowed(scenario, 0.5),
        "no gate, full pool": slowed(scenario, 0.5).model_copy(update={"gate": "off"}),
    }
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{options.trace.name}, {options.requests} requests at 10/s, {options.rounds} rounds")
    measured: dict[str, list[Measured]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, case in cases.items():
            measured[name].append(measure(case, options.trace, options.requests))
    print(
        f"{'':28} {'x real time':>11} {'spread':>11} {'us/request':>10} "
        f"{'running':>8} {'most waiting':>12}"
    )
    for name, runs in measured.items():
        times = sorted(run.times_real for run in runs)
        each_us = statistics.median(run.cpu_s / run.request_count * 1e6 for run in runs)
        print(
            f"{name:28} {statistics.median(times):11.0f} {times[0]:5.0f}-{times[-1]:<5.0f} "
            f"{each_us:10.0f} {runs[0].busy:8.1f} {runs[0].waiting_most:12}"
        )


if __name__ == "__main__":
    main()

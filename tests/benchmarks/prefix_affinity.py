"""Cache hits and times to the first token, by who picks the endpoint, on a Mooncake trace.

    python -m tests.benchmarks.prefix_affinity conversation_trace.jsonl

Simulated: eight servers with a prefix cache, and the trace at its own times, once with each picker.
The trace (Qin et al., FAST'25, from its authors' repository) names the blocks of 512 tokens of each
prompt; a server keeps blocks of finished prompts in what its running sequences leave of the KV
cache, and forgets the least lately used. Round robin and least request are Envoy's own, with
flowcontrol's limit in front; least-loaded and prefix-affinity are flowcontrol's.

Caveats: affinity's numbers (half of a prompt, 1.5 times the mean, a tenth) were chosen on the
conversation trace, and judged on the synthetic one. The engine is the simulation's, whose speeds
are arithmetic (see `ModelServerConfig`). A server's cache is not shared with others, nor kept in
host memory.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from flowcontrol.simulation.traces import per_second
from flowcontrol.simulation.world import World
from flowcontrol_server.tools.simulate.scenario import Scenario
from flowcontrol_server.tools.simulate.workloads import load_trace

SCENARIO: Final = Path(__file__).parents[2] / "scenarios" / "shared-prefixes.yaml"
PICKERS: Final[Mapping[str, Mapping[str, str]]] = {
    "round robin (Envoy)": {"picker": "off", "balancer": "round-robin"},
    "least request (Envoy)": {"picker": "off", "balancer": "least-request"},
    "least-loaded": {"picker": "least-loaded"},
    "prefix-affinity": {"picker": "prefix-affinity"},
}
RATES: Final = (0.5, 0.75, 1.0)
"""Of the trace's own."""
PERCENTS: Final = (50, 90, 99)


def row(picker: str, rate: float, trace: Path) -> str:
    """Run the trace with one picker, at a multiple of its own rate, and return what came of it."""
    read = yaml.safe_load(SCENARIO.read_text())
    read |= PICKERS[picker]
    wanted = per_second(load_trace(trace)) * rate
    read["workloads"][0]["arrivals"] = {"trace": {"perSecond": wanted}}
    scenario = Scenario.model_validate(read)
    world = World(scenario.engine(), scenario.plan(trace), scenario.seed, slots=scenario.slots())
    results = world.finish()
    figures = results.band(0)
    cached = sum(server.cached_share for server in results.servers) / len(results.servers)
    most = max(server.in_flight_most for server in results.servers)
    ttfts = [figures.ttft_ns(percent) for percent in PERCENTS]
    seconds = " ".join(f"{(ttft or 0) / 1e9:8.2f}" for ttft in ttfts)
    return f"{picker:22} {rate:5.1f} {cached:7.0%} {seconds} {figures.goodput or 0:8.0%} {most:6}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    arguments = parser.parse_args()
    print("cached: of prompt tokens; times to the first token; in SLO: within 3 s; most: in flight")
    print(f"{'picker':22} {'rate':>5} {'cached':>7} {'p50 s':>8} {'p90 s':>8} {'p99 s':>8}", end="")
    print(f" {'in SLO':>8} {'most':>6}")
    for rate in RATES:
        for picker in PICKERS:
            print(row(picker, rate, arguments.trace), flush=True)


if __name__ == "__main__":
    main()

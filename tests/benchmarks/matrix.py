"""The cells that engine.py and bridge.py measure, their traffic, and how they are printed.

The axes are those of the reference's own benchmark (llm-d-router, pkg/epp/flowcontrol/benchmark),
and one step beyond: in-flight limit (0 is free), bands, flows, callers who each have one request
at a time. Flows are drawn by Zipf's law (exponent 1.1), so that one is hot; flow i is of priority
i modulo the bands; sizes lie between 100 B and 9 KB, scattered by Knuth's multiplier.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, product
from pathlib import Path
from random import Random
from typing import NamedTuple

from flowcontrol import controller
from flowcontrol.config import BandSettings, Concurrency, ControllerConfig, Fairness, Ordering

CODE = "interpreted" if str(controller.__file__).endswith(".py") else "compiled"
LIMITS = (0, 1, 100)
BANDS = (1, 8)
FLOWS = (10, 5_000, 50_000)
CALLERS = (10, 5_000, 50_000)
_FREE = 10**9
_FREE_CALLERS_MAX = 100
_KNUTH = 2_654_435_769
_SEED = 1


class Cell(NamedTuple):
    """One point of the matrix."""

    limit: int
    """Requests in flight at once; 0 for no limit."""
    bands: int
    flows: int
    callers: int
    """Waiting or in flight at any time."""

    def __str__(self) -> str:
        limit = "free" if self.limit == 0 else str(self.limit)
        return f"{limit:>5} {self.bands:5} {self.flows:6} {self.callers:7}"

    @property
    def objectives(self) -> dict[str, int]:
        """The objectives that declare the bands."""
        return {f"priority-{number}": number for number in range(self.bands)}

    def config(self, fairness: Fairness, ordering: Ordering) -> ControllerConfig:
        """Return the engine's settings: nothing is refused, nothing expires."""
        return ControllerConfig(
            detectors=(Concurrency(requests_max=self.limit or _FREE),),
            default_settings=BandSettings(fairness=fairness, ordering=ordering),
        )


HEADER = "limit bands  flows callers"


class Traffic(NamedTuple):
    """What one request is, as far as the engine cares."""

    flow_id: str
    objective: str
    byte_size: int


def cells() -> Iterator[Cell]:
    """Yield the cells that make sense.

    With free flow nobody waits, so that more callers are the same again; with a limit that fits all
    callers, too.
    """
    for cell in map(Cell._make, product(LIMITS, BANDS, FLOWS, CALLERS)):
        most = _FREE_CALLERS_MAX if cell.limit == 0 else None
        if (most is None and cell.callers > cell.limit) or (most and cell.callers <= most):
            yield cell


def begin(what: str, description: str, requests: int) -> tuple[argparse.Namespace, list[Cell]]:
    """Read the command line and print the heading; return the options and the cells chosen."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument(
        "--fairness", default="weighted-tokens", choices=[each.value for each in Fairness]
    )
    parser.add_argument("--ordering", default="fcfs", choices=[each.value for each in Ordering])
    parser.add_argument("--cells", default="", help="only those whose row contains this")
    options = parser.parse_args()
    print(machine())
    print(
        f"{what}, {CODE}, {options.fairness}, {options.ordering}: "
        f"{options.requests} requests a cell, {options.rounds} rounds"
    )
    return options, [cell for cell in cells() if options.cells in str(cell)]


def traffic(cell: Cell, count: int) -> list[Traffic]:
    """Return that many requests, the same for every run."""
    weights = accumulate((1 + index) ** -1.1 for index in range(cell.flows))
    flows = Random(_SEED).choices(range(cell.flows), cum_weights=list(weights), k=count)
    return [
        Traffic(
            f"flow-{flow}",
            f"priority-{flow % cell.bands}",
            100 + (flow * _KNUTH) % 2**32 % 9000,
        )
        for flow in flows
    ]


def machine() -> str:
    """Return what this was measured on."""
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{', '.join(names)}, {cores} cores, load {load:.1f} at the start, "
        f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    )


def measure_all(
    chosen: Iterable[Cell], rounds: int, measure: Callable[[Cell], float]
) -> dict[Cell, list[float]]:
    """Measure every cell once a round, so that a disturbance spreads over all of them."""
    results: dict[Cell, list[float]] = {cell: [] for cell in chosen}
    for _ in range(rounds):
        for cell, seconds in results.items():
            seconds.append(measure(cell))
    return results


def print_all(results: dict[Cell, list[float]], what: str) -> None:
    """Print the median of each cell, its spread, and how much dearer it is than the cheapest."""
    cheapest = min(map(statistics.median, results.values()))
    print(f"{HEADER}   us/{what}    spread       {what}s/s  x cheapest")
    for cell, seconds in results.items():
        middle = statistics.median(seconds)
        print(
            f"{cell} {middle * 1e6:12.1f} {min(seconds) * 1e6:6.1f}-{max(seconds) * 1e6:<6.1f} "
            f"{1 / middle:14,.0f} {middle / cheapest:10.2f}"
        )
    worst = max(map(statistics.median, results.values()))
    print(f"worst against cheapest: {worst / cheapest:.2f}")

"""How fast is the gate beside the reference's flow control, on the same machine?

Question: over the reference's benchmark matrix (llm-d-router, pkg/epp/flowcontrol/benchmark), and
beyond it, how many requests a second pass its flow controller, and how many this one?

Method: the reference's own function for one cell, `runMatrixCoordinate`, is built from its tree,
with one file laid over it (go's -overlay; the tree is not touched) that takes the cell from the
environment, because its list ends at 5,000 flows and callers. It runs with its harness as it is:
first come first served within a flow, global-strict between flows, which is its default. Here it is
bridge.py, futures, inbox, thread and engine, with the same policies unless told otherwise, and
engine.py, the engine alone. Traffic is the same (matrix.py). The three take turns, cell by cell,
round by round, so that whatever else the machine does disturbs them alike. Medians are given. CPU
time is that of the process, all its threads; it is what to look at where the machine is shared.

Caveats: Go runs on all cores, Python on one at a time, so on a larger machine Go's wall time gains.
The reference's detector is a mock that may let more than the limit through when its caller is slow,
and counts nothing; here the real one counts. Its clock also covers filling and draining, its CPU
time making the requests; so it gets twice the callers more, to spread that over. It rejects what
has waited for 30 s; such a cell is marked with the share that was dispatched.

    git clone https://github.com/llm-d/llm-d-router
    python tests/benchmarks/reference.py llm-d-router [--rounds 5] [--cells "^  100"]
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import uvloop
from bridge import Run
from engine import Bench
from matrix import HEADER, Cell, cells, machine

from flowcontrol.config import Fairness, Ordering
from flowcontrol_server.service import SWITCH_INTERVAL_S
from tests.benchmarks import stage

_PACKAGE = "pkg/epp/flowcontrol/benchmark"
_CELL_GO = """
package benchmark

import (
	"fmt"
	"os"
	"syscall"
	"testing"
)

func cpuNanoseconds() int64 {
	var used syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return used.Utime.Nano() + used.Stime.Nano()
}

func BenchmarkCell(b *testing.B) {
	var m benchMatrix
	_, err := fmt.Sscan(os.Getenv("CELL"), &m.limit, &m.priorities, &m.flows, &m.concurrency)
	if err != nil {
		b.Fatal(err)
	}
	began := cpuNanoseconds()
	runMatrixCoordinate(b, m)
	b.ReportMetric(float64(cpuNanoseconds()-began)/float64(b.N), "cpu-ns/op")
}
"""
_CELL_TIMEOUT_S = 200


class Cost(NamedTuple):
    """What a request took, in microseconds."""

    wall: float
    cpu: float
    dispatched: float = 1.0
    """Share of the requests."""


def build(tree: Path, into: Path) -> Path:
    """Return the reference's benchmark, built."""
    (into / "cell_test.go").write_text(_CELL_GO)
    laid_over = {str(tree / _PACKAGE / "cell_test.go"): str(into / "cell_test.go")}
    (into / "overlay.json").write_text(json.dumps({"Replace": laid_over}))
    binary = into / "benchmark.test"
    overlay = ("-overlay", str(into / "overlay.json"))
    subprocess.run(
        ["go", "test", "-c", *overlay, "-o", str(binary), f"./{_PACKAGE}"], cwd=tree, check=True
    )
    return binary


def reference(binary: Path, cell: Cell, requests: int) -> Cost | None:
    """Return what a request costs in the reference; None where it did not end in time."""
    count = 2 * cell.callers + requests
    command = [str(binary), "-test.run=^$", "-test.bench=^BenchmarkCell$"]
    try:
        output = subprocess.run(
            [*command, f"-test.benchtime={count}x"],
            env={**os.environ, "CELL": " ".join(map(str, cell))},
            capture_output=True,
            text=True,
            timeout=_CELL_TIMEOUT_S,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired:
        return None
    found = {unit: float(number) for number, unit in re.findall(r"([\d.]+) (\S+/\S+)", output)}
    wall_ns = found["ns/op"]
    return Cost(wall_ns / 1e3, found["cpu-ns/op"] / 1e3, min(1.0, found["d/s"] * wall_ns / 1e9))


def bridge(cell: Cell, options: argparse.Namespace) -> Cost:
    """Return what a request costs here, from the event loop to the engine's thread and back."""
    run = Run(cell, options)
    gc.collect()
    uvloop.run(run.run())
    return Cost(run.wall_s / options.requests * 1e6, run.cpu_s / options.requests * 1e6)


def middle(costs: Iterable[Cost | None]) -> Cost:
    """Return the medians; infinite where it did not end in time."""
    ended = [each or Cost(float("inf"), float("inf"), 0.0) for each in costs]
    return Cost(*map(statistics.median, zip(*ended, strict=True)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tree", type=Path, help="llm-d-router, checked out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--fairness", default="global-strict", choices=[f.value for f in Fairness])
    parser.add_argument("--cells", default="", help="a pattern that their rows match")
    options = parser.parse_args()
    options.ordering = Ordering.FCFS
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    chosen = [cell for cell in cells() if re.search(options.cells, str(cell))]
    theirs: dict[Cell, list[Cost | None]] = {cell: [] for cell in chosen}
    ours: dict[Cell, list[Cost | None]] = {cell: [] for cell in chosen}
    alone: dict[Cell, list[float]] = {cell: [] for cell in chosen}
    with tempfile.TemporaryDirectory() as into:
        binary = build(options.tree.resolve(), Path(into))
        go = subprocess.run(["go", "version"], capture_output=True, text=True, check=True).stdout
        print(machine())
        print(
            f"{go.strip()}; global-strict there, {options.fairness} here, fcfs: "
            f"{options.requests} requests a cell, {options.rounds} rounds"
        )
        for _ in range(options.rounds):
            for cell in chosen:
                theirs[cell].append(reference(binary, cell, options.requests))
                ours[cell].append(bridge(cell, options))
                alone[cell].append(Bench(cell, options).per_request(options.requests) * 1e6)
    print("us a request; x is the reference's over the gate's: above 1 the gate is faster")
    print(f"{HEADER}    reference wall, CPU       gate wall, CPU  engine    x wall   x CPU")
    ratios: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell in chosen:
        go_cost, cost = middle(theirs[cell]), middle(ours[cell])
        ratios[cell.limit].append((go_cost.wall / cost.wall, go_cost.cpu / cost.cpu))
        mark = "" if go_cost.dispatched > 0.99 else f"  {go_cost.dispatched:.0%} dispatched there"
        print(
            f"{cell} {go_cost.wall:12.1f} {go_cost.cpu:10.1f} {cost.wall:10.1f} {cost.cpu:9.1f} "
            f"{statistics.median(alone[cell]):7.1f} {go_cost.wall / cost.wall:9.2f} "
            f"{go_cost.cpu / cost.cpu:7.2f}{mark}"
        )
    figures = {
        f"{name}_{of}": min(pair[index] for pair in ratios[limit])
        for name, limit in (("free", 0), ("one", 1))
        for index, of in enumerate(("wall", "cpu"))
        if limit in ratios
    }
    stage.keep_figures("reference", figures)


if __name__ == "__main__":
    main()

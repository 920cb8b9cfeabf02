"""What is asked of the gate, what was measured, pass or miss.

Runs the benchmarks that are named, or all, and prints a table from the figures they keep in
results/*.json: a row whose benchmark was not run again shows what was kept, with its day.

    PYTHONPATH=. python tests/benchmarks/table.py [--run all | through_envoy saturated ...]
        [--epp llm-d-router/epp] [--reference llm-d-router] [--quick]

Half an hour in all; with --quick a third of that. Rows that compare with llm-d-router's endpoint
picker or with its flow control need its binary (`go build ./cmd/epp`), or its tree.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import stage

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One thing that is asked."""

    what: str
    must: float
    unit: str
    """Behind the figures; x: of the other."""
    figure: str
    """FILE.NAME, where it is kept."""
    is_least: bool = False
    """Whether it must be at least that; else at most."""
    tried: str = ""
    """Where it is missed: what was tried, and what would get there."""


ROWS = (
    Row("requests/s through Envoy against the C++ no-op, 64 connections", 1.0, "x",
        "through_envoy.requests_per_s", is_least=True,
        tried="322,000 instructions a request against 220,000 (docs/design.md), at less CPU than "
        "the C++ no-op takes; on two shared cores what Envoy gets decides. Less would take a codec "
        "and tickets in C."),
    Row("CPU of the processor against it", 1.0, "x", "through_envoy.cpu"),
    Row("added p50 at one connection against it", 1.0, "x", "through_envoy.added_p50",
        tried="between 0.97x and 1.5x on machines of this kind: one request alone wakes a sleeping "
        "thread twice; spin, eventfd and futex are in docs/design.md. Less would take one thread."),
    Row("added p99 at one connection against it", 1.2, "x", "through_envoy.added_p99",
        tried="as the median; to write the log in slices showed nothing."),
    Row("engine and bridge against the reference, free, worst cell: wall", 1.0, "x",
        "reference.free_wall", is_least=True,
        tried="two hand-overs for ten requests at a time; of a request's instructions the engine "
        "takes 45,000, inbox and thread 17,000. Less would take turns on the loop's thread."),
    Row("engine and bridge against the reference, free, worst cell: CPU", 1.0, "x",
        "reference.free_cpu", is_least=True,
        tried="only with 10 flows, of which the reference scans fewer heads; 1.0x and more with "
        "5,000 and 50,000. As the wall time."),
    Row("one in flight, worst cell: wall", 0.5, "x", "reference.one_wall", is_least=True,
        tried="0.10x to 0.20x, by what it takes a machine to wake a thread: 90 to 150 us, 7 to 30 "
        "of them the engine's. The processor's thread sleeps in a pipe, half the wall time of a "
        "lock; a spin, an eventfd and a futex are in docs/design.md. Less would take one thread."),
    Row("Envoy's CPU at 220 KB against Envoy with an ext_proc that reads nothing", 1.3, "x",
        "through_envoy.envoy_cpu_220_kb"),
    Row("duplex against the reference's EPP: CPU a request of 1 KB", 1.0, "x",
        "duplex.request_1_kb"),
    Row("duplex against the reference's EPP: CPU a request of 220 KB", 1.0, "x",
        "duplex.request_220_kb"),
    Row("duplex against the reference's EPP: CPU an event", 1.0, "x", "duplex.event"),
    Row("50,000 parked: release", 0.5, " s CPU", "saturated.release_cpu_s",
        tried="0.35 to 0.66 for the same instructions, by the machine of the day."),
    Row("50,000 parked: cancel", 0.5, " s CPU", "saturated.cancel_cpu_s",
        tried="0.84 before, as below; each leaves the queue by itself and has a log line."),
    Row("50,000 parked: expire", 0.8, " s CPU", "saturated.expire_cpu_s",
        tried="1.75 before requests were read by hand and events were native; each has a log line "
        "and a stream to end."),
    Row("CPU while nothing is asked, of one core", 0.5, " %", "idle.cpu_percent"),
    Row("memory a parked request", 2.0, " KiB", "saturated.memory_kib"),
    Row("memory a parked duplex request of 220 KB, one window", 64.0, " KiB",
        "parked_bodies.body_kib",
        tried="a window of 56 KiB is full, and the allocator keeps some 3 % more; partly received "
        "messages held without slack change nothing. A smaller window would do."),
)  # fmt: skip


def commands(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Return how each benchmark is run; none where something is missing."""
    rounds = ["--rounds", "2"] if options.quick else []
    epp = [] if options.epp is None else ["--epp", str(options.epp)]
    tree = [] if options.reference is None else [str(options.reference)]
    return {
        "through_envoy": [["through_envoy.py", *rounds]],
        "saturated": [["saturated.py", *(["--rounds", "1"] if options.quick else [])]],
        "streaming": [["streaming.py", *rounds]],
        "idle": [["idle.py", *(["--rounds", "1"] if options.quick else [])]],
        "duplex": [["duplex.py", "--compiled", *epp, *rounds]],
        "parked_bodies": [["parked_bodies.py", "--compiled"]],
        "reference": [["reference.py", *tree, "--cells", "^ free|^    1.* 10$", *rounds]]
        if tree
        else [],
        "engine": [["engine.py", *rounds], ["bridge.py", *rounds]],
        "instructions": [["instructions.py"]],
        "picture": [["draw.py"]],
    }


def run(name: str, command: list[str]) -> None:
    """Run a benchmark; those that measure code in their own process run what was compiled."""
    is_own = name in {"engine", "reference"}
    path = f"{stage.COMPILED}:{stage.ROOT}" if is_own else str(stage.ROOT)
    script, *arguments = command
    print(f"--- {' '.join(command)}", flush=True)
    subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def measured(figure: str) -> tuple[float, str] | None:
    """Return a figure that was kept, and its day; None where there is none."""
    name, _, key = figure.partition(".")
    path = stage.RESULTS / f"{name}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    value = kept["figures"].get(key)
    return None if value is None else (float(value), str(kept["day"]))


def table(find: Callable[[str], tuple[float, str] | None] = measured) -> list[str]:
    """Return the table as lines."""
    width = max(len(row.what) for row in ROWS)
    lines = [f"{'what':{width}} {'must':>13} {'measured':>13}"]
    notes = []
    for row in ROWS:
        must = f"{'>=' if row.is_least else '<='} {row.must:g}{row.unit}"
        found = find(row.figure)
        if found is None:
            lines.append(f"{row.what:{width}} {must:>13} {'-':>13}  not measured")
            continue
        value, day = found
        is_met = value >= row.must if row.is_least else value <= row.must
        said = f"{value:.2f}{row.unit}"
        lines.append(
            f"{row.what:{width}} {must:>13} {said:>13}  {'pass' if is_met else 'MISS'}  {day}"
        )
        if not is_met and row.tried:
            notes.append(f"{row.what}: {row.tried}")
    return [*lines, *(["", "Tried where it is missed, and what would get there:"] if notes else [])
            , *notes]  # fmt: skip


def main() -> None:
    """Run what is named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", default=[], help="benchmarks by name, or all")
    parser.add_argument("--epp", type=Path, help="the reference's endpoint picker, built")
    parser.add_argument("--reference", type=Path, help="the reference's tree")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    known = commands(options)
    if unknown := set(options.run) - {*known, "all"}:
        parser.error(f"--run must name some of {', '.join(known)}, or all, got {unknown}")
    for name in known if "all" in options.run else options.run:
        for command in known[name]:
            run(name, command)
        if not known[name]:
            print(f"--- {name} needs --reference: not run")
    stage.keep("table", "\n".join([stage.machine(), *table()]))


if __name__ == "__main__":
    main()

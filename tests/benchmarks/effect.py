"""What does flow control do for people, with nothing set?

Question: how near does the limit that finds itself (`auto`) come to the best fixed limit of each
workload, found with hindsight; what do people beside a job notice of it by default; are the waits
that are forecast true; who is refused that could have been served; and are shares fair where the
lengths of answers are wrongly estimated?

Method: the workloads of tests/support/effects.py, simulated; those that replay a trace are left out
where its file is not in the directory of --traces (Azure's of 2023, CC-BY 4.0). Constants were
chosen on the half marked T, so what the half marked J gets is what other traffic may expect. The
best fixed limit is the one with the earliest end of the job among those that serve within half a
percent of the most people in time. Every run is kept as a line of results/effect_runs.txt and
is not repeated while it is there: --anew repeats those of the engine's own policies, and of the
fixed limits too with --sweep. Each says of which engine it is: `git rev-parse HEAD:flowcontrol`.

More in flight than 1.5 times the best fixed limit is a miss, although `auto` sends prompts one
after the other, so that more in flight harms people less than a fixed limit of that size would. So
beside it stands how many times as many are in flight as with the least fixed limit by which the
job ends as early, at most 2 % later: what the job's end costs by a fixed limit. "-": none does.

The time to first token is the wait in our queue and the engine's time. Of people beside a job the
p99 of the first stands beside that of both. What the engine takes longer than for people alone is
the job's work in the same steps; the last column says what is left of it where engines take higher
bands first of what waits inside (`requests.enginePriority`).

Refused are those for whom the queue has no place (a limit, displaced). Each alone could have been
served that would have had a turn within its time to live, had it been kept at its place and all
else been as it was (tests/support/refusals.py: an upper bound). But that turn was another's: in all
only as many more could have been served as are without the limit, up to the end of arrivals. That
is one in a hundred of the served by chance alone, so it is counted over six seeds together. How
long a queue may be is the operator's: the default refuses none here, and what shorter ones cost is
to be seen. Told are those of whom Explain says, on arrival or every ten seconds after, that they
will be evicted before their turn; the engine keeps them, and they may be served anyway. One request
in eight is asked about.

Shares are of flows of equal weight that always have more waiting, with answers four times as long
or a fourth of what the engine expects (tests/support/wrong_estimates.py). What no access log tells
is not corrected; that case has no target.

Caveats: the model server has no prefix cache; one seed; the sweep of some workloads is of seven
limits. What a fixed limit is worth is known only after trying all of them on the same traffic.

    python tests/benchmarks/effect.py [--traces DIR] [--only WORDS] [--anew] [--sweep]
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from flowcontrol.config import Auto, Ceilings, CeilingSettings, Concurrency
from flowcontrol.request import Outcome
from flowcontrol.simulation.results import Results
from tests.support import refusals as scarcity
from tests.support import wrong_estimates
from tests.support.effects import CASES, Case, effect, load_traces, run
from tests.support.overloads import MINUTE, SECOND

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "effect_runs.txt"
PICTURE = RESULTS / "effect.png"
RESERVE = CeilingSettings(policy=Ceilings.RESERVE)
FRONTIER = "demo's servers and a job"
NEAR, EARLY = 0.995, 1.02
PEOPLE, JOB, IN_FLIGHT = 0.97, 1.05, 1.5
BLIND = {"settlements": 0.95, "departures": 0.90}
BESIDE, BESIDE_JOB, JAIN = 1.3, 1.08, 0.99
WAITS, OFF = "waits within  median  engine", "p90       off  priority"
WITHIN, MEDIAN = (0.85, 0.95), 0.25
REFUSED, SCARCE_MINUTES, SHARES_MINUTES = 0.01, 6, 5
SCARCE_SEEDS = (889, 31, 7, 1, 2, 3)


class Runs:
    """Every run that was ever made, by workload and what it was made with."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self.engine = _engine()
        lines = RUNS.read_text().splitlines() if RUNS.exists() else []
        for line in lines:
            case, how, values = line.split(" | ")
            self.kept[case, how] = json.loads(values)

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Forget those made with something."""
        self.kept = {key: value for key, value in self.kept.items() if not is_gone(key[1])}

    @property
    def engines(self) -> list[str]:
        """Return of which engines those runs are that are not of fixed limits."""
        ours = [values for (_, how), values in self.kept.items() if not how.startswith("fixed ")]
        return sorted({str(values.get("engine", "an older one")) for values in ours})

    def add(self, case: str, how: str, came_to: Mapping[str, float | None]) -> None:
        """Keep one."""
        self.kept[case, how] = {
            key: round(value, 4) for key, value in came_to.items() if value is not None
        }
        self.kept[case, how]["engine"] = self.engine
        lines = [f"{a} | {b} | {json.dumps(values)}" for (a, b), values in self.kept.items()]
        RUNS.write_text("\n".join(lines) + "\n")

    def best(self, case: str) -> tuple[int, dict[str, float]] | None:
        """Return the best fixed limit of a workload, and what it came to."""
        fixed = {
            int(how.removeprefix("fixed ")): values
            for (name, how), values in self.kept.items()
            if name == case and how.startswith("fixed ")
        }
        if not fixed:
            return None
        most = max(values["people"] for values in fixed.values())
        good = {n: each for n, each in fixed.items() if each["people"] >= NEAR * most}
        limit = min(good, key=lambda n: (good[n].get("job_s", 0), -good[n]["people"]))
        return limit, good[limit]

    def as_early(self, case: str, job_s: float) -> dict[str, Any] | None:
        """Return what came of the least fixed limit by which the job ends as early, if one does."""
        early = [
            values
            for (name, how), values in self.kept.items()
            if name == case and how.startswith("fixed ") and values["job_s"] <= EARLY * job_s
        ]
        return min(early, key=lambda values: values["in_flight"], default=None)


def _engine() -> str:
    """Return of which engine the runs are that are made now."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), capture_output=True, text=True, check=True, cwd=RESULTS
        ).stdout.strip()

    changed = git("status", "--porcelain", ":/flowcontrol")
    return git("rev-parse", "--short=12", "HEAD:flowcontrol") + ("+changes" if changed else "")


def plans(case: Case) -> dict[str, Callable[..., Results]]:
    """Return what a workload is run with, but for fixed limits."""

    def auto(**changes: object) -> Callable[..., Results]:
        return lambda traces: run(case, Auto(), traces, **changes)  # type: ignore[arg-type]  # run's own

    ways = {
        "auto": auto(),
        "settlements": auto(scrapes=False),
        "departures": auto(scrapes=False, settles=False),
    }
    if case.has_job:
        ways |= {"alone": auto(has_job=False), "default": auto(ceilings=RESERVE)}
        ways["engine priority"] = auto(ceilings=RESERVE, has_engine_priority=True)
    if case.name == FRONTIER:
        ways |= {name: _beside(case, each) for name, each in _frontier().items()}
    return ways


def _beside(case: Case, ceilings: CeilingSettings) -> Callable[..., Results]:
    return lambda traces: run(case, Concurrency(requests_max=16), traces, ceilings=ceilings)


def _frontier() -> dict[str, CeilingSettings]:
    holdback = {
        f"16, holdback {low}": CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=low)
        for low in (0.6, 0.7, 0.8, 0.9, 0.95)
    }
    soft = CeilingSettings(policy=Ceilings.SOFT_REFLECTIVE)
    return {
        "16, static": CeilingSettings(policy=Ceilings.STATIC),
        "16, soft": soft,
        "16, reserve": RESERVE,
        **holdback,
    }


def measure(runs: Runs, only: list[str], traces: Path) -> None:
    """Make every run that is not kept."""
    known = load_traces(traces)
    for case in CASES.values():
        if only and not any(word in case.name for word in only):
            continue
        if case.trace is not None and case.trace not in known:
            print(f"{case.name}: left out, the trace {case.trace} is not in {traces}")
            continue
        if runs.best(case.name) is None:
            for limit in case.limits:
                came = run(case, Concurrency(requests_max=limit), known)
                runs.add(case.name, f"fixed {limit}", asdict(effect(case, came)))
        for how, make in plans(case).items():
            if (case.name, how) not in runs.kept:
                runs.add(case.name, how, asdict(effect(case, make(known))))
                print(case.name, how, runs.kept[case.name, how], flush=True)
    for kind, name, make_values in _parts():
        if (name, kind) not in runs.kept and (not only or any(word in name for word in only)):
            runs.add(name, kind, make_values())
            print(name, kind, runs.kept[name, kind], flush=True)


def _parts() -> Iterator[tuple[str, str, Callable[[], Mapping[str, float | None]]]]:
    """Yield what is not about limits: its kind, its name, and how to measure it."""
    for name, scarce in scarcity.CASES.items():
        yield "refusals", name, partial(_refused, scarce)
    for name, wrong in wrong_estimates.CASES.items():
        yield "shares", name, partial(_shared, wrong)


def _refused(scarce: scarcity.Scarce) -> dict[str, float | None]:
    results, told = scarcity.run(scarce, SCARCE_MINUTES)
    found = scarcity.refusals(results.transcript, round(scarce.ttl_s * SECOND))
    return {
        "fewer": _fewer_served(scarce) if found.could else None,
        "asked": sum(found.outcomes.values()),
        "refused": len(found.could),
        "could": found.share,
        "told": sum(told.outcomes.values()),
        "served": told.share,
        "expired": told.asked[Outcome.EVICTED_TTL],
        "foretold": told.outcomes[Outcome.EVICTED_TTL],
    }


def _fewer_served(scarce: scarcity.Scarce) -> float:
    """Return how many fewer are served than without the limit, of those it refuses."""
    fewer = refused = 0
    for seed in SCARCE_SEEDS:
        limited, _ = scarcity.run(scarce, SCARCE_MINUTES, seed)
        unlimited, _ = scarcity.run(replace(scarce, requests_max=None), SCARCE_MINUTES, seed)
        end_ns = SCARCE_MINUTES * MINUTE
        served, most = (scarcity.served(each.transcript, end_ns) for each in (limited, unlimited))
        fewer += most - served
        refused += len(scarcity.refusals(limited.transcript, round(scarce.ttl_s * SECOND)).could)
    return max(0, fewer) / refused


def _shared(wrong: wrong_estimates.Wrong) -> dict[str, float | None]:
    results = wrong_estimates.run(wrong, SHARES_MINUTES)
    served = [figures.tokens_served for figures in results.tenants.values()]
    fair = sum(served) / len(served)
    return {"jain": results.jain(0), "least": min(served) / fair, "most": max(served) / fair}


def _passes(value: float, *, least: float = 0.0, most: float = float("inf")) -> str:
    return " " if least <= round(value, 3) <= most else "*"


def limits_table(runs: Runs) -> list[str]:
    """Return how each way compares with the best fixed limit; * where a target is missed."""
    lines = [
        f"{'':36} best fixed limit         auto, of the best            as    settl.  depart.",
        f"{'':36}  at people job s  fl.   people     job    in flight   early   people  people",
    ]
    for name, case in CASES.items():
        best, came = runs.best(name), runs.kept.get((name, "auto"))
        if best is None or came is None:
            lines.append(f"  {name:34} not measured")
            continue
        limit, fixed = best
        share = came["people"] / fixed["people"]
        line = f"{'T' if case.is_tuned else 'J'} {name:34} {limit:3} {fixed['people']:6.1%}"
        line += f" {fixed.get('job_s', 0):5.0f} {fixed['in_flight']:4.0f}"
        line += f"  {share:6.1%}{_passes(share, least=PEOPLE)}"
        job = came.get("job_s", 0) / fixed["job_s"] if "job_s" in fixed else 0.0
        line += f" {job:6.2f}x{_passes(job, most=JOB)}" if job else f"{'':9}"
        more = came["in_flight"] / fixed["in_flight"]
        line += f"  {more:5.2f}x{_passes(more, most=IN_FLIGHT)}"
        early = runs.as_early(name, came["job_s"]) if "job_s" in came else None
        line += f"  {came['in_flight'] / early['in_flight']:5.2f}x " if early else f"{'-':>7}  "
        for how, least in BLIND.items():
            other = runs.kept.get((name, how))
            blind = other["people"] / fixed["people"] if other else float("nan")
            line += f"  {blind:6.1%}{_passes(blind, least=least)}"
        lines.append(line)
    return lines


def people_table(runs: Runs) -> list[str]:
    """Return what people notice of a job by default, and how true forecasts are."""
    lines = [
        f"{'':36} first token p99 s            times  job, of    people   Jain {WAITS:>31}",
        f"{'':36} alone static default queued  alone  static in SLO      tokens {OFF:>30}",
    ]
    for name, case in CASES.items():
        ways = [runs.kept.get((name, how)) for how in ("alone", "auto", "default")]
        if not case.has_job or any(way is None for way in ways):
            continue
        alone, static, came = (way or {} for way in ways)
        times, job = came["p99_s"] / alone["p99_s"], came["job_s"] / static["job_s"]
        jain, within, median = (came.get(key) for key in ("jain", "within", "median"))
        line = f"{'T' if case.is_tuned else 'J'} {name:34} {alone['p99_s']:5.2f}"
        line += f" {static['p99_s']:6.2f} {came['p99_s']:7.2f} {came['queued_s']:6.2f}"
        line += f" {times:5.2f}x{_passes(times, most=BESIDE)}"
        line += f" {job:5.2f}x{_passes(job, most=BESIDE_JOB)} {came['people']:6.1%}"
        line += f" {jain:8.3f}{_passes(jain, least=JAIN)}" if jain else f"{'-':>9} "
        low, high = WITHIN
        line += (
            f"  {within:7.1%}{_passes(within, least=low, most=high)}" if within else f"{'-':>10}"
        )
        off = abs(median - 1) if median else 0.0
        line += f"  {off:7.0%}{_passes(off, most=MEDIAN)}" if median else f"{'-':>9}"
        by_engine = runs.kept.get((name, "engine priority"))
        line += f" {by_engine['p99_s']:6.2f}" if by_engine else ""
        lines.append(line)
    return lines


def refusals_table(runs: Runs) -> list[str]:
    """Return who was refused, or told so, and could have been served."""
    lines = [
        f"{'':38} asked  refused    could be served    told    served   evicted  of these",
        f"{'':38}                   in all  each alone           anyway   at TTL    told",
    ]
    for name in scarcity.CASES:
        came = runs.kept.get((name, "refusals"))
        if came is None:
            continue
        line = f"  {name:36} {came['asked']:5} {came['refused']:8} {_in_vain(came.get('fewer'))}"
        line += f" {_in_vain(came.get('could'))}"
        line += f" {came['told']:7} {_in_vain(came.get('served'))}"
        part = came["foretold"] / came["expired"] if came["expired"] else 0.0
        lines.append(f"{line} {came['expired']:9} {part:8.1%}")
    return lines


def _in_vain(share: float | None) -> str:
    return f"{'-':>8} " if share is None else f"{share:8.1%}{_passes(share, most=REFUSED)}"


def shares_table(runs: Runs) -> list[str]:
    """Return how fair shares are where answers are four times as long as expected or a fourth."""
    lines = [f"{'':38} Jain by tokens   least and most, of the fair share"]
    for name, wrong in wrong_estimates.CASES.items():
        came = runs.kept.get((name, "shares"))
        if came is not None:
            mark = _passes(came["jain"], least=JAIN) if wrong.settles else " "
            line = f"  {name:36} {came['jain']:10.4f}{mark}"
            lines.append(f"{line} {came['least']:12.3f} {came['most']:6.3f}")
    return lines


def frontier_table(runs: Runs) -> list[str]:
    """Return every ceiling policy on the demo's servers, all with the same limit."""
    alone = runs.kept.get((FRONTIER, "alone"))
    lines = [f"{FRONTIER}, 16 in flight at each: first token p99 of people, end of the job"]
    for how in _frontier():
        came = runs.kept.get((FRONTIER, how))
        if came and alone:
            lines.append(
                f"  {how:20} {came['p99_s']:5.2f} s  {came['job_s']:4.0f} s"
                f"  {came['waited']:5.1%} found no place"
            )
    return lines


def draw(runs: Runs) -> None:
    """Draw the tables."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(2, 1))
    names = [name for name in CASES if runs.best(name) and (name, "auto") in runs.kept]
    for how, mark, colour in (
        ("auto", "o", "tab:green"),
        ("settlements", "s", "tab:blue"),
        ("departures", "^", "tab:orange"),
    ):
        points = [
            (runs.kept[name, how]["people"] / best[1]["people"], place)
            for place, name in enumerate(names)
            if (name, how) in runs.kept and (best := runs.best(name)) is not None
        ]
        label = "auto, with metrics" if how == "auto" else f"auto, by {how} alone"
        left.plot(*zip(*points, strict=True), mark, color=colour, label=label)
    left.axvline(1, color="grey", lw=0.8)
    left.axvline(PEOPLE, color="grey", lw=0.8, ls=":")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("people in their SLO, of what the best fixed limit serves")
    left.legend(fontsize=8)
    for how in _frontier():
        came = runs.kept.get((FRONTIER, how))
        if came:
            is_reserve = "reserve" in how
            right.plot(
                came["job_s"], came["p99_s"], "*" if is_reserve else "o", ms=12 if is_reserve else 6
            )
            right.annotate(how.removeprefix("16, "), (came["job_s"], came["p99_s"]), fontsize=8)
    right.set_xlabel("end of the job, s")
    right.set_ylabel("first token of people, p99 s")
    right.set_title(f"{FRONTIER}: every ceiling policy", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--only", nargs="*", default=[], help="workloads with one of these words")
    parser.add_argument("--anew", action="store_true", help="repeat what is kept")
    parser.add_argument("--sweep", action="store_true", help="with --anew: fixed limits too")
    arguments = parser.parse_args()
    runs = Runs()
    if arguments.anew:
        runs.forget(lambda how: arguments.sweep or not how.startswith("fixed "))
    measure(runs, arguments.only, arguments.traces)
    report = [
        "T: constants were chosen on it; J: they were not. *: beyond the target.",
        f"Engine (git rev-parse HEAD:flowcontrol): {', '.join(runs.engines)}",
        *("", *limits_table(runs)),
        *("", *people_table(runs)),
        *("", *refusals_table(runs)),
        *("", *shares_table(runs)),
        *("", *frontier_table(runs)),
    ]
    print("\n".join(report))
    (RESULTS / "effect.txt").write_text("\n".join(line.rstrip() for line in report) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()

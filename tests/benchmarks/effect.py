"""What does flow control do for people, with nothing set?

Question: how near does the limit that finds itself (`auto`) come to the best fixed limit of each
workload, found with hindsight; what do people beside a job notice of it by default; are the waits
that are forecast true; who is refused that could have been served; and are shares fair where the
lengths of answers are wrongly estimated?

Method: the workloads of tests/support/effects.py, simulated; those that replay a trace are left out
where its file is not in the directory of --traces (Azure's of 2023, CC-BY 4.0). Constants were
chosen on the half marked T, so what the half marked J gets is what other traffic may expect. The
best fixed limit is the one with the earliest end of the job among those that serve within half a
percent of the most people in time. "Again" is a second run, by a process that goes on with what the
first has learnt of the same kind of traffic by another seed, as it does with a store: to begin with
nothing is the hardest, and ten minutes are short. Every run is kept as a line of
results/effect_runs.txt and is not repeated while it is there: --anew repeats those of the engine's
own policies, and of the fixed limits too with --sweep. Each says of which engine it is:
`git rev-parse HEAD:flowcontrol`.

More in flight than 1.5 times the best fixed limit is a miss, although `auto` sends prompts one
after the other, so that more in flight harms people less than a fixed limit of that size would. So
beside it stands how many times as many are in flight as with the least fixed limit by which the
job ends as early, at most 2 % later: what the job's end costs by a fixed limit. "-": none does.

The time to first token is the wait in our queue and the engine's time. Of people beside a job the
p99 of the first stands beside that of both. What the engine takes longer than for people alone is
the job's work in the same steps; the last column says what is left of it where engines take higher
bands first of what waits inside (`requests.enginePriority`). Whether waits stay within their p90 is
told of three seeds together: by one, some workloads have hundreds of waits.

The two targets for people beside a job are against each other: the more of the job runs, the longer
is a step, and a person waits for one. So every limit of the sweep was also run with every ceiling
policy. The table says how short the p99 gets with any of them that ends the job within its target,
and how early the job ends with any that keeps the p99 within its own. Which one that is, is known
with hindsight only, and differs from workload to workload.

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

Caveats: the model server has no prefix cache; one seed but for waits and refusals; the sweep of
some workloads is of seven limits. What a fixed limit is worth is known only after trying all of
them on the same traffic.

    python tests/benchmarks/effect.py [--traces DIR] [--only WORDS] [--anew] [--sweep]
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from tests.support import refusals as scarcity
from tests.support import wrong_estimates
from tests.support.effect_runs import (
    FRONTIER,
    HOLDBACKS,
    PARTS,
    POLICIES,
    WAIT_SEEDS,
    Runs,
    came_to,
    plans,
)
from tests.support.effects import CASES, Case, load_traces

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "effect_runs.txt"
PICTURE = RESULTS / "effect.png"
ON_FRONTIER = ("static", "soft", "reserve", *HOLDBACKS)
LEAST = {
    "auto": 0.97,
    "settlements": 0.95,
    "settlements again": 0.95,
    "departures": 0.90,
    "departures again": 0.90,
}
"""Share of the people whom the best fixed limit serves in time."""
JOB, IN_FLIGHT = 1.05, 1.5
BESIDE, BESIDE_JOB, JAIN = 1.3, 1.08, 0.99
BY_HOW, AGAIN = "  by settlements    by departures", "  people   again "
WAITS = f"{'waits within':>17} {'median':>9} {'engine':>8}"
OFF = f"{'p90, three seeds':>17} {'off':>9} {'priority':>8}"
WITHIN, MEDIAN = (0.85, 0.95), 0.25
REFUSED = 0.01


def _is_asked(name: str, only: list[str]) -> bool:
    return not only or any(word in name for word in only)


def measure(runs: Runs, only: list[str], traces: Path) -> None:
    """Make every run that is not kept, as many at the same time as there are cores."""
    known = load_traces(traces)
    wanted: list[tuple[str, str]] = []
    for case in CASES.values():
        if case.trace is not None and case.trace not in known:
            print(f"{case.name}: left out, the trace {case.trace} is not in {traces}")
        else:
            wanted += [(case.name, how) for how in plans(case)]
    wanted = [
        (name, how)
        for name, how in (*wanted, *PARTS)
        if (name, how) not in runs.kept and _is_asked(name, only)
    ]
    with ProcessPoolExecutor() as pool:
        results = pool.map(partial(came_to, traces=traces), wanted)
        for (name, how), came in zip(wanted, results, strict=True):
            runs.add(name, how, came)
            print(name, how, runs.kept[name, how], flush=True)


def _passes(value: float, *, least: float = 0.0, most: float = float("inf")) -> str:
    return " " if least <= round(value, 3) <= most else "*"


def limits_table(runs: Runs) -> list[str]:
    """Return how each way compares with the best fixed limit; * where a target is missed."""
    lines = [
        f"{'':36} best fixed limit         auto, of the best            as {BY_HOW}",
        f"{'':36}  at people job s  fl.   people     job    in flight   early {2 * AGAIN}",
    ]
    shares: dict[str, list[float]] = {how: [] for how in LEAST}
    for name, case in CASES.items():
        best, came = runs.best(name), runs.kept.get((name, "auto"))
        if best is None or came is None:
            lines.append(f"  {name:34} not measured")
            continue
        limit, fixed = best
        line = f"{'T' if case.is_tuned else 'J'} {name:34} {limit:3} {fixed['people']:6.1%}"
        line += f" {fixed.get('job_s', 0):5.0f} {fixed['in_flight']:4.0f} "
        for how, least in LEAST.items():
            other = runs.kept.get((name, how))
            if other is None:
                line += f"{'-':>7} "
                continue
            share = other["people"] / fixed["people"]
            shares[how].append(share)
            line += f" {share:6.1%}{_passes(share, least=least)}"
            line += _job_and_in_flight(runs, name, came, fixed) if how == "auto" else ""
        lines.append(line)
    means = [f"{sum(each) / max(1, len(each)):6.1%}" for each in shares.values()]
    return [*lines, f"  {'mean':55} {means[0]}{'':30}{'  '.join(means[1:])}"]


def _job_and_in_flight(
    runs: Runs, name: str, came: Mapping[str, Any], fixed: Mapping[str, Any]
) -> str:
    """Return the columns of the job's end, and of what was in flight."""
    job = came.get("job_s", 0) / fixed["job_s"] if "job_s" in fixed else 0.0
    line = f" {job:6.2f}x{_passes(job, most=JOB)}" if job else f"{'':9}"
    more = came["in_flight"] / fixed["in_flight"]
    line += f"  {more:5.2f}x{_passes(more, most=IN_FLIGHT)}"
    early = runs.as_early(name, came["job_s"]) if "job_s" in came else None
    return line + (f"  {came['in_flight'] / early['in_flight']:5.2f}x " if early else f"{'-':>7}  ")


def people_table(runs: Runs) -> list[str]:
    """Return what people notice of a job by default, and how true forecasts are."""
    lines = [
        f"{'':36} first token p99 s            times  job, of    people   Jain {WAITS}",
        f"{'':36} alone static default queued  alone  static in SLO   tokens{OFF}",
    ]
    for name, case in CASES.items():
        ways = [runs.kept.get((name, how)) for how in ("alone", "auto", "default")]
        if not case.has_job or any(way is None for way in ways):
            continue
        alone, static, came = (way or {} for way in ways)
        times, job = came["p99_s"] / alone["p99_s"], came["job_s"] / static["job_s"]
        jain, median, within = came.get("jain"), came.get("median"), _within(runs, name)
        line = f"{'T' if case.is_tuned else 'J'} {name:34} {alone['p99_s']:5.2f}"
        line += f" {static['p99_s']:6.2f} {came['p99_s']:7.2f} {came['queued_s']:6.2f}"
        line += f" {times:5.2f}x{_passes(times, most=BESIDE)}"
        line += f" {job:5.2f}x{_passes(job, most=BESIDE_JOB)} {came['people']:6.1%}"
        line += f" {jain:8.3f}{_passes(jain, least=JAIN)}" if jain else f"{'-':>9} "
        line += within
        off = abs(median - 1) if median else 0.0
        line += f"  {off:7.0%}{_passes(off, most=MEDIAN)}" if median else f"{'-':>9}"
        by_engine = runs.kept.get((name, "engine priority"))
        line += f" {by_engine['p99_s']:6.2f}" if by_engine else ""
        lines.append(line)
    return lines


def _within(runs: Runs, name: str) -> str:
    """Return the columns of how many waits stayed within their p90, by all seeds together."""
    hows = ("default", *(f"default {seed}" for seed in WAIT_SEEDS))
    seen = [runs.kept.get((name, how), {}) for how in hows]
    waits = [(each["within"], each["foretold"]) for each in seen if "foretold" in each]
    count = sum(number for _, number in waits)
    if not count:
        return f"{'-':>17}"
    share = sum(share * number for share, number in waits) / count
    low, high = WITHIN
    return f" {share:6.1%}{_passes(share, least=low, most=high)} of {count:5}"


def hand_set_table(runs: Runs) -> list[str]:
    """Return what any limit set by hand comes to, with any ceiling policy, beside the default."""
    lines = [
        f"{'':36}                 of any limit with any ceiling policy:",
        f"{'':36}    default      p99 if job {BESIDE_JOB}x         job if p99 {BESIDE}x",
    ]
    for name, case in CASES.items():
        came = _beside_alone(runs, case)
        if "default" not in came:
            continue
        p99, job = came.pop("default")
        line = f"{'T' if case.is_tuned else 'J'} {name:34} {p99:5.2f}x {job:5.2f}x"
        line += _extreme({how: each for how, each in came.items() if each[1] <= BESIDE_JOB}, 0)
        line += _extreme({how: each for how, each in came.items() if each[0] <= BESIDE}, 1)
        lines.append(line)
    return lines


def _beside_alone(runs: Runs, case: Case) -> dict[str, tuple[float, float]]:
    """Return p99 over that alone and job's end over that with static, of the default and others."""
    alone, static = (runs.kept.get((case.name, how)) for how in ("alone", "auto"))
    if not case.has_job or alone is None or static is None:
        return {}
    hows = {f"{limit}, static": f"fixed {limit}" for limit in case.limits}
    hows |= {f"{limit}, {name}": f"{limit}, {name}" for limit in case.limits for name in POLICIES}
    hows["default"] = "default"
    return {
        name: (came["p99_s"] / alone["p99_s"], came["job_s"] / static["job_s"])
        for name, how in hows.items()
        if (came := runs.kept.get((case.name, how))) is not None
    }


def _extreme(reached: Mapping[str, tuple[float, float]], which: int) -> str:
    """Return the least p99 (0) or the earliest end (1), with what it is reached."""
    if not reached:
        return f"  {'-':>6}  {'none':18}"
    how = min(reached, key=lambda each: reached[each][which])
    return f"  {reached[how][which]:5.2f}x  {how:18}"


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
    for name in ON_FRONTIER:
        came = runs.kept.get((FRONTIER, _on_frontier(name)))
        if came and alone:
            lines.append(
                f"  {f'16, {name}':20} {came['p99_s']:5.2f} s  {came['job_s']:4.0f} s"
                f"  {came['waited']:5.1%} found no place"
            )
    return lines


def _on_frontier(name: str) -> str:
    return "fixed 16" if name == "static" else f"16, {name}"


def draw(runs: Runs) -> None:
    """Draw the tables."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 7), width_ratios=(4, 3, 2))
    _draw_limits(runs, left)
    _draw_hand_set(runs, middle)
    for name in ON_FRONTIER:
        came = runs.kept.get((FRONTIER, _on_frontier(name)))
        if came:
            mark, size = ("*", 12) if name == "reserve" else ("o", 6)
            right.plot(came["job_s"], came["p99_s"], mark, ms=size)
            right.annotate(name, (came["job_s"], came["p99_s"]), fontsize=8)
    right.set_xlabel("end of the job, s")
    right.set_ylabel("first token of people, p99 s")
    right.set_title(f"{FRONTIER}, 16 at each:\nevery ceiling policy", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90)


def _draw_limits(runs: Runs, axes: plt.Axes) -> None:
    """Draw people in their SLO, of what the best fixed limit serves."""
    names = [name for name in CASES if runs.best(name) and (name, "auto") in runs.kept]
    for how, mark, colour, label in (
        ("auto", "o", "tab:green", "auto, with metrics"),
        ("settlements", "s", "tab:blue", "by settlements alone"),
        ("settlements again", ".", "tab:blue", "the same, again"),
        ("departures", "^", "tab:orange", "by departures alone"),
    ):
        points = [
            (runs.kept[name, how]["people"] / best[1]["people"], place)
            for place, name in enumerate(names)
            if (name, how) in runs.kept and (best := runs.best(name)) is not None
        ]
        axes.plot(*zip(*points, strict=True), mark, color=colour, label=label)
    axes.axvline(1, color="grey", lw=0.8)
    axes.axvline(LEAST["auto"], color="grey", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("people in their SLO, of what the best fixed limit serves")
    axes.legend(fontsize=8)


def _draw_hand_set(runs: Runs, axes: plt.Axes) -> None:
    """Draw people's p99 beside the job: by default, and the best by hand that ends it in time."""
    names = [case.name for case in CASES.values() if "default" in _beside_alone(runs, case)]
    for place, name in enumerate(names):
        came = _beside_alone(runs, CASES[name])
        default = came.pop("default")[0]
        best = min((p99 for p99, end in came.values() if end <= BESIDE_JOB), default=None)
        axes.plot(default, place, "o", color="tab:green", label=None if place else "default")
        if best is not None:
            axes.plot([default, best], [place, place], color="grey", lw=0.8)
            label = None if place else "the best limit and policy by hand"
            axes.plot(best, place, "s", color="tab:red", label=label)
    axes.axvline(BESIDE, color="grey", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("first token of people, p99 beside the job over alone")
    axes.set_title(f"job's end at most {BESIDE_JOB}x", fontsize=9)
    axes.legend(fontsize=8)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--only", nargs="*", default=[], help="workloads with one of these words")
    parser.add_argument("--anew", action="store_true", help="repeat what is kept")
    parser.add_argument("--sweep", action="store_true", help="with --anew: fixed limits too")
    arguments = parser.parse_args()
    runs = Runs(RUNS)
    if arguments.anew:
        runs.forget(
            lambda name, how: (
                _is_asked(name, arguments.only)
                and (arguments.sweep or not how.startswith("fixed "))
            )
        )
    measure(runs, arguments.only, arguments.traces)
    report = [
        "T: constants were chosen on it; J: they were not. *: beyond the target.",
        f"Engine (git rev-parse HEAD:flowcontrol): {', '.join(runs.engines)}",
        *("", *limits_table(runs)),
        *("", *people_table(runs)),
        *("", *hand_set_table(runs)),
        *("", *refusals_table(runs)),
        *("", *shares_table(runs)),
        *("", *frontier_table(runs)),
    ]
    print("\n".join(report))
    (RESULTS / "effect.txt").write_text("\n".join(line.rstrip() for line in report) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()

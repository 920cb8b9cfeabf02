"""The runs of tests/benchmarks/effect.py: their definitions, and the file with the results."""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from flowcontrol.config import Auto, Ceilings, CeilingSettings, Concurrency
from flowcontrol.request import Outcome
from flowcontrol.simulation.results import Results
from tests.support import refusals as scarcity
from tests.support import wrong_estimates
from tests.support.effects import CASES, Case, effect, load_traces, run
from tests.support.overloads import MINUTE, SECOND

FRONTIER = "demo's servers and a job"
"""The workload that is run with more policies than the others."""
STATIC = CeilingSettings(policy=Ceilings.STATIC)
RESERVE = CeilingSettings(policy=Ceilings.RESERVE)
HOLDBACKS = {
    f"holdback {low}": CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=low)
    for low in (0.6, 0.7, 0.8, 0.9, 0.95)
}
POLICIES = {
    "soft": CeilingSettings(policy=Ceilings.SOFT_REFLECTIVE),
    "reserve": RESERVE,
    "holdback 0.8": HOLDBACKS["holdback 0.8"],
}
"""Policies with which every limit of the sweep is run if there is a job; static is a fixed one."""
WAIT_SEEDS = (31, 7)
"""Seeds of the forecasts of waits, in addition to the seed of everything else."""
_NEAR, _EARLY = 0.995, 1.02
_SCARCE_MINUTES, _SHARES_MINUTES = 6, 5
_SCARCE_SEEDS = (889, 31, 7, 1, 2, 3)


@final
class Runs:
    """All runs so far, by workload and settings.

    Args:
        path: the file that keeps them, a line each, in a checkout.
    """

    def __init__(self, path: Path) -> None:
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self.engine = _engine(path.parent)
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            case, how, values = line.split(" | ")
            self.kept[case, how] = json.loads(values)

    def forget(self, is_gone: Callable[[str, str], bool]) -> None:
        """Remove the runs of some workloads that were made with some setting."""
        self.kept = {key: values for key, values in self.kept.items() if not is_gone(*key)}

    @property
    def engines(self) -> list[str]:
        """Return the engines of the runs without a fixed limit."""
        ours = [values for (_, how), values in self.kept.items() if not how.startswith("fixed ")]
        return sorted({str(values.get("engine", "an older one")) for values in ours})

    def add(self, case: str, how: str, came_to: Mapping[str, float | None]) -> None:
        """Add one run."""
        self.kept[case, how] = {
            key: round(value, 4) for key, value in came_to.items() if value is not None
        }
        self.kept[case, how]["engine"] = self.engine
        lines = [f"{a} | {b} | {json.dumps(values)}" for (a, b), values in self.kept.items()]
        self._path.write_text("\n".join(lines) + "\n")

    def best(self, case: str) -> tuple[int, dict[str, float]] | None:
        """Return the best fixed limit of a workload, and its results."""
        fixed = {
            int(how.removeprefix("fixed ")): values
            for (name, how), values in self.kept.items()
            if name == case and how.startswith("fixed ")
        }
        if not fixed:
            return None
        most = max(values["people"] for values in fixed.values())
        good = {n: each for n, each in fixed.items() if each["people"] >= _NEAR * most}
        limit = min(good, key=lambda n: (good[n].get("job_s", 0), -good[n]["people"]))
        return limit, good[limit]

    def as_early(self, case: str, job_s: float) -> dict[str, Any] | None:
        """Return the results of the lowest fixed limit whose job ends as early; None: no such."""
        early = [
            values
            for (name, how), values in self.kept.items()
            if name == case and how.startswith("fixed ") and values["job_s"] <= _EARLY * job_s
        ]
        return min(early, key=lambda values: values["in_flight"], default=None)


def _engine(directory: Path) -> str:
    """Return the engine of runs made now."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), capture_output=True, text=True, check=True, cwd=directory
        ).stdout.strip()

    changed = git("status", "--porcelain", ":/flowcontrol")
    return git("rev-parse", "--short=12", "HEAD:flowcontrol") + ("+changes" if changed else "")


def plans(case: Case) -> dict[str, Callable[..., Results]]:
    """Return the simulations of a workload; each is a function of the traces."""

    def auto(**changes: object) -> Callable[..., Results]:
        return lambda traces: run(case, Auto(), traces, **changes)  # type: ignore[arg-type]  # run's own

    def fixed(limit: int, ceilings: CeilingSettings) -> Callable[..., Results]:
        return lambda traces: run(case, Concurrency(requests_max=limit), traces, ceilings=ceilings)

    ways = {f"fixed {limit}": fixed(limit, STATIC) for limit in case.limits}
    ways |= {
        "auto": auto(),
        "settlements": auto(scrapes=False),
        "settlements again": auto(scrapes=False, is_known=True),
        "departures": auto(scrapes=False, settles=False),
        "departures again": auto(scrapes=False, settles=False, is_known=True),
    }
    if case.has_job:
        ways |= {"alone": auto(has_job=False), "default": auto(ceilings=RESERVE)}
        ways |= {f"default {seed}": auto(ceilings=RESERVE, seed=seed) for seed in WAIT_SEEDS}
        ways["engine priority"] = auto(ceilings=RESERVE, has_engine_priority=True)
        ways |= {
            f"{limit}, {name}": fixed(limit, ceilings)
            for name, ceilings in POLICIES.items()
            for limit in case.limits
        }
    if case.name == FRONTIER:
        ways |= {f"16, {name}": fixed(16, ceilings) for name, ceilings in HOLDBACKS.items()}
    return ways


def came_to(what: tuple[str, str], traces: Path) -> Mapping[str, float | None]:
    """Make one run.

    Args:
        what: workload and settings, by name.
        traces: the folder of the traces.
    """
    if what in PARTS:
        return PARTS[what]()
    name, how = what
    case = CASES[name]
    return asdict(effect(case, plans(case)[how](load_traces(traces))))


def _refused(scarce: scarcity.Scarce) -> dict[str, float | None]:
    results, told = scarcity.run(scarce, _SCARCE_MINUTES)
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
    """Return how many fewer requests are served than without the limit, per refused request."""
    fewer = refused = 0
    for seed in _SCARCE_SEEDS:
        limited, _ = scarcity.run(scarce, _SCARCE_MINUTES, seed)
        unlimited, _ = scarcity.run(replace(scarce, requests_max=None), _SCARCE_MINUTES, seed)
        end_ns = _SCARCE_MINUTES * MINUTE
        served, most = (scarcity.served(each.transcript, end_ns) for each in (limited, unlimited))
        fewer += most - served
        refused += len(scarcity.refusals(limited.transcript, round(scarce.ttl_s * SECOND)).could)
    return max(0, fewer) / refused


def _shared(wrong: wrong_estimates.Wrong) -> dict[str, float | None]:
    results = wrong_estimates.run(wrong, _SHARES_MINUTES)
    served = [figures.tokens_served for figures in results.tenants.values()]
    fair = sum(served) / len(served)
    return {"jain": results.jain(0), "least": min(served) / fair, "most": max(served) / fair}


PARTS: Mapping[tuple[str, str], Callable[[], Mapping[str, float | None]]] = {
    **{(name, "refusals"): partial(_refused, each) for name, each in scarcity.CASES.items()},
    **{(name, "shares"): partial(_shared, each) for name, each in wrong_estimates.CASES.items()},
}
"""The parts that are not about limits."""

"""The results of a simulation, as tables."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import final

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flowcontrol.simulation.clients import Ending
from flowcontrol.simulation.results import Results, TenantFigures
from flowcontrol_server.common.plain_text import plain

TENANTS_SHOWN_MAX = 8
"""Tenants shown of each band, those with the most calls; the band's row includes all."""
_SECOND_NS = 1_000_000_000
_PERCENTS = (50, 95, 99)
_LARGE = 100


@final
@dataclass(frozen=True, slots=True)
class Run:
    """The run of one scenario."""

    name: str
    results: Results
    cpu_s: float
    """CPU time of the run."""

    @property
    def times_real(self) -> float:
        """Simulated time over CPU time; 0: not measured."""
        return self.results.ended_ns / _SECOND_NS / self.cpu_s if self.cpu_s else 0.0


def shown_tenants(results: Results, priority: int) -> list[tuple[str, TenantFigures]]:
    """Return the tenants of a band that have their own rows, by name; none if there is only one."""
    mine = [(name, each) for (band, name), each in results.tenants.items() if band == priority]
    busiest = sorted(mine, key=lambda pair: (-pair[1].call_count, pair[0]))[:TENANTS_SHOWN_MAX]
    return sorted(busiest, key=lambda pair: pair[0]) if len(mine) > 1 else []


def table(run: Run) -> Table:
    """Return the figures of a run for each band and its busiest tenants."""
    results = run.results
    drawn = _table(run.name)
    drawn.add_column("band", justify="right")
    drawn.add_column("tenant", no_wrap=True, max_width=16)
    for name in (
        *("calls", "answered", "refused", "gave up", "failed"),
        *("wait\np50", "s\np95", "\np99", "TTFT\np50", "s\np95", "\np99"),
        *("in\nSLO", "tokens\n/s", "Jain"),
    ):
        drawn.add_column(name, justify="right")
    for priority in results.priorities:
        jain = _ratio(results.jain(priority))
        drawn.add_row(str(priority), "all", *_cells(results, results.band(priority)), jain)
        for tenant, figures in shown_tenants(results, priority):
            drawn.add_row("", Text(plain(tenant)), *_cells(results, figures), "", style="dim")
        drawn.add_section()
    return drawn


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _cells(results: Results, figures: TenantFigures) -> list[str]:
    counts = [figures.call_count, *(figures.endings[ending] for ending in Ending)]
    return [
        *map(str, counts),
        *(_seconds(figures.wait_ns(percent)) for percent in _PERCENTS),
        *(_seconds(figures.ttft_ns(percent)) for percent in _PERCENTS),
        _percent(figures.goodput),
        f"{results.tokens_per_second(figures):.0f}",
    ]


def summary(run: Run) -> list[str]:
    """Return lines on the model servers, the run and the forecasts of waits."""
    results = run.results
    after_s = (results.ended_ns - results.duration_ns) / _SECOND_NS
    lines = [
        f"{server.address}: busy {server.utilisation:.0%} of the time, on average "
        f"{server.running_mean:.1f} requests running, at most {server.in_flight_most} in flight, "
        f"at most {server.waiting_most} queued inside"
        + (f", {server.cached_share:.0%} of prompt tokens cached" if server.cached_share else "")
        for server in results.servers
    ]
    lines.append(
        f"at most {results.waiting_most} requests waited at the gate, at most "
        f"{results.in_flight_most} were in flight; the last one ended {after_s:.0f} s after the "
        "end of arrivals"
    )
    lines.append(
        f"simulated {results.ended_ns / _SECOND_NS:.0f} s in {run.cpu_s:.2f} s of CPU time, "
        f"{run.times_real:.0f} times faster than real time; transcript {results.digest[:16]}"
    )
    for priority in results.priorities:
        calibration = results.calibration(priority)
        if calibration is not None:
            lines.append(
                f"band {priority}: {calibration.predicted_count} predicted waits, "
                f"{calibration.close:.0%} of them within a factor of 2; "
                f"the median wait took {calibration.ratio:.2f} times the prediction"
            )
    return lines


Measure = Callable[[Results, TenantFigures], float | None]


def _count(ending: Ending) -> Measure:
    return lambda _, figures: figures.endings[ending]


def _wait(percent: float) -> Measure:
    return lambda _, figures: _in_seconds(figures.wait_ns(percent))


def _ttft(percent: float) -> Measure:
    return lambda _, figures: _in_seconds(figures.ttft_ns(percent))


_MEASURES: tuple[tuple[str, Measure], ...] = (
    ("calls", lambda _, figures: figures.call_count),
    ("answered", _count(Ending.ANSWERED)),
    ("refused", _count(Ending.REFUSED)),
    ("gave up", _count(Ending.GAVE_UP)),
    ("failed", _count(Ending.FAILED)),
    ("wait p95, s", _wait(95)),
    ("TTFT p50, s", _ttft(50)),
    ("TTFT p95, s", _ttft(95)),
    ("TTFT p99, s", _ttft(99)),
    ("in SLO", lambda _, figures: figures.goodput),
    ("tokens/s", lambda results, figures: results.tokens_per_second(figures)),
)
_POOL_MEASURES: tuple[tuple[str, Callable[[Results], float]], ...] = (
    ("utilisation", lambda results: fmean(server.utilisation for server in results.servers)),
    ("most in flight", lambda results: results.in_flight_most),
    ("most waiting at the gate", lambda results: results.waiting_most),
    (
        "last end after arrivals, s",
        lambda results: (results.ended_ns - results.duration_ns) / _SECOND_NS,
    ),
)


def comparison(one: Run, other: Run) -> Table:
    """Return the figures of two runs side by side, with the ratio of the second to the first."""
    drawn = _table("side by side")
    for name in ("band", "measure"):
        drawn.add_column(name)
    for name in (one.name, other.name, "ratio"):
        drawn.add_column(name, justify="right")
    for priority in sorted({*one.results.priorities, *other.results.priorities}, reverse=True):
        bands = [run.results.band(priority) for run in (one, other)]
        label = str(priority)
        for name, measure in _MEASURES:
            pair = (measure(one.results, bands[0]), measure(other.results, bands[1]))
            if any(pair):
                drawn.add_row(label, name, *_compared(*pair))
                label = ""
        jains = (one.results.jain(priority), other.results.jain(priority))
        if any(jains):
            drawn.add_row(label, "Jain", *_compared(*jains))
        drawn.add_section()
    label = "pool"
    for name, of_pool in _POOL_MEASURES:
        drawn.add_row(label, name, *_compared(of_pool(one.results), of_pool(other.results)))
        label = ""
    return drawn


def _compared(one: float | None, other: float | None) -> tuple[str, str, str]:
    ratio = "" if not one or other is None else f"{other / one:.2f}"
    return _number(one), _number(other), ratio


def _number(value: float | None) -> str:
    """Format a number; "-": unknown."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if value < _LARGE else f"{value:.0f}"


def _in_seconds(value_ns: int | None) -> float | None:
    return None if value_ns is None else value_ns / _SECOND_NS


def _seconds(value_ns: int | None) -> str:
    return _number(_in_seconds(value_ns))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

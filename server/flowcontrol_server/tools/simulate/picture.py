"""The results of a simulation, as a picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowcontrol_server.tools.simulate.report import Run, shown_tenants

_COLOURS = ("#2471a3", "#c0392b", "#7d8b2f", "#8e44ad", "#d68910", "#5d6d7e")
_SECOND_NS = 1_000_000_000
_DOTS_MAX = 4000
"""Most dots of a band; of more requests, every n-th is drawn."""


def picture(runs: list[Run], path: Path) -> None:
    """Draw each run as a column: time to first token and queues over time, and tenants.

    The columns share their scales, so that two runs can be compared by eye.
    """
    figure = Figure(figsize=(2 + 6 * len(runs), 10))
    grid = figure.subplots(3, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        _draw_people(grid[0][column], run)
        _draw_queues(grid[1][column], run)
        _draw_tenants(grid[2][column], run)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _draw_people(axes: Axes, run: Run) -> None:
    results = run.results
    for colour, priority in zip(_COLOURS * 9, results.priorities, strict=False):
        dots = sorted(results.band(priority).ttfts)
        dots = dots[:: len(dots) // _DOTS_MAX + 1]
        asked = [asked_ns / _SECOND_NS for asked_ns, _ in dots]
        waited = [max(ttft_ns / _SECOND_NS, 0.001) for _, ttft_ns in dots]
        axes.scatter(asked, waited, s=5, color=colour, label=f"band {priority}", linewidths=0)
    axes.set_yscale("log")
    axes.set(xlabel="asked at, seconds", ylabel="time to first token, seconds")
    axes.set_title(f"{run.name}\neach dot is an answered request", fontsize=10)
    axes.grid(alpha=0.3)
    if results.priorities:
        axes.legend(fontsize=8, markerscale=3)


def _draw_queues(axes: Axes, run: Run) -> None:
    samples = run.results.samples
    at = [sample.at_ns / _SECOND_NS for sample in samples]
    axes.plot(at, [sample.waiting for sample in samples], color="#2471a3", label="at the gate")
    axes.plot(
        at, [sample.in_flight for sample in samples], color="#c0392b", label="at the model servers"
    )
    axes.set(xlabel="seconds", ylabel="requests")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_tenants(axes: Axes, run: Run) -> None:
    results = run.results
    bars = []
    for colour, priority in zip(_COLOURS * 9, results.priorities, strict=False):
        tenants = shown_tenants(results, priority) or [("all", results.band(priority))]
        bars += [(f"{name}\n{priority}", figures, colour) for name, figures in tenants]
    heights = [(figures.ttft_ns(95) or 0) / _SECOND_NS for _, figures, _ in bars]
    drawn = axes.bar(range(len(bars)), heights, color=[colour for *_, colour in bars])
    axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axes.set_ylabel("95 % had their first token after, seconds")
    axes.spines[["top", "right"]].set_visible(False)

"""The results of the demo: a table, a picture, and the samples as text."""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import final, get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.tools.demo.traffic import DemoSample, Kind

WITHOUT, WITH = "Envoy alone", "with flowcontrol"
_COLOURS = {WITHOUT: "#c0392b", WITH: "#2471a3"}
_KINDS: tuple[Kind, ...] = get_args(Kind)
_PERCENTILES = (50, 95, 99)


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """One class of traffic in one phase."""

    ttft_s: tuple[float, ...]
    """Time to first token at the 50th, 95th and 99th percentile."""
    completed: int
    failed: int
    refusals: int
    tokens_per_second: float
    done_s: float
    """When its last request ended, since the start of the phase."""


Results = dict[str, list[DemoSample]]
"""The samples of each phase, by its name."""


def summarize(samples: list[DemoSample], kind: Kind) -> Summary:
    """Return the figures of one class."""
    mine = [sample for sample in samples if sample.planned.kind == kind]
    ttfts = [sample.ttft_s for sample in mine if sample.ttft_s is not None]
    hundredths = quantiles(ttfts, n=100, method="inclusive") if len(ttfts) > 1 else [0.0] * 99
    ends = [sample.end_s for sample in samples if sample.end_s is not None]
    own_ends = [sample.end_s for sample in mine if sample.end_s is not None]
    return Summary(
        ttft_s=tuple(hundredths[percent - 1] for percent in _PERCENTILES),
        completed=sum(sample.failure is None for sample in mine),
        failed=sum(sample.failure is not None for sample in mine),
        refusals=sum(sample.refusals for sample in mine),
        tokens_per_second=sum(sample.tokens for sample in mine) / max(ends, default=1.0),
        done_s=max(own_ends, default=0.0),
    )


def table(results: Results) -> Table:
    """Return the figures of both phases, class by class."""
    drawn = Table(title="time to first token, seconds", title_justify="left")
    drawn.add_column("class")
    drawn.add_column("")
    columns = [f"p{percent}" for percent in _PERCENTILES]
    for column in (*columns, "all done at", "completed", "failed", "got 429", "tokens/s"):
        drawn.add_column(column, justify="right")
    for kind in _KINDS:
        for name, samples in results.items():
            figures = summarize(samples, kind)
            drawn.add_row(
                *(kind, name),
                *(f"{seconds:.2f}" for seconds in figures.ttft_s),
                f"{figures.done_s:.0f}",
                *(str(figures.completed), str(figures.failed), str(figures.refusals)),
                f"{figures.tokens_per_second:.0f}",
                end_section=name == WITH,
            )
    return drawn


BATCH_WAITS = (
    "With flowcontrol the batch job gets its first tokens later, because it waits at the gate"
    " instead of ahead of people in the model servers. What matters for a job is when all of it is"
    " done. Requests that got 429 were retried after Retry-After."
)


def caveat(results: Results) -> str | None:
    """Return a note if people waited no less with flow control; None: they waited less."""
    without, with_it = (summarize(results[name], "interactive") for name in (WITHOUT, WITH))
    if with_it.ttft_s[1] < without.ttft_s[1]:
        return None
    return (
        "People waited no less with flowcontrol (p95). This run does not show its effect: the batch"
        " job was too short to fill the model servers, or this machine was too busy. Use more"
        " --seconds."
    )


def picture(results: Results, path: Path) -> None:
    """Draw the wait of every person, the percentiles of both classes, and the throughput."""
    figure = Figure(figsize=(14, 4.8))
    over_time, bars, work = figure.subplots(1, 3, width_ratios=(5, 4, 2))
    _draw_people(over_time, results)
    _draw_percentiles(bars, results)
    _draw_throughput(work, results)
    figure.suptitle("A batch job meets people on three model servers", fontsize=13)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_people(axes: Axes, results: Results) -> None:
    for name, samples in results.items():
        people = [s for s in samples if s.planned.kind == "interactive" and s.ttft_s is not None]
        asked = [sample.planned.at_s for sample in people]
        waited = [sample.ttft_s or 0.0 for sample in people]
        axes.scatter(asked, waited, s=14, color=_COLOURS[name], label=name)
    axes.set(xlabel="asked at, seconds", ylabel="time to first token, seconds")
    axes.set_title("each dot is a person waiting for an answer", fontsize=11)
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)


def _draw_percentiles(axes: Axes, results: Results) -> None:
    labels = [f"{kind}\np{percent}" for kind in _KINDS for percent in _PERCENTILES]
    for shift, (name, samples) in zip((-0.2, 0.2), results.items(), strict=True):
        heights = [ttft for kind in _KINDS for ttft in summarize(samples, kind).ttft_s]
        places = [index + shift for index in range(len(labels))]
        drawn = axes.bar(places, heights, width=0.38, color=_COLOURS[name])
        axes.bar_label(drawn, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("time to first token, seconds", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_throughput(axes: Axes, results: Results) -> None:
    labels = []
    for place, (name, samples) in enumerate(results.items()):
        figures = [summarize(samples, kind) for kind in _KINDS]
        tokens = sum(each.tokens_per_second for each in figures)
        drawn = axes.bar([place], [tokens], width=0.6, color=_COLOURS[name])
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
        labels.append(f"{name}\ngot 429: {sum(each.refusals for each in figures)}")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("tokens per second", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def save_samples(results: Results, path: Path) -> None:
    """Write one line per request."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("phase", "class", "flow", "at_s", "ttft_s", "end_s", "tokens", "told_429", "failure")
        )
        for name, samples in results.items():
            for sample in samples:
                planned = sample.planned
                writer.writerow(
                    (
                        *(name, planned.kind, plain(planned.flow_id), f"{planned.at_s:.3f}"),
                        *(_seconds(sample.ttft_s), _seconds(sample.end_s), sample.tokens),
                        *(sample.refusals, sample.failure or ""),
                    )
                )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

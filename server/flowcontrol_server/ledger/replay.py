"""`flowcontrol replay`: repeat the decisions of a ledger, as recorded or with other settings."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import LedgerError
from flowcontrol.events import Decision
from flowcontrol.replay.comparison import Comparison, Figures, by_priority
from flowcontrol.replay.ledger import (
    Checkpoint,
    Entry,
    Gap,
    Header,
    Turn,
    disguise_with,
    disguised_config,
)
from flowcontrol.replay.rerun import Rerun
from flowcontrol.request import FlowKey, Group, by_group
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.ledger.reader import parts_of, read_entries

_TENANTS_SHOWN_MAX = 8
"""Tenants shown for each band: those with the most requests."""
_DIFFERENT = 1
_SECOND_NS = 1_000_000_000


@final
class Replay:
    """The replay of one ledger.

    Args:
        path: its newest part.
        config: of the engine in the replay; None: as recorded.
    """

    def __init__(self, path: Path, config: ControllerConfig | None) -> None:
        self.parts = parts_of(path)
        self.comparison = Comparison()
        self.turns = 0
        self.gaps: list[tuple[int, int]] = []
        """Time and number of missing turns of each gap."""
        self.approximate_from_ns: int | None = None
        """Time since which the engine has lacked state of the recorded one; None: never."""
        self._config = config
        self._rerun: Rerun | None = None
        self._first: Header | None = None
        self._began_ns = self._now_ns = 0

    def run(self) -> None:
        """Decide all turns again.

        Raises:
            LedgerError: a line cannot be read.
        """
        for entry in self._entries():
            self._take(entry)
        if self._first is None or not self.turns:
            message = f"{self.parts[-1]} holds no turn that can be decided again"
            raise LedgerError(message)

    def _entries(self) -> Iterator[Entry]:
        for part in self.parts:
            yield from read_entries(part)

    def _take(self, entry: Entry) -> None:
        match entry:
            case Header():
                self._begin(entry)
            case Turn():
                self._turn(entry)
            case Checkpoint():
                if self._rerun is None:
                    self._resume(entry)
            case Gap(turns):
                self.gaps.append((self._now_ns, turns))
                self._rerun = None

    def _begin(self, header: Header) -> None:
        if self._first is not None:
            return
        self._first = header
        self._began_ns = self._now_ns = header.now_ns
        if self._config is not None and header.salt:
            self._config = disguised_config(self._config, disguise_with(header.salt))
        if header.part == 0:
            engine = FlowController(self._config or header.config, header.now_ns)
            self._rerun = Rerun(engine, has_own_config=self._config is not None)

    def _resume(self, checkpoint: Checkpoint) -> None:
        if self.approximate_from_ns is None:
            self.approximate_from_ns = checkpoint.now_ns
        self._rerun = Rerun.restored(
            checkpoint,
            self._config or checkpoint.config,
            has_own_config=self._config is not None,
        )

    def _turn(self, turn: Turn) -> None:
        self._now_ns = turn.now_ns
        if self._rerun is None:
            return  # between a gap and the next checkpoint: state unknown
        self.turns += 1
        decided = self._rerun.turn(turn)
        self.comparison.take(turn.now_ns, turn.decisions, decided)

    def at(self, now_ns: int) -> str:
        """Return a moment as date and time of day (UTC)."""
        assert self._first is not None, "it has been run"
        wall_ns = self._first.wall_ns + now_ns - self._first.now_ns
        return datetime.fromtimestamp(wall_ns / _SECOND_NS, UTC).strftime("%Y-%m-%d %H:%M:%S.%fZ")

    @property
    def span(self) -> str:
        """First and last moment."""
        return f"{self.at(self._began_ns)} to {self.at(self._now_ns)}"


def replay(path: Path, config: ControllerConfig | None) -> tuple[int, list[str]]:
    """Replay a ledger; return the exit status and the lines of the report.

    Raises:
        LedgerError: it cannot be read.
    """
    again = Replay(path, config)
    again.run()
    comparison = again.comparison
    parts = f"{len(again.parts)} part{'s' if len(again.parts) > 1 else ''}"
    counts = f"{again.turns} turns, {comparison.recorded_count} decisions"
    lines = [f"{plain(str(again.parts[-1]))}: {parts}, {again.span}, {counts}", *_exactness(again)]
    if config is not None:
        return 0, [*lines, *_compared(comparison)]
    difference = comparison.first_difference
    if difference is None:
        return 0, [*lines, f"decided again identically: all {comparison.recorded_count} decisions"]
    return _DIFFERENT, [
        *lines,
        f"not identical from {again.at(difference.now_ns)} on:",
        f"  recorded {_described(difference.recorded)}",
        f"  again    {_described(difference.candidate)}",
        *_compared(comparison),
    ]


def _exactness(again: Replay) -> list[str]:
    lines = [
        f"gap: {turns} turn(s) after {again.at(now_ns)} were not written"
        for now_ns, turns in again.gaps
    ]
    if again.approximate_from_ns is not None:
        lines.append(
            f"approximate from {again.at(again.approximate_from_ns)} on: begun at a checkpoint, "
            "which has the live requests and the learnt limits, accounts and rates, but not the "
            "endpoint of each request, the speed of prefill and what forecasts had learnt"
        )
    return lines


def _described(decision: Decision | None) -> str:
    if decision is None:
        return "nothing"
    return (
        f"request {decision.request_id} {decision.outcome.value} after {_ms(decision.waited_ns)} "
        f"(band {decision.priority}, {plain(decision.flow_id)}, endpoint "
        f"{plain(str(decision.endpoint))}, saturation "
        f"{decision.saturation:.3f})"
    )


# Tables


class _Column(NamedTuple):
    title: str
    width: int


_COLUMNS = (
    _Column("band", 5),
    _Column("tenant", 18),
    _Column("dispatched", 16),
    _Column("refused", 16),
    _Column("evicted", 16),
    _Column("wait p50", 20),
    _Column("wait p95", 20),
)


def _compared(comparison: Comparison) -> list[str]:
    """Return a table of both sides, and the requests that were decided differently."""
    lines = ["", "each cell: recorded > replayed", _row([column.title for column in _COLUMNS])]
    before, after = by_priority(comparison.recorded), by_priority(comparison.candidate)
    for priority in sorted(before.keys() | after.keys(), reverse=True):
        mine, other = before.get(priority, Figures()), after.get(priority, Figures())
        lines.append(_row([str(priority), "all", *_cells(mine, other)]))
        tenants = _tenants(comparison, priority)
        for key in tenants if len(tenants) > 1 else []:
            mine = comparison.recorded.get(key, Figures())
            other = comparison.candidate.get(key, Figures())
            lines.append(_row(["", plain(key.flow_id), *_cells(mine, other)]))
    changed = Counter(
        {pair: count for pair, count in comparison.pairs.counts.items() if pair[0] is not pair[1]}
    )
    lines += ["", f"{changed.total()} requests decided differently"]
    lines += [
        f"  {count:>8}  {was.value} > {now.value}" for (was, now), count in changed.most_common()
    ]
    only_again, only_recorded = comparison.pairs.undecided
    if only_again or only_recorded:
        lines.append(
            f"decided only in the recording: {only_recorded}; only in the replay: {only_again}"
        )
    return lines


def _tenants(comparison: Comparison, priority: int) -> list[FlowKey]:
    mine = {
        key: figures.outcomes.total()
        for key, figures in comparison.recorded.items()
        if key.priority == priority
    }
    busiest = sorted(mine, key=lambda key: (-mine[key], key.flow_id))[:_TENANTS_SHOWN_MAX]
    return sorted(busiest)


def _cells(recorded: Figures, again: Figures) -> list[str]:
    both = (recorded, again)
    counts = [by_group(each.outcomes) for each in both]
    return [
        *(_pair([str(each[group]) for each in counts]) for group in Group),
        _pair([_ms(each.wait_ns(0.5)) for each in both]),
        _pair([_ms(each.wait_ns(0.95)) for each in both]),
    ]


def _pair(both: Sequence[str]) -> str:
    return " > ".join(both)


def _ms(duration_ns: int | None) -> str:
    if duration_ns is None:
        return "-"
    return f"{duration_ns / 1e6:.1f}ms" if duration_ns < _SECOND_NS else f"{duration_ns / 1e9:.2f}s"


def _row(cells: Sequence[str]) -> str:
    fitted = (
        f"{cell[: column.width]:>{column.width}}"
        for cell, column in zip(cells, _COLUMNS, strict=True)
    )
    return "  ".join(fitted).rstrip()

"""A candidate configuration decides the same traffic, in a process of its own, without effect.

It follows the ledger of a running service. `flowcontrol.replay.rerun` describes the meaning of its
figures, and where they are approximate.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.events import Decision
from flowcontrol.replay.comparison import Pairs
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
from flowcontrol.request import Outcome
from flowcontrol.tally import Tally
from flowcontrol.views.snapshot import Totals


@final
@dataclass(frozen=True, slots=True)
class ShadowReport:
    """The decisions of a candidate so far, and those of the service."""

    waiting: int = 0
    in_flight: int = 0
    recorded: Mapping[int, Totals] = field(default_factory=dict)
    """By priority, of the service."""
    candidate: Mapping[int, Totals] = field(default_factory=dict)
    """By priority, of the candidate."""
    pairs: Mapping[tuple[Outcome, Outcome], int] = field(default_factory=dict)
    """Number of requests by outcome in the service and outcome in the candidate."""
    restarts: int = 0
    """Restarts from a checkpoint: after a gap, or because the ledger lacks its start."""


@final
class Shadow:
    """Runs a candidate on a ledger. Memory: O(requests live on either side + bands).

    Args:
        config: of the candidate.
    """

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._followed: Header | None = None
        self._disguised = config
        self._rerun: Rerun | None = None
        self._recorded: dict[int, Tally] = {}
        self._candidate: dict[int, Tally] = {}
        self._pairs = Pairs()
        self._restarts = 0

    def play(self, entries: Iterable[Entry]) -> None:
        """Decide the entries added to the ledger, except between a gap and the next checkpoint."""
        for entry in entries:
            match entry:
                case Header():
                    self._begin(entry)
                case Turn():
                    if self._rerun is not None:
                        self._turn(entry, self._rerun)
                case Checkpoint():
                    if self._rerun is None:
                        self._restarts += 1
                        self._pairs.forget()
                        self._rerun = Rerun.restored(entry, self._disguised, has_own_config=True)
                case Gap():
                    self._rerun = None

    def report(self) -> ShadowReport:
        """Return the figures so far."""
        rerun = self._rerun
        return ShadowReport(
            0 if rerun is None else rerun.candidate.waiting,
            0 if rerun is None else rerun.candidate.in_flight,
            {priority: tally.totals() for priority, tally in self._recorded.items()},
            {priority: tally.totals() for priority, tally in self._candidate.items()},
            dict(self._pairs.counts),
            self._restarts,
        )

    def _begin(self, header: Header) -> None:
        if self._followed is not None and self._followed.run == header.run:
            return
        self._followed = header
        self._pairs.forget()
        salt = header.salt
        self._disguised = (
            disguised_config(self._config, disguise_with(salt)) if salt else self._config
        )
        self._rerun = None
        if header.part == 0:
            engine = FlowController(self._disguised, header.now_ns)
            self._rerun = Rerun(engine, has_own_config=True)

    def _turn(self, turn: Turn, rerun: Rerun) -> None:
        decisions = rerun.turn(turn)
        _count(self._recorded, turn.decisions)
        _count(self._candidate, decisions)
        self._pairs.take(turn.decisions, decisions)


def _count(tallies: dict[int, Tally], decisions: Sequence[Decision]) -> None:
    for decision in decisions:
        tally = tallies.get(decision.priority)
        if tally is None:
            tally = tallies[decision.priority] = Tally()
        tally.count(decision.outcome, decision.waited_ns)

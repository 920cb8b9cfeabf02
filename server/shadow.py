"""Shadow mode: a candidate configuration decides the same traffic, beside the engine and unheard.

In a thread of its own, a moment behind: it costs about what the engine costs once more (CPU of this
process, not time on a request's way) and the memory of the requests alive in either world. What its
figures mean, and where they are approximate, is told in `flowcontrol.rerun`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import final

import structlog

from flowcontrol.comparison import Pairs
from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.events import Decision
from flowcontrol.ledger import Checkpoint, Entry, Shadowed, Turn
from flowcontrol.request import Outcome
from flowcontrol.rerun import Rerun
from flowcontrol.snapshot import Totals
from flowcontrol.tally import Tally
from server.recording import TurnFeed

_LINGER_S = 0.1
_log = structlog.get_logger()


@final
@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What a candidate would have done so far."""

    is_running: bool = True
    """False once it has failed; the engine has not noticed."""
    waiting: int = 0
    in_flight: int = 0
    totals: Mapping[int, Totals] = field(default_factory=dict)
    """By priority."""
    pairs: Mapping[tuple[Outcome, Outcome], int] = field(default_factory=dict)
    """How often the engine decided this, and the candidate that."""
    restarts: int = 0
    """Times it fell behind and began anew from a checkpoint."""


@final
class Shadow:
    """Runs a candidate on what a feed brings, until it is closed or fails.

    Args:
        config: the candidate's.
        feed: brings turns.
        ledger: gets the candidate's decisions, if there is one.
    """

    def __init__(self, config: ControllerConfig, feed: TurnFeed, ledger: TurnFeed | None) -> None:
        self.report = ShadowReport()
        """Replaced as a whole by the thread, so anybody may read it."""
        self._config = config
        self._feed = feed
        self._ledger = ledger
        self._rerun: Rerun | None = None
        self._tallies: dict[int, Tally] = {}
        self._pairs = Pairs()
        self._restarts = 0
        self._thread = Thread(target=self._run, name="shadow", daemon=True)

    def start(self, made_ns: int) -> None:
        """Begin, for an engine made at that time."""
        self._rerun = Rerun(FlowController(self._config, made_ns), has_own_config=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End."""
        self._feed.close()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while entries := self._feed.take(_LINGER_S):
                self._play(entries)
                self._publish(is_running=True)
        except Exception as error:  # noqa: BLE001 - a candidate may fail; the engine must not notice
            self._feed.close()
            _log.error("shadow_failed", exc_info=error)
            self._publish(is_running=False)

    def _play(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            match entry:
                case Turn() if self._rerun is not None:
                    decisions = self._rerun.turn(entry)
                    self._count(decisions)
                    self._pairs.take(entry.decisions, decisions)
                    if decisions and self._ledger is not None:
                        self._ledger.put(Shadowed(entry.now_ns, tuple(decisions)))
                case Checkpoint() if self._rerun is None:
                    self._restarts += 1
                    self._pairs.forget()
                    self._rerun = Rerun.restored(entry, self._config, has_own_config=True)
                case Turn() | Checkpoint():
                    pass
                case _:  # a gap: it has fallen behind, and begins anew at the checkpoint to come
                    self._rerun = None

    def _count(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            tally = self._tallies.get(decision.priority)
            if tally is None:
                tally = self._tallies[decision.priority] = Tally()
            tally.count(decision.outcome, decision.waited_ns)

    def _publish(self, *, is_running: bool) -> None:
        rerun = self._rerun
        self.report = ShadowReport(
            is_running,
            0 if rerun is None else rerun.candidate.waiting,
            0 if rerun is None else rerun.candidate.in_flight,
            {priority: tally.totals() for priority, tally in self._tallies.items()},
            dict(self._pairs.counts),
            self._restarts,
        )

"""Thread shell. The one thread that owns the flow controller.

A turn: take the facts from the inbox, read the clock once, pass the facts to the controller, let it
decide, deliver the decisions in one batch, and sleep until the next fact or the next deadline. It
never polls. (The clock is read once more after the turn, to measure how long the turn took.)
"""

import time
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Final, Protocol, final

from flowcontrol.controller import FlowController
from flowcontrol.events import Decision, Fact
from flowcontrol.histogram import Histogram
from flowcontrol.inbox import Asked, Inbox
from flowcontrol.replay.ledger import Turn
from flowcontrol.views.snapshot import Pace, Snapshot
from flowcontrol.views.view import take_snapshot

_FLOWS_SHOWN_MAX: Final = 1000
"""Most flows of each band in a published snapshot; bounds its cost."""
_NO_PROGRESS_S: Final = 0.001
"""Pause before a second turn at the same time."""
_PACE_BOUNDS_S = (  # not Final: mypyc takes a final tuple of floats for unset
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)


class Recorder(Protocol):
    """Records every turn."""

    def turned(self, controller: FlowController, turn: Turn) -> None:
        """Record a turn; called in the processor's thread, so it must return at once."""


@final
class FlowProcessor:
    """Runs a flow controller in a thread of its own until it is drained.

    Args:
        controller: owned by the thread from `start` on.
        inbox: where its facts come from.
        deliver: called in the thread with each batch of decisions, and with a snapshot if one was
            requested since the last turn. Must return at once.
        ended: called in the thread as its last act: with None after a drain, else with the
            exception. Any exception in a turn is a bug: nothing is decided after it.
        clock: monotonic nanoseconds.
        recorder: records every turn; None: no recording.
    """

    def __init__(  # noqa: PLR0913 - each is one wire of the shell
        self,
        controller: FlowController,
        inbox: Inbox,
        deliver: Callable[[list[Decision], Snapshot | None], None],
        ended: Callable[[BaseException | None], None],
        clock: Callable[[], int] = time.monotonic_ns,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self._controller = controller
        self._inbox = inbox
        self._deliver = deliver
        self._ended = ended
        self._clock = clock
        self._recorder = recorder
        self._is_snapshot_wanted = False
        self._decided_ns = 0
        """The time of the last turn."""
        self._turns = Histogram(_PACE_BOUNDS_S)
        self._lags = Histogram(_PACE_BOUNDS_S)
        self._own_thread = Thread(target=self._run, name="flow-processor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._own_thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; return whether it did."""
        self._own_thread.join(timeout_s)
        return not self._own_thread.is_alive()

    def want_snapshot(self) -> None:
        """Request, from any thread, a snapshot with the next delivery; requests are merged."""
        self._is_snapshot_wanted = True
        self._inbox.ring()

    def _run(self) -> None:
        fault: BaseException | None = None
        try:
            while not self._controller.is_drained:
                self._turn(self._sleep())
            self._turn(self._inbox.close())  # whatever was accepted is decided
        except BaseException as error:  # noqa: BLE001 - passed to `ended`, which ends the process
            fault = error
            self._inbox.close()
        self._ended(fault)

    def _turn(self, taken: list[Fact | Asked]) -> None:
        now_ns = self._decided_ns = self._clock()
        if taken:
            self._lags.observe(max(0, now_ns - self._inbox.since_ns))
        controller = self._controller
        facts = [each for each in taken if not isinstance(each, Asked)]
        for fact in facts:
            controller.handle(fact, now_ns)
        decisions = controller.poll(now_ns)
        if self._recorder is not None:
            self._recorder.turned(controller, Turn(now_ns, facts, decisions))
        snapshot = None
        if self._is_snapshot_wanted:
            self._is_snapshot_wanted = False  # first, so that a request from now on gets another
            snapshot = take_snapshot(controller, now_ns, _FLOWS_SHOWN_MAX)
            snapshot = replace(snapshot, pace=Pace(self._turns.snapshot(), self._lags.snapshot()))
        if decisions or snapshot is not None:
            self._deliver(decisions, snapshot)
        if len(facts) < len(taken):
            for each in taken:
                if isinstance(each, Asked):
                    each.reply(self._answer(each, now_ns))
        self._turns.observe(self._clock() - now_ns)

    def _answer(self, asked: Asked, now_ns: int) -> object:
        try:
            return asked.question(self._controller, now_ns)
        except Exception as error:  # noqa: BLE001 - a query changes nothing; the caller gets the error
            return error

    def _sleep(self) -> list[Fact | Asked]:
        wakeup_ns = self._controller.next_wakeup_ns()
        if wakeup_ns is None:
            return self._inbox.take(None)
        wait_s = (wakeup_ns - self._clock()) / 1e9
        if wakeup_ns <= self._decided_ns:  # a bug, or a clock that stands still: do not spin
            wait_s = max(wait_s, _NO_PROGRESS_S)
        return self._inbox.take(wait_s)

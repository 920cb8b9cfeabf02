"""Pure. Runs recorded traffic through another engine: what would it have decided?

The candidate gets the facts that the recorded engine got, at the same times. While both decide
alike, the replay is exact. Once they differ, what follows was never recorded, and is filled in:

    a request is served for as long as in reality, from whenever it is dispatched;
    one that was not served in reality is served for the mean time of its band;
    a client that left while waiting leaves at the same time, whether it waits or is being served;
    one that was refused in reality, but not by the candidate, goes on waiting.

So the replay does not show how a dispatch slows other requests: a candidate that allows more in
flight looks better here than it would be, because no model server becomes slower. One effect comes
late: if the candidate dispatches a request earlier than reality did, its slot is free only when
reality shows how long it took. Metrics of the endpoints are those of reality. Clients do not retry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Self, final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.events import Answered, Arrived, Decision, Fact, Left, Reconfigured, Settled
from flowcontrol.replay.ledger import Checkpoint, Turn, restore
from flowcontrol.request import Outcome

_SERVICE_DEFAULT_NS = 1_000_000_000
"""Service time of a request that was not served in reality, before any was."""
_MEMORY = 64
"""Service times in a running mean: the first 64 count alike, each later one counts 1/64."""


@final
@dataclass(slots=True)
class _Course:
    """One request, in reality and in the replay."""

    request_id: int
    priority: int = 0
    real_dispatched_ns: int | None = None
    service_ns: int | None = None
    """How long it is served; None: unknown."""
    is_over_in_reality: bool = False
    dispatched_ns: int | None = None
    """When the candidate dispatched it; None: it has not."""
    is_leaving: bool = False
    """Whether its departure is scheduled."""
    settled: Settled | None = None
    """Its settlement, held back until its departure."""


@final
class Rerun:
    """Drives a candidate through recorded turns. Owner: its caller.

    Args:
        candidate: new, or restored from a checkpoint; it has taken no facts yet.
        has_own_config: whether its configuration differs from the recorded one. If so, recorded
            changes of the configuration are ignored, and it is woken at the times it asks for;
            else only when the recorded engine was, however late that was.
    """

    def __init__(self, candidate: FlowController, *, has_own_config: bool) -> None:
        self.candidate = candidate
        self._has_own_config = has_own_config
        self._courses: dict[int, _Course] = {}
        self._departures: list[tuple[int, int]] = []
        """Departures at times that differ from reality: time and request id."""
        self._services: dict[int, tuple[float, int]] = {}
        """By priority: mean service time, and the number of services it is over."""
        self._polled_ns = -1

    @property
    def open_count(self) -> int:
        """Requests that are not over in both reality and the replay."""
        return len(self._courses)

    @classmethod
    def restored(
        cls, checkpoint: Checkpoint, config: ControllerConfig, *, has_own_config: bool
    ) -> Self:
        """Return a replay that begins at a checkpoint, as if its requests had just begun."""
        candidate = restore(checkpoint, config)
        rerun = cls(candidate, has_own_config=has_own_config)
        now_ns = checkpoint.now_ns
        were_in_flight = {each.request.request_id for each in checkpoint.live if each.is_in_flight}
        for lease in candidate.leases.values():
            course = _Course(lease.request.request_id)
            course.priority = lease.flow.key.priority
            course.real_dispatched_ns = now_ns if course.request_id in were_in_flight else None
            course.dispatched_ns = now_ns if lease.is_in_flight else None
            rerun._courses[course.request_id] = course
        return rerun

    def turn(self, turn: Turn) -> list[Decision]:
        """Replay one turn; return the candidate's decisions in it and since the last one."""
        now_ns = turn.now_ns
        decisions = self._advance(now_ns)
        candidate = self.candidate
        for fact in turn.facts:
            passed = self._translate(fact, now_ns)
            if passed is not None:
                candidate.handle(passed, now_ns)
        self._depart(now_ns)
        decided = candidate.poll(now_ns)
        self._polled_ns = now_ns
        for decision in turn.decisions:
            self._note_reality(decision, now_ns)
        self._note(decided, now_ns)
        return decisions + decided

    def _advance(self, until_ns: int) -> list[Decision]:
        decisions: list[Decision] = []
        while (due_ns := self._next_ns()) is not None and due_ns < until_ns:
            self._depart(due_ns)
            decided = self.candidate.poll(due_ns)
            self._polled_ns = due_ns
            self._note(decided, due_ns)
            decisions += decided
        return decisions

    def _next_ns(self) -> int | None:
        times = [max(self._departures[0][0], self._polled_ns + 1)] if self._departures else []
        wakeup_ns = self.candidate.next_wakeup_ns() if self._has_own_config else None
        if wakeup_ns is not None and wakeup_ns > self._polled_ns:
            times.append(wakeup_ns)
        return min(times, default=None)

    def _depart(self, now_ns: int) -> None:
        while self._departures and self._departures[0][0] <= now_ns:
            course = self._courses.get(heappop(self._departures)[1])
            if course is None:
                continue
            if course.settled is not None:
                self.candidate.handle(course.settled, now_ns)
            self.candidate.handle(Left(course.request_id), now_ns)
            self._forget(course)

    def _translate(self, fact: Fact, now_ns: int) -> Fact | None:
        """Return the fact that the candidate gets for a recorded one; None: nothing now."""
        match fact:
            case Arrived(request):
                self._courses[request.request_id] = _Course(request.request_id)
            case Left(request_id):
                course = self._courses.get(request_id)
                return fact if course is None else self._left(course, fact, now_ns)
            case Settled(request_id):
                course = self._courses.get(request_id)
                if course is not None and course.dispatched_ns is None:
                    course.settled = fact
                    return None
            case Answered(request_id):
                course = self._courses.get(request_id)
                return None if course is not None and course.dispatched_ns is None else fact
            case Reconfigured():
                return None if self._has_own_config else fact
            case _:
                pass
        return fact

    def _left(self, course: _Course, left: Left, now_ns: int) -> Fact | None:
        if course.is_over_in_reality:
            return None  # refused in reality; here it goes on
        course.is_over_in_reality = True
        if course.real_dispatched_ns is None:  # its client left
            self._forget(course)
            return left
        course.service_ns = now_ns - course.real_dispatched_ns
        self._learn(course)
        if course.dispatched_ns is None:
            return None  # it still waits here
        if course.dispatched_ns + course.service_ns > now_ns:
            self._leave_later(course)
            return None
        self._forget(course)
        return left

    def _note_reality(self, decision: Decision, now_ns: int) -> None:
        course = self._courses.get(decision.request_id)
        if course is None or course.is_over_in_reality:
            return
        course.priority = decision.priority
        if decision.outcome is Outcome.DISPATCHED:
            course.real_dispatched_ns = now_ns
        elif decision.outcome is not Outcome.RECLAIMED:
            course.is_over_in_reality = True
            course.service_ns = self._usual_ns(decision.priority)
            if course.dispatched_ns is not None:
                self._leave_later(course)

    def _note(self, decided: Sequence[Decision], now_ns: int) -> None:
        for decision in decided:
            course = self._courses.get(decision.request_id)
            if course is None:
                continue
            if decision.outcome is Outcome.DISPATCHED:
                course.dispatched_ns = now_ns
                if course.service_ns is not None:
                    self._leave_later(course)
            elif decision.outcome is Outcome.RECLAIMED:
                if self._has_own_config:  # it is gone a moment after the decision
                    course.service_ns = 0
                    course.is_leaving = False  # its earlier departure no longer applies
                    self._leave_later(course)
            else:
                self._forget(course)

    def _leave_later(self, course: _Course) -> None:
        if course.is_leaving:
            return
        assert course.dispatched_ns is not None, "a departing request was dispatched"
        assert course.service_ns is not None, "its service time is known"
        course.is_leaving = True
        heappush(self._departures, (course.dispatched_ns + course.service_ns, course.request_id))

    def _forget(self, course: _Course) -> None:
        self._courses.pop(course.request_id, None)

    def _learn(self, course: _Course) -> None:
        assert course.service_ns is not None, "it has just been served"
        average, count = self._services.get(course.priority, (0.0, 0))
        count = min(count + 1, _MEMORY)
        average += (course.service_ns - average) / count
        self._services[course.priority] = average, count

    def _usual_ns(self, priority: int) -> int:
        known = self._services.get(priority) or next(iter(self._services.values()), None)
        return _SERVICE_DEFAULT_NS if known is None else round(known[0])

"""Pure. Gates to compare the flow controller with: none at all, and one that forgets."""

from collections import deque
from typing import Protocol, final

from flowcontrol.events import Arrived, Decision, Fact, Left, ObjectivesChanged
from flowcontrol.request import DEFAULT_PRIORITY, Outcome


class Decider(Protocol):
    """What decides about requests; `flowcontrol.controller.FlowController` is one."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Take in one fact."""

    def poll(self, now_ns: int) -> list[Decision]:
        """Decide everything that can be decided now."""

    def next_wakeup_ns(self) -> int | None:
        """Return when `poll` must be called even if nothing happens."""

    def check_invariants(self) -> None:
        """Raise AssertionError if the accounts do not add up."""


@final
class OpenGate:
    """Envoy alone: every request is dispatched at once, in the order of arrival."""

    def __init__(self) -> None:
        self._priorities: dict[str, int] = {}
        self._decisions: list[Decision] = []

    def handle(self, fact: Fact, now_ns: int) -> None:  # noqa: ARG002 - a Decider
        """Dispatch an arrival; of other facts only objectives matter."""
        match fact:
            case Arrived(request):
                priority = DEFAULT_PRIORITY
                if request.objective is not None:
                    priority = self._priorities.get(request.objective, DEFAULT_PRIORITY)
                self._decisions.append(
                    Decision(
                        request.request_id,
                        Outcome.DISPATCHED,
                        priority,
                        request.flow_id,
                        waited_ns=0,
                    )
                )
            case ObjectivesChanged(priorities):
                self._priorities = dict(priorities)
            case _:
                pass

    def poll(self, now_ns: int) -> list[Decision]:  # noqa: ARG002 - a Decider
        """Return the decisions since the last poll."""
        decisions, self._decisions = self._decisions, []
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Return None: nothing waits."""
        return None

    def check_invariants(self) -> None:
        """There are no accounts."""


@final
class ForgetfulGate:
    """A gate that takes a request for ended when it has been in flight for too long.

    The reference had this fault (llm-d-router#2295, #2137): accounts of requests without a response
    chunk for 5 minutes were removed while the requests still ran. So the gate saw room where there
    was none, dispatched more, and made everything slower. Here answers are not streamed: an answer
    comes in one piece at its end.

    Args:
        engine: decides everything else.
        forgets_after_ns: how long a request in flight is counted.
    """

    def __init__(self, engine: Decider, forgets_after_ns: int) -> None:
        self._engine = engine
        self._forgets_after_ns = forgets_after_ns
        self._in_flight: deque[tuple[int, int]] = deque()
        """Time to forget and id of each request in flight; includes requests that have left."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Pass a fact on; the engine ignores the departure of a forgotten request."""
        self._engine.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Forget requests that are due, then decide."""
        while self._in_flight and self._in_flight[0][0] <= now_ns:
            self._engine.handle(Left(self._in_flight.popleft()[1]), now_ns)
        decisions = self._engine.poll(now_ns)
        forgotten_ns = now_ns + self._forgets_after_ns
        self._in_flight.extend(
            (forgotten_ns, each.request_id)
            for each in decisions
            if each.outcome is Outcome.DISPATCHED
        )
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Return the earlier of the engine's wake-up and the next time to forget."""
        wakeups = [self._engine.next_wakeup_ns()]
        if self._in_flight:
            wakeups.append(self._in_flight[0][0])
        return min((wakeup for wakeup in wakeups if wakeup is not None), default=None)

    def check_invariants(self) -> None:
        """The engine's accounts add up; they are only wrong about the world."""
        self._engine.check_invariants()

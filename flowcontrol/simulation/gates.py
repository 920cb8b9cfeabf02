"""Pure. What the flow controller is compared with: no gate at all, and a gate that forgets."""

from collections import deque
from typing import Protocol, final

from flowcontrol.events import Arrived, Decision, Fact, Left, ObjectivesChanged
from flowcontrol.request import DEFAULT_PRIORITY, Outcome


class Decider(Protocol):
    """What the world asks of what decides; `flowcontrol.controller.FlowController` is one."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Take in one fact."""

    def poll(self, now_ns: int) -> list[Decision]:
        """Decide all that can be decided now."""

    def next_wakeup_ns(self) -> int | None:
        """Return when `poll` must be called even if nothing happens."""

    def check_invariants(self) -> None:
        """Raise AssertionError when the accounts do not add up."""


@final
class OpenGate:
    """Envoy alone: every request goes on at once, in the order of arrival."""

    def __init__(self) -> None:
        self._priorities: dict[str, int] = {}
        self._decisions: list[Decision] = []

    def handle(self, fact: Fact, now_ns: int) -> None:  # noqa: ARG002 - a Decider
        """Let a request go on; of the rest only the names of objectives matter."""
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
        """Nothing waits, so nothing is due."""
        return None

    def check_invariants(self) -> None:
        """There are no accounts."""


@final
class ForgetfulGate:
    """A gate that takes a request for ended when it is in flight for too long.

    That is what befell the reference (llm-d-router#2295, #2137): accounts of requests without a
    response chunk for 5 minutes were cleared away while the requests still ran, so the gate saw
    room where there was none, sent more, and made everything slower still. Here no answer is
    streamed: the whole of it comes at its end.

    Args:
        engine: does everything else.
        forgets_after_ns: how long a request in flight is remembered.
    """

    def __init__(self, engine: Decider, forgets_after_ns: int) -> None:
        self._engine = engine
        self._forgets_after_ns = forgets_after_ns
        self._in_flight: deque[tuple[int, int]] = deque()
        """When each is forgotten, and its id; those that have left are still among them."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Pass it on; that a forgotten request leaves means nothing to the engine."""
        self._engine.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Forget what is due to be, then decide."""
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
        """Return the engine's own wake-up, or when something is forgotten."""
        wakeups = [self._engine.next_wakeup_ns()]
        if self._in_flight:
            wakeups.append(self._in_flight[0][0])
        return min((wakeup for wakeup in wakeups if wakeup is not None), default=None)

    def check_invariants(self) -> None:
        """The engine's accounts add up; it is the world that they are wrong about."""
        self._engine.check_invariants()

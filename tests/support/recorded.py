"""Recordings for tests: an engine that records its turns, and traffic with every kind of event."""

from dataclasses import replace
from random import Random
from typing import final

from flowcontrol.config import (
    Adaptive,
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Limits,
    Ordering,
    Picker,
    Reclaim,
    Staleness,
    Utilization,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    Left,
    LoadObserved,
    ObjectivesChanged,
    Settled,
)
from flowcontrol.replay.ledger import Turn
from flowcontrol.request import Outcome, Request
from flowcontrol.views.explain import explain
from flowcontrol.views.view import take_snapshot

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
OBJECTIVES = {"chat": 10, "batch": -1}
ENDPOINTS = ("10.0.0.1:8000", "10.0.0.2:8000")


def small_config(in_flight_max: int = 4) -> ControllerConfig:
    """Two endpoints, short waits, small queues and weights."""
    return ControllerConfig(
        limits=Limits(requests_max=60),
        templates=(
            BandTemplate(
                priority_min=1,
                settings=BandSettings(
                    limits=Limits(requests_max=25), ttl_ns=SECOND, ordering=Ordering.EDF
                ),
            ),
        ),
        default_settings=BandSettings(ttl_ns=2 * SECOND, flow_limits=Limits(requests_max=15)),
        detectors=(Concurrency(requests_max=in_flight_max),),
        picker=Picker.LEAST_LOADED,
        weights={"tenant-0": 3.0},
    )


def whole_config() -> ControllerConfig:
    """The same with all features of the engine."""
    small = small_config()
    return replace(
        small,
        templates=(
            *small.templates,
            BandTemplate(
                priority_max=-1,
                settings=BandSettings(
                    ttl_ns=2 * SECOND,
                    flow_limits=Limits(requests_max=15),
                    fairness=Fairness.LEAST_ATTAINED_SERVICE,
                    share_min=0.1,
                    promote_after_ns=SECOND,
                ),
            ),
        ),
        detectors=(
            Concurrency(requests_max=6, tokens_max=2000),
            Utilization(staleness=Staleness.DECAY),
            Adaptive(limit_first=4),
        ),
        ceilings=CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=0.8),
        reclaim=Reclaim(is_enabled=True),
        forecasts=True,
    )


@final
class Recording:
    """An engine that records its turns; also usable in a simulated world.

    Args:
        config: configuration of the engine.
        now_ns: when it is created.
        is_looked_at: whether snapshots and explanations are requested between its turns, as by an
            operator.
    """

    def __init__(
        self, config: ControllerConfig, now_ns: int = 0, *, is_looked_at: bool = False
    ) -> None:
        self.began_ns = now_ns
        self.config = config
        self.controller = FlowController(config, now_ns)
        self.turns: list[Turn] = []
        self._is_looked_at = is_looked_at
        self._facts: list[Fact] = []

    @property
    def decisions(self) -> list[Decision]:
        """All decisions so far."""
        return [decision for turn in self.turns for decision in turn.decisions]

    def turn(self, now_ns: int, *facts: Fact) -> list[Decision]:
        """Run one turn."""
        for fact in facts:
            self.handle(fact, now_ns)
        return self.poll(now_ns)

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Add one fact."""
        self._facts.append(fact)
        self.controller.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """End the turn."""
        decisions = self.controller.poll(now_ns)
        self.turns.append(Turn(now_ns, self._facts, decisions))
        self._facts = []
        if self._is_looked_at and len(self.turns) % 7 == 0:
            take_snapshot(self.controller, now_ns, flows_max=10)
            self.controller.learned.memory(now_ns)
            for request_id in list(self.controller.leases)[:3]:
                explain(self.controller, request_id, now_ns)
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Return when the next turn must be."""
        return self.controller.next_wakeup_ns()

    def check_invariants(self) -> None:
        """Check the invariants of the engine."""
        self.controller.check_invariants()


def busy(recording: Recording, requests: int, seed: int = 1) -> Recording:
    """Send requests faster than they are served, some impatient, some that time out, then drain."""
    _Traffic(recording, Random(seed)).run(requests)
    return recording


@final
class _Traffic:
    """Clients and model servers, as far as they affect the engine."""

    def __init__(self, recording: Recording, chance: Random) -> None:
        self._recording = recording
        self._chance = chance
        self._now_ns = recording.began_ns
        self._ending: dict[int, int] = {}
        """When streams end, by request id."""
        self._unanswered: list[int] = []
        """Requests whose first byte must be reported to the engine."""
        self._next_id = 1

    def run(self, requests: int) -> None:
        """Send so many requests, and run until all have ended."""
        self._turn(ObjectivesChanged(OBJECTIVES), EndpointsChanged(ENDPOINTS))
        while self._next_id <= requests or self._ending:
            self._wait_until(self._now_ns + self._chance.randrange(1, 60 * MILLISECOND))
            count = self._chance.randrange(6) if self._next_id <= requests else 0
            facts = (*self._departures(), *self._answers(), *self._scrapes())
            self._turn(*facts, *self._arrivals(count))
        self._now_ns += SECOND
        self._turn(DrainBegan(0))

    def _wait_until(self, until_ns: int) -> None:
        """Wake the engine when it asks for it, as late as a thread may be."""
        while (wakeup_ns := self._recording.controller.next_wakeup_ns()) is not None:
            woken_ns = wakeup_ns + self._chance.randrange(100_000)
            if woken_ns >= until_ns:
                break
            self._now_ns = max(self._now_ns, woken_ns)
            self._turn()
        self._now_ns = until_ns

    def _turn(self, *facts: Fact) -> None:
        for decision in self._recording.turn(self._now_ns, *facts):
            request_id = decision.request_id
            if decision.outcome is Outcome.DISPATCHED:
                service_ns = self._chance.randrange(10 * MILLISECOND, 400 * MILLISECOND)
                self._ending.setdefault(request_id, self._now_ns + service_ns)
                if decision.awaits_answer:
                    self._unanswered.append(request_id)
            elif decision.outcome is Outcome.RECLAIMED:
                self._ending[request_id] = self._now_ns + MILLISECOND
            else:
                self._ending.pop(request_id, None)

    def _answers(self) -> list[Fact]:
        count = self._chance.randrange(len(self._unanswered) + 1)
        answered, self._unanswered = self._unanswered[:count], self._unanswered[count:]
        return [Answered(each) for each in answered if each in self._ending]

    def _scrapes(self) -> list[Fact]:
        return [
            LoadObserved(each, self._chance.randrange(4), 4, self._chance.random() * 0.6)
            for each in ENDPOINTS
            if self._recording.config.reclaim.is_enabled and self._chance.random() < 0.1
        ]

    def _departures(self) -> list[Fact]:
        facts: list[Fact] = []
        for request_id in [each for each, at in self._ending.items() if at <= self._now_ns]:
            del self._ending[request_id]
            facts.append(Left(request_id))
            if self._chance.random() < 0.7:
                tokens = self._chance.randrange(500)
                facts.append(Settled(request_id, 100, 0, tokens, MILLISECOND))
        return facts

    def _arrivals(self, count: int) -> list[Fact]:
        facts: list[Fact] = []
        for request_id in range(self._next_id, self._next_id + count):
            facts.append(Arrived(_request(request_id, self._chance)))
            if self._chance.random() < 0.05:  # its client disconnects
                self._ending[request_id] = self._now_ns + self._chance.randrange(SECOND)
        self._next_id += count
        if self._chance.random() < 0.002:
            facts.append(FlowEvicted(0, "tenant-1"))
        return facts


def _request(request_id: int, chance: Random) -> Request:
    return Request(
        request_id,
        f"tenant-{chance.randrange(5)}",
        chance.choice((None, "chat", "batch", "nobody's")),
        chance.randrange(8000),
        chance.choice((None, None, 300 * MILLISECOND)),
        output_tokens_max=chance.choice((None, 64)),
        model="llama",
    )

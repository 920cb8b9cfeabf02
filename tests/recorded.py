"""Recordings for tests: an engine that keeps its turns, and traffic with a bit of everything."""

from random import Random
from typing import final

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    Concurrency,
    ControllerConfig,
    Limits,
    Ordering,
    Picker,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    Left,
    ObjectivesChanged,
    Settled,
)
from flowcontrol.ledger import Turn
from flowcontrol.request import Outcome, Request

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
OBJECTIVES = {"chat": 10, "batch": -1}
ENDPOINTS = ("10.0.0.1:8000", "10.0.0.2:8000")


def small_config(in_flight_max: int = 4) -> ControllerConfig:
    """Two endpoints' worth of trouble: short waits, small queues, weights."""
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


@final
class Recording:
    """An engine with its turns kept."""

    def __init__(self, config: ControllerConfig, now_ns: int = 0) -> None:
        self.began_ns = now_ns
        self.config = config
        self.controller = FlowController(config, now_ns)
        self.turns: list[Turn] = []

    @property
    def decisions(self) -> list[Decision]:
        """All there were."""
        return [decision for turn in self.turns for decision in turn.decisions]

    def turn(self, now_ns: int, *facts: Fact) -> list[Decision]:
        """One turn."""
        for fact in facts:
            self.controller.handle(fact, now_ns)
        decisions = self.controller.poll(now_ns)
        self.turns.append(Turn(now_ns, list(facts), decisions))
        return decisions


def busy(recording: Recording, requests: int, seed: int = 1) -> Recording:
    """Let requests come faster than they are served, some impatient, some in vain, then drain."""
    _Traffic(recording, Random(seed)).run(requests)
    return recording


@final
class _Traffic:
    """Clients and model servers, as far as the engine notices them."""

    def __init__(self, recording: Recording, chance: Random) -> None:
        self._recording = recording
        self._chance = chance
        self._now_ns = recording.began_ns
        self._ending: dict[int, int] = {}
        """When whom's stream ends."""
        self._next_id = 1

    def run(self, requests: int) -> None:
        """So many requests, until all are gone."""
        self._turn(ObjectivesChanged(OBJECTIVES), EndpointsChanged(ENDPOINTS))
        while self._next_id <= requests or self._ending:
            self._wait_until(self._now_ns + self._chance.randrange(1, 60 * MILLISECOND))
            count = self._chance.randrange(6) if self._next_id <= requests else 0
            self._turn(*self._departures(), *self._arrivals(count))
        self._now_ns += SECOND
        self._turn(DrainBegan(0))

    def _wait_until(self, until_ns: int) -> None:
        """Let the engine be woken when it asks for it, as late as a thread may be."""
        while (wakeup_ns := self._recording.controller.next_wakeup_ns()) is not None:
            woken_ns = wakeup_ns + self._chance.randrange(100_000)
            if woken_ns >= until_ns:
                break
            self._now_ns = max(self._now_ns, woken_ns)
            self._turn()
        self._now_ns = until_ns

    def _turn(self, *facts: Fact) -> None:
        for decision in self._recording.turn(self._now_ns, *facts):
            if decision.outcome is Outcome.DISPATCHED:
                service_ns = self._chance.randrange(10 * MILLISECOND, 400 * MILLISECOND)
                self._ending.setdefault(decision.request_id, self._now_ns + service_ns)
            else:
                self._ending.pop(decision.request_id, None)

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
            if self._chance.random() < 0.05:  # hangs up, whatever happens
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

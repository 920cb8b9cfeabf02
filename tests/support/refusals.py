"""Counts the refused requests that could have been served, by the fate of those behind them.

A request is refused for lack of a place (a limit of waiting requests, or displaced by another one),
or because it is predicted to be evicted before its turn. Could it have been served?

If there was no place, its fate is unknown. But had only that request been kept, at its place in its
flow, it would have had the turn of the next request of its flow that arrived after it and was
dispatched. So it could have been served if that turn came within its time to live. Each request is
judged alone: if ten could have had the same turn, all ten count. So does a request whose flow has
no later turn, unless the one before it waited too long. So this is an upper bound. It holds for
flows that are served in order of arrival. A test keeps single requests and compares.

A request with a prediction goes on waiting, so its real fate is known.
"""

from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, final

from flowcontrol.config import BandSettings, ControllerConfig, Limits, Picker
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Decision, Fact
from flowcontrol.request import Outcome
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.workload import Poisson, Workload
from flowcontrol.simulation.world import World
from flowcontrol.views.explain import explain
from tests.support.effects import OBJECTIVES, SMALL, job, people
from tests.support.overloads import MINUTE, SECOND

WITHOUT_A_PLACE = (Outcome.REJECTED_CAPACITY, Outcome.EVICTED_DISPLACED)


ASKED_NS = 10 * SECOND
SERVED = 12.0
"""People per second that the pool of these cases can serve, approximately."""


@final
@dataclass(frozen=True)
class Scarce:
    """More traffic than the pool, or the queue, has room for."""

    workloads: tuple[Workload, ...]
    requests_max: int | None = None
    """Most waiting requests; None: unlimited."""
    ttl_s: float = 30


def _crowd(times: float) -> Workload:
    """Return people who send so many times the traffic that is served."""
    return people(Poisson(times * SERVED), 3, 200, 64, spread=0.6, longest=2000)


def _within(part: float) -> int:
    """Return how many may wait so that this part of the time to live suffices to serve them."""
    return round(part * SERVED * Scarce.ttl_s)


CASES = {
    "twice as many people as are served": Scarce((_crowd(2),)),
    "the same, queue of half a TTL": Scarce((_crowd(2),), _within(0.5)),
    "the same, queue of one TTL": Scarce((_crowd(2),), _within(1)),
    "the same, queue of two TTLs": Scarce((_crowd(2),), _within(2)),
    "people, a job, queue of 1000": Scarce((_crowd(0.5), job(3000, 512, 128)), 1000, ttl_s=60),
}


def run(scarce: Scarce, minutes: float, seed: int = 889) -> tuple[Results, "Hopeless"]:
    """Run a case on three of the demo's servers, with defaults for everything else."""
    plan = Plan(
        duration_ns=round(minutes * MINUTE),
        servers=tuple(ServerSpec(address=f"s{n}", config=SMALL) for n in range(3)),
        workloads=scarce.workloads,
        objectives=OBJECTIVES,
        scrape_interval_ns=SECOND,
    )
    config = ControllerConfig(
        picker=Picker.LEAST_LOADED,
        limits=Limits(requests_max=scarce.requests_max),
        default_settings=BandSettings(ttl_ns=round(scarce.ttl_s * SECOND)),
    )
    engine = Hopeless(FlowController(config, 0))
    return World(engine, plan, seed).finish(), engine


class Line(NamedTuple):
    """One line of a transcript."""

    at_ns: int
    request_id: int
    outcome: Outcome
    flow: tuple[str, str]
    """Priority and flow id."""
    arrived_ns: int


@final
@dataclass
class Refusals:
    """The requests refused in a run, and those of them that could have been served."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    """Outcomes of all requests."""
    could: dict[int, bool] = field(default_factory=dict)
    """Whether requests without a place would have been dispatched in time, by id."""

    @property
    def share(self) -> float | None:
        """Share of the refused that could have been served; None: nothing was refused."""
        return sum(self.could.values()) / len(self.could) if self.could else None


def refusals(transcript: Iterable[str], ttl_ns: int) -> Refusals:
    """Count the requests refused for lack of a place.

    Args:
        transcript: the transcript of a run, see `simulation.results.Results`.
        ttl_ns: time to live of all requests.
    """
    lines = [_line(text) for text in transcript]
    found = Refusals(Counter(line.outcome for line in lines))
    flows: dict[tuple[str, str], _History] = defaultdict(_History)
    for line in sorted(lines, key=lambda line: line.arrived_ns):
        if line.outcome is Outcome.DISPATCHED:
            flows[line.flow].turns.append(line)
        elif line.outcome is Outcome.EVICTED_TTL:
            flows[line.flow].expired.append(line.arrived_ns)
    for line in lines:
        if line.outcome in WITHOUT_A_PLACE:
            found.could[line.request_id] = flows[line.flow].could_serve(line, ttl_ns)
    return found


def served(transcript: Iterable[str], end_ns: int) -> int:
    """Return how many requests were dispatched up to a time."""
    lines = (_line(text) for text in transcript)
    return sum(line.outcome is Outcome.DISPATCHED and line.at_ns <= end_ns for line in lines)


def _line(text: str) -> Line:
    at_ns, number, outcome, priority, flow_id, waited_ns, *_ = text.split(" ")
    arrived_ns = int(at_ns) - int(waited_ns)
    return Line(int(at_ns), int(number), Outcome(outcome), (priority, flow_id), arrived_ns)


class _History:
    """The fates of the requests of one flow, in order of arrival."""

    def __init__(self) -> None:
        self.turns: list[Line] = []
        """Dispatched requests."""
        self.expired: list[int] = []
        """Arrivals of requests that waited too long."""

    def could_serve(self, line: Line, ttl_ns: int) -> bool:
        """Whether the next turn comes in time; without one, whether those ahead had a turn."""
        place = bisect_right(self.turns, line.arrived_ns, key=_arrival)
        if place < len(self.turns):
            return self.turns[place].at_ns - line.arrived_ns < ttl_ns
        served_ns = self.turns[-1].arrived_ns if self.turns else -1
        before = bisect_right(self.expired, line.arrived_ns)
        return before == 0 or self.expired[before - 1] < served_ns


def _arrival(line: Line) -> int:
    return line.arrived_ns


@final
class Hopeless:
    """Lets an engine decide, and asks it which requests wait in vain.

    It asks when a request begins to wait and then every ten seconds, for one request in eight,
    because each question examines all requests ahead.
    """

    def __init__(self, engine: FlowController) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        """Outcomes of the requests predicted to be evicted before their turn."""
        self.asked: Counter[Outcome] = Counter()
        """Outcomes of all requests asked about."""
        self._engine = engine
        self._due: deque[tuple[int, int]] = deque()
        """Requests to ask about next, with their times."""
        self._live: dict[int, bool] = {}
        """Whether the prediction was made, by request."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Record arrivals, and pass the fact on."""
        if isinstance(fact, Arrived) and fact.request.request_id % 8 == 0:
            self._live[fact.request.request_id] = False
            self._due.appendleft((now_ns, fact.request.request_id))
        self._engine.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Ask about requests that are due and waiting."""
        decisions = self._engine.poll(now_ns)
        for decision in decisions:
            said = self._live.pop(decision.request_id, None)
            if said is not None:
                self.asked[decision.outcome] += 1
                self.outcomes[decision.outcome] += said
        while self._due and self._due[0][0] <= now_ns:
            _, request_id = self._due.popleft()
            if request_id in self._live:
                explained = explain(self._engine, request_id, now_ns)
                assert explained is not None, "what is not decided lives"
                self._live[request_id] |= explained.is_hopeless
                self._due.append((now_ns + ASKED_NS, request_id))
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Delegate."""
        return self._engine.next_wakeup_ns()

    def check_invariants(self) -> None:
        """Delegate."""
        self._engine.check_invariants()

    @property
    def share(self) -> float | None:
        """Share of them that were served nevertheless; None: no prediction was made."""
        said = sum(self.outcomes.values())
        return self.outcomes[Outcome.DISPATCHED] / said if said else None

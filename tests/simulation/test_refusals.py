"""Which refused requests could have been served: the count of `tests.support.refusals`."""

from collections.abc import Iterable

import pytest

from flowcontrol.config import BandSettings, Concurrency, ControllerConfig, Limits
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Decision, Fact, Reconfigured
from flowcontrol.request import Outcome
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.workload import AtOnce, Poisson
from flowcontrol.simulation.world import World
from tests.support.refusals import Hopeless, refusals
from tests.support.simulated import SECOND, make_plan, workload

TTL_NS = 2 * SECOND


def transcript(*lines: tuple[int, int, str]) -> Iterable[str]:
    """Return lines of one flow: when it came, when it was decided, and how."""
    for number, (arrived, at, outcome) in enumerate(lines):
        yield f"{at} {number} {outcome} 0 a {at - arrived} - -"


class TestCount:
    """By what came of those behind them."""

    @pytest.mark.parametrize(
        ("lines", "could"),
        [
            (((0, 0, "rejected-capacity"), (1, 9, "dispatched")), 1),
            (((0, 0, "rejected-capacity"), (1, 10, "dispatched")), 0),
            (((0, 0, "rejected-capacity"), (1, 11, "evicted-ttl"), (2, 9, "dispatched")), 1),
            (((0, 4, "evicted-displaced"), (1, 9, "dispatched")), 1),
            (((0, 4, "evicted-displaced"), (5, 11, "dispatched")), 0),
            (((0, 3, "dispatched"), (1, 1, "rejected-capacity")), 1),
            (((0, 10, "evicted-ttl"), (1, 1, "rejected-capacity")), 0),
            (((0, 10, "evicted-ttl"), (1, 2, "dispatched"), (3, 3, "rejected-capacity")), 1),
        ],
    )
    def test_turn(self, lines: tuple[tuple[int, int, str], ...], could: int) -> None:
        """It takes the next turn of its flow, in time or not; else it fares as those before."""
        assert list(refusals(transcript(*lines), 10).could.values()) == [could]

    def test_nothing_refused(self) -> None:
        """Then there is no share."""
        assert refusals(transcript((0, 0, "dispatched")), 10).share is None


class Keeping:
    """Lets an engine decide, and makes room for one request more while a certain one waits."""

    def __init__(self, config: ControllerConfig, roomier: ControllerConfig, kept: int) -> None:
        self.engine = FlowController(config, 0)
        self.config, self.roomier, self.kept = config, roomier, kept
        self.outcome: Outcome | None = None
        """What became of it."""

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Make room as it comes."""
        if isinstance(fact, Arrived) and fact.request.request_id == self.kept:
            self.engine.handle(Reconfigured(self.roomier), now_ns)
        self.engine.handle(fact, now_ns)

    def poll(self, now_ns: int) -> list[Decision]:
        """Take the room away as it goes."""
        decisions = self.engine.poll(now_ns)
        for decision in decisions:
            if decision.request_id == self.kept:
                self.outcome = decision.outcome
                self.engine.handle(Reconfigured(self.config), now_ns)
        return decisions

    def next_wakeup_ns(self) -> int | None:
        """Pass on."""
        return self.engine.next_wakeup_ns()

    def check_invariants(self) -> None:
        """Pass on."""
        self.engine.check_invariants()


def run(engine: Keeping | FlowController | Hopeless, job: int = 0) -> Results:
    """Let twice as much be asked of one server as it serves, by two tenants; and a job in the end.

    Args:
        engine: who decides.
        job: how many requests of a third tenant come at once.
    """
    asked = [workload(Poisson(40), tenants={"a": 2.0, "b": 1.0})]
    if job:
        asked.append(workload(AtOnce(job), "job", tenants={"c": 1.0}, from_ns=6 * SECOND))
    return World(engine, make_plan(*asked, duration_ns=8 * SECOND), 1).finish()


def config(flow_requests: int) -> ControllerConfig:
    """Return settings with so many places for each flow; each server has two."""
    return ControllerConfig(
        detectors=(Concurrency(requests_max=2),),
        default_settings=BandSettings(
            ttl_ns=TTL_NS, flow_limits=Limits(requests_max=flow_requests)
        ),
    )


@pytest.mark.slow
class TestKept:
    """The count, against a run for each refused request in which that one is kept."""

    @pytest.mark.parametrize("places", [15, 24])
    def test_upper_bound(self, places: int) -> None:
        """Who would be dispatched is counted, and hardly anybody else."""
        usual = run(FlowController(config(places), 0))
        found = refusals(usual.transcript, TTL_NS)
        sample = list(found.could)[::20]
        kept = {}
        for request_id in sample:
            engine = Keeping(config(places), config(places + 1), request_id)
            run(engine)
            kept[request_id] = engine.outcome is Outcome.DISPATCHED

        assert len(sample) >= 5
        assert {each for each in sample if kept[each]} <= {e for e in sample if found.could[e]}
        assert sum(kept.values()) >= sum(found.could[each] for each in sample) - 1


@pytest.mark.slow
class TestTold:
    """Who is said to be evicted before its turn, against what then happens."""

    def test_job(self) -> None:
        """Of a job that comes at once: of most that are evicted, and of none that is served."""
        engine = Hopeless(FlowController(config(1000), 0))
        results = run(engine, job=400)
        job = results.tenants[0, "c"].outcomes

        assert job[Outcome.DISPATCHED] > 8
        assert engine.outcomes[Outcome.DISPATCHED] == 0
        assert engine.outcomes[Outcome.EVICTED_TTL] > job[Outcome.EVICTED_TTL] / 8 / 2

    def test_people(self) -> None:
        """Who comes one by one is first in the end, just before it is evicted: nobody can say."""
        engine = Hopeless(FlowController(config(1000), 0))
        run(engine)

        assert engine.asked[Outcome.EVICTED_TTL] > 10
        assert engine.asked[Outcome.DISPATCHED] > 10
        assert engine.share is None

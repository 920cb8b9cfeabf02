"""The limit that finds itself: what moves it, in engines of a few lines; and in simulated pools."""

from collections import deque
from itertools import count
from typing import NamedTuple

import pytest

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.config import Adaptive, Concurrency, Limits, Ordering, Picker, Role
from flowcontrol.estimates import Tokens
from flowcontrol.events import Endpoint, LoadObserved, Settled
from flowcontrol.flow import Flow, Lease
from flowcontrol.moves import LimitMove
from flowcontrol.picker import FULL
from flowcontrol.pool import Pool
from flowcontrol.request import FlowKey, Request
from flowcontrol.saturation import make_detectors
from tests.support.overloads import OVERLOADS, goodput, run

SECOND = 1_000_000_000
FLOW = Flow(FlowKey(0, "a"), Ordering.FCFS, Limits())


class Running(NamedTuple):
    """A request inside an engine."""

    ends_ns: int
    sent_ns: int
    began_ns: int
    lease: Lease


class Engines:
    """Engines each of which runs so many requests at once, for about a second each.

    What is sent beyond that queues inside, first come, first served. Before them is a gate where
    there is always a request that waits to go.

    Args:
        places: what runs at once at each endpoint.
        picks: whether the gate chooses the endpoint.
        settings: of the detector.
    """

    def __init__(
        self, places: dict[str, int], *, picks: bool = True, settings: Adaptive | None = None
    ) -> None:
        self.places = places
        self.settles = self.is_healthy = True
        """Whether the access log speaks, and whether engines answer."""
        self.turned_away = False
        self.demand_max: int | None = None
        self.service_ns = SECOND
        self.now_ns = 0
        self.picker = Picker.LEAST_LOADED if picks else Picker.OFF
        self.pool = Pool(self.picker, make_detectors([settings or Adaptive(limit_first=4)]))
        self._running: dict[str, deque[Running]] = {name: deque() for name in places}
        self._numbers = count(1)
        self.become(*places)

    @property
    def detector(self) -> AdaptiveDetector:
        """Return the one that is tested."""
        (detector,) = self.pool.detectors[Role.BOTH]
        assert isinstance(detector, AdaptiveDetector)
        return detector

    @property
    def limits(self) -> dict[str, int]:
        """Return the limit of each endpoint."""
        return {each.address: self.detector.limit_of(each.address) for each in self.pool.endpoints}

    def become(self, *addresses: str) -> None:
        """Have other endpoints."""
        self.pool.set_endpoints([Endpoint(each) for each in addresses], self.now_ns)

    def reconfigure(self, settings: Adaptive, picker: Picker | None = None) -> None:
        """Take other settings."""
        self.picker = picker or self.picker
        self.pool.reconfigure(self.picker, make_detectors([settings]), self.now_ns)

    def run(self, ends: int) -> None:
        """Let so many requests end."""
        for _ in range(ends):
            while self.pool.saturation() < FULL and self._is_wanted():
                self._send()
            queue = min((q for q in self._running.values() if q), key=lambda q: min(q).ends_ns)
            over = min(queue)
            queue.remove(over)
            self.now_ns = max(self.now_ns, over.ends_ns)
            self.pool.release(over.lease, self.now_ns)
            if self.settles:
                self.pool.settled(over.lease, self._settled(over), self.now_ns)

    @property
    def in_flight(self) -> int:
        """Return how many are inside, wherever."""
        return sum(map(len, self._running.values()))

    def _is_wanted(self) -> bool:
        return self.demand_max is None or self.in_flight < self.demand_max

    def _send(self) -> None:
        number = next(self._numbers)
        lease = Lease(Request(number), FLOW, number, 0, Tokens(100, 10), 1.0)
        self.pool.charge(lease, self.now_ns)
        address = lease.endpoint or min(self.places, key=lambda name: len(self._running[name]))
        queue, places = self._running[address], self.places[address]
        ends_ns = sorted(each.ends_ns for each in queue)
        began_ns = self.now_ns if len(queue) < places else ends_ns[-places]
        uneven_ns = number * 7919 % 97 * 5_000_000  # so that not all end at one moment
        queue.append(Running(began_ns + self.service_ns + uneven_ns, self.now_ns, began_ns, lease))

    def _settled(self, over: Running) -> Settled:
        settled = Settled(over.lease.request.request_id, was_turned_away=self.turned_away)
        settled.is_success = self.is_healthy and not self.turned_away
        if settled.is_success:
            settled.ttft_ns = over.began_ns + self.service_ns // 10 - over.sent_ns
        return settled

    def whose(self) -> list[str | None]:
        """Return whose limits moved."""
        return [move.address for move in self.detector.moves.latest]

    def reasons(self) -> str:
        """Return why the limits moved."""
        return "; ".join(move.reason for move in self.detector.moves.latest)


class TestLimit:
    """Where it ends up."""

    @pytest.mark.parametrize("picks", [True, False])
    @pytest.mark.parametrize("places", [3, 10, 40])
    def test_what_fits(self, places: int, picks: bool) -> None:  # noqa: FBT001 - both
        """As many as run at once, and few more; from below and from above."""
        for first in (2, 4 * places):
            engines = Engines(
                {"a": places, "b": places}, picks=picks, settings=Adaptive(limit_first=first)
            )
            engines.run(1000 + 60 * places)
            assert places * 2 <= engines.detector.limit <= places * 2 * 1.2 + 2

    @pytest.mark.parametrize("picks", [True, False])
    def test_without_settlements(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Departures alone tell nearly as much."""
        engines = Engines({"a": 10, "b": 10}, picks=picks)
        engines.settles = False
        engines.run(6000)
        assert 18 <= engines.detector.limit <= 30

    def test_each_endpoint_has_its_own(self) -> None:
        """A large and a small one, where the engine picks."""
        engines = Engines({"large": 30, "small": 5})
        engines.run(6000)
        assert 30 <= engines.limits["large"] <= 36
        assert 5 <= engines.limits["small"] <= 7
        assert engines.detector.endpoint_saturation("small") <= FULL

    def test_a_quiet_night_raises_nothing(self) -> None:
        """Who is asked for three at a time learns nothing about the fourth."""
        engines = Engines({"a": 10})
        engines.demand_max = 3
        engines.run(2000)
        assert engines.detector.limit == 4

    def test_within_its_bounds(self) -> None:
        """Not above what is set, and never below one."""
        engines = Engines({"a": 40, "b": 40}, settings=Adaptive(limit_first=2, limit_max=6))
        engines.run(3000)
        assert engines.limits == {"a": 6, "b": 6}
        engines.turned_away = True
        engines.run(3000)
        assert engines.limits == {"a": 1, "b": 1}

    def test_slower_model(self) -> None:
        """What used to be the least is no measure any more: it is learnt again, the limit stays."""
        engines = Engines({"a": 10})
        engines.run(2000)
        engines.service_ns *= 20
        engines.run(3000)
        assert 8 <= engines.detector.limit <= 14

    def test_slower_without_settlements(self) -> None:
        """The same, seen by departures alone."""
        engines = Engines({"a": 20})
        engines.settles = False
        engines.run(2000)
        engines.service_ns *= 3
        engines.run(6000)
        assert 14 <= engines.detector.limit <= 34


class TestMoves:
    """What moves it, and what is said of it."""

    def test_explained(self) -> None:
        """Up while no request waits inside, by half; down where many do."""
        engines = Engines({"a": 10})
        engines.run(400)
        first, *_ = engines.detector.moves.latest
        assert first == LimitMove(first.at_ns, "a", 4.0, 6.0, "0% of those in flight wait inside")
        falls = [move for move in engines.detector.moves.latest if move.after < move.before]
        assert falls
        assert all(move.reason.endswith("% of those in flight wait inside") for move in falls)

    def test_turned_away(self) -> None:
        """An engine that says it has no room is believed: a fifth less."""
        engines = Engines({"a": 10}, settings=Adaptive(limit_first=10))
        engines.run(1)
        engines.turned_away = True
        engines.run(40)
        assert "engines refused 6 of 6" in engines.reasons()
        assert engines.detector.limit < 10

    def test_other_failures_move_nothing(self) -> None:
        """Invalid requests are not the engine's load."""
        engines = Engines({"a": 10})
        engines.run(1)
        engines.is_healthy = False
        engines.run(1000)
        assert not engines.detector.moves.latest

    def test_lost_settlements(self) -> None:
        """Where half of the access log is lost, the other half does."""
        engines = Engines({"a": 10})
        for _ in range(3000):
            engines.settles = not engines.settles
            engines.run(1)
        assert 10 <= engines.detector.limit <= 13

    def test_silence(self) -> None:
        """When the access log ceases, departures judge from then on, for all endpoints together."""
        engines = Engines({"a": 10, "b": 10})
        engines.run(2000)
        assert set(engines.whose()) == {"a", "b"}
        engines.settles = False
        engines.places = {"a": 40, "b": 40}
        engines.run(5000)
        assert engines.whose()[-1] is None
        assert engines.detector.limit > 30
        engines.settles = True
        engines.places = {"a": 10, "b": 10}
        engines.run(3000)
        assert engines.whose()[-1] in {"a", "b"}
        assert 20 <= engines.detector.limit <= 50


class TestChanges:
    """What stays when endpoints or settings change."""

    def test_newcomer_has_the_usual_limit(self) -> None:
        """Who joins is trusted with what the others do; who stays keeps its own."""
        engines = Engines({"a": 10, "b": 10, "c": 10})
        engines.become("a", "b")
        engines.run(3000)
        before = engines.limits
        engines.become("a", "b", "c")
        assert engines.limits == before | {"c": (before["a"] + before["b"]) // 2}
        engines.become("c")
        assert engines.detector.limit == engines.limits["c"]

    def test_shared_limit_follows_the_pool(self) -> None:
        """While Envoy picks, half the endpoints have half the limit."""
        engines = Engines({"a": 10, "b": 10}, picks=False)
        engines.run(3000)
        before = engines.detector.limit
        engines.become("a")
        assert engines.detector.limit == before // 2
        assert engines.detector.moves.latest[-1].reason == "2 endpoints became 1"
        engines.become("a")
        assert engines.detector.moves.latest[-1].reason == "2 endpoints became 1"

    def test_settings(self) -> None:
        """Another bound does not forget the limit, but holds at once."""
        engines = Engines({"a": 10, "b": 10})
        engines.run(3000)
        before, moves = engines.limits, list(engines.detector.moves.latest)
        engines.reconfigure(Adaptive(limit_first=4, limit_max=100))
        assert engines.limits == before
        assert list(engines.detector.moves.latest) == moves
        engines.reconfigure(Adaptive(limit_first=4, limit_max=5))
        assert engines.limits == {"a": 5, "b": 5}

    def test_picker(self) -> None:
        """Limits are divided and put together again, when it is another who picks."""
        engines = Engines({"a": 10, "b": 10})
        engines.run(3000)
        limit = engines.detector.limit
        engines.reconfigure(Adaptive(limit_first=4), Picker.OFF)
        assert abs(engines.detector.limit - limit) <= 1
        engines.run(300)
        engines.reconfigure(Adaptive(limit_first=4), Picker.LEAST_LOADED)
        engines.run(300)
        assert sum(engines.limits.values()) == engines.detector.limit >= 20

    @pytest.mark.parametrize("picks", [True, False])
    def test_who_ends_in_an_empty_pool(self, picks: bool) -> None:  # noqa: FBT001 - both
        """While every endpoint is away, what they answer still counts, by whichever evidence."""
        engines = Engines({"a": 10}, picks=picks, settings=Adaptive(limit_first=10))
        engines.run(10)
        engines.turned_away = True
        engines.become()
        engines.run(9)
        engines.become("a")
        assert "engines refused 6 of 6" in engines.reasons()
        assert engines.detector.limit < 10

        engines = Engines({"a": 200}, picks=picks, settings=Adaptive(limit_first=90))
        engines.settles = False
        engines.demand_max = 90
        engines.run(1)
        engines.become()
        engines.run(engines.in_flight)
        engines.become("a")
        assert engines.detector.limit == 135

    @pytest.mark.parametrize("picks", [True, False])
    def test_news_in_an_empty_pool(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Settings and the first settlement may come while no endpoint is there."""
        engines = Engines({"a": 10, "b": 10}, picks=picks)
        engines.settles = False
        engines.run(10)
        engines.settles = True
        engines.become()
        engines.run(1)
        engines.become("a", "b")
        engines.run(3000)
        before = engines.limits
        engines.become()
        engines.run(engines.in_flight)
        engines.reconfigure(Adaptive(limit_first=4, limit_max=100))
        engines.become("a", "b")
        assert engines.limits == before
        assert (None in engines.whose()[-9:]) is not picks

    def test_settled_before_anybody_decodes(self) -> None:
        """A stage that has never had an endpoint learns nothing, until one comes."""
        pool = (Endpoint("p", Role.PREFILL), Endpoint("d", Role.DECODE))
        gate = Pool(Picker.OFF, make_detectors([Adaptive(limit_first=4)]))
        gate.set_endpoints(pool[:1], 0)
        lease = Lease(Request(1), FLOW, 1, 0, Tokens(100, 10), 1.0)
        gate.charge(lease, 0)
        gate.release(lease, SECOND)
        gate.settled(lease, Settled(1, ttft_ns=SECOND // 10), SECOND)
        gate.set_endpoints(pool, SECOND)
        (decodes,) = gate.detectors[Role.DECODE]
        assert isinstance(decodes, AdaptiveDetector)
        assert (decodes.limit, decodes.saturation()) == (4, 0)

    def test_needs_no_metrics(self) -> None:
        """A scrape changes nothing, nor does time alone."""
        engines = Engines({"a": 10})
        engines.pool.observed(LoadObserved("a", 1000, 1000, 1.0), 0)
        engines.pool.advance(SECOND)
        engines.detector.advance(SECOND)
        assert engines.pool.saturation() == 0
        assert engines.detector.next_change_ns() is None
        assert engines.pool.next_change_ns() is None

    def test_who_has_left_judges_nothing(self) -> None:
        """What ends at an endpoint that is gone belongs to no limit."""
        engines = Engines({"a": 10, "b": 10})
        engines.run(500)
        engines.become("a")
        before = engines.limits
        engines.run(12)
        assert engines.limits == before


@pytest.mark.slow
class TestGoodput:
    """Within a tenth of the best fixed limit, with no setting; all of it is in the benchmark."""

    @pytest.mark.parametrize(
        ("name", "pool", "best"), [("long prompts", "uniform", 7), ("heavy tails", "mixed", 16)]
    )
    def test_as_good_as_tuned(self, name: str, pool: str, best: int) -> None:
        """Requests are answered in time as with the limit that a sweep found best."""
        overload = OVERLOADS[name]
        tuned = goodput(run(overload, pool, Concurrency(requests_max=best), minutes=10))
        wrong = goodput(run(overload, pool, Concurrency(requests_max=2 * best), minutes=10))
        found = goodput(run(overload, pool, Adaptive(), minutes=10))
        assert found >= 0.9 * tuned
        assert found >= 1.2 * wrong

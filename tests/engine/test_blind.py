"""The limit of a stage by departures alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.auto import AutoDetector
from flowcontrol.config import Auto, ControllerConfig, Picker, Role
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    EndpointsChanged,
    Left,
    LoadObserved,
    MemoryRestored,
    Settled,
)
from flowcontrol.memory import EngineMemory, PlaceMemory, StageMemory
from flowcontrol.request import Request
from flowcontrol.simulation.distributions import Lognormal
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.workload import Independent, Poisson, Workload
from flowcontrol.simulation.world import World
from tests.support.effects import SERVER, SMALL
from tests.support.overloads import MINUTE, SECOND

NARROW = replace(SERVER, kv_tokens=24 * 1024)
"""Forty fill its cache."""


def _engine(picker: Picker = Picker.LEAST_LOADED) -> FlowController:
    return FlowController(ControllerConfig(detectors=(Auto(),), picker=picker), 0)


def _limits(server: ModelServerConfig, picker: Picker) -> list[float]:
    """Return the limit at each endpoint after every move, with more to do than can be done."""
    engine = _engine(picker)
    plan = Plan(
        duration_ns=6 * MINUTE,
        servers=tuple(ServerSpec(address=f"s{number}", config=server) for number in range(4)),
        workloads=(
            Workload(
                name="job",
                arrivals=Poisson(100),
                lengths=Independent(Lognormal(300, 0.7, 2000), Lognormal(100, 0.6, 700)),
            ),
        ),
        settlement_delay_ns=None,
        scrape_interval_ns=None,
    )
    World(engine, plan, 1).run_until(6 * MINUTE)
    return [move.after for move in _detector(engine).moves.latest]


def _detector(engine: FlowController) -> AutoDetector:
    (detector,) = engine.pool.detectors[Role.BOTH]
    assert isinstance(detector, AutoDetector)
    return detector


@pytest.mark.slow
class TestFound:
    """What an engine can do is found, as far as departures tell."""

    @pytest.mark.parametrize(
        ("server", "least", "most"), [(SMALL, 10, 26), (SERVER, 40, 250), (NARROW, 16, 60)]
    )
    @pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
    def test_limit(
        self, server: ModelServerConfig, picker: Picker, least: float, most: float
    ) -> None:
        """It stops where more in flight gains little, and not before."""
        limits = _limits(server, picker)

        assert least <= limits[-1] <= most
        assert max(limits) <= 2 * most

    @pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
    def test_stays(self, picker: Picker) -> None:
        """Near an edge the limit falls by what cohorts in a row say, not by one that is off."""
        limits = _limits(SMALL, picker)

        assert min(limits[2:]) >= 12  # of 16 that run; by every single cohort it falls to 10


class _Pool:
    """Two endpoints that serve at a fixed rate each, however many are in flight, or faster.

    Args:
        gain: how much more is served with twice as much in flight, as an exponent of two.
        known: of the endpoints, found before.
    """

    def __init__(self, gain: float, endpoints: int = 2, known: StageMemory | None = None) -> None:
        self.engine = _engine()
        self.addresses = tuple(f"s{number}" for number in range(endpoints))
        self.engine.handle(EndpointsChanged(self.addresses), 0)
        if known is not None:
            self.engine.handle(MemoryRestored(EngineMemory(stages=(known,))), 0)
        self._gain = gain
        self._now_ns = 0
        self._asked = 0
        self._at: dict[str, list[int]] = {address: [] for address in self.addresses}
        self._due: dict[str, float] = dict.fromkeys(self.addresses, 0.0)

    @property
    def limits(self) -> list[int]:
        """The limit at each endpoint."""
        return [_detector(self.engine).limit_of(address) for address in self.addresses]

    @property
    def remembered(self) -> StageMemory:
        """What another would go on with."""
        (stage,) = self.engine.learned.memory(self._now_ns).stages
        return stage

    def run(self, seconds: float) -> None:
        """Serve first come, first served, with always more to do."""
        end_ns = self._now_ns + round(seconds * SECOND)
        while self._now_ns < end_ns:
            self._now_ns += SECOND // 100
            self._fill()
            for address, inside in self._at.items():
                self._due[address] += 0.1 * max(1, len(inside)) ** self._gain
                while self._due[address] >= 1 and inside:
                    self._due[address] -= 1
                    self.engine.handle(Left(inside.pop(0)), self._now_ns)

    def run_to_comparison(self) -> None:
        """Serve until half of the endpoints have more."""
        for _ in range(600):
            self.run(0.5)
            if len(set(self.limits)) == 2:
                return
        pytest.fail("no comparison")

    def replace_all(self, times: int) -> None:
        """Let one at each endpoint leave, and another come, all at the same time."""
        for _ in range(times):
            for inside in self._at.values():
                self.engine.handle(Left(inside.pop(0)), self._now_ns)
            self._fill()

    def _fill(self) -> None:
        while self.engine.waiting < 8:
            self.engine.handle(Arrived(Request(self._asked)), self._now_ns)
            self._asked += 1
        for decision in self.engine.poll(self._now_ns):
            assert decision.endpoint is not None
            self._at[decision.endpoint].append(decision.request_id)


class TestGain:
    """More in flight at half of the endpoints shows what more in flight gains."""

    @pytest.mark.parametrize(("gain", "rises"), [(0.9, True), (0.0, False)])
    def test_direction(self, gain: float, *, rises: bool) -> None:
        """Where it gains, the limit rises; where it only waits longer, it does not."""
        pool = _Pool(gain)
        pool.run(100)

        assert (min(pool.limits) > 16) == rises
        assert max(pool.limits) < (10_000 if rises else 16)

    @pytest.mark.parametrize("limit", [1.0, 1.9, 3.7])
    def test_low(self, limit: float) -> None:
        """Nor does it stay low because only whole requests are sent."""
        places = {f"s{n}": PlaceMemory(requests=limit, calm=limit) for n in range(4)}
        pool = _Pool(0.9, endpoints=4, known=StageMemory(Role.BOTH, places))
        pool.run(300)

        assert min(pool.limits) >= 2 * limit

    def test_remembered(self) -> None:
        """What another goes on with is the limit, not what a half has while it is asked."""
        pool = _Pool(0.0)
        pool.run_to_comparison()
        kept = {place.requests for place in pool.remembered.places.values()}

        assert len(kept) == 1
        assert min(pool.limits) < min(kept) < max(pool.limits)

    def test_goes_on(self) -> None:
        """Another knows how long the shortest take, and where more gained too little."""
        pool = _Pool(0.0)
        pool.run(300)
        stage = pool.remembered
        other = _Pool(0.0, known=stage)
        other.run(3)

        assert stage.edge > 0
        assert stage.shortest_ns > 0
        assert other.remembered == stage

    def test_halves(self) -> None:
        """While it is asked one half has more, and a word of an endpoint ends it at once."""
        pool = _Pool(0.0)
        pool.run_to_comparison()
        few, many = sorted(pool.limits)
        assert many / few == pytest.approx(1.3**2, abs=0.3)

        detector = _detector(pool.engine)
        before, heard = detector.revision, LoadObserved("s0", waiting=0, running=1, kv_usage=0.1)
        pool.engine.handle(heard, round(900 * SECOND))
        assert detector.revision > before  # the other endpoint has another load now
        assert len(set(pool.limits)) == 1
        assert few < pool.limits[0] < many

    def test_at_once(self) -> None:
        """What leaves in no time tells nothing, and divides nothing."""
        pool = _Pool(0.0)
        pool.run_to_comparison()
        pool.replace_all(300)

        assert len(set(pool.limits)) == 1

    def test_endpoints_change(self) -> None:
        """Whoever comes or goes meanwhile, all limits are one again, and it goes on."""
        pool = _Pool(0.0, endpoints=3)
        pool.run_to_comparison()
        pool.addresses = pool.addresses[:2]
        pool.engine.handle(EndpointsChanged(pool.addresses), round(301 * SECOND))
        assert len(set(pool.limits)) == 1


_STEPS = st.one_of(
    st.tuples(st.just("serve"), st.integers(1, 400), st.integers(0, 3)),
    st.tuples(st.just("end all"), st.just(0), st.integers(0, 1)),
    st.tuples(st.just("endpoints"), st.integers(1, 5), st.just(0)),
)
"""What, how many, and so many ms after each."""


class TestAnything:
    """Whatever leaves when, at the same time or never."""

    @given(st.lists(_STEPS, min_size=1, max_size=30))
    def test_limits(self, steps: list[tuple[str, int, int]]) -> None:
        """There is always room for one, and no more is sent than the limits allow."""
        engine = _engine()
        inside: list[int] = []
        now_ns, asked = 0, 0
        engine.handle(EndpointsChanged(("s0", "s1")), now_ns)
        for what, count, ms in steps:
            if what == "endpoints":
                engine.handle(
                    EndpointsChanged(tuple(f"s{number}" for number in range(count))), now_ns
                )
            for _ in range(count if what == "serve" else 1):
                now_ns += ms * 1_000_000
                for _ in range(len(inside) if what == "end all" else 1):
                    if inside:
                        engine.handle(Left(inside.pop(0)), now_ns)
                engine.handle(Arrived(Request(asked)), now_ns)
                asked += 1
                limit, before = _detector(engine).limit, len(inside)
                inside += [decision.request_id for decision in engine.poll(now_ns)]
                assert limit >= 1
                assert len(inside) <= max(limit, before)
        assert engine.in_flight == len(inside)


class TestSilence:
    """Evidence that stops coming is missed, and departures are all that is left."""

    def test_beginning(self) -> None:
        """Two seconds are left to endpoints and the log to say their first word."""
        pool = _Pool(0.9)
        pool.run(1.9)
        assert set(pool.limits) == {8}

        pool.run(90)
        assert min(pool.limits) > 8

    def test_log_stops(self) -> None:
        """Without a settlement for a minute, while requests end, the limit goes by departures."""
        pool = _Pool(0.9)
        pool.engine.handle(Arrived(Request(1_000_000)), 0)
        pool.engine.poll(0)
        pool.engine.handle(Settled(1_000_000, ttft_ns=SECOND // 10), 0)
        pool.run(30)
        assert max(pool.limits) == 8

        pool.run(90)
        assert min(pool.limits) > 8
        assert "departures" in _detector(pool.engine).moves.latest[-1].reason

"""How much a lower band leaves free: the formula, what is learnt, and what comes of it."""

from math import inf, nextafter
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowcontrol.config import BandSettings, Ceilings, CeilingSettings, Concurrency
from flowcontrol.memory import CountsMemory
from flowcontrol.reserve import EventCounts, Reserve, places
from flowcontrol.simulation.distributions import Fixed, Lognormal
from flowcontrol.simulation.workload import AtOnce, Independent, Poisson
from tests.support.simulated import SECOND, make_controller, make_plan, run, workload

TARGET = 0.01


class TestPlaces:
    """The bound, held against chance."""

    @pytest.mark.parametrize(("arrivals", "departures"), [(2.0, 10.0), (5.0, 10.0), (8.0, 10.0)])
    def test_single_arrivals(self, arrivals: float, departures: float) -> None:
        """With so many places free, and no fewer, arrivals by chance find none as often as said."""
        free = places(arrivals, 1.0, departures, TARGET)

        assert _found_none(arrivals, 1, departures, int(free) + 1) <= 1.3 * TARGET
        assert _found_none(arrivals, 1, departures, int(free / 2)) > TARGET

    def test_batches(self) -> None:
        """Arrivals that come together need more, and get it."""
        free = places(4.0, 8.0, 10.0, TARGET)

        assert free > 3 * places(4.0, 1.0, 10.0, TARGET)
        assert _found_none(4.0, 8, 10.0, int(free) + 1) <= 1.3 * TARGET

    @pytest.mark.parametrize(
        ("arrivals", "target", "free"),
        [(0.0, TARGET, 0.0), (5.0, 1.0, 0.0), (0.001, TARGET, 0.0)],
    )
    def test_none(self, arrivals: float, target: float, free: float) -> None:
        """Nothing is needed without arrivals, or with a wait target of 1."""
        assert places(arrivals, 1.0, 10.0, target) == free

    @given(
        arrivals=st.floats(0, 1e6),
        batch=st.floats(1, 256),
        departures=st.floats(0, 1e9),
        target=st.floats(1e-6, 1),
    )
    @example(arrivals=0.01, batch=256.0, departures=1000.0, target=TARGET)
    @example(arrivals=10.0, batch=1.0, departures=nextafter(10.0, 11.0), target=TARGET)
    def test_any(self, arrivals: float, batch: float, departures: float, target: float) -> None:
        """Whatever is measured, it is a number; a burst after a long silence, too."""
        free = places(arrivals, batch, departures, target)

        assert 0.0 <= free < inf
        assert places(arrivals, 1.0, departures, target) <= free * (1 + 1e-9)

    def test_no_end(self) -> None:
        """More arrivals than departures are never satisfied."""
        assert places(11.0, 1.0, 10.0, TARGET) > 1e6


def _found_none(arrivals: float, batch: int, departures: float, most: int) -> float:
    """Return which part of arrivals finds no place free, of a reserve of so many."""
    chance = Random(1)
    free, came, without = most, 0, 0
    part = arrivals / batch / (arrivals / batch + departures)
    for _ in range(300_000):
        if chance.random() >= part:
            free = min(most, free + 1)
            continue
        for _ in range(batch):
            came += 1
            without += free <= 0
            free -= 1
    return without / came


class TestCounts:
    """Rates and bursts."""

    @pytest.mark.parametrize("batch", [1, 10])
    def test_batch(self, batch: int) -> None:
        """The variance tells how many come together."""
        counts, chance, now_ns = EventCounts(0), Random(1), 0
        while now_ns < 120 * SECOND:
            now_ns += round(chance.expovariate(20 / batch) * SECOND)
            for _ in range(batch):
                counts.count(now_ns)

        assert counts.per_second == pytest.approx(20, rel=0.25)
        assert counts.batch == pytest.approx(batch, rel=0.7)

    def test_silence(self) -> None:
        """What was long ago is forgotten, at a cost that does not depend on how long it was."""
        counts = EventCounts(0)
        for _ in range(100):
            counts.count(0)
        counts.advance(10 * 365 * 86_400 * SECOND)

        assert counts.per_second == 0


class TestReserve:
    """The ceilings."""

    def make(self) -> Reserve:
        """Return one for people over a job, of whom five come a second and ten leave."""
        reserve = Reserve(0)
        config = make_controller().config
        reserve.set_bands([10, -1], config, 0)
        chance, now_ns = Random(1), 0
        for _ in range(900):
            now_ns += round(chance.expovariate(15) * SECOND)
            if chance.random() < 1 / 3:
                reserve.arrived(10, now_ns)
                reserve.sent(10, 0.01)
            else:
                reserve.left(now_ns)
                reserve.sent(-1, 0.01)
            reserve.renew(1.0, 1.0, now_ns)
        self.now_ns = now_ns
        return reserve

    def test_learnt(self) -> None:
        """About seven places of a hundred are left to those who take half of what gets free."""
        top, low = self.make().ceilings

        assert top == 1
        assert 0.85 < low < 0.95

    def test_low_ceiling(self) -> None:
        """Where the highest band may fill a fifth, a quarter of that is the most: never all of it.

        Else the job would not go at an empty pool, and nothing would happen that could let it.
        """
        reserve = self.make()
        for _ in range(100):
            reserve.arrived(10, self.now_ns)
        reserve.renew(0.2, 0.2, self.now_ns + SECOND)

        assert reserve.ceilings == [0.2, pytest.approx(0.15)]

    def test_remembered(self) -> None:
        """Another that goes on with it leaves as many free at once."""
        reserve, config = self.make(), make_controller().config
        memory = reserve.remember(self.now_ns)
        assert memory is not None
        other = Reserve(self.now_ns)
        other.set_bands([10, 0, -1], config, self.now_ns)
        other.restore(memory, self.now_ns)
        for each in (reserve, other):
            each.renew(1.0, 1.0, self.now_ns + SECOND)

        assert other.ceilings[0] == 1
        assert other.ceilings[-1] == pytest.approx(reserve.ceilings[1], abs=0.005)
        assert reserve.ceilings[1] < 0.95

    def test_asking_changes_nothing(self) -> None:
        """Whether it was asked in a long silence or not, it goes on alike."""
        asked, other = self.make(), self.make()
        for second in range(0, 900, 10):
            asked.remember(self.now_ns + second * SECOND)
        for each in (asked, other):
            each.arrived(10, self.now_ns + 900 * SECOND)
        at_ns = self.now_ns + 905 * SECOND

        assert asked.remember(at_ns) == other.remember(at_ns)

    def test_remembered_otherwise(self) -> None:
        """What counts by other scales is not taken for these."""
        counts = EventCounts(0)
        counts.resume(CountsMemory((1.0,), (5.0,), (25.0,)), SECOND)

        assert counts.per_second == 0

    def test_nothing_to_remember(self) -> None:
        """A new one has learnt nothing."""
        assert Reserve(0).remember(SECOND) is None

    def test_forgotten(self) -> None:
        """When nothing has come for some minutes nothing is held back."""
        reserve = self.make()
        reserve.renew(1.0, 1.0, self.now_ns + 600 * SECOND)

        assert reserve.ceilings == [1, 1]


@pytest.mark.slow
class TestWaits:
    """What people notice beside a job."""

    def waited(self, policy: Ceilings, target: float = TARGET) -> tuple[float, int]:
        """Return which part of the people found no place at once, and when the job was over."""
        lengths = Independent(Fixed(10), Lognormal(100, 0.5, 500))
        people = workload(Poisson(2), "chat", objective="chat", lengths=lengths)
        job = workload(AtOnce(600), "job", objective="batch", lengths=lengths, from_ns=30 * SECOND)
        engine = make_controller(
            detectors=(Concurrency(requests_max=8),),
            ceilings=CeilingSettings(policy=policy),
            default_settings=BandSettings(wait_target=target),
        )
        plan = make_plan(people, job, duration_ns=180 * SECOND, servers=4)
        results = run(plan, engine)
        waits = results.band(10).waits_ns
        return sum(each > 0 for each in waits) / len(waits), results.band(-1).ended_ns

    def test_share(self) -> None:
        """Hardly anybody waits, and the job ends hardly later; static lets most of them wait."""
        static, static_ns = self.waited(Ceilings.STATIC)
        kept, kept_ns = self.waited(Ceilings.RESERVE)

        assert static > 0.3
        assert kept <= 0.03
        assert kept_ns < 1.25 * static_ns

    def test_target(self) -> None:
        """Who does not mind waiting costs the job nothing."""
        assert self.waited(Ceilings.RESERVE, 1.0) == self.waited(Ceilings.STATIC)

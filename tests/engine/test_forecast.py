"""What a waiting request can expect, against counting and against what then happens."""

from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import (
    BandSettings,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Ordering,
    Picker,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged, Settled
from flowcontrol.forecast import Ahead, Calibration, Forecast, forecast
from flowcontrol.request import Outcome, Request
from flowcontrol.retry import DrainRate

SECOND = 1_000_000_000


def draining(per_second: int) -> DrainRate:
    """Return a rate of so many a second, as of 100 s."""
    rate = DrainRate(0)
    rate.began(0)
    for index in range(100 * per_second):
        rate.dispatched(index * SECOND // per_second)
    return rate


class TestInterval:
    """What the rates say, corrected by what came true."""

    @pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
    def test_interval(self, factor: float) -> None:
        """However wrong the rates are, half stay within the one and nine in ten the other."""
        calibration, chance = Calibration(), Random(1)
        within = late = 0
        for number in range(3000):
            said = calibration.apply(Forecast(9, None, raw_ns=10 * SECOND))
            waited_ns = round(10 * SECOND * factor * chance.lognormvariate(0, 0.5))
            assert said.wait_ns is not None
            assert said.late_ns is not None
            if number >= 200:
                within += waited_ns <= said.wait_ns
                late += waited_ns <= said.late_ns
            calibration.learn(said, waited_ns, is_over=True)

        assert within / 2800 == pytest.approx(0.5, abs=0.05)
        assert late / 2800 == pytest.approx(0.91, abs=0.04)

    def test_evicted(self) -> None:
        """One that was evicted late would have waited longer; one evicted soon says nothing."""
        calibration = Calibration()
        before = calibration.apply(Forecast(0, None, raw_ns=10 * SECOND))
        calibration.learn(before, SECOND, is_over=False)
        assert calibration.apply(Forecast(0, None, raw_ns=10 * SECOND)) == before

        calibration.learn(before, 60 * SECOND, is_over=False)
        after = calibration.apply(Forecast(0, None, raw_ns=10 * SECOND))
        assert after.wait_ns is not None
        assert before.wait_ns is not None
        assert after.wait_ns > before.wait_ns

    @pytest.mark.parametrize(
        ("departures", "early", "middle", "late"), [(1, 0, 0.69, 2.53), (100, 0.79, 1.0, 1.15)]
    )
    def test_random_departures(
        self, departures: int, early: float, middle: float, late: float
    ) -> None:
        """Before anything came true: by how many must go first, and a margin for all else."""
        calibration = Calibration()
        said = calibration.apply(Forecast(0, None, raw_ns=9 * SECOND, departures=departures))

        assert said.wait_ns == pytest.approx(middle * 9 * SECOND, rel=0.02)
        assert said.late_ns == pytest.approx(2 * late * 9 * SECOND, rel=0.02)
        assert calibration.early(said) == pytest.approx(0.4 * early * 9 * SECOND, rel=0.03)

    def test_known_end_is_a_kind_of_its_own(self) -> None:
        """However wrong waits by the rates are, those of a known end are as they are said."""
        calibration = Calibration()
        by_rates = calibration.apply(Forecast(0, None, raw_ns=SECOND))
        known = calibration.apply(Forecast(0, None, raw_ns=SECOND, departures=0))
        for _ in range(200):
            calibration.learn(by_rates, 3 * SECOND, is_over=True)
            calibration.learn(known, SECOND, is_over=True)
        later = calibration.apply(known)

        assert known.wait_ns == SECOND
        assert later.wait_ns == pytest.approx(SECOND, rel=0.03)
        assert later.late_ns == pytest.approx(SECOND, rel=0.1)
        assert calibration.apply(by_rates).wait_ns == pytest.approx(3 * SECOND, rel=0.1)

    def test_unknown_stays_unknown(self) -> None:
        """Nothing is said where the rates say nothing."""
        assert Calibration().apply(Forecast(5, None)) == Forecast(5, None)


class TestForecast:
    """Position and wait."""

    def test_unknown_rates_forecast_no_wait(self) -> None:
        """But a position."""
        assert forecast(2, Ahead(3), (DrainRate(0), DrainRate(0)), 0) == Forecast(5, None)

    def test_slower_of_band_and_all_counts(self) -> None:
        """What arrives above takes from the band; what waits above goes first."""
        now_ns = 100 * SECOND

        own = forecast(0, Ahead(9), (draining(2), draining(10)), now_ns)
        above = forecast(40, Ahead(9), (draining(2), draining(5)), now_ns)

        assert own.position == 9
        assert own.wait_ns == pytest.approx(5 * SECOND, rel=0.04)
        assert above.position == 49
        assert above.wait_ns == pytest.approx(10 * SECOND, rel=0.02)

    def test_whoever_overtakes_takes_time(self) -> None:
        """Of 10 a second 8 go to requests that come later, so 2 a second to what is ahead."""
        found = forecast(0, Ahead(9, 0.8), (draining(10), draining(10)), 100 * SECOND)

        assert found.position == 9
        assert found.wait_ns == pytest.approx(5 * SECOND, rel=0.04)

    def test_band_never_served_is_forecast_by_all(self) -> None:
        """Once those above have gone, it is its turn."""
        found = forecast(40, Ahead(9), (DrainRate(0), draining(5)), 100 * SECOND)

        assert found.position == 49
        assert found.wait_ns == pytest.approx(10 * SECOND, rel=0.02)

    def test_band_that_waits_in_vain_knows_nothing(self) -> None:
        """Once a request has waited longer than that, unserved, the band may as well be gated."""
        gated, pool = DrainRate(0), draining(5)
        gated.began(98 * SECOND)

        at_first = forecast(0, Ahead(19), (gated, pool), 100 * SECOND)
        later = forecast(0, Ahead(19), (gated, pool), 103 * SECOND)

        assert at_first.wait_ns == pytest.approx(4 * SECOND, rel=0.02)
        assert later == Forecast(19, None)


class TestHeld:
    """Places are free, but prompts have to be read first."""

    def test_next_in_line_goes_when_they_are_read(self) -> None:
        """Whatever the rates are, and whether or not they are known."""
        for rates in ((DrainRate(0), DrainRate(0)), (draining(2), draining(5))):
            found = forecast(0, Ahead(0), rates, 100 * SECOND, held_ns=SECOND // 8)

            assert (found.wait_ns, found.departures) == (SECOND // 8, 0)

    def test_those_ahead_go_by_the_rates(self) -> None:
        """Three after the first."""
        found = forecast(0, Ahead(3), (draining(2), draining(5)), 100 * SECOND, held_ns=SECOND)

        assert found.wait_ns == pytest.approx(2.5 * SECOND, rel=0.04)
        assert found.departures == 3

    @staticmethod
    def held_engine(**settings: object) -> tuple[FlowController, int]:
        """Return an engine that has seen prompts of 1,000 and 8,000 tokens read, and the time."""
        config = {"picker": Picker.LEAST_LOADED, "forecasts": True, **settings}
        controller = FlowController(ControllerConfig(**config), 0)  # type: ignore[arg-type]  # keywords of a test
        controller.handle(EndpointsChanged(("a",)), 0)
        controller.handle(ObjectivesChanged({"chat": 10, "batch": -1}), 0)
        now_ns = 0
        for number in range(40):  # 0.1 ms a token
            tokens = 8000 if number % 2 else 1000
            controller.handle(Arrived(Request(number, input_tokens=tokens)), now_ns)
            controller.poll(now_ns)
            now_ns += SECOND
            controller.handle(Left(number), now_ns)
            ttft_ns = tokens * SECOND // 10_000
            controller.handle(Settled(number, ttft_ns=ttft_ns, generation_ns=0), now_ns)
            controller.poll(now_ns)
        return controller, now_ns

    def test_engine_knows(self) -> None:
        """A prompt after another waits for exactly as long as it is said to."""
        controller, now_ns = self.held_engine()
        controller.handle(Arrived(Request(100, input_tokens=8000)), now_ns)
        controller.handle(Arrived(Request(101, input_tokens=1000)), now_ns)
        (first,) = controller.poll(now_ns)
        wakeup_ns = controller.next_wakeup_ns()
        assert wakeup_ns is not None
        (second,) = controller.poll(wakeup_ns)

        assert (first.request_id, second.request_id) == (100, 101)
        assert second.waited_ns == wakeup_ns - now_ns > SECOND // 10
        assert second.expected_wait_ns == pytest.approx(second.waited_ns, rel=0.01)

    def test_gated_band_is_not_next(self) -> None:
        """A band for which the places that are free are too few does not go when they are read."""
        ceilings = CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=0.0)
        controller, now_ns = self.held_engine(ceilings=ceilings)
        for number, objective in ((100, "chat"), (101, "batch")):
            request = Request(number, objective=objective, input_tokens=8000)
            controller.handle(Arrived(request), now_ns)
        controller.poll(now_ns)

        assert controller.pool.held_ns(now_ns)
        assert controller.expected(101, now_ns) == Forecast(0, None)


class World:
    """A pool of so many slots before an engine, and flows of which the first are hot.

    Args:
        fairness: of the one band.
        costs: of the requests of each flow in turn, in tokens of input.
        flows: how many.
        forecasts: whether every wait is forecast as it begins.
    """

    def __init__(
        self, fairness: Fairness, costs: tuple[int, ...], flows: int, *, forecasts: bool = True
    ) -> None:
        self.chance = Random(7)
        self.now_ns = 0
        self.costs = costs
        self.flows = flows
        self.controller = FlowController(
            ControllerConfig(
                detectors=(Concurrency(requests_max=16),),
                default_settings=BandSettings(fairness=fairness),
                forecasts=forecasts,
            ),
            0,
        )
        self.controller.handle(EndpointsChanged(("a",)), 0)
        self.ends: list[tuple[int, int]] = []
        self.ratios: list[float] = []
        self.asked: dict[int, Forecast] = {}
        """What a question said of each request as its wait began, where it knew."""
        self.waits: dict[int, int] = {}
        """What each wait came to."""
        self.forecast_count = 0
        """Decisions that say what was expected."""
        self.count = 0

    def arrive(self) -> None:
        """Let a request come."""
        self.count += 1
        flow = min(int(self.chance.paretovariate(0.6)) - 1, self.flows - 1)
        tokens = self.costs[flow % len(self.costs)]
        request = Request(self.count, f"f{flow}", input_tokens=tokens, output_tokens_max=0)
        self.controller.handle(Arrived(request), self.now_ns)

    def poll(self) -> None:
        """Let the engine decide; who is dispatched ends some time later."""
        for decision in self.controller.poll(self.now_ns):
            assert decision.outcome is Outcome.DISPATCHED
            service_ns = round(self.chance.expovariate(0.5) * SECOND)
            self.ends.append((self.now_ns + service_ns, decision.request_id))
            self.waits[decision.request_id] = decision.waited_ns
            self.forecast_count += decision.expected_wait_ns is not None
            if decision.expected_wait_ns is not None and decision.waited_ns > SECOND:
                self.ratios.append(decision.expected_wait_ns / decision.waited_ns)

    def ask(self) -> None:
        """Ask what the newest request can expect."""
        found = self.controller.expected(self.count, self.now_ns)
        if found is not None and found.late_ns is not None:
            self.asked[self.count] = found

    def run(self, seconds: int, per_second: float) -> None:
        """Let requests come for a while, then only go."""
        tick_ns = SECOND // 20
        for tick in range(seconds * 20):
            self.now_ns = tick * tick_ns
            for _ in range(int(self.chance.random() < per_second / 20)):
                self.arrive()
            for end in [end for end in self.ends if end[0] <= self.now_ns]:
                self.ends.remove(end)
                self.controller.handle(Left(end[1]), self.now_ns)
            self.poll()
            self.ask()


@pytest.mark.slow
class TestCalibration:
    """Predicted against realised waits, in a queue that grows and shrinks."""

    @pytest.mark.parametrize("fairness", Fairness)
    @pytest.mark.parametrize("costs", [(100,), (100, 400, 50)])
    def test_middle_forecast_is_right(self, fairness: Fairness, costs: tuple[int, ...]) -> None:
        """The median within a quarter, whatever the policy and whatever requests cost."""
        world = World(fairness, costs, flows=40)
        world.run(150, 10.0)

        assert len(world.ratios) > 200
        assert median(world.ratios) == pytest.approx(1.0, abs=0.25)

    def test_a_line_is_forecast_to_a_fifth(self) -> None:
        """No request overtakes, so only the rate is uncertain: four of five within a fifth."""
        world = World(Fairness.GLOBAL_STRICT, (100,), flows=40)
        world.run(150, 10.0)
        close = [ratio for ratio in world.ratios if 0.8 < ratio < 1.2]

        assert len(close) > 0.8 * len(world.ratios)


@pytest.mark.slow
class TestSample:
    """Without `forecasts`: computed when asked for, and learnt from one wait in eight."""

    def test_few_waits_are_forecast(self) -> None:
        """The first 64, then one in eight: where forecasts cost nothing, nothing is said."""
        world = World(Fairness.GLOBAL_STRICT, (100,), flows=40, forecasts=False)
        world.run(300, 10.0)
        waited = sum(waited_ns > 0 for waited_ns in world.waits.values())

        assert waited > 2000
        assert world.forecast_count == pytest.approx(64 + (waited - 64) / 8, rel=0.05)

    @pytest.mark.parametrize("fairness", [Fairness.GLOBAL_STRICT, Fairness.WEIGHTED_TOKENS])
    def test_intervals_still_come_true(self, fairness: Fairness) -> None:
        """An answer still names a wait that about half stay within, and one that nine in ten do."""
        world = World(fairness, (100,), flows=40, forecasts=False)
        world.run(600, 9.0)
        pairs = [
            (said, world.waits[request_id])
            for request_id, said in world.asked.items()
            if request_id > 500 and request_id in world.waits
        ]
        within = sum(waited_ns <= (said.wait_ns or 0) for said, waited_ns in pairs)
        late = sum(waited_ns <= (said.late_ns or 0) for said, waited_ns in pairs)

        assert len(pairs) > 2000
        assert within / len(pairs) == pytest.approx(0.45, abs=0.1)
        assert late / len(pairs) == pytest.approx(0.9, abs=0.08)


class TestPosition:
    """Who is ahead of a request that waits, now."""

    @pytest.mark.parametrize("ordering", Ordering)
    @pytest.mark.parametrize("fairness", [Fairness.GLOBAL_STRICT, Fairness.ROUND_ROBIN])
    def test_one_flow_is_a_line(self, fairness: Fairness, ordering: Ordering) -> None:
        """Every position is taken once, in the order in which they then go."""
        settings_ = BandSettings(fairness=fairness, ordering=ordering, ttl_ns=100 * SECOND)
        controller = FlowController(
            ControllerConfig(detectors=(Concurrency(requests_max=1),), default_settings=settings_),
            0,
        )
        controller.handle(EndpointsChanged(("a",)), 0)
        for index in range(20):
            controller.handle(
                Arrived(Request(index, ttft_slo_ns=index * 7 % 20, ttl_ns=SECOND + index * 7 % 20)),
                0,
            )
        order = [each.request_id for each in controller.poll(0)]
        positions = {}
        for index in range(20):
            found = controller.expected(index, 0)
            if found is not None:
                positions[found.position] = index
        for _ in range(19):
            controller.handle(Left(order[-1]), 0)
            order += [each.request_id for each in controller.poll(0)]

        assert [positions[place] for place in range(19)] == order[1:]

    @pytest.mark.parametrize("fairness", Fairness)
    @pytest.mark.parametrize("large", [2**49, 10**15 - 1])
    def test_behind_numbers_that_round(self, fairness: Fairness, large: int) -> None:
        """A small request is in a line of its own once many huge ones have left it."""
        controller = FlowController(
            ControllerConfig(default_settings=BandSettings(fairness=fairness), forecasts=True), 0
        )
        for index in range(40):
            request = Request(index, "huge", input_tokens=large, output_tokens_max=0)
            controller.handle(Arrived(request), 0)
        controller.poll(0)
        controller.handle(Arrived(Request(40, output_tokens_max=0)), 1)
        controller.poll(1)
        for index in range(40):
            controller.handle(Left(index), 2)
        controller.poll(2)
        found = controller.expected(40, 2)

        assert found is not None
        assert found.position == 0

    def test_higher_bands_stand_ahead(self) -> None:
        """All that waits in them."""
        controller = FlowController(ControllerConfig(detectors=(Concurrency(requests_max=1),)), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        controller.handle(ObjectivesChanged({"chat": 10}), 0)
        for index in range(6):
            controller.handle(Arrived(Request(index, objective="chat" if index % 2 else None)), 0)
        controller.poll(0)
        low = controller.expected(4, 0)

        assert low == Forecast(2 + 2, None)
        assert controller.expected(99, 0) is None

    def test_nobody_overtakes_by_more_than_its_turns(self) -> None:
        """Two flows whose backlogs have only grown: 80 go before the last, one a second."""
        controller = FlowController(ControllerConfig(detectors=(Concurrency(requests_max=1),)), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        for number in range(90):
            controller.handle(Arrived(Request(number, f"f{number % 2}")), 0)
        (decision,) = controller.poll(0)
        for second in range(1, 10):
            controller.handle(Left(decision.request_id), second * SECOND)
            (decision,) = controller.poll(second * SECOND)
        found = controller.expected(89, 9 * SECOND)

        assert found is not None
        assert found.position == pytest.approx(79, rel=0.2)
        assert found.wait_ns == pytest.approx(80 * SECOND, rel=0.2)

    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
    @settings(max_examples=50)
    def test_last_of_a_flow_knows_how_many_go_before_it(self, lengths: list[int]) -> None:
        """With round robin: all that have fewer of their own before them, give or take a turn."""
        controller = FlowController(
            ControllerConfig(
                detectors=(Concurrency(requests_max=1),),
                default_settings=BandSettings(fairness=Fairness.ROUND_ROBIN),
            ),
            0,
        )
        requests = [
            Request(number * 10 + place, f"f{number}")
            for number, length in enumerate(lengths)
            for place in range(length)
        ]
        controller.handle(Arrived(Request(999, "first")), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        controller.poll(0)
        for request in requests:
            controller.handle(Arrived(request), 0)
        controller.poll(0)
        found = {each.request_id: controller.expected(each.request_id, 0) for each in requests}
        last, order = 999, []
        for _ in requests:
            controller.handle(Left(last), 0)
            (decision,) = controller.poll(0)
            last = decision.request_id
            order.append(last)

        for place, request_id in enumerate(order):
            expected = found[request_id]
            assert expected is not None
            assert abs(expected.position - place) <= len(lengths)

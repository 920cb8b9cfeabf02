"""What a waiting request can expect, against counting and against what then happens."""

from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import BandSettings, Concurrency, ControllerConfig, Fairness, Ordering
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged
from flowcontrol.forecast import Ahead, Forecast, forecast
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


class TestForecast:
    """Position and wait."""

    def test_unknown_rates_forecast_no_wait(self) -> None:
        """But a position."""
        assert forecast(2, Ahead(3), DrainRate(0), DrainRate(0), 0) == Forecast(5, None)

    def test_slower_of_band_and_all_counts(self) -> None:
        """What arrives above takes from the band; what waits above goes first."""
        now_ns = 100 * SECOND

        own = forecast(0, Ahead(9), draining(2), draining(10), now_ns)
        above = forecast(40, Ahead(9), draining(2), draining(5), now_ns)

        assert own.position == 9
        assert own.wait_ns == pytest.approx(5 * SECOND, rel=0.02)
        assert above.position == 49
        assert above.wait_ns == pytest.approx(10 * SECOND, rel=0.02)

    def test_whoever_overtakes_takes_time(self) -> None:
        """Of 10 a second 8 go to requests that come later, so 2 a second to what is ahead."""
        found = forecast(0, Ahead(9, 0.8), draining(10), draining(10), 100 * SECOND)

        assert found.position == 9
        assert found.wait_ns == pytest.approx(5 * SECOND, rel=0.02)

    def test_band_never_served_is_forecast_by_all(self) -> None:
        """Once those above have gone, it is its turn."""
        found = forecast(40, Ahead(9), DrainRate(0), draining(5), 100 * SECOND)

        assert found.position == 49
        assert found.wait_ns == pytest.approx(10 * SECOND, rel=0.02)

    def test_band_that_waits_in_vain_knows_nothing(self) -> None:
        """Once somebody has waited longer than that, unserved, the band may as well be gated."""
        gated, pool = DrainRate(0), draining(5)
        gated.began(98 * SECOND)

        at_first = forecast(0, Ahead(19), gated, pool, 100 * SECOND)
        later = forecast(0, Ahead(19), gated, pool, 103 * SECOND)

        assert at_first.wait_ns == pytest.approx(4 * SECOND, rel=0.02)
        assert later == Forecast(19, None)


class World:
    """A pool of so many slots before an engine, and flows of which the first are hot.

    Args:
        fairness: of the one band.
        costs: of the requests of each flow in turn, in tokens of input.
        flows: how many.
    """

    def __init__(self, fairness: Fairness, costs: tuple[int, ...], flows: int) -> None:
        self.chance = Random(7)
        self.now_ns = 0
        self.costs = costs
        self.flows = flows
        self.controller = FlowController(
            ControllerConfig(
                detectors=(Concurrency(requests_max=16),),
                default_settings=BandSettings(fairness=fairness),
                forecasts=True,
            ),
            0,
        )
        self.controller.handle(EndpointsChanged(("a",)), 0)
        self.ends: list[tuple[int, int]] = []
        self.expected: dict[int, int] = {}
        self.ratios: list[float] = []
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
            if decision.expected_wait_ns is not None and decision.waited_ns > SECOND:
                self.ratios.append(decision.expected_wait_ns / decision.waited_ns)

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
        """Nobody overtakes, so only the drain rate is uncertain: four of five within a fifth."""
        world = World(Fairness.GLOBAL_STRICT, (100,), flows=40)
        world.run(150, 10.0)
        close = [ratio for ratio in world.ratios if 0.8 < ratio < 1.2]

        assert len(close) > 0.8 * len(world.ratios)


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

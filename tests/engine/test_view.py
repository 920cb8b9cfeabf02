"""Snapshots of the engine."""

import pytest

from flowcontrol.config import Adaptive, Concurrency, ControllerConfig, Role, Utilization
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged
from flowcontrol.request import Request
from flowcontrol.views.snapshot import DetectorSnapshot
from flowcontrol.views.view import take_snapshot

SECOND = 1_000_000_000


class TestDetectors:
    """What each detector makes of each stage."""

    def test_several(self) -> None:
        """Each is shown with the number it goes by, where it goes by one."""
        detectors = (Concurrency(requests_max=4), Utilization(), Adaptive(limit_first=3))
        controller = FlowController(ControllerConfig(detectors=detectors), 0)
        controller.handle(EndpointsChanged(("a", "b")), 0)
        controller.handle(Arrived(Request(1)), 0)
        controller.poll(0)

        shown = take_snapshot(controller, 0, 10).detectors

        assert [(each.stage, each.kind, each.requests_limit) for each in shown] == [
            ("both", "concurrency", 8),
            ("both", "utilization", None),
            ("both", "adaptive", 6),
        ]
        assert shown[0].saturation == pytest.approx(1 / 8)

    def test_stages(self) -> None:
        """Prefill and decode are shown apart; the fuller one is what the pool is."""
        config = ControllerConfig(detectors=(Concurrency(requests_max=2),))
        controller = FlowController(config, 0)
        roles = {"p": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE}
        controller.handle(EndpointsChanged(("p", "d", "e"), roles), 0)
        controller.handle(Arrived(Request(1)), 0)
        controller.poll(0)

        snapshot = take_snapshot(controller, 0, 10)

        assert snapshot.detectors == (
            DetectorSnapshot("prefill", "concurrency", 0.5, 2),
            DetectorSnapshot("decode", "concurrency", 0.25, 4),
        )
        assert snapshot.saturation == 0.5

    def test_empty_pool(self) -> None:
        """Where there is no endpoint, there is nothing to say."""
        assert take_snapshot(FlowController(ControllerConfig(), 0), 0, 10).detectors == ()

    def test_moves(self) -> None:
        """Each change of a limit that was found says when, from what to what, and why."""
        config = ControllerConfig(detectors=(Adaptive(limit_first=2),))
        controller = FlowController(config, 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        controller.handle(EndpointsChanged(("a", "b")), SECOND)

        (shown,) = take_snapshot(controller, 3 * SECOND, 10).detectors

        assert (shown.requests_limit, shown.raised, shown.lowered) == (4, 1, 0)
        assert [(each.ago_ns, each.before, each.after) for each in shown.moves] == [
            (2 * SECOND, 2.0, 4.0)
        ]
        assert shown.moves[0].reason


class TestBands:
    """What waits, and how long one more would."""

    def test_expected_wait(self) -> None:
        """Behind all that wait in its band and above, at the rate at which they go."""
        config = ControllerConfig(detectors=(Concurrency(requests_max=1),))
        controller = FlowController(config, 0)
        controller.handle(ObjectivesChanged({"chat": 10, "batch": -1}), 0)
        empty = take_snapshot(controller, 0, 10)
        controller.handle(EndpointsChanged(("a",)), 0)
        idle = take_snapshot(controller, 0, 10)
        for request_id in range(16):
            controller.handle(Arrived(Request(request_id, objective="batch")), 0)
        controller.poll(0)

        before = take_snapshot(controller, 0, 10)
        for request_id in range(10):
            now_ns = (request_id + 1) * SECOND
            controller.handle(Left(request_id), now_ns)
            controller.poll(now_ns)
        chat, batch = take_snapshot(controller, 10 * SECOND, 10).bands

        assert [band.expected_wait_ns for band in empty.bands] == [None, None]
        assert [band.expected_wait_ns for band in idle.bands] == [0, 0]
        assert before.bands[1].expected_wait_ns is None
        assert (batch.priority, batch.waiting) == (-1, 5)
        assert batch.expected_wait_ns == pytest.approx(6 * SECOND, rel=0.2)
        assert chat.expected_wait_ns == pytest.approx(0.69 * SECOND, rel=0.2)  # half of the time
        assert [band.late_wait_ns for band in idle.bands] == [0, 0]
        assert batch.late_wait_ns is not None
        assert batch.late_wait_ns >= 6 * SECOND

    @pytest.mark.parametrize("weight", [1e-20, 0.5, 1e20])
    def test_fair_shares(self, weight: float) -> None:
        """They add up, however much or little one weighs."""
        controller = FlowController(ControllerConfig(weights={"a": weight, "gone": 7.0}), 0)
        alone: list[float] = []
        for number, flow_id in enumerate("abc"):
            controller.handle(Arrived(Request(number, flow_id)), 0)
            controller.poll(0)
            (band,) = take_snapshot(controller, 0, 10).bands
            alone.append(sum(flow.fair_share for flow in band.flows))

        assert alone == pytest.approx([1.0, 1.0, 1.0])

    def test_position_and_wait_of_one(self) -> None:
        """A request that waits has a position; one that does not has none."""
        config = ControllerConfig(detectors=(Concurrency(requests_max=1),))
        controller = FlowController(config, 0)
        controller.handle(ObjectivesChanged({"chat": 10}), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        for request_id in range(4):
            controller.handle(Arrived(Request(request_id)), 0)
        controller.poll(0)
        controller.handle(Arrived(Request(9, objective="chat")), 0)
        controller.poll(0)

        places = {}
        for request_id in (0, 1, 3, 9, 77):
            forecast = controller.expected(request_id, 0)
            places[request_id] = None if forecast is None else forecast.position

        assert places == {0: None, 1: 1, 3: 3, 9: 0, 77: None}

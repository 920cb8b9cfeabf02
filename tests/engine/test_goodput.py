"""Goodput: what a dispatched request was worth."""

import pytest

from flowcontrol.charges import EARLY_MAX
from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged, Settled
from flowcontrol.request import Request
from flowcontrol.tally import COUNTED_MAX
from flowcontrol.views.snapshot import GoodputSnapshot
from flowcontrol.views.view import take_snapshot

MILLISECOND = 1_000_000


def goodput(
    settled: Settled, objective: str | None = "chat", slo_ms: int | None = None
) -> dict[str, GoodputSnapshot]:
    """Serve one request, settled before and after it left; return the counts."""
    controller = FlowController(ControllerConfig(), 0)
    controller.handle(ObjectivesChanged({"chat": 10}), 0)
    slo_ns = None if slo_ms is None else slo_ms * MILLISECOND
    request = Request(settled.request_id, objective=objective, ttft_slo_ns=slo_ns)
    controller.handle(Arrived(request), 0)
    controller.poll(0)
    controller.handle(EndpointsChanged(("a",)), 100 * MILLISECOND)  # so it waited 100 ms
    controller.poll(100 * MILLISECOND)
    controller.handle(settled, 900 * MILLISECOND)
    controller.handle(Left(settled.request_id), 900 * MILLISECOND)
    controller.handle(settled, 901 * MILLISECOND)
    return dict(take_snapshot(controller, 901 * MILLISECOND, 1).goodput)


class TestGoodput:
    """Counting."""

    @pytest.mark.parametrize(
        ("slo_ms", "ttft_ms", "is_success", "expected"),
        [
            (None, 10_000, True, "good"),
            (500, 400, True, "good"),
            (500, 401, True, "late"),
            (500, None, True, "good"),
            (500, 401, False, "failed"),
            (None, None, False, "failed"),
        ],
    )
    def test_result(
        self,
        slo_ms: int | None,
        ttft_ms: int | None,
        is_success: bool,  # noqa: FBT001 - a table
        expected: str,
    ) -> None:
        """Waiting counts against the target; a request is counted once."""
        ttft_ns = None if ttft_ms is None else ttft_ms * MILLISECOND
        settled = Settled(1, output_tokens=7, ttft_ns=ttft_ns, is_success=is_success)

        (counted,) = goodput(settled, slo_ms=slo_ms).values()

        nothing = {"good": 0, "late": 0, "failed": 0, "abandoned": 0}
        assert counted.results == nothing | {expected: 1}
        assert counted.good_tokens == (7 if expected == "good" else 0)

    def test_a_client_that_left(self) -> None:
        """Before a response has begun it is abandoned, whatever the target; later it counts."""
        for was_answered, ttft_ns, expected in (
            (False, None, "abandoned"),
            (True, None, "good"),
            (True, 400 * MILLISECOND, "good"),
            (True, 401 * MILLISECOND, "late"),
        ):
            settled = Settled(1, ttft_ns=ttft_ns, was_answered=was_answered)
            (counted,) = goodput(settled, slo_ms=500).values()
            assert [word for word, count in counted.results.items() if count] == [expected]

    @pytest.mark.parametrize("objective", [None, "never-declared"])
    def test_names_are_of_operators(self, objective: str | None) -> None:
        """What no objective declares is counted under no name."""
        assert list(goodput(Settled(1), objective)) == [""]

    def test_an_attempt_that_was_not_sent(self) -> None:
        """Is no response: the next one has it."""
        assert goodput(Settled(1, 0, 0, 0, is_success=False, was_sent=False)) == {}

    def test_what_ended_before_the_first_settlement(self) -> None:
        """Is counted when that comes; of more than are kept, those that ended last."""
        controller = FlowController(ControllerConfig(), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        numbers = range(1, EARLY_MAX + 3)
        for number in numbers:
            controller.handle(Arrived(Request(number)), 0)
            controller.poll(0)
            controller.handle(Left(number), 0)
        for number in numbers:
            controller.handle(Settled(number), 1)

        (counted,) = take_snapshot(controller, 1, 1).goodput.values()
        assert counted.results["good"] == EARLY_MAX
        assert controller.charges.unsettled == 0

    @pytest.mark.slow
    def test_names_are_bounded(self) -> None:
        """Of priorities and objectives that are declared no more only so many keep their counts."""
        controller = FlowController(ControllerConfig(), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        for number in range(COUNTED_MAX + 50):
            name = f"objective-{number}"
            controller.handle(ObjectivesChanged({"chat": 10, name: 100 + number}), number)
            for request_id, objective in ((2 * number, "chat"), (2 * number + 1, name)):
                controller.handle(Arrived(Request(request_id, objective=objective)), number)
                controller.poll(number)
                controller.handle(Settled(request_id), number)
                controller.handle(Left(request_id), number)
                controller.poll(number)
        snapshot = take_snapshot(controller, COUNTED_MAX + 50, 1)

        assert len(snapshot.totals) == len(snapshot.goodput) == COUNTED_MAX
        assert snapshot.goodput["chat"].results["good"] == COUNTED_MAX + 50
        assert snapshot.totals[10].completed == COUNTED_MAX + 50
        assert "objective-0" not in snapshot.goodput
        assert 100 not in snapshot.totals
        assert snapshot.totals[100 + COUNTED_MAX + 49].completed == 1

    def test_declared(self) -> None:
        """A declared one is counted under its own."""
        assert list(goodput(Settled(1))) == ["chat"]

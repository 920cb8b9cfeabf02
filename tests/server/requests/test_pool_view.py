"""What was last said of the endpoints."""

from dataclasses import replace

import pytest

from flowcontrol.events import EndpointsChanged, Left, LoadObserved
from flowcontrol.tally import COUNTED_MAX
from flowcontrol.views.snapshot import EndpointSnapshot, Snapshot
from flowcontrol_server.requests.pool_view import PoolView

SECOND = 1_000_000_000
A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"


@pytest.fixture(name="view")
def _view() -> PoolView:
    """A pool of two."""
    view = PoolView()
    view.notice(EndpointsChanged((A, B)), 0)
    return view


def snapshot(in_flight: int, **by_endpoint: int | None) -> Snapshot:
    """The engine's state: in all, and at a and b."""
    addresses = {"a": A, "b": B}
    return Snapshot(
        saturation=0.0,
        waiting=0,
        waiting_bytes=0,
        in_flight=in_flight,
        is_draining=False,
        bands=(),
        totals={},
        endpoints=tuple(EndpointSnapshot(addresses[k], n, 64) for k, n in by_endpoint.items()),
        objectives={},
        unknown_objectives=0,
    )


class TestAnywhere:
    """An endpoint for requests that nobody has picked one for."""

    def test_in_turn(self, view: PoolView) -> None:
        """Each has its turn."""
        assert sorted(view.anywhere() or "" for _ in range(4)) == [A, A, B, B]

    def test_pool_changes(self, view: PoolView) -> None:
        """Only endpoints of now; of an empty pool none."""
        view.notice(EndpointsChanged((C,)), 0)
        assert {view.anywhere(), view.anywhere()} == {C}
        view.notice(EndpointsChanged(()), 0)
        assert view.anywhere() is None


class TestAnswers:
    """How often each did its part."""

    def test_of_the_pool(self, view: PoolView) -> None:
        """Only endpoints that are, or were, in the pool are counted."""
        for address, is_failure in ((A, False), (A, True), (A, False), (C, True)):
            view.answered(address, is_failure)
        assert view.answers == {A: [2, 1], B: [0, 0]}

    def test_an_endpoint_that_is_taken_out(self, view: PoolView) -> None:
        """For the failures that are counted: they stay, with what is reported later."""
        view.answered(A, is_failure=True)
        view.notice(EndpointsChanged((B,)), 0)
        view.answered(A, is_failure=True)
        assert view.answers[A] == [0, 2]
        view.notice(EndpointsChanged((A, B)), 0)
        view.answered(A, is_failure=False)
        assert view.answers[A] == [1, 2]

    def test_endpoints_that_are_gone(self, view: PoolView) -> None:
        """Only so many are kept; none of the pool is dropped for them."""
        view.answered(B, is_failure=True)
        for number in range(COUNTED_MAX + 10):
            view.notice(EndpointsChanged((B, f"10.1.0.{number}:80")), 0)
        assert len(view.answers) == COUNTED_MAX
        assert view.answers[B] == [0, 1]
        assert A not in view.answers


class TestDrift:
    """Our account against the endpoints' own."""

    def test_picked_here(self, view: PoolView) -> None:
        """Where we know each endpoint's count, those that speak are compared."""
        view.notice(LoadObserved(A, waiting=2, running=3, kv_usage=0.5), 0)

        assert view.drift(snapshot(9, a=4, b=5), 0) == 1
        assert view.engine_requests(0) == {A: 5}

    def test_picked_by_envoy(self, view: PoolView) -> None:
        """Where we know the pool alone, all must have spoken."""
        view.notice(LoadObserved(A, waiting=0, running=3, kv_usage=0.5), 0)
        assert view.drift(snapshot(9, a=None, b=None), 0) is None
        view.notice(LoadObserved(B, waiting=1, running=1, kv_usage=0.5), 0)
        assert view.drift(snapshot(9, a=None, b=None), 0) == -4

    def test_recovered(self, view: PoolView) -> None:
        """What another process has dispatched holds a slot here, and has not passed by the gate."""
        view.notice(LoadObserved(A, waiting=0, running=3, kv_usage=0.5), 0)
        view.notice(LoadObserved(B, waiting=1, running=2, kv_usage=0.5), 0)

        assert view.drift(replace(snapshot(1, a=None, b=None), recovered=5), 0) == 0

    def test_silence(self, view: PoolView) -> None:
        """Nothing said, or long ago, is no drift."""
        assert view.drift(snapshot(9, a=4, b=5), 0) is None
        view.notice(LoadObserved(A, waiting=0, running=4, kv_usage=0.5), 0)
        assert view.drift(snapshot(9, a=4, b=5), 29 * SECOND) == 0
        assert view.drift(snapshot(9, a=4, b=5), 30 * SECOND) is None

    def test_strangers(self, view: PoolView) -> None:
        """Who is not in the pool, or has left it, is not heard; other facts change nothing."""
        view.notice(LoadObserved(C, waiting=0, running=4, kv_usage=0.5), 0)
        view.notice(LoadObserved(B, waiting=0, running=4, kv_usage=0.5), 0)
        view.notice(EndpointsChanged((A,)), 0)
        view.notice(Left(1), 0)

        assert view.engine_requests(0) == {}

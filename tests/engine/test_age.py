"""Requests that waited at another replica before."""

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Ordering,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Decision, EndpointsChanged, Left, ObjectivesChanged
from flowcontrol.replay.ledger import restore, take_checkpoint
from flowcontrol.request import Outcome, Request

SECOND = 1_000_000_000
TTL_NS = 60 * SECOND


def engine(
    fairness: Fairness = Fairness.ROUND_ROBIN, ordering: Ordering = Ordering.FCFS
) -> FlowController:
    """One slot, taken by request 0, a minute after the beginning."""
    settings = BandSettings(fairness=fairness, ordering=ordering, ttl_ns=TTL_NS)
    config = ControllerConfig(
        default_settings=settings, detectors=(Concurrency(requests_max=1),), no_endpoint_ttl_ns=0
    )
    controller = FlowController(config, 0)
    controller.handle(EndpointsChanged(("10.0.0.5:8000",)), 0)
    arrive(controller, 60, (0, 0))
    return controller


def arrive(controller: FlowController, at_s: int, *come: tuple[int, int]) -> list[Decision]:
    """Requests of these numbers and ages in seconds."""
    for number, age_s in come:
        controller.handle(
            Arrived(Request(number, arrived_ns=(at_s - age_s) * SECOND)), at_s * SECOND
        )
    return controller.poll(at_s * SECOND)


def served(controller: FlowController, at_s: int, count: int) -> list[int]:
    """End one request after the other; return who goes."""
    numbers, last = [], 0
    for _ in range(count):
        controller.handle(Left(last), at_s * SECOND)
        (decision,) = controller.poll(at_s * SECOND)
        last = decision.request_id
        numbers.append(last)
    controller.check_invariants()
    return numbers


def test_order() -> None:
    """They take their place among those that came meanwhile, by arrival, with every policy."""
    for fairness in (Fairness.ROUND_ROBIN, Fairness.GLOBAL_STRICT):
        controller = engine(fairness)
        arrive(controller, 61, (1, 0))
        arrive(controller, 63, (2, 0))
        arrive(controller, 64, (3, 2), (4, 30), (5, 0))

        assert served(controller, 65, 5) == [4, 1, 3, 2, 5]


def test_order_of_turns() -> None:
    """Whichever turn takes them in: those that came first to the gate were not the last to come."""
    controller = engine()
    for number, arrived_s, turn_s in ((2, 62, 63), (3, 63, 63), (1, 61, 64), (4, 70, 64)):
        request = Request(number, arrived_ns=arrived_s * SECOND)
        controller.handle(Arrived(request), turn_s * SECOND)
        controller.poll(turn_s * SECOND)

    assert controller.leases[4].arrived_ns == 64 * SECOND, "nothing comes from the future"
    assert served(controller, 65, 4) == [1, 2, 3, 4]


def test_deadline() -> None:
    """The time to live is what is left of it; what is over is refused unless it can go at once."""
    controller = engine()
    arrive(controller, 61, (1, 0), (2, 50))

    assert controller.next_wakeup_ns() == 71 * SECOND
    (expired,) = controller.poll(71 * SECOND)
    assert (expired.request_id, expired.outcome) == (2, Outcome.EVICTED_TTL)
    assert expired.waited_ns == TTL_NS
    (late,) = arrive(controller, 72, (3, 60))
    assert (late.request_id, late.outcome) == (3, Outcome.EVICTED_TTL)
    assert served(controller, 73, 1) == [1]


def test_waited() -> None:
    """What it waited elsewhere counts."""
    controller = engine()
    arrive(controller, 61, (1, 20))
    controller.handle(Left(0), 62 * SECOND)
    (decision,) = controller.poll(62 * SECOND)

    assert decision.waited_ns == 21 * SECOND


def test_order_is_linked_again() -> None:
    """When nothing waits any more the flow is as before: a newcomer goes behind who is there."""
    controller = engine()
    arrive(controller, 61, (1, 0), (2, 30))
    assert served(controller, 62, 2) == [2, 1]
    arrive(controller, 63, (3, 0), (4, 0))
    controller.handle(Left(1), 63 * SECOND)

    assert [each.request_id for each in controller.poll(63 * SECOND)] == [3]


def test_checkpoint() -> None:
    """An engine made of a checkpoint holds them to the same deadline."""
    controller = engine()
    arrive(controller, 61, (1, 0), (2, 50))
    again = restore(take_checkpoint(controller, 61 * SECOND), controller.config)

    assert again.leases[2].arrived_ns == 11 * SECOND
    assert again.leases[2].deadline_ns == 71 * SECOND


def test_promoted_at_once() -> None:
    """One that has waited for so long goes in the turn that takes it in, though its band is gated.

    Else the engine would ask to be woken at a time that has passed.
    """
    band = BandSettings(promote_after_ns=5 * SECOND)
    controller = FlowController(
        ControllerConfig(
            templates=(BandTemplate(priority_max=-1, settings=band),),
            detectors=(Concurrency(requests_max=2),),
            ceilings=CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=0.5),
        ),
        0,
    )
    controller.handle(EndpointsChanged(("10.0.0.5:8000",)), 0)
    controller.handle(ObjectivesChanged({"batch": -1}), 0)
    arrive(controller, 60, (0, 0))
    request = Request(1, objective="batch", arrived_ns=54 * SECOND)
    controller.handle(Arrived(request), 60 * SECOND)

    (decision,) = controller.poll(60 * SECOND)

    assert decision.outcome is Outcome.DISPATCHED

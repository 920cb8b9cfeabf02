"""What a live request waits for, and how that is said."""

import pytest

from flowcontrol.config import (
    BandSettings,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Picker,
    Reclaim,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Decision, EndpointsChanged, Left, ObjectivesChanged
from flowcontrol.request import Outcome, Request
from flowcontrol.shares import ACCOUNTS_MAX, HALF_LIFE_NS, Shares
from flowcontrol.views.explain import Explanation, Gate, explain
from flowcontrol_server.admin.wording import duration, reason, sentences

SECOND = 1_000_000_000
_ACCOUNTS = (
    Fairness.WEIGHTED_TOKENS,
    Fairness.LEAST_ATTAINED_SERVICE,
    Fairness.GLOBAL_STRICT,
)
OBJECTIVES = ObjectivesChanged({"chat": 10, "batch": -1})


def engine(
    *,
    endpoints: int = 1,
    low: float | None = None,
    fairness: Fairness = Fairness.WEIGHTED_TOKENS,
) -> FlowController:
    """Two slots an endpoint; with `low`, the lowest band may fill the pool to there."""
    ceilings = CeilingSettings()
    if low is not None:
        ceilings = CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK, ceiling_min=low)
    controller = FlowController(
        ControllerConfig(
            detectors=(Concurrency(requests_max=2),),
            picker=Picker.LEAST_LOADED,
            ceilings=ceilings,
            default_settings=BandSettings(ttl_ns=60 * SECOND, fairness=fairness),
            weights={"gold": 3.0},
        ),
        0,
    )
    controller.handle(OBJECTIVES, 0)
    addresses = tuple(f"10.0.0.{number}:8000" for number in range(1, endpoints + 1))
    controller.handle(EndpointsChanged(addresses), 0)
    controller.poll(0)
    return controller


def arrive(controller: FlowController, now_ns: int, *requests: Request) -> None:
    """One turn with arrivals."""
    for request in requests:
        controller.handle(Arrived(request), now_ns)
    controller.poll(now_ns)


def asked(controller: FlowController, request_id: int, now_ns: int) -> Explanation:
    """The explanation of a request that is there."""
    explained = explain(controller, request_id, now_ns)
    assert explained is not None
    return explained


class TestExplain:
    """The facts."""

    def test_nobody(self) -> None:
        """Is not explained."""
        assert explain(engine(), 1, 0) is None

    def test_in_flight(self) -> None:
        """Where, and since when."""
        controller = engine()
        arrive(controller, 5, Request(1, "a", "chat"))
        explained = asked(controller, 1, 15)

        assert explained.is_in_flight
        assert explained.gate is Gate.NONE
        assert explained.endpoint == "10.0.0.1:8000"
        assert explained.age_ns == 10
        assert explained.deadline_in_ns is None
        assert "in flight at 10.0.0.1:8000; it arrived 0 ms ago" in sentences(explained)[0]

    def test_told_to_end(self) -> None:
        """In flight, but not for long."""
        config = ControllerConfig(
            detectors=(Concurrency(requests_max=1),), reclaim=Reclaim(is_enabled=True)
        )
        controller = FlowController(config, 0)
        controller.handle(ObjectivesChanged({"chat": 10, "batch": -1}), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        arrive(controller, 0, Request(1, "a", "batch"))
        assert not asked(controller, 1, 0).is_reclaimed
        arrive(controller, 1, Request(2, "a", "chat"))
        explained = asked(controller, 1, 1)

        assert (explained.is_in_flight, explained.is_reclaimed) == (True, True)
        assert "It is being ended for a waiting request of higher priority." in sentences(explained)

    def test_pool_full(self) -> None:
        """With who is ahead: above, in its flow, of others; and what it may expect."""
        controller = engine()
        arrive(controller, 0, *(Request(n, "a", "chat") for n in (1, 2, 3)))
        arrive(controller, 0, Request(4, "a"), Request(5, "b"), Request(6, "a"), Request(7, "a"))
        explained = asked(controller, 7, SECOND)

        assert explained.gate is Gate.POOL_FULL
        assert explained.ahead_above == {10: 1}
        assert (explained.ahead_in_flow, explained.ahead_in_band) == (2, 3)
        assert explained.position == 4
        assert [flow.flow_id for flow in explained.rivals] == ["b"]
        assert explained.deadline_in_ns == 59 * SECOND
        assert explained.gating_priority == 10
        said = " ".join(sentences(explained))
        assert "the pool is full: 100%, 2 in flight (10.0.0.1:8000 2 in flight, 100%)" in said
        assert "Ahead of it: 1 in band 10, 2 of its own flow, about 1 of other flows" in said
        assert "; it is evicted in 59.0 s at the latest" in said

    @pytest.mark.parametrize("fairness", _ACCOUNTS)
    def test_equal_accounts(self, fairness: Fairness) -> None:
        """Of flows that got the same so far, each is behind those that came before it."""
        controller = engine(fairness=fairness)
        arrive(controller, 0, Request(1, "x"), Request(2, "y"))
        for number in range(3, 13):  # two of each
            arrive(controller, 0, Request(number, "abcde"[number % 5]))
        said = [asked(controller, number, SECOND) for number in range(3, 13)]
        order = []
        for number in range(1, 11):
            controller.handle(Left(number), SECOND)
            order += [decision.request_id for decision in controller.poll(SECOND)]

        assert order == [explained.request_id for explained in said]
        assert [explained.position for explained in said] == list(range(10))
        assert sentences(said[0])[2] == "No request is ahead of it."
        assert sentences(said[4])[2] == (
            "Ahead of it: about 4 of other flows in its band, as they take turns."
        )

    def test_hopeless(self) -> None:
        """What hardly goes before its deadline is said to be evicted before its turn."""
        controller = engine()
        arrive(controller, 0, *(Request(number, "a") for number in range(1, 61)))
        for number in (1, 2, 3):  # one in 10 s
            now_ns = number * 10 * SECOND
            controller.handle(Left(number), now_ns)
            controller.poll(now_ns)
        soon, late = (asked(controller, number, 30 * SECOND) for number in (6, 60))

        assert (soon.deadline_in_ns, late.deadline_in_ns) == (30 * SECOND, 30 * SECOND)
        assert soon.expected_wait_ns is not None
        assert soon.expected_wait_ns < 30 * SECOND
        assert not soon.is_hopeless
        assert late.expected_wait_ns is not None
        assert late.expected_wait_ns > 60 * SECOND
        assert late.is_hopeless
        conclusion = "It is expected to be evicted before its turn."
        assert conclusion not in " ".join(sentences(soon))
        assert sentences(late)[-1].endswith(f"evicted in 30.0 s at the latest. {conclusion}")

    def test_pool_that_became_empty(self) -> None:
        """There is no forecast, although dispatches were seen."""
        controller = engine()
        arrive(controller, 0, *(Request(number, "a") for number in range(1, 6)))
        controller.handle(Left(1), SECOND)
        controller.poll(SECOND)
        assert asked(controller, 5, SECOND).expected_wait_ns is not None
        controller.handle(EndpointsChanged(()), SECOND)
        controller.poll(SECOND)
        explained = asked(controller, 5, SECOND)

        assert (explained.expected_wait_ns, explained.late_wait_ns) == (None, None)
        assert not explained.is_hopeless
        assert "its remaining wait is unknown" in sentences(explained)[-1].lower()

    def test_no_endpoints(self) -> None:
        """Comes before all else."""
        controller = engine(endpoints=0)
        arrive(controller, 0, Request(1, "a", "chat"))
        explained = asked(controller, 1, 0)

        assert explained.gate is Gate.NO_ENDPOINTS
        said = " ".join(sentences(explained))
        assert "the pool has no endpoint" in said
        assert "No request is ahead of it." in said
        assert "unknown while the pool has no endpoint" in said

    def test_ceiling(self) -> None:
        """There is room, but not for this band."""
        controller = engine(endpoints=2, low=0.25)
        arrive(controller, 0, Request(1, "a", "batch"), Request(2, "a", "batch"))
        explained = asked(controller, 2, 0)

        assert explained.gate is Gate.CEILING
        ceiling = "may fill the pool to 25% only, and the pool is at 25%"
        assert ceiling in " ".join(sentences(explained))

    def test_higher_band(self) -> None:
        """Gated itself, it lets no lower band pass."""
        controller = engine(endpoints=2, low=0.5)
        arrive(controller, 0, *(Request(n, "a", "chat") for n in (1, 2, 3)))
        arrive(controller, 0, Request(4, "a"), Request(5, "a", "batch"))
        explained = asked(controller, 5, 0)

        assert controller.pool.saturation() == 0.75
        assert explained.gate is Gate.HIGHER_BAND
        assert explained.gating_priority == 0
        assert "because band 0 has requests waiting" in " ".join(sentences(explained))

    def test_share_against_fair_share(self) -> None:
        """By the cost of what was dispatched, and by weight."""
        controller = engine()
        arrive(controller, 0, Request(1, "gold", byte_size=40), Request(2, "lead", byte_size=40))
        arrive(controller, 0, Request(3, "gold"), Request(4, "lead"))
        flow = asked(controller, 4, 0).flow

        assert (flow.share, flow.fair_share) == (0.5, 0.25)
        assert "lead recently got 50% of its band's service; its fair share is 25%." in (
            sentences(asked(controller, 4, 0))
        )

    def test_a_turn_to_come(self) -> None:
        """Between a departure and the poll nothing keeps it."""
        controller = engine()
        arrive(controller, 0, *(Request(n, "a", "chat") for n in (1, 2, 3)))
        controller.handle(Left(1), 1)
        explained = asked(controller, 3, 1)

        assert explained.gate is Gate.TURN
        assert "it is dispatched next" in " ".join(sentences(explained))


class TestShares:
    """Who got how much lately."""

    def test_nothing_yet(self) -> None:
        """No flow has a share."""
        assert Shares(0).of("a") == 0.0

    def test_it_counts_half_after_a_half_life(self) -> None:
        """A newer dispatch of the same cost weighs twice."""
        shares = Shares(0)
        shares.dispatched("old", 6.0, 0)
        shares.dispatched("new", 6.0, HALF_LIFE_NS)

        assert shares.of("old") == pytest.approx(1 / 3)
        assert shares.of("new") == pytest.approx(2 / 3)

    def test_it_counts_anew_in_time(self) -> None:
        """After an age nothing overflows, and what faded is forgotten."""
        shares = Shares(0)
        shares.dispatched("old", 6.0, 0)
        shares.dispatched("new", 6.0, 5000 * HALF_LIFE_NS)

        assert shares.of("new") == pytest.approx(1.0)
        assert shares.of("old") == pytest.approx(0.0)

    def test_it_keeps_only_so_many(self) -> None:
        """Those with next to nothing go first."""
        shares = Shares(0)
        shares.dispatched("large", 1e9, 0)
        for number in range(ACCOUNTS_MAX + 10):
            shares.dispatched(f"flow-{number}", 1.0, 0)

        assert shares.of("large") > 0.99
        assert shares.of("flow-0") == 0.0


class TestWords:
    """Decisions in a sentence."""

    @pytest.mark.parametrize("outcome", Outcome)
    def test_every_outcome_has_a_reason(self, outcome: Outcome) -> None:
        """With the circumstances."""
        said = reason(Decision(1, outcome, 0, "a", 5 * SECOND, saturation=0.5, waiting=3))

        its = " with it" if outcome is Outcome.DISPATCHED else ""
        assert said.endswith(f"(50% saturation{its}, 3 left waiting)")
        assert "{" not in said

    def test_displaced(self) -> None:
        """By whom is not known here: by a better band's, or by a flow with less waiting."""
        decision = Decision(1, Outcome.EVICTED_DISPLACED, 0, "a", SECOND)

        assert reason(decision).startswith("it was displaced by another request after")

    def test_dispatched(self) -> None:
        """At once, or after a wait, against what was expected."""
        at_once = Decision(1, Outcome.DISPATCHED, 0, "a", 100)
        waited = Decision(1, Outcome.DISPATCHED, 0, "a", SECOND, expected_wait_ns=2 * SECOND)

        assert reason(at_once).startswith("there was room at once")
        assert reason(waited).startswith("its turn came after 1.0 s, 2.0 s expected")

    @pytest.mark.parametrize(
        ("duration_ns", "text"),
        [
            (0, "0 ms"),
            (340_000_000, "340 ms"),
            (4_200_000_000, "4.2 s"),
            (200 * SECOND, "3 min 20 s"),
        ],
    )
    def test_durations(self, duration_ns: int, text: str) -> None:
        """As people say them."""
        assert duration(duration_ns) == text

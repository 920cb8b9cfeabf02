"""What a client is told of every outcome."""

import json
from dataclasses import replace

import pytest

from flowcontrol.config import BandSettings, Concurrency, ControllerConfig, Limits
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    Left,
    ObjectivesChanged,
)
from flowcontrol.request import DEFAULT_FLOW_ID, Outcome, Request, Scope
from flowcontrol_server.requests.dialects import Dialect
from flowcontrol_server.requests.replies import (
    PUSHBACK_HEADER,
    REFUSALS,
    Exempt,
    Refuse,
    answer,
    refusal,
    unavailable,
)

SECOND = 1_000_000_000

# DESIGN.md, "Outcomes and what the client sees": HTTP status and reason.
TABLE = {
    "rejected-capacity": (429, "rejected-saturated"),
    "rejected-no-endpoints": (503, "rejected-no-endpoints"),
    "rejected-draining": (503, "rejected-shutting-down"),
    "evicted-ttl": (429, "rejected-ttl-expired"),
    "evicted-no-endpoints": (503, "rejected-no-endpoints"),
    "evicted-displaced": (429, "evicted-priority"),
    "evicted-cancelled": (499, "rejected-context-cancelled"),
    "evicted-drained": (503, "rejected-shutting-down"),
    "evicted-operator": (429, "evicted-operator"),
    "evicted-stood-down": (503, "rejected-unavailable"),
    "reclaimed": (429, "evicted"),
    "internal": (500, "internal"),
}
# The same table: outcomes whose Retry-After is known, and outcomes that carry none.
# "When known" of an empty pool is never: nobody can tell when a model server comes.
WITH_RETRY_AFTER = {
    "rejected-capacity",
    "rejected-draining",
    "evicted-displaced",
    "evicted-drained",
}
WITHOUT_RETRY_AFTER = {
    *("dispatched", "rejected-no-endpoints", "evicted-ttl"),
    *("evicted-no-endpoints", "evicted-cancelled", "evicted-operator"),
}
GRPC_STATUS = {429: 8, 499: 1, 500: 13, 503: 14}

DECISION = Decision(1, Outcome.DISPATCHED, priority=10, flow_id="a", waited_ns=5)


def refused(outcome: str, retry_after_ns: int | None = None) -> Refuse:
    """The refusal for an outcome."""
    decision = replace(DECISION, outcome=Outcome(outcome), retry_after_ns=retry_after_ns)
    reply = answer(decision, 0.0)
    assert isinstance(reply, Refuse)
    return reply


def play(facts: list[Fact], *, then_s: int) -> list[Decision]:
    """Tell an engine with one slot and two places some facts at once, then let time pass."""
    config = ControllerConfig(
        limits=Limits(requests_max=2),
        default_settings=BandSettings(ttl_ns=50 * SECOND),
        no_endpoint_ttl_ns=40 * SECOND,
        detectors=(Concurrency(requests_max=1),),
    )
    controller = FlowController(config, 0)
    decisions = []
    for fact in facts:
        controller.handle(fact, 0)
        decisions += controller.poll(0)
    return decisions + controller.poll(then_s * SECOND)


class TestTable:
    """One row of DESIGN.md's table after the other."""

    def test_every_outcome_has_a_row(self) -> None:
        """The table knows every outcome but those that are no refusals."""
        expected = {outcome.value for outcome in Outcome} - {"dispatched", "evicted-moved"}

        assert expected == TABLE.keys()
        assert expected == {outcome.value for outcome in REFUSALS}

    def test_moved(self) -> None:
        """Nobody is to be told; whoever listens all the same is refused, never let on."""
        moved = Decision(1, Outcome.EVICTED_MOVED, 0, "tenant", waited_ns=0)

        assert answer(moved, 0.0) == unavailable(Dialect.OPENAI)

    @pytest.mark.parametrize("outcome", TABLE)
    def test_status_and_reason(self, outcome: str) -> None:
        """The client gets the row's status and reason, and gRPC clients its equivalent."""
        reply = refused(outcome)

        status, reason = TABLE[outcome]
        assert reply.status == status
        assert reply.reason == reason
        assert reply.grpc_status == GRPC_STATUS[status]

    @pytest.mark.parametrize("outcome", TABLE)
    def test_body(self, outcome: str) -> None:
        """The body is the JSON that OpenAI's clients expect of an error."""
        body = json.loads(refused(outcome).body)

        status, reason = TABLE[outcome]
        kinds = {429: "rate_limit_error", 499: "invalid_request_error"}
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["type"] == kinds.get(status, "server_error")
        assert body["error"]["param"] is None
        assert body["error"]["code"] == reason
        assert body["error"]["message"]
        assert body["error"]["message"][0].islower()

    def test_displaced_by_whom(self) -> None:
        """Whoever is displaced may have been so by an equal: no priority is claimed."""
        message = REFUSALS[Outcome.EVICTED_DISPLACED].message

        assert message == "the queue is full, and another request took the place"

    def test_dispatched(self) -> None:
        """The decision itself is the answer."""
        decision = replace(
            DECISION,
            endpoint="10.0.0.5:8000",
            fallbacks=("10.0.0.6:8000",),
            retry_after_ns=9 * SECOND,
            saturation=0.75,
        )

        assert answer(decision, 0.5) is decision

    def test_fail_open(self) -> None:
        """Where the operator chose so, a request goes on ungated when the engine has failed."""
        decision = replace(DECISION, outcome=Outcome.INTERNAL)

        assert answer(decision, 0.5, continue_on_fault=True) == Exempt()

    @pytest.mark.parametrize("outcome", sorted(TABLE.keys() - {"internal"}))
    def test_fail_open_is_for_faults(self, outcome: str) -> None:
        """That choice lets nothing else pass."""
        decision = replace(DECISION, outcome=Outcome(outcome))

        assert answer(decision, 0.5, continue_on_fault=True) == answer(decision, 0.5)


class TestCircumstances:
    """What a refusal says of the request: how long it waited, and in which band."""

    def test_waited(self) -> None:
        """In the message and in headers; a spent TTL tells the client's library not to retry."""
        decision = replace(
            DECISION, outcome=Outcome.EVICTED_TTL, waited_ns=60 * SECOND + 5, priority=-1
        )
        reply = refusal(decision, 0.0)

        message = json.loads(reply.body)["error"]["message"]
        assert (
            message
            == "the request waited too long for its turn (waited 60 s, band -1, limit reached: ttl)"
        )
        assert reply.headers == (
            ("x-llm-d-flow-priority", "-1"),
            ("x-llm-d-flow-queue-duration-ms", "60000"),
            ("x-llm-d-flow-limit", "ttl"),
            ("x-should-retry", "false"),
        )

    def test_at_once(self) -> None:
        """A request that did not wait may be tried again."""
        reply = refused("rejected-capacity")

        message = json.loads(reply.body)["error"]["message"]
        assert message == "the queue for this request is full (band 10)"
        assert dict(reply.headers) == {
            "x-llm-d-flow-priority": "10",
            "x-llm-d-flow-queue-duration-ms": "0",
        }

    @pytest.mark.parametrize(
        ("scopes", "limits"), [((Scope.BAND,), "band"), ((Scope.FLOW, Scope.ALL), "flow, all")]
    )
    def test_limit(self, scopes: tuple[Scope, ...], limits: str) -> None:
        """A full queue is named."""
        decision = replace(DECISION, outcome=Outcome.REJECTED_CAPACITY, without_room=scopes)
        reply = refusal(decision, 0.0)

        assert dict(reply.headers)["x-llm-d-flow-limit"] == limits
        assert json.loads(reply.body)["error"]["message"] == (
            f"the queue for this request is full (band 10, limit reached: {limits})"
        )

    def test_internal(self) -> None:
        """A fault of our own says nothing of the request."""
        assert refused("internal").headers == ()


class TestRetryAfterByOutcome:
    """Who is told when to come back: the engine decides, the reply repeats it."""

    def test_by_the_engine(self) -> None:
        """Where the table says yes there is a Retry-After, and elsewhere none."""
        pool, nobody = EndpointsChanged(("10.0.0.5:8000",)), EndpointsChanged(())
        crowd = [Arrived(Request(number)) for number in range(9)]
        chat, urgent = ObjectivesChanged({"chat": 10}), Arrived(Request(9, objective="chat"))
        decided = [
            *play([pool, chat, *crowd, Left(1), Arrived(Request(10)), urgent], then_s=50),
            *play([nobody, *crowd], then_s=40),
            *play([nobody, crowd[0], FlowEvicted(0, DEFAULT_FLOW_ID)], then_s=1),
            *play([pool, *crowd[:2], DrainBegan(SECOND), crowd[3]], then_s=1),
        ]

        with_it: set[str] = set()
        without: set[str] = set()
        for decision in decided:
            reply = answer(decision, 0.0)
            has_it = isinstance(reply, Refuse) and reply.retry_after_s is not None
            (with_it if has_it else without).add(decision.outcome.value)
        assert with_it == WITH_RETRY_AFTER
        assert without == WITHOUT_RETRY_AFTER

    @pytest.mark.parametrize("outcome", sorted(TABLE.keys() - {"evicted-displaced"}))
    def test_unknown(self, outcome: str) -> None:
        """Without an expectation nothing is promised."""
        assert refused(outcome).retry_after_s is None

    def test_displaced_after_a_wait(self) -> None:
        """While no rate is known, the time it has waited in vain is."""
        decision = replace(DECISION, outcome=Outcome.EVICTED_DISPLACED, waited_ns=7 * SECOND)
        assert refusal(decision, 0.0).retry_after_s == 7
        assert refusal(replace(decision, waited_ns=5), 0.0).retry_after_s == 1
        longer = replace(decision, waited_ns=90 * SECOND)
        assert refusal(longer, 0.0).retry_after_s == 30

    @pytest.mark.parametrize("outcome", sorted(WITH_RETRY_AFTER))
    def test_known(self, outcome: str) -> None:
        """An expectation is passed on."""
        assert refused(outcome, 3 * SECOND).retry_after_s == 3


class TestPushback:
    """When a gRPC client that is told to retry comes back."""

    @pytest.mark.parametrize(
        ("outcome", "retry_after_ns", "expected"),
        [
            ("rejected-capacity", 7 * SECOND, "7000"),
            ("evicted-ttl", None, "-1000"),
            ("evicted-operator", None, None),
        ],
    )
    def test_grpc(self, outcome: str, retry_after_ns: int | None, expected: str | None) -> None:
        """As Retry-After says; never, where the request had its time."""
        decision = replace(DECISION, outcome=Outcome(outcome), retry_after_ns=retry_after_ns)
        of_grpc = dict(refusal(decision, 0.0, Dialect.GRPC).headers)

        assert of_grpc.get(PUSHBACK_HEADER) == expected
        assert PUSHBACK_HEADER not in dict(refusal(decision, 0.0).headers)

    def test_unavailable(self) -> None:
        """Nor is it forgotten where another replica decides."""
        assert unavailable(Dialect.GRPC).headers == ((PUSHBACK_HEADER, "5000"),)
        assert unavailable(Dialect.OPENAI).headers == ()

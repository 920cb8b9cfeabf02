"""The ext_proc conversation: every message in every phase."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.classify import ExemptPaths, Intake, classify
from server.exchange import (
    Acknowledge,
    Exchange,
    Message,
    MessageKind,
    Park,
    Phase,
    ProtocolError,
)
from server.replies import Answer, Exempt, Proceed, Refuse

HEADERS = {":path": "/v1/chat/completions", "x-llm-d-inference-objective": "chat"}
PROCEED = Proceed(request_id=1, priority=10, waited_ns=5)
REFUSE = Refuse(status=429, reason="rejected-saturated", body=b"{}", grpc_status=8)

OPENS = "the first message must be request_headers"
TWICE = "request_headers were sent twice"
BODIES = "processing_mode must keep request and response bodies NONE: the gate never reads them"
OVER = "the conversation is over"

# Who may say what, and when. None: the message is legal.
TABLE: dict[tuple[str, str], str | None] = {
    ("OPENING", "request_headers"): None,
    ("OPENING", "request_body"): OPENS,
    ("OPENING", "request_trailers"): OPENS,
    ("OPENING", "response_headers"): OPENS,
    ("OPENING", "response_body"): OPENS,
    ("OPENING", "response_trailers"): OPENS,
    ("PARKED", "request_headers"): TWICE,
    ("PARKED", "request_body"): BODIES,
    ("PARKED", "request_trailers"): BODIES,
    ("PARKED", "response_headers"): BODIES,
    ("PARKED", "response_body"): BODIES,
    ("PARKED", "response_trailers"): BODIES,
    ("GOING", "request_headers"): TWICE,
    ("GOING", "request_body"): None,
    ("GOING", "request_trailers"): None,
    ("GOING", "response_headers"): None,
    ("GOING", "response_body"): None,
    ("GOING", "response_trailers"): None,
    ("OVER", "request_headers"): OVER,
    ("OVER", "request_body"): OVER,
    ("OVER", "request_trailers"): OVER,
    ("OVER", "response_headers"): OVER,
    ("OVER", "response_body"): OVER,
    ("OVER", "response_trailers"): OVER,
}


def message(kind: MessageKind) -> Message:
    """A message of that kind, with headers where they belong."""
    return Message(kind, HEADERS if kind is MessageKind.REQUEST_HEADERS else {})


def exchange_in(phase: Phase) -> Exchange:
    """A conversation that was led to that phase."""
    exchange = Exchange(Intake())
    if phase is not Phase.OPENING:
        exchange.receive(message(MessageKind.REQUEST_HEADERS))
    if phase is Phase.GOING:
        exchange.decide(PROCEED)
    if phase is Phase.OVER:
        exchange.decide(REFUSE)
    assert exchange.phase is phase
    return exchange


class TestReceive:
    """What Envoy says."""

    def test_the_table_is_complete(self) -> None:
        """Every phase meets every kind of message in these tests."""
        expected = {(phase.name, kind.value) for phase in Phase for kind in MessageKind}

        assert expected == TABLE.keys()

    @pytest.mark.parametrize("pair", TABLE, ids="-".join)
    def test_every_pair(self, pair: tuple[str, str]) -> None:
        """A legal message is answered; an illegal one is complained of and changes nothing."""
        phase, kind, complaint = Phase[pair[0]], MessageKind(pair[1]), TABLE[pair]
        exchange = exchange_in(phase)

        if complaint is not None:
            with pytest.raises(ProtocolError) as raised:
                exchange.receive(message(kind))
            assert complaint == str(raised.value)
            assert phase is exchange.phase
        elif kind is MessageKind.REQUEST_HEADERS:
            assert exchange.receive(message(kind)) == Park(classify(HEADERS))
            assert exchange.phase is Phase.PARKED
        else:
            assert exchange.receive(message(kind)) == Acknowledge(kind)
            assert exchange.phase is Phase.GOING

    def test_exempt_path(self) -> None:
        """An exempt path passes at once, and the conversation is over."""
        exchange = Exchange(Intake(exempt=ExemptPaths(("/health",))))

        reply = exchange.receive(Message(MessageKind.REQUEST_HEADERS, {":path": "/health?deep=1"}))

        assert reply == Exempt()
        assert exchange.phase is Phase.OVER


class TestDecide:
    """What the engine says."""

    @pytest.mark.parametrize(
        ("answer", "phase"),
        [(PROCEED, Phase.GOING), (REFUSE, Phase.OVER), (Exempt(), Phase.OVER)],
    )
    def test_moves(self, answer: Answer, phase: Phase) -> None:
        """A request that goes on keeps its stream; for any other the conversation is over."""
        exchange = exchange_in(Phase.PARKED)

        assert exchange.decide(answer) is answer
        assert exchange.phase is phase

    @pytest.mark.parametrize("phase", [Phase.OPENING, Phase.GOING, Phase.OVER])
    def test_only_parked_requests(self, phase: Phase) -> None:
        """To decide what is not parked is our own mistake, and changes nothing."""
        exchange = exchange_in(phase)

        with pytest.raises(AssertionError, match="only a parked request is decided"):
            exchange.decide(PROCEED)
        assert exchange.phase is phase


class TestRecall:
    """What the engine says later."""

    def test_in_flight(self) -> None:
        """A request in flight is refused after all, and its conversation is over."""
        exchange = exchange_in(Phase.GOING)

        assert exchange.recall(REFUSE) is REFUSE
        assert exchange.phase is Phase.OVER

    @pytest.mark.parametrize("phase", [Phase.OPENING, Phase.PARKED, Phase.OVER])
    def test_only_in_flight(self, phase: Phase) -> None:
        """To recall what is not in flight is our own mistake, and changes nothing."""
        exchange = exchange_in(phase)

        with pytest.raises(AssertionError, match="only a request in flight is recalled"):
            exchange.recall(REFUSE)
        assert exchange.phase is phase


class TestSequences:
    """Any conversation, to the end."""

    @given(
        st.lists(
            st.sampled_from(MessageKind) | st.sampled_from([PROCEED, REFUSE, Exempt()]), max_size=12
        )
    )
    def test_any_order(self, said: list[MessageKind | Answer]) -> None:
        """Whatever is said, the phase follows the table, and one request is parked at most."""
        exchange = Exchange(Intake())
        parks = 0
        for each in said:
            before = exchange.phase
            if not isinstance(each, MessageKind):
                if before is Phase.PARKED:
                    exchange.decide(each)
                    after = Phase.GOING if each is PROCEED else Phase.OVER
                    assert exchange.phase is after
                continue
            heard = None
            try:
                parks += isinstance(exchange.receive(message(each)), Park)
            except ProtocolError as error:
                heard = str(error)
            assert TABLE[before.name, each.value] == heard
            assert heard is None or exchange.phase is before
        assert parks <= 1

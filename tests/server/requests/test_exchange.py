"""The ext_proc conversations: every message in every phase, and every interleaving of bodies."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.events import Decision
from flowcontrol.request import Outcome, Request
from flowcontrol_server.requests.classify import ExemptPaths, Intake, classify
from flowcontrol_server.requests.exchange import (
    MOVES,
    PARTINGS,
    Acknowledge,
    Exchange,
    FurtherAttempt,
    Message,
    MessageKind,
    Mode,
    Parting,
    Phase,
    ProtocolError,
    Reply,
)
from flowcontrol_server.requests.replies import Answer, Exempt, Refuse
from flowcontrol_server.requests.splice import BodyPart
from tests.support.conversation import PAGE, rewritten

HEADERS = {":path": "/v1/chat/completions", "x-llm-d-inference-objective": "chat"}
DISPATCHED = Decision(1, Outcome.DISPATCHED, 10, "tenant", waited_ns=5)
REFUSE = Refuse(status=429, reason="rejected-saturated", body=b"{}", grpc_status=8)
PART = BodyPart(is_request=True, body=b"ask", is_end=False)
ANSWER_PART = BodyPart(is_request=False, body=b"tell", is_end=False)

OPENS = "the first message must be request_headers"
TWICE = "request_headers must come once"
BODIES = "processing_mode must keep request and response bodies NONE, or stream both ways"
EARLY = "no response may come before the headers are answered"
OVER = "the conversation is over"

# What is answered, or the complaint, by the kind of message in the order of its protocol.
PASS, BACK, LATER, ASK = "acknowledged", "sent back", "nothing yet", "a decision is asked for"
TABLE = {
    ("ANSWERS", "OPENING"): (ASK, OPENS, OPENS, OPENS, OPENS, OPENS),
    ("ANSWERS", "PARKED"): (TWICE, BODIES, BODIES, PASS, BODIES, BODIES),
    ("ANSWERS", "GOING"): (TWICE, PASS, PASS, PASS, PASS, PASS),
    ("ANSWERS", "OVER"): (OVER, OVER, OVER, OVER, OVER, OVER),
    ("BUFFERED", "OPENING"): (ASK, OPENS, OPENS, OPENS, OPENS, OPENS),
    ("BUFFERED", "PARKED"): (TWICE, LATER, LATER, PASS, BODIES, BODIES),
    ("BUFFERED", "GOING"): (TWICE, PASS, PASS, PASS, PASS, PASS),
    ("BUFFERED", "OVER"): (OVER, OVER, OVER, OVER, OVER, OVER),
    ("DUPLEX", "PARKED"): (TWICE, LATER, LATER, PASS, EARLY, EARLY),
    ("DUPLEX", "GOING"): (TWICE, BACK, PASS, PASS, BACK, PASS),
    ("DUPLEX", "OVER"): (OVER, OVER, OVER, OVER, OVER, OVER),
}
KINDS = list(MessageKind)
CASES = [(*row, place) for row in TABLE for place in range(len(KINDS))]


def said(kind: MessageKind, mode: Mode | None = Mode.ANSWERS) -> Message | BodyPart:
    """A message of that kind, with headers where they belong."""
    if kind is MessageKind.REQUEST_BODY:
        return PART
    if kind is MessageKind.RESPONSE_BODY:
        return ANSWER_PART
    if kind is MessageKind.REQUEST_HEADERS:
        return Message(kind, HEADERS, mode=mode)
    return Message(kind, {})


def exchange_in(phase: Phase, mode: Mode | None = Mode.ANSWERS) -> Exchange:
    """A conversation that was led to that phase."""
    exchange = Exchange(Intake())
    if phase is not Phase.OPENING:
        exchange.receive(said(MessageKind.REQUEST_HEADERS, mode))
    if phase is Phase.GOING:
        exchange.decide(DISPATCHED)
    if phase is Phase.OVER:
        exchange.decide(REFUSE)
    assert exchange.phase is phase
    return exchange


class TestReceive:
    """What Envoy says."""

    def test_the_table_is_complete(self) -> None:
        """Every phase of each conversation meets every kind of message in these tests."""
        opening = (Mode.DUPLEX, Phase.OPENING)  # the first message says which it is

        assert {(Mode[mode], Phase[phase]) for mode, phase in TABLE} == MOVES.keys() - {opening}
        assert MOVES[opening] == MOVES[Mode.ANSWERS, Phase.OPENING]

    def test_the_page_shows_the_table(self) -> None:
        """Docs are generated; to write them: python -m tests.support.conversation."""
        page = PAGE.read_text()

        assert rewritten(page) == page

    def test_partings(self) -> None:
        """Every open phase has one: a parked request moves on or is refused, no body breaks off."""
        going = {mode: PARTINGS[mode, Phase.GOING] for mode in Mode}
        parked = {mode: PARTINGS[mode, Phase.PARKED] for mode in Mode}

        assert len(PARTINGS) == len(going) + len(parked)
        assert going == {
            Mode.ANSWERS: Parting.END,
            Mode.BUFFERED: Parting.END,
            Mode.DUPLEX: Parting.STAY,
        }
        assert parked == {
            Mode.ANSWERS: Parting.MOVE,
            Mode.BUFFERED: Parting.REFUSE,
            Mode.DUPLEX: Parting.REFUSE,
        }
        assert exchange_in(Phase.OVER).parting is None

    @pytest.mark.parametrize(("mode", "phase", "place"), CASES)
    def test_every_pair(self, mode: str, phase: str, place: int) -> None:
        """A legal message is answered; an illegal one is an error and changes nothing."""
        kind, expected = KINDS[place], TABLE[mode, phase][place]
        exchange = exchange_in(Phase[phase], Mode[mode])
        message = said(kind, Mode[mode])

        if expected == ASK:
            assert exchange.receive(message) == classify(HEADERS)
            assert exchange.phase is Phase.PARKED
        elif expected == PASS:
            assert exchange.receive(message) == Acknowledge(kind)
            assert exchange.phase is Phase.GOING
        elif expected == BACK:
            assert exchange.receive(message) is message
        elif expected == LATER:
            assert exchange.receive(message) is None
        else:
            with pytest.raises(ProtocolError) as raised:
                exchange.receive(message)
            assert expected == str(raised.value)
            assert exchange.phase is Phase[phase]

    def test_a_body_tells_the_conversation(self) -> None:
        """Where Envoy has not said which it is, a body that comes while the request waits does."""
        exchange = exchange_in(Phase.PARKED, None)

        assert exchange.receive(PART) is None
        assert exchange.mode is Mode.DUPLEX
        assert exchange.decide(DISPATCHED) == [DISPATCHED, PART]

    @pytest.mark.parametrize(
        ("content_type", "model"), [("application/json", "llama"), ("text/plain", "")]
    )
    def test_body_that_is_read(self, content_type: str, model: str) -> None:
        """What a body holds counts only if it is JSON, whenever it comes."""
        exchange = Exchange(Intake())
        headers = {**HEADERS, "content-type": content_type}
        message = Message(MessageKind.REQUEST_HEADERS, headers, mode=Mode.DUPLEX)
        request = exchange.receive(message)
        exchange.receive(BodyPart(is_request=True, body=b'{"model": "llama"}', is_end=True))

        assert isinstance(request, Request)
        assert exchange.with_body(request, message).model == model

    @pytest.mark.parametrize("kept", [MessageKind.REQUEST_BODY, MessageKind.RESPONSE_BODY])
    def test_one_body_to_be_sent_back(self, kept: MessageKind) -> None:
        """Parts of the other are acknowledged: those of a parked request behind its answer."""
        exchange = Exchange(Intake())
        kind = MessageKind.REQUEST_HEADERS
        exchange.receive(Message(kind, HEADERS, mode=Mode.DUPLEX, kept=kept))
        exchange.receive(PART)
        of_request = [*exchange.decide(DISPATCHED)[1:], exchange.receive(PART)]
        passed = Acknowledge(kept)

        is_request = kept is MessageKind.REQUEST_BODY
        assert of_request == ([passed, passed] if is_request else [PART, PART])
        assert exchange.receive(ANSWER_PART) == (ANSWER_PART if is_request else passed)

    def test_half_close_behind_a_body(self) -> None:
        """A client that never said so and has sent all of a body still waits for the answer."""
        told, untold = exchange_in(Phase.PARKED, Mode.DUPLEX), exchange_in(Phase.PARKED, None)
        for exchange in (told, untold):
            assert not exchange.awaits_end
            exchange.receive(PART)
            assert not exchange.awaits_end
            exchange.receive(BodyPart(is_request=True, body=b"", is_end=True))

        assert untold.awaits_end
        assert not told.awaits_end

    def test_attempt_without_a_ticket(self) -> None:
        """Another attempt at a request that needed no slot needs none."""
        exchange = Exchange(Intake())
        attempt = FurtherAttempt("", "10.0.0.6:8000")
        message = Message(MessageKind.REQUEST_HEADERS, HEADERS, attempt=attempt)

        assert exchange.receive(message) == Acknowledge(MessageKind.REQUEST_HEADERS)
        assert exchange.phase is Phase.OVER

    @pytest.mark.parametrize(
        ("mode", "is_end", "expected"),
        [(None, True, True), (None, False, False), (Mode.ANSWERS, True, False)],
    )
    def test_half_close_without_a_body(
        self,
        mode: Mode | None,
        is_end: bool,  # noqa: FBT001 - a parameter
        expected: bool,  # noqa: FBT001 - a parameter
    ) -> None:
        """A client that never said so and asks for a request without a body shows no response."""
        exchange = Exchange(Intake())
        exchange.receive(Message(MessageKind.REQUEST_HEADERS, HEADERS, mode=mode, is_end=is_end))
        exchange.decide(DISPATCHED)

        assert exchange.is_unseen is expected
        exchange.receive(Message(MessageKind.RESPONSE_HEADERS, {}))
        assert not exchange.is_unseen

    @pytest.mark.parametrize(
        ("mode", "phase"),
        [(Mode.ANSWERS, Phase.OVER), (Mode.BUFFERED, Phase.OVER), (Mode.DUPLEX, Phase.GOING)],
    )
    def test_exempt_path(self, mode: Mode, phase: Phase) -> None:
        """An exempt path passes at once; that ends the conversation, unless a body is to follow."""
        exchange = Exchange(Intake(exempt=ExemptPaths(("/health",))))
        path = {":path": "/health?deep=1"}

        headers = {":method": "GET", **path}
        reply = exchange.receive(Message(MessageKind.REQUEST_HEADERS, headers, mode=mode))

        assert reply == Exempt()
        assert exchange.phase is phase

    def test_envoy_responds_while_parked(self) -> None:
        """A local reply of Envoy's passes; nothing is owed to the request any more."""
        exchange = exchange_in(Phase.PARKED, Mode.DUPLEX)
        exchange.receive(PART)
        exchange.receive(said(MessageKind.RESPONSE_HEADERS))

        assert exchange.held_bytes == 0
        assert exchange.receive(ANSWER_PART) is ANSWER_PART

    @pytest.mark.parametrize("method", [{":method": "POST"}, {}])
    def test_exempt_for_another_method(self, method: dict[str, str]) -> None:
        """An exempt path is gated for other methods, and where the method is unknown."""
        exchange = Exchange(Intake(exempt=ExemptPaths(("/health",))))

        exchange.receive(Message(MessageKind.REQUEST_HEADERS, {":path": "/health", **method}))

        assert exchange.phase is Phase.PARKED


class TestDecide:
    """What the engine says."""

    @pytest.mark.parametrize(
        ("answer", "phase"),
        [(DISPATCHED, Phase.GOING), (REFUSE, Phase.OVER), (Exempt(), Phase.OVER)],
    )
    def test_moves(self, answer: Answer, phase: Phase) -> None:
        """A request that goes on keeps its stream; for any other the conversation is over."""
        exchange = exchange_in(Phase.PARKED)

        assert exchange.decide(answer) == [answer]
        assert exchange.phase is phase

    def test_buffered_body(self) -> None:
        """A body that Envoy sends before it has read our answer is acknowledged behind it."""
        exchange = exchange_in(Phase.PARKED, Mode.BUFFERED)
        exchange.receive(PART)

        owed = Acknowledge(MessageKind.REQUEST_BODY)
        assert exchange.held_bytes == 0
        assert exchange.decide(DISPATCHED) == [DISPATCHED, owed]

    def test_refused_with_a_body(self) -> None:
        """Nothing follows an immediate response."""
        exchange = exchange_in(Phase.PARKED, Mode.DUPLEX)
        exchange.receive(PART)
        exchange.receive(said(MessageKind.REQUEST_TRAILERS))

        assert exchange.held_bytes == 3
        assert exchange.decide(REFUSE) == [REFUSE]
        assert exchange.held_bytes == 0

    @pytest.mark.parametrize("phase", [Phase.OPENING, Phase.GOING, Phase.OVER])
    def test_only_parked_requests(self, phase: Phase) -> None:
        """To decide what is not parked is our own mistake, and changes nothing."""
        exchange = exchange_in(phase)

        with pytest.raises(AssertionError, match="only a parked request is decided"):
            exchange.decide(DISPATCHED)
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


def parts(*, is_request: bool) -> st.SearchStrategy[list[BodyPart]]:
    """A body in parts, its end perhaps in one of its own, perhaps twice, perhaps not at all."""
    bodies = st.lists(st.binary(max_size=5), max_size=4)
    ends = st.lists(st.sampled_from([b"", b"late"]), max_size=2)
    return st.builds(
        lambda plain, last: [
            *(BodyPart(is_request, body, is_end=False) for body in plain),
            *(BodyPart(is_request, body, is_end=True) for body in last),
        ],
        bodies,
        ends,
    )


def expected_of(sent: Sequence[BodyPart]) -> tuple[bytes, int]:
    """What of a body must come back: all to its first end, and how many ends."""
    body, ends = b"", 0
    for part in sent:
        if not ends:
            body += part.body
            ends += part.is_end
    return body, ends


class TestSequences:
    """Any conversation, to the end."""

    @given(
        st.lists(
            st.sampled_from(MessageKind) | st.sampled_from([DISPATCHED, REFUSE, Exempt()]),
            max_size=12,
        ),
        st.sampled_from([None, *Mode]),
    )
    def test_any_order(self, given_: list[MessageKind | Answer], mode: Mode | None) -> None:
        """Whatever is said, an error changes nothing, and one request is parked at most."""
        exchange = Exchange(Intake())
        parks = 0
        for each in given_:
            before = exchange.phase, exchange.mode
            if not isinstance(each, MessageKind):
                if before[0] is Phase.PARKED:
                    assert exchange.decide(each)[0] is each
                continue
            try:
                parks += isinstance(exchange.receive(said(each, mode)), Request)
            except ProtocolError:
                assert (exchange.phase, exchange.mode) == before
        assert parks <= 1

    @given(
        data=st.data(),
        request=parts(is_request=True),
        response=parts(is_request=False),
        has_request_trailers=st.booleans(),
        has_response_trailers=st.booleans(),
        answer=st.sampled_from([DISPATCHED, Exempt(), REFUSE]),
        mode=st.sampled_from([Mode.DUPLEX, None]),
    )
    def test_bodies_come_back(  # noqa: PLR0917 - what a conversation consists of
        self,
        data: st.DataObject,
        request: list[BodyPart],
        response: list[BodyPart],
        has_request_trailers: bool,  # noqa: FBT001 - drawn
        has_response_trailers: bool,  # noqa: FBT001 - drawn
        answer: Answer,
        mode: Mode | None,
    ) -> None:
        """Both bodies come back whole, once, in order, behind the answer; or the client is told."""
        exchange = Exchange(Intake())
        assert isinstance(exchange.receive(said(MessageKind.REQUEST_HEADERS, mode)), Request)
        asked: list[Message | BodyPart] = [*request]
        if has_request_trailers:
            asked.append(said(MessageKind.REQUEST_TRAILERS))
        if mode is None:
            asked = [PART, *asked]  # it tells which conversation it is
        told: list[Message | BodyPart] = [said(MessageKind.RESPONSE_HEADERS), *response]
        if has_response_trailers:
            told.append(said(MessageKind.RESPONSE_TRAILERS))
        before = data.draw(st.integers(0 if mode is not None else 1, len(asked)), "before")
        replies: list[Reply] = []
        for each in asked[:before]:
            assert exchange.receive(each) is None
        assert exchange.held_bytes == len(expected_of(_bodies(asked[:before], is_request=True))[0])
        replies += exchange.decide(answer)
        assert replies[0] is answer
        if answer is REFUSE:
            assert replies == [REFUSE]
            assert exchange.phase is Phase.OVER
            return
        later = [*asked[before:]]
        steps = len(later) + len(told)
        recalled_behind = data.draw(st.none() | st.integers(0, steps), "recalled behind")
        while (later or told) and steps - len(later) - len(told) != recalled_behind:
            takes_asked = bool(later) and (not told or data.draw(st.booleans()))
            reply = exchange.receive((later if takes_asked else told).pop(0))
            assert not isinstance(reply, Request)
            if reply is not None:
                replies.append(reply)

        if recalled_behind is not None:
            _check_recalled(exchange, replies, asked, response)
            return
        for is_request, sent in ((True, _bodies(asked, is_request=True)), (False, response)):
            back = [r for r in replies if isinstance(r, BodyPart) and r.is_request == is_request]
            body, ends = expected_of(sent)
            assert b"".join(part.body for part in back) == body
            assert sum(part.is_end for part in back) == ends
            assert not ends or back[-1].is_end
        kinds = [reply.kind for reply in replies if isinstance(reply, Acknowledge)]
        assert kinds.count(MessageKind.REQUEST_TRAILERS) == has_request_trailers
        assert kinds.count(MessageKind.RESPONSE_HEADERS) == 1
        assert kinds.count(MessageKind.RESPONSE_TRAILERS) == has_response_trailers
        assert exchange.held_bytes == 0


def _check_recalled(
    exchange: Exchange,
    replies: Sequence[Reply],
    asked: Sequence[Message | BodyPart],
    response: Sequence[BodyPart],
) -> None:
    """What has come back is the beginning of both bodies, and nothing follows the refusal."""
    assert exchange.recall(REFUSE) is REFUSE
    for is_request, sent in ((True, _bodies(asked, is_request=True)), (False, response)):
        back = [r for r in replies if isinstance(r, BodyPart) and r.is_request == is_request]
        assert expected_of(sent)[0].startswith(b"".join(part.body for part in back))
    for kind in MessageKind:
        with pytest.raises(ProtocolError, match=OVER):
            exchange.receive(said(kind))


def _bodies(messages: Sequence[Message | BodyPart], *, is_request: bool) -> list[BodyPart]:
    return [m for m in messages if isinstance(m, BodyPart) and m.is_request == is_request]

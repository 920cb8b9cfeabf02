"""Pure. The ext_proc conversation of one request, whatever carries it.

Envoy opens a stream and sends the request headers. Nothing else is owed until the headers are
answered; then the stream stays open until the request is over (ENVOY: response trailers SEND), and
at most one more message comes, the trailers of the response, if the model server really sends any.

Messages and answers are plain slots classes, built once and read once: frozen ones take four times
as long to make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, final

from server.classify import Intake, RequestFacts, classify
from server.replies import Answer, Exempt, Proceed, Refuse
from server.rules import Metadata


class Phase(Enum):
    """Where a conversation stands."""

    OPENING = auto()
    """Nothing has been said."""
    PARKED = auto()
    """The headers are here and owed an answer."""
    GOING = auto()
    """The request was let on; its stream is the lease on its slot."""
    OVER = auto()
    """Nothing more is to be said: refused, exempt, or ended."""

    __hash__ = object.__hash__  # as in Outcome


class MessageKind(Enum):
    """What Envoy can send."""

    REQUEST_HEADERS = "request_headers"
    REQUEST_BODY = "request_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"


@final
@dataclass(slots=True)
class Message:
    """One message of Envoy's; all but its kind only with request headers."""

    kind: MessageKind
    headers: Mapping[str, str]
    """Names in lower case."""
    metadata: Metadata = field(default_factory=dict)
    """What Envoy's filters found in the request, where Envoy forwards it."""


@final
@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Let a later part of the request or response pass as it is."""

    kind: MessageKind


@final
@dataclass(slots=True)
class Park:
    """Ask for a decision about this request."""

    facts: RequestFacts


Reply = Answer | Acknowledge


class ProtocolError(Exception):
    """Envoy, or whoever speaks in its place, said what it must not say now; nothing has changed."""


class _Move(NamedTuple):
    then: Phase
    complaint: str | None = None


_H = MessageKind.REQUEST_HEADERS
_BODIES = "processing_mode must keep request and response bodies NONE: the gate never reads them"
_MOVES: dict[tuple[Phase, bool], _Move] = {
    # (phase, is the message request headers?)
    (Phase.OPENING, True): _Move(Phase.PARKED),
    (Phase.OPENING, False): _Move(Phase.OPENING, "the first message must be request_headers"),
    (Phase.PARKED, True): _Move(Phase.PARKED, "request_headers were sent twice"),
    (Phase.PARKED, False): _Move(Phase.PARKED, _BODIES),
    (Phase.GOING, True): _Move(Phase.GOING, "request_headers were sent twice"),
    (Phase.GOING, False): _Move(Phase.GOING),
    (Phase.OVER, True): _Move(Phase.OVER, "the conversation is over"),
    (Phase.OVER, False): _Move(Phase.OVER, "the conversation is over"),
}


@final
class Exchange:
    """One conversation: messages and decisions go in, replies come out.

    Legal moves are the table above; an illegal one raises `ProtocolError` and changes nothing.
    """

    __slots__ = ("_intake", "phase")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.phase = Phase.OPENING

    def receive(self, message: Message) -> Park | Reply:
        """Take what Envoy says; answer it, or ask for the decision that will answer it."""
        move = _MOVES[self.phase, message.kind is _H]
        if move.complaint is not None:
            raise ProtocolError(move.complaint)
        self.phase = move.then
        if message.kind is not _H:
            return Acknowledge(message.kind)
        facts = classify(message.headers, message.metadata, self._intake)
        if facts.path in self._intake.exempt:
            self.phase = Phase.OVER
            return Exempt()
        return Park(facts)

    def recall(self, refusal: Refuse) -> Reply:
        """Take the decision that ends a request in flight; return it as the reply to be sent."""
        assert self.phase is Phase.GOING, "only a request in flight is recalled"
        self.phase = Phase.OVER
        return refusal

    def decide(self, answer: Answer) -> Reply:
        """Take the decision about the parked request; return it as the reply that is owed."""
        assert self.phase is Phase.PARKED, "only a parked request is decided"
        match answer:
            case Proceed():
                self.phase = Phase.GOING
            case Exempt() | Refuse():
                self.phase = Phase.OVER
        return answer

"""Pure. The ext_proc conversation of one request, independent of the transport.

Envoy opens a stream and sends the request headers. Nothing else is answered before the headers.
What follows is one of these conversations, which Envoy names in its first message:

ANSWERS. Envoy keeps the bodies. The stream stays open until the request is over (response trailers
SEND). At most one more message comes: the trailers of the response, if the model server sends any.
BUFFERED is the same, except that the answer to the headers must ask Envoy to keep the bodies. A
body that comes before Envoy has read the answer is acknowledged.

DUPLEX (FULL_DUPLEX_STREAMED, as gateways configure endpoint pickers). Envoy sends both bodies in
parts and waits until they are sent back. Parts that come while the request is parked are held, and
sent back after the answer to the headers; all others are sent back at once. The end of a body is
sent back once, and whatever follows it is ignored (envoyproxy/envoy#46237). Nothing follows an
ImmediateResponse. If Envoy expects only one of the bodies back, parts of the other are
acknowledged.

Messages and answers are plain classes with slots, built once and read once: frozen ones take four
times as long to make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple, final

from flowcontrol.events import Decision
from flowcontrol.request import Request
from flowcontrol_server.requests.body_facts import READ_BYTES_MAX, body_facts
from flowcontrol_server.requests.classify import (
    Intake,
    Origin,
    classify_with_origin,
    names_json,
    path_of,
    served_endpoint,
)
from flowcontrol_server.requests.prefix import prefix_of_body
from flowcontrol_server.requests.replies import Answer, Exempt, Refuse
from flowcontrol_server.requests.rules import BODY_NAMESPACE, Metadata
from flowcontrol_server.requests.splice import BodyPart

_NO_METADATA: Final[Metadata] = {}


class Phase(Enum):
    """The state of a conversation."""

    OPENING = auto()
    """No message has come."""
    PARKED = auto()
    """The headers have come and are not answered yet."""
    GOING = auto()
    """The request may go on to its endpoint; its stream is the lease on its slot."""
    OVER = auto()
    """Nothing more is sent: the request was refused, is exempt, or has ended."""

    __hash__ = object.__hash__  # as in Outcome


class Mode(Enum):
    """Which conversation it is."""

    ANSWERS = "answers"
    """Envoy keeps the bodies."""
    BUFFERED = "buffered"
    """Envoy is asked not to send bodies; a body that comes nevertheless is acknowledged."""
    DUPLEX = "duplex"
    """Envoy sends the bodies and gets them back."""

    __hash__ = object.__hash__


class MessageKind(Enum):
    """Kinds of messages that Envoy can send."""

    REQUEST_HEADERS = "request_headers"
    REQUEST_BODY = "request_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"

    __hash__ = object.__hash__


class FurtherAttempt(NamedTuple):
    """Another attempt at a request that Envoy could not send to its endpoint."""

    ticket: str
    """Ticket of the attempt before; empty: it had none."""
    endpoint: str
    """Where Envoy would send it now."""


@final
@dataclass(slots=True, init=False)
class Message:
    """One message of Envoy that is not a part of a body."""

    kind: MessageKind
    headers: Mapping[str, str]
    """Headers of the request or the response, names in lower case; trailers are not read."""
    metadata: Metadata = field(default_factory=dict)
    """Metadata of Envoy's filters, if Envoy forwards it."""
    began: str = ""
    """When Envoy first saw the request, RFC 3339; empty: unknown."""
    mode: Mode | None = None
    """Which conversation follows; None: Envoy does not name it."""
    is_end: bool = False
    """Whether no body follows these headers."""
    attempt: FurtherAttempt | None = None
    """None: Envoy has not tried to send the request yet."""
    kept: MessageKind | None = None
    """The body that Envoy does not expect back in a duplex conversation; None: there is none."""

    def __init__(  # noqa: PLR0913 - its fields; a dataclass's own is interpreted
        self,
        kind: MessageKind,
        headers: Mapping[str, str],
        metadata: Metadata = _NO_METADATA,
        began: str = "",
        mode: Mode | None = None,
        *,
        is_end: bool = False,
        attempt: FurtherAttempt | None = None,
        kept: MessageKind | None = None,
    ) -> None:
        self.kind = kind
        self.headers = headers
        self.metadata = metadata
        self.began = began
        self.mode = mode
        self.is_end = is_end
        self.attempt = attempt
        self.kept = kept


@final
@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Let a later message of the request or response pass unchanged."""

    kind: MessageKind
    served: str = ""
    """For conformance tests: the endpoint to name in the headers of the response."""


Reply = Answer | Acknowledge | BodyPart


class ProtocolError(Exception):
    """The client of this stream sent a message that is not allowed now; the state is unchanged."""


class Move(Enum):
    """How a message is handled."""

    PARK = "park"
    """Ask for the decision."""
    HOLD = "hold"
    """Keep it until the headers are answered."""
    ECHO = "echo"
    """Send it back."""
    ACKNOWLEDGE = "acknowledge"
    """Let it pass."""
    GIVE_UP = "give up"
    """Envoy itself responds while the request is parked: let the response pass, leave the queue."""


_OPENS: Final = "the first message must be request_headers"
_TWICE: Final = "request_headers must come once"
_BODIES: Final = "processing_mode must keep request and response bodies NONE, or stream both ways"
_EARLY: Final = "no response may come before the headers are answered"
_OVER: Final = "the conversation is over"
_PARK: Final = Move.PARK
_HOLD: Final = Move.HOLD
_ECHO: Final = Move.ECHO
_ACK: Final = Move.ACKNOWLEDGE
_GIVE_UP: Final = Move.GIVE_UP

MOVES: Final[Mapping[tuple[Mode, Phase], Sequence[Move | str]]] = {
    # One entry for each kind of message: headers, body, trailers of the request, then the same of
    # the response. A text is the error if the message is not allowed.
    (Mode.ANSWERS, Phase.OPENING): (_PARK, _OPENS, _OPENS, _OPENS, _OPENS, _OPENS),
    (Mode.ANSWERS, Phase.PARKED): (_TWICE, _BODIES, _BODIES, _GIVE_UP, _BODIES, _BODIES),
    (Mode.ANSWERS, Phase.GOING): (_TWICE, _ACK, _ACK, _ACK, _ACK, _ACK),
    (Mode.ANSWERS, Phase.OVER): (_OVER, _OVER, _OVER, _OVER, _OVER, _OVER),
    (Mode.BUFFERED, Phase.OPENING): (_PARK, _OPENS, _OPENS, _OPENS, _OPENS, _OPENS),
    (Mode.BUFFERED, Phase.PARKED): (_TWICE, _HOLD, _HOLD, _GIVE_UP, _BODIES, _BODIES),
    (Mode.BUFFERED, Phase.GOING): (_TWICE, _ACK, _ACK, _ACK, _ACK, _ACK),
    (Mode.BUFFERED, Phase.OVER): (_OVER, _OVER, _OVER, _OVER, _OVER, _OVER),
    (Mode.DUPLEX, Phase.OPENING): (_PARK, _OPENS, _OPENS, _OPENS, _OPENS, _OPENS),
    (Mode.DUPLEX, Phase.PARKED): (_TWICE, _HOLD, _HOLD, _GIVE_UP, _EARLY, _EARLY),
    (Mode.DUPLEX, Phase.GOING): (_TWICE, _ECHO, _ACK, _ACK, _ECHO, _ACK),
    (Mode.DUPLEX, Phase.OVER): (_OVER, _OVER, _OVER, _OVER, _OVER, _OVER),
}


class Parting(Enum):
    """What happens to a request when this replica stops deciding, or closes."""

    MOVE = "move"
    """End the stream unanswered: Envoy asks the next replica."""
    REFUSE = "refuse"
    """Refuse the request. Envoy keeps no copy of a body that it has sent here, and gateways
    configure no second try: Envoy would answer a bare 500, or let the request pass undecided."""
    END = "end"
    """End the stream: the response goes on without it."""
    STAY = "stay"
    """Keep the stream until the bodies have passed."""

    __hash__ = object.__hash__


PARTINGS: Final[Mapping[tuple[Mode, Phase], Parting]] = {
    (Mode.ANSWERS, Phase.PARKED): Parting.MOVE,
    (Mode.ANSWERS, Phase.GOING): Parting.END,
    (Mode.BUFFERED, Phase.PARKED): Parting.REFUSE,
    (Mode.BUFFERED, Phase.GOING): Parting.END,
    (Mode.DUPLEX, Phase.PARKED): Parting.REFUSE,
    (Mode.DUPLEX, Phase.GOING): Parting.STAY,
}
_KINDS: Final = tuple(MessageKind)
_MOVES: Final = {
    (mode, phase, kind): move
    for (mode, phase), moves in MOVES.items()
    for kind, move in zip(_KINDS, moves, strict=True)
}
_EXEMPT: Final = Exempt()
_OPENING: Final = Phase.OPENING  # looked up once: each time takes some 200 instructions
_PARKED: Final = Phase.PARKED
_GOING: Final = Phase.GOING
_ANSWERS: Final = Mode.ANSWERS
_DUPLEX: Final = Mode.DUPLEX


@final
class Exchange:
    """One conversation: takes messages and decisions, returns replies.

    Moves are those of the table above. A message that is not allowed raises `ProtocolError` and
    changes nothing.
    """

    __slots__ = (
        "_has_asked",
        "_has_only_asked",
        "_held",
        "_intake",
        "_is_end_held",
        "_is_request_ended",
        "_is_response_ended",
        "_kept",
        "_owed",
        "held_bytes",
        "mode",
        "origin",
        "phase",
    )

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.origin: Origin | None = None
        """Origin of the objective and the flow of the request; None: it is not classified."""
        self.phase = _OPENING
        self.mode = _ANSWERS
        self._has_asked = False
        """Whether Envoy has named the conversation."""
        self._has_only_asked = False
        """Whether all of a request came without a named conversation, and no response has come."""
        self._held: list[bytes] | None = None
        """Parts of the request's body, while the request is parked."""
        self.held_bytes = 0
        self._is_end_held = False
        self._owed: list[Reply] | None = None
        """Acknowledgements to send after the answer to the headers."""
        self._is_request_ended = False
        """The end of the request's body has come."""
        self._is_response_ended = False
        self._kept: MessageKind | None = None
        """The body whose parts are acknowledged, not sent back."""

    def receive(self, message: Message | BodyPart) -> Request | Reply | None:
        """Take a message; return the reply, or the request whose decision will be the reply.

        None: no reply is due now.
        """
        if isinstance(message, BodyPart):
            return self._receive_body(message)
        kind = message.kind
        move = _MOVES[self.mode, self.phase, kind]
        if isinstance(move, str):
            raise ProtocolError(move)
        if move is _PARK:
            return self._begin(message)
        if move is _HOLD:
            self._owe(kind)
            return None
        if kind is MessageKind.RESPONSE_HEADERS:
            self._has_only_asked = False
        if move is _GIVE_UP:
            self._drop_held()
            self.phase = _GOING
        if self._intake.conformance is not None and kind is MessageKind.RESPONSE_HEADERS:
            return Acknowledge(kind, served_endpoint(message.metadata))
        return Acknowledge(kind)

    def reads_body(self, message: Message) -> bool:
        """Whether the beginning of the request's body is read: it comes through here, and is JSON.

        Args:
            message: the headers.
        """
        return self.mode is Mode.DUPLEX and not message.is_end and names_json(message.headers)

    def with_body(self, request: Request, message: Message) -> Request:
        """Return a request updated with the part of its body that has come, if it is read.

        Args:
            request: as classified by its headers.
            message: the headers.
        """
        if self._held is None or not self.reads_body(message):
            return request
        body = b"".join(self._held)[:READ_BYTES_MAX]
        if BODY_NAMESPACE not in message.metadata and (found := body_facts(body)):
            metadata = {**message.metadata, BODY_NAMESPACE: found}
            request = self._classify(message.headers, metadata)
        if self._intake.reads_prefixes:
            request.prefix = prefix_of_body(request.model, body)
        return request

    @property
    def awaits_end(self) -> bool:
        """Whether a half-close is not the end of the request.

        A client that does not name the conversation (NGINX Gateway Fabric) half-closes the stream
        after the request, and then reads the answers.
        """
        return not self._has_asked and self._is_request_ended

    @property
    def takes_bodies(self) -> bool:
        """Whether a part of a body may come and is sent back, in any number of parts."""
        return self.mode is _DUPLEX or not self._has_asked

    @property
    def parting(self) -> Parting | None:
        """What happens when this replica stops deciding; None: nothing is left to do."""
        return PARTINGS.get((self.mode, self.phase))

    @property
    def is_unseen(self) -> bool:
        """Whether the response stays unseen: such a client asks only where to send a request."""
        return self._has_only_asked and self.phase is _GOING

    def recall(self, refusal: Refuse) -> Reply:
        """Take the decision that ends a request in flight; return the reply to send."""
        assert self.phase is _GOING, "only a request in flight is recalled"
        self.phase = Phase.OVER
        return refusal

    def decide(self, answer: Answer) -> list[Reply]:
        """Take the decision about the parked request; return the replies to send, in order."""
        assert self.phase is _PARKED, "only a parked request is decided"
        replies: list[Reply] = [answer]
        is_going = isinstance(answer, Decision) or (
            isinstance(answer, Exempt) and self.mode is _DUPLEX
        )
        self.phase = _GOING if is_going else Phase.OVER
        if not isinstance(answer, Refuse):
            if self._held is not None or self._is_end_held:
                body = b"".join(self._held or ())
                replies.append(BodyPart(is_request=True, body=body, is_end=self._is_end_held))
            if self._owed is not None:
                replies += self._owed
        self._drop_held()
        return replies

    def _begin(self, message: Message) -> Request | Reply:
        if message.mode is not None:
            self._has_asked = True
            self.mode, self._kept = message.mode, message.kept
        self.phase = _PARKED
        self._is_request_ended = message.is_end
        self._has_only_asked = message.is_end and not self._has_asked
        headers = message.headers
        if message.attempt is not None and not message.attempt.ticket:
            self.phase = Phase.OVER  # exempt, or passed while this service was unreachable
            return Acknowledge(message.kind)
        if self._intake.exempt.passes(headers.get(":method", ""), path_of(headers)):
            self.phase = _GOING if self.mode is _DUPLEX else Phase.OVER
            return _EXEMPT
        return self._classify(headers, message.metadata)

    def _classify(self, headers: Mapping[str, str], metadata: Metadata) -> Request:
        request, self.origin = classify_with_origin(headers, metadata, self._intake)
        return request

    def _receive_body(self, part: BodyPart) -> Reply | None:
        kind = MessageKind.REQUEST_BODY if part.is_request else MessageKind.RESPONSE_BODY
        move = _MOVES[self.mode, self.phase, kind]
        if isinstance(move, str):
            is_unasked = self.phase is _PARKED and part.is_request and not self._has_asked
            if self.mode is _DUPLEX or not is_unasked:
                raise ProtocolError(move)
            self.mode, move = _DUPLEX, _HOLD  # no other conversation sends a body so early
        if part.is_request and part.is_end and not self._has_asked:
            self._has_only_asked = True
        is_kept = kind is self._kept
        if move is _ACK or (is_kept and move is _ECHO):
            return Acknowledge(kind)
        if self.mode is Mode.BUFFERED or is_kept:
            self._owe(kind)
            return None
        if self._has_ended(part):
            return None
        if move is _ECHO:
            return part
        assert move is _HOLD, "a body is held, or sent back"
        self._is_end_held = part.is_end
        if part.body:
            if self._held is None:
                self._held = []
            self._held.append(part.body)
            self.held_bytes += len(part.body)
        return None

    def _has_ended(self, part: BodyPart) -> bool:
        """Note a part; return whether the end of its body came before it."""
        if part.is_request:
            has_ended = self._is_request_ended
            self._is_request_ended = has_ended or part.is_end
        else:
            has_ended = self._is_response_ended
            self._is_response_ended = has_ended or part.is_end
        return has_ended

    def _owe(self, kind: MessageKind) -> None:
        if self._owed is None:
            self._owed = []
        self._owed.append(Acknowledge(kind))

    def _drop_held(self) -> None:
        self._held, self.held_bytes = None, 0
        self._is_end_held = False
        self._owed = None

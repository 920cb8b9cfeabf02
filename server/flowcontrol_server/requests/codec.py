"""Decodes Envoy's ext_proc messages to plain values, and encodes the replies.

Only this module and `log_codec` use Envoy's message classes.

Google's protobuf (upb) decodes a request in microseconds. The typed dataclasses of envoy-data-plane
take most of a millisecond; they are the independent second codec of the tests.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any, Final, TypeVar, final

from google.protobuf import message as protobuf
from google.protobuf import struct_pb2

from flowcontrol.events import Decision
from flowcontrol_server.common.envoy_messages import (
    HeaderValueOption,
    ProcessingMode,
    ProcessingRequest,
    ProcessingResponse,
)
from flowcontrol_server.requests.classify import CONTROL_HEADERS
from flowcontrol_server.requests.conformance import SERVED_HEADER
from flowcontrol_server.requests.exchange import (
    Acknowledge,
    FurtherAttempt,
    Message,
    MessageKind,
    Mode,
    Reply,
)
from flowcontrol_server.requests.replies import (
    ENGINE_PRIORITIES,
    REASON_HEADER,
    REFUSALS_MAX,
    EnginePriority,
    Exempt,
    Refuse,
)
from flowcontrol_server.requests.rules import Metadata
from flowcontrol_server.requests.splice import BodyPart, body_of, echoes, trailers_of
from flowcontrol_server.requests.tickets import TICKETS, Tickets
from flowcontrol_server.requests.wire import Opening, UnexpectedError, header_text

Kind = TypeVar("Kind", bound=protobuf.Message)
SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION: Final = "x-gateway-destination-endpoint"
"""Endpoint picker protocol: the same value as header and as dynamic metadata."""
ENGINE_HEADERS: Final = (DESTINATION, *(each.header for each in ENGINE_PRIORITIES.values()))
"""With these headers a client would choose its model server, or its priority there."""
METADATA_NAMESPACE: Final = "flowcontrol"
ADMITTED: Final = "admitted"
"""True in that metadata for every request that may pass, dispatched or exempt. The filter behind
ext_proc refuses a request without it, so that none passes while this service is unreachable."""
TICKET: Final = "ticket"
"""Identifies the request in that metadata, to join the entry in the access log with it. The
client's x-request-id may be missing, or used twice."""
SIZE_ATTRIBUTE: Final = "request.size"
"""Size of the body as Envoy knows it: the announced one, else the bytes that have arrived, which is
the whole body if Envoy buffers it."""

ARRIVED_ATTRIBUTE: Final = "request.total_size"
"""Bytes of the request that Envoy has received so far, headers included."""
UNSENT_BYTES_MAX: Final = 1_048_576
"""Announced bytes that count before they have arrived. Without a bound, a client could announce a
gigabyte, send nothing, and leave no room in its band for others. Most prompts are smaller, and
Envoy buffers a JSON body until it is complete: both count as announced, for limits and for the
estimate of their tokens."""
TIME_ATTRIBUTE: Final = "request.time"
"""When Envoy first saw the request; unchanged if Envoy sends it again, to another replica."""
ID_ATTRIBUTE: Final = "request.id"
"""x-request-id, if it is not among the headers that are sent to this service."""
ATTRIBUTES: Final = (ID_ATTRIBUTE, SIZE_ATTRIBUTE, TIME_ATTRIBUTE, ARRIVED_ATTRIBUTE)
"""Attributes that Envoy is asked to send with the headers."""
ATTEMPT_ATTRIBUTE: Final = "upstream.address"
"""The endpoint of a further attempt at a request. Only the filter for such attempts asks for it:
elsewhere Envoy does not know it."""

_TICKET_MARK: Final = b"?"
_MARKS: Final = {
    "queue_ms": -1.7976931348623157e308,
    "headroom": -1.7976931348623155e308,
    "position": -1.7976931348623153e308,
}
"""Placeholders in a template for the numbers of one request, which are never below 0."""
_TEMPLATES_MAX: Final = 1_024
_double: Final = Struct("<d").pack
_numbers: Final = Struct("<3d").pack
"""Packs the numbers of _MARKS, in that order."""
_KINDS: Final = {kind.value: kind for kind in MessageKind}
_ANNOUNCED: Final = "content-length"
_LONG_SIZE: Final = len(str(UNSENT_BYTES_MAX))
_CLIENT_ID: Final = "x-request-id"
_CODINGS: Final = "accept-encoding"
"""Removed so that the response is not compressed: Envoy and this service could not read it."""
_NO_HEADERS: Final[dict[str, str]] = {}
_NO_METADATA: Final[Metadata] = {}
_TRAILERS: Final = {
    True: Message(MessageKind.REQUEST_TRAILERS, _NO_HEADERS),
    False: Message(MessageKind.RESPONSE_TRAILERS, _NO_HEADERS),
}
"""By whether they are the request's. Their content is not read."""
_DUPLEX: Final[int] = ProcessingMode.FULL_DUPLEX_STREAMED
_NO_BODIES: Final[int] = ProcessingMode.NONE
_AWAITS_ANSWER: Final = ProcessingMode(
    response_header_mode=ProcessingMode.SEND,
    response_trailer_mode=ProcessingMode.SEND,
)
"""For one request: also send the headers of its response here; all else as configured."""


def _without_bodies(mode: Mode, *, reads_response: bool) -> Any:
    """Return the mode that keeps bodies in Envoy; Envoy ignores it where that is not allowed.

    The body of a duplex request is already on its way. The headers of the response carry the status
    and the endpoint that served, in case there is no access log.
    """
    is_duplex = mode is Mode.DUPLEX
    return ProcessingMode(
        request_header_mode=ProcessingMode.SEND,
        request_body_mode=_DUPLEX if is_duplex else ProcessingMode.NONE,
        request_trailer_mode=ProcessingMode.SEND if is_duplex else ProcessingMode.SKIP,
        response_header_mode=ProcessingMode.SEND if reads_response else ProcessingMode.SKIP,
        response_body_mode=ProcessingMode.NONE,
        response_trailer_mode=ProcessingMode.SEND,
    )


class MalformedMessageError(Exception):
    """The bytes are not the expected message, or the message is empty."""


def parsed(kind: type[Kind], data: bytes) -> Kind:
    """Read one message.

    Raises:
        MalformedMessageError: it cannot be read; the error names the expected message.
    """
    try:
        return kind.FromString(data)
    except protobuf.DecodeError as error:
        message = f"not a {kind.DESCRIPTOR.name}"
        raise MalformedMessageError(message) from error


def decode(data: bytes) -> Message | BodyPart:
    """Read one ProcessingRequest.

    Raises:
        MalformedMessageError: it cannot be read.
    """
    part = body_of(data)
    if part is not None:
        return part
    try:
        opening = Opening(data)
    except (UnexpectedError, UnicodeDecodeError):
        is_of_request = trailers_of(data)
        return _decode_any(data) if is_of_request is None else _TRAILERS[is_of_request]
    if opening.is_response:
        metadata = _NO_METADATA if opening.metadata is None else opening.metadata
        kind = MessageKind.RESPONSE_HEADERS
        return Message(kind, opening.headers, metadata, is_end=opening.is_end)
    return _opening(
        opening.headers,
        opening.attributes,
        opening.metadata,
        opening.modes,
        is_end=opening.is_end,
    )


def _decode_any(data: bytes) -> Message | BodyPart:
    """Read any ProcessingRequest with protobuf."""
    request = parsed(ProcessingRequest, data)
    which = request.WhichOneof("request")
    if which is None:
        message = "a ProcessingRequest without a request"
        raise MalformedMessageError(message)
    kind = _KINDS[which]
    if kind is MessageKind.RESPONSE_HEADERS:
        return _response(request)
    if kind is not MessageKind.REQUEST_HEADERS:
        if kind not in {MessageKind.REQUEST_BODY, MessageKind.RESPONSE_BODY}:
            return Message(kind, _NO_HEADERS)
        part = getattr(request, which)
        return BodyPart(kind is MessageKind.REQUEST_BODY, part.body, part.end_of_stream)
    modes = request.protocol_config
    return _opening(
        _headers(request.request_headers),
        {name: plain(request.attributes[name]) for name in request.attributes},
        _metadata(request) if request.HasField("metadata_context") else None,
        (modes.request_body_mode, modes.response_body_mode)
        if request.HasField("protocol_config")
        else None,
        is_end=request.request_headers.end_of_stream,
    )


def _response(request: Any) -> Message:
    """Read the headers of a response."""
    response = request.response_headers
    metadata = _metadata(request) if request.HasField("metadata_context") else _NO_METADATA
    headers = _headers(response)
    return Message(MessageKind.RESPONSE_HEADERS, headers, metadata, is_end=response.end_of_stream)


def _headers(message: Any) -> dict[str, str]:
    headers: dict[str, str] = {}
    for header in message.headers.headers:
        name = header.key
        if name not in headers:
            raw = header.raw_value
            headers[name] = header_text(raw) or header.value
    return headers


def _metadata(request: Any) -> Metadata:
    found = request.metadata_context.filter_metadata
    return {name: plain(found[name]) for name in found}


def _opening(
    headers: dict[str, str],
    attributes: dict[str, dict[str, Any]],
    metadata: Metadata | None,
    modes: tuple[int, int] | None,
    *,
    is_end: bool,
) -> Message:
    """Return the first message of a conversation."""
    began = _read_attributes(attributes, headers) if attributes else ""
    if attributes and len(headers.get(_ANNOUNCED, "")) >= _LONG_SIZE:
        _bound_announced(headers, attributes)
    known = _NO_METADATA if metadata is None else metadata
    return Message(
        MessageKind.REQUEST_HEADERS,
        headers,
        known,
        began,
        None if modes is None else _mode(modes),
        is_end=is_end,
        attempt=_further_attempt(attributes, known),
        kept=None if modes is None else _kept(modes),
    )


def _further_attempt(
    attributes: dict[str, dict[str, Any]], metadata: Metadata
) -> FurtherAttempt | None:
    for fields in attributes.values():
        endpoint = _text_of(fields, ATTEMPT_ATTRIBUTE)
        if endpoint:
            return FurtherAttempt(_text_of(metadata.get(METADATA_NAMESPACE, {}), TICKET), endpoint)
    return None


def _mode(modes: tuple[int, int]) -> Mode:
    """Return the conversation that follows from Envoy's modes for bodies."""
    of_request, of_response = modes
    if _DUPLEX in {of_request, of_response}:
        return Mode.DUPLEX
    return Mode.ANSWERS if of_request == of_response == _NO_BODIES else Mode.BUFFERED


def _kept(modes: tuple[int, int]) -> MessageKind | None:
    """Return the body that Envoy does not expect back, if it expects only the other one back."""
    of_request, of_response = modes
    if (of_request == _DUPLEX) is (of_response == _DUPLEX):
        return None
    return MessageKind.RESPONSE_BODY if of_request == _DUPLEX else MessageKind.REQUEST_BODY


def _read_attributes(attributes: dict[str, dict[str, Any]], headers: dict[str, str]) -> str:
    """Return when the request came, and fill in missing headers from the attributes."""
    began, size = "", 0.0
    for fields in attributes.values():
        began = _text_of(fields, TIME_ATTRIBUTE) or began
        size += _number_of(fields, SIZE_ATTRIBUTE)
        if _CLIENT_ID not in headers and (client_id := _text_of(fields, ID_ATTRIBUTE)):
            headers[_CLIENT_ID] = client_id
    if _ANNOUNCED not in headers:
        headers[_ANNOUNCED] = f"{size:.0f}"
    return began


def _text_of(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _number_of(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    return value if isinstance(value, float) else 0.0


def _bound_announced(headers: dict[str, str], attributes: dict[str, dict[str, Any]]) -> None:
    """Bound the announced size: bytes that have arrived, plus `UNSENT_BYTES_MAX`."""
    arrived = max(
        (
            int(_number_of(fields, ARRIVED_ATTRIBUTE))
            for fields in attributes.values()
            if ARRIVED_ATTRIBUTE in fields
        ),
        default=None,
    )
    announced = headers[_ANNOUNCED]
    if arrived is None or not (announced.isascii() and announced.isdigit()):
        return  # Envoy does not send the attribute: the size stays as announced
    bound = str(arrived + UNSENT_BYTES_MAX)
    if (len(announced), announced) > (len(bound), bound):
        headers[_ANNOUNCED] = bound


def plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """Return a Struct as JSON values; numbers are floats."""
    fields = struct.fields
    return {name: _plain_value(fields[name]) for name in fields}


def _plain_value(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return plain(value.struct_value)
    if kind == "list_value":
        return [_plain_value(each) for each in value.list_value.values]
    return None if kind in {None, "null_value"} else getattr(value, kind)


@final
class Encoder:
    """Encodes replies.

    Args:
        picks: whether this service sets the destination.
        trusts_engine_headers: let ENGINE_HEADERS of a client pass, unless this service sets them
            itself.
        anywhere: with `picks`, returns an endpoint for requests for which none was picked.
        engine_priority: how the model server gets the band; None: it does not.
        reads_responses: whether Envoy reads responses, so that they must not be compressed.
        tickets: issues the tickets that identify requests in Envoy's access log.
    """

    def __init__(  # noqa: PLR0913 - all that differs between deployments
        self,
        *,
        picks: bool = False,
        trusts_engine_headers: bool = False,
        anywhere: Callable[[], str | None] = lambda: None,
        engine_priority: EnginePriority | None = None,
        reads_responses: bool = False,
        tickets: Tickets = TICKETS,
    ) -> None:
        self._tickets = tickets
        self._anywhere = anywhere if picks else None
        self._engine_priority = engine_priority
        ours: set[str] = {DESTINATION} if picks else set()
        if engine_priority is not None:
            ours.add(engine_priority.header)
        self._removed = CONTROL_HEADERS + tuple(
            name for name in ENGINE_HEADERS if name in ours or not trusts_engine_headers
        )
        self._removed_at_dispatch = self._removed + ((_CODINGS,) if reads_responses else ())
        self._templates: dict[tuple[int, int, str | None, Mode, bool], _Template] = {}
        self._exempt = _exempt(self._removed)

    def encode(self, reply: Reply, mode: Mode = Mode.ANSWERS) -> list[bytes]:
        """Encode a reply as ProcessingResponses: one, or several for a long body."""
        match reply:
            case Decision():
                return [self._dispatched(reply, mode)]
            case Exempt():
                endpoint = None if self._anywhere is None else self._anywhere()
                if endpoint is None and mode is Mode.ANSWERS:
                    return [self._exempt]
                removed = self._removed
                if endpoint is not None:
                    removed = tuple(name for name in removed if name != DESTINATION)
                return [_exempt(removed, endpoint, mode)]
            case Refuse():
                return [_refuse(reply)]
            case Acknowledge():
                return [_served_by(reply.served) if reply.served else _ACKNOWLEDGEMENTS[reply.kind]]
            case BodyPart():
                return list(echoes(reply))

    def _dispatched(self, decision: Decision, mode: Mode) -> bytes:
        ticket = self._tickets.issue(decision.request_id)
        destination = decision.endpoint
        if decision.fallbacks and destination is not None:
            destination = ",".join((destination, *decision.fallbacks))
        key = (len(ticket), decision.priority, destination, mode, decision.awaits_answer)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= _TEMPLATES_MAX:
                self._templates.clear()
            template = self._templates[key] = self._make_template(*key)
        numbers = _numbers(
            decision.waited_ns // 1_000_000,
            round(max(0.0, 1.0 - decision.saturation), 3),
            decision.position,
        )
        return template.filled(ticket, numbers)

    def _make_template(
        self,
        ticket_bytes: int,
        priority: int,
        destination: str | None,
        mode: Mode,
        awaits_answer: bool,  # noqa: FBT001 - part of a key
    ) -> "_Template":
        """Return an answer with placeholders for what differs with every request.

        Args:
            ticket_bytes: length of the ticket; all lengths before it depend on it.
            priority: of the band.
            destination: where the request goes; None: Envoy picks.
            mode: which conversation it is.
            awaits_answer: whether to ask for the response headers.
        """
        response = ProcessingResponse()
        mutation = response.request_headers.response.header_mutation
        ours: set[str] = set() if destination is None else {DESTINATION}
        if self._engine_priority is not None:
            ours.add(self._engine_priority.header)
        removed = (name for name in self._removed_at_dispatch if name not in ours)
        mutation.remove_headers.extend(removed)
        own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
        own[ADMITTED].bool_value = True
        own[TICKET].string_value = (_TICKET_MARK * ticket_bytes).decode()
        for key, number in _MARKS.items():
            own[key].number_value = number
        own["priority"].number_value = priority
        if self._engine_priority is not None:
            name, sign = self._engine_priority
            _set_header(mutation.set_headers.add(), name, str(sign * priority))
        if mode is not Mode.ANSWERS:
            response.mode_override.CopyFrom(_without_bodies(mode, reads_response=True))
        elif awaits_answer:
            response.mode_override.CopyFrom(_AWAITS_ANSWER)
        if destination is not None:
            _send_to(response, destination)
        marks = [_TICKET_MARK * ticket_bytes, *(_double(number) for number in _MARKS.values())]
        return _Template(_serialized(response), marks)


@final
class _Template:
    """An answer with placeholders for what differs with every request.

    Args:
        data: the answer.
        marks: the placeholder of the ticket, and those of the numbers.
    """

    __slots__ = ("_order", "_pieces")

    def __init__(self, data: bytes, marks: list[bytes]) -> None:
        assert all(data.count(mark) == 1 for mark in marks), "a mark is what nothing else can be"
        self._order = sorted(range(len(marks)), key=lambda number: data.index(marks[number]))
        """The marks in their order in the answer; 0 is the ticket."""
        self._pieces: list[bytes] = []
        at = 0
        for number in self._order:
            begin = data.index(marks[number])
            self._pieces.append(data[at:begin])
            at = begin + len(marks[number])
        self._pieces.append(data[at:])

    def filled(self, ticket: bytes, numbers: bytes) -> bytes:
        """Return the answer for one request; numbers in the order of _MARKS, 8 bytes each."""
        parts: list[bytes] = []
        for at, number in enumerate(self._order):
            parts.append(self._pieces[at])
            parts.append(numbers[number * 8 - 8 : number * 8] if number else ticket)
        parts.append(self._pieces[-1])
        return b"".join(parts)


@lru_cache(REFUSALS_MAX)
def _refuse(reply: Refuse) -> bytes:
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = reply.status
    immediate.details = reply.reason.replace("-", "_")
    immediate.body = reply.body
    immediate.grpc_status.status = reply.grpc_status
    headers = immediate.headers.set_headers
    _set_header(headers.add(), "content-type", reply.content_type)
    _set_header(headers.add(), REASON_HEADER, reply.reason)
    for name, value in reply.headers:
        _set_header(headers.add(), name, value)
    if reply.retry_after_s is not None:
        _set_header(headers.add(), "retry-after", str(reply.retry_after_s))
    return _serialized(response)


def _set_header(option: Any, name: str, value: str) -> None:
    option.header.key = name
    option.header.raw_value = value.encode()  # Envoy reads `value` as an empty header here
    option.append_action = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def _acknowledgement(kind: MessageKind) -> bytes:
    response = ProcessingResponse()
    getattr(response, kind.value).SetInParent()
    if kind.value.endswith(("headers", "body")):
        getattr(response, kind.value).response.SetInParent()
    return _serialized(response)


def _served_by(served: str) -> bytes:
    """Return the acknowledgement of response headers that adds the endpoint that served."""
    response = ProcessingResponse()
    mutation = response.response_headers.response.header_mutation
    _set_header(mutation.set_headers.add(), SERVED_HEADER, served)
    return _serialized(response)


def _send_to(response: Any, destination: str) -> None:
    """Set the destination of the request, in the two places that must agree."""
    mutation = response.request_headers.response.header_mutation
    _set_header(mutation.set_headers.add(), DESTINATION, destination)
    response.dynamic_metadata.fields["envoy.lb"].struct_value.fields[
        DESTINATION
    ].string_value = destination


def _exempt(
    removed: tuple[str, ...], endpoint: str | None = None, mode: Mode = Mode.ANSWERS
) -> bytes:
    response = ProcessingResponse()
    response.request_headers.response.header_mutation.remove_headers.extend(removed)
    own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
    own[ADMITTED].bool_value = True
    if endpoint is not None:
        _send_to(response, endpoint)
    if mode is not Mode.ANSWERS:
        response.mode_override.CopyFrom(_without_bodies(mode, reads_response=False))
    return _serialized(response)


def _serialized(response: Any) -> bytes:
    data: bytes = response.SerializeToString()
    return data


_ACKNOWLEDGEMENTS: Final = {kind: _acknowledgement(kind) for kind in MessageKind}

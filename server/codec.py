"""The only file that knows Envoy's messages. Bytes in, plain values out, and back.

Google's protobuf (upb) decodes a request in microseconds, where the typed dataclasses of
envoy-data-plane take most of a millisecond; those are the independent second codec of the tests.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from secrets import token_hex
from struct import Struct
from typing import Any, Final, TypeVar, final

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc_pb2
from google.protobuf import message as protobuf
from google.protobuf import struct_pb2

from server.classify import CONTROL_HEADERS
from server.exchange import Acknowledge, Message, MessageKind, Reply
from server.replies import REASON_HEADER, REFUSALS_MAX, EnginePriority, Exempt, Proceed, Refuse

Kind = TypeVar("Kind", bound=protobuf.Message)
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION = "x-gateway-destination-endpoint"
"""Endpoint picker protocol: the same value as header and as dynamic metadata."""
METADATA_NAMESPACE = "flowcontrol"
TICKET = "ticket"
"""Our own request id in that metadata: by it the access log's entry is joined with the request. The
client's x-request-id may be missing, or used twice."""
INSTANCE: Final = token_hex(4)
"""Names this process in a ticket: the log may bring what another replica, or a former life of this
one, has let go, and counters begin at 1 in each."""

SIZE_ATTRIBUTE: Final = "request.size"
"""What Envoy knows of a body's size: what was announced, else what has arrived of it by then; where
Envoy holds the body to read it, that is all of it."""

_TICKET_BEGIN: Final = f"{INSTANCE}.".encode()
_MARKS: Final = {
    "queue_ms": -1.7976931348623157e308,
    "headroom": -1.7976931348623155e308,
    "position": -1.7976931348623153e308,
}
"""Stand in a template for the numbers of one request; none of them is ever below 0."""
_TEMPLATES_MAX: Final = 1_024
_double: Final = Struct("<d").pack
_KINDS: Final = {kind.value: kind for kind in MessageKind}
_ANNOUNCED: Final = "content-length"
_NO_HEADERS: dict[str, str] = {}
_AWAITS_ANSWER = processing_mode_pb2.ProcessingMode(
    response_header_mode=processing_mode_pb2.ProcessingMode.SEND,
    response_trailer_mode=processing_mode_pb2.ProcessingMode.SEND,
)
"""For one request: the headers of its response are sent to us, too; all else as configured."""


class MalformedMessageError(Exception):
    """The bytes are not the message they should be, or one that asks for nothing."""


def parsed(kind: type[Kind], data: bytes) -> Kind:
    """Read one message.

    Raises:
        MalformedMessageError: naming what it should have been.
    """
    try:
        return kind.FromString(data)
    except protobuf.DecodeError as error:
        message = f"not a {kind.DESCRIPTOR.name}"
        raise MalformedMessageError(message) from error


def decode(data: bytes) -> Message:
    """Read one ProcessingRequest.

    Raises:
        MalformedMessageError: it cannot be read.
    """
    request = parsed(ext_proc_pb2.ProcessingRequest, data)
    which = request.WhichOneof("request")
    if which is None:
        message = "a ProcessingRequest without a request"
        raise MalformedMessageError(message)
    kind = _KINDS[which]
    if kind is not MessageKind.REQUEST_HEADERS:
        return Message(kind, _NO_HEADERS)
    headers: dict[str, str] = {}
    for header in request.request_headers.headers.headers:
        name = header.key
        if name not in headers:
            raw = header.raw_value
            headers[name] = (raw.decode() if raw.isascii() else _text(raw)) or header.value
    if _ANNOUNCED not in headers and request.attributes:
        headers[_ANNOUNCED] = _counted(request.attributes)
    if not request.HasField("metadata_context"):
        return Message(kind, headers)
    found = request.metadata_context.filter_metadata
    return Message(kind, headers, {name: plain(found[name]) for name in found})


def _text(raw: bytes) -> str:
    """Read a header as UTF-8, as bodies and settings are; what is none byte by byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _counted(attributes: Mapping[str, struct_pb2.Struct]) -> str:
    """Return the size of a body that was not announced, as if it had been."""
    return f"{sum(each.fields[SIZE_ATTRIBUTE].number_value for each in attributes.values()):.0f}"


def plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """Return a Struct as what JSON can hold; numbers are floats."""
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
    """Writes what we answer.

    Args:
        picks: whether the destination is ours to set. Then a client's own is taken off also where
            none is set; else it may be another picker's.
        anywhere: with `picks`, says an endpoint for requests that nobody has picked one for.
        engine_priority: how a model server is told of the band, if it is.
    """

    def __init__(
        self,
        *,
        picks: bool = False,
        anywhere: Callable[[], str | None] = lambda: None,
        engine_priority: EnginePriority | None = None,
    ) -> None:
        self._anywhere = anywhere if picks else None
        self._engine_priority = engine_priority
        engine_headers = () if engine_priority is None else (engine_priority.header,)
        self._removed = (*CONTROL_HEADERS, *engine_headers)
        self._template = lru_cache(_TEMPLATES_MAX)(self._make_template)
        self._exempt = _exempt((*self._removed, DESTINATION) if picks else self._removed)

    def encode(self, reply: Reply) -> bytes:
        """Write one ProcessingResponse."""
        match reply:
            case Proceed():
                return self._proceed(reply)
            case Exempt():
                endpoint = None if self._anywhere is None else self._anywhere()
                return self._exempt if endpoint is None else _exempt(self._removed, endpoint)
            case Refuse():
                return _refuse(reply)
            case Acknowledge():
                return _ACKNOWLEDGEMENTS[reply.kind]

    def _proceed(self, reply: Proceed) -> bytes:
        number = str(reply.request_id)
        destination = reply.endpoint
        if reply.fallbacks and destination is not None:
            destination = ",".join((destination, *reply.fallbacks))
        template = self._template(
            len(number), reply.priority, destination, awaits_answer=reply.awaits_answer
        )
        return template % {
            b"ticket": _TICKET_BEGIN + number.encode(),
            b"queue_ms": _double(reply.waited_ns // 1_000_000),
            b"headroom": _double(round(reply.headroom, 3)),
            b"position": _double(reply.position),
        }

    def _make_template(
        self, digits: int, priority: int, destination: str | None, *, awaits_answer: bool
    ) -> bytes:
        """Return an answer in which only what differs with every request is left open.

        Args:
            digits: length of the request id; all lengths before it depend on it.
            priority: of the band.
            destination: where the request goes, if that is ours to say.
            awaits_answer: whether the response headers are asked for.
        """
        response = ext_proc_pb2.ProcessingResponse()
        mutation = response.request_headers.response.header_mutation
        mutation.remove_headers.extend(CONTROL_HEADERS)
        own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
        own[TICKET].string_value = (_TICKET_BEGIN + b"?" * digits).decode()
        for key, number in _MARKS.items():
            own[key].number_value = number
        own["priority"].number_value = priority
        if self._engine_priority is not None:
            name, sign = self._engine_priority
            _set_header(mutation.set_headers.add(), name, str(sign * priority))
        if awaits_answer:
            response.mode_override.CopyFrom(_AWAITS_ANSWER)
        if destination is not None:
            _send_to(response, destination)
        template = _serialized(response).replace(b"%", b"%%")
        marks = {key: _double(number) for key, number in _MARKS.items()}
        for key, mark in {TICKET: _TICKET_BEGIN + b"?" * digits, **marks}.items():
            assert template.count(mark) == 1, "a mark is what nothing else can be"
            template = template.replace(mark, b"%%(%b)b" % key.encode())
        return template


@lru_cache(REFUSALS_MAX)
def _refuse(reply: Refuse) -> bytes:
    response = ext_proc_pb2.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = reply.status
    immediate.details = reply.reason.replace("-", "_")
    immediate.body = reply.body
    immediate.grpc_status.status = reply.grpc_status
    headers = immediate.headers.set_headers
    _set_header(headers.add(), "content-type", reply.content_type)
    _set_header(headers.add(), REASON_HEADER, reply.reason)
    if reply.retry_after_s is not None:
        _set_header(headers.add(), "retry-after", str(reply.retry_after_s))
    return _serialized(response)


def _set_header(option: base_pb2.HeaderValueOption, name: str, value: str) -> None:
    option.header.key = name
    option.header.raw_value = value.encode()  # Envoy takes `value` for an empty header here
    option.append_action = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def _acknowledgement(kind: MessageKind) -> bytes:
    response = ext_proc_pb2.ProcessingResponse()
    getattr(response, kind.value).SetInParent()
    if kind.value.endswith(("headers", "body")):
        getattr(response, kind.value).response.SetInParent()
    return _serialized(response)


def _send_to(response: ext_proc_pb2.ProcessingResponse, destination: str) -> None:
    """Say where the request goes, in both places that must agree."""
    mutation = response.request_headers.response.header_mutation
    _set_header(mutation.set_headers.add(), DESTINATION, destination)
    response.dynamic_metadata.fields["envoy.lb"].struct_value.fields[
        DESTINATION
    ].string_value = destination


def _exempt(removed: tuple[str, ...], endpoint: str | None = None) -> bytes:
    response = ext_proc_pb2.ProcessingResponse()
    response.request_headers.response.header_mutation.remove_headers.extend(removed)
    if endpoint is not None:
        _send_to(response, endpoint)
    return _serialized(response)


def _serialized(response: ext_proc_pb2.ProcessingResponse) -> bytes:
    data: bytes = response.SerializeToString()
    return data


_ACKNOWLEDGEMENTS = {kind: _acknowledgement(kind) for kind in MessageKind}

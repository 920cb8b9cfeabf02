"""The only file that knows Envoy's messages. Bytes in, plain values out, and back.

Google's protobuf (upb) decodes a request in microseconds, where the typed dataclasses of
envoy-data-plane take most of a millisecond; those are the independent second codec of the tests.
"""

from collections.abc import Callable
from secrets import token_hex
from typing import Any, Final, final

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc_pb2
from google.protobuf.struct_pb2 import Struct, Value

from server.classify import CONTROL_HEADERS
from server.exchange import Acknowledge, Message, MessageKind, Reply
from server.replies import REASON_HEADER, EnginePriority, Exempt, Proceed, Refuse

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

_NO_HEADERS: dict[str, str] = {}
_AWAITS_ANSWER = processing_mode_pb2.ProcessingMode(
    response_header_mode=processing_mode_pb2.ProcessingMode.SEND,
    response_trailer_mode=processing_mode_pb2.ProcessingMode.SEND,
)
"""For one request: the headers of its response are sent to us, too; all else as configured."""


class MalformedMessageError(Exception):
    """The bytes are no ProcessingRequest, or one that asks for nothing."""


def decode(data: bytes) -> Message:
    """Read one ProcessingRequest.

    Raises:
        MalformedMessageError: it cannot be read.
    """
    request = ext_proc_pb2.ProcessingRequest()
    try:
        request.ParseFromString(data)
    except Exception as error:  # upb's DecodeError is not exported where it can be named
        message = "not a ProcessingRequest"
        raise MalformedMessageError(message) from error
    which = request.WhichOneof("request")
    if which is None:
        message = "a ProcessingRequest without a request"
        raise MalformedMessageError(message)
    kind = MessageKind(which)
    if kind is not MessageKind.REQUEST_HEADERS:
        return Message(kind, _NO_HEADERS)
    headers: dict[str, str] = {}
    for header in request.request_headers.headers.headers:
        value = header.raw_value.decode("latin-1") if header.raw_value else header.value
        headers.setdefault(header.key, value)
    if not request.HasField("metadata_context"):
        return Message(kind, headers)
    found = request.metadata_context.filter_metadata
    return Message(kind, headers, {name: plain(found[name]) for name in found})


def plain(struct: Struct) -> dict[str, Any]:
    """Return a Struct as what JSON can hold; numbers are floats."""
    fields = struct.fields
    return {name: _plain_value(fields[name]) for name in fields}


def _plain_value(value: Value) -> Any:
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
            case Acknowledge(kind):
                return _ACKNOWLEDGEMENTS[kind]

    def _proceed(self, reply: Proceed) -> bytes:
        response = ext_proc_pb2.ProcessingResponse()
        mutation = response.request_headers.response.header_mutation
        mutation.remove_headers.extend(CONTROL_HEADERS)
        own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
        own[TICKET].string_value = f"{INSTANCE}.{reply.request_id}"
        own["queue_ms"].number_value = reply.waited_ns // 1_000_000
        own["priority"].number_value = reply.priority
        own["headroom"].number_value = round(reply.headroom, 3)
        if self._engine_priority is not None:
            name, sign = self._engine_priority
            _set_header(mutation.set_headers.add(), name, str(sign * reply.priority))
        if reply.awaits_answer:
            response.mode_override.CopyFrom(_AWAITS_ANSWER)
        if reply.endpoint is not None:
            _send_to(response, ",".join((reply.endpoint, *reply.fallbacks)))
        return _serialized(response)


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

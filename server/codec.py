"""The only file that knows Envoy's messages. Bytes in, plain values out, and back.

Google's protobuf (upb) decodes a request in microseconds, where the typed dataclasses of
envoy-data-plane take most of a millisecond; those are the independent second codec of the tests.
"""

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc_pb2

from server.classify import CONTROL_HEADERS
from server.exchange import Acknowledge, Message, MessageKind, Reply
from server.replies import REASON_HEADER, Exempt, Proceed, Refuse

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION = "x-gateway-destination-endpoint"
"""Endpoint picker protocol: the same value as header and as dynamic metadata."""
METADATA_NAMESPACE = "flowcontrol"

_NO_HEADERS: dict[str, str] = {}


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
    return Message(kind, headers)


def encode(reply: Reply, *, picks: bool = False) -> bytes:
    """Write one ProcessingResponse.

    Args:
        reply: what to say.
        picks: whether the destination is ours to set. Then a client's own is taken off also where
            none is set; else it may be another picker's.
    """
    match reply:
        case Proceed():
            return _proceed(reply)
        case Exempt():
            return _EXEMPT[picks]
        case Refuse():
            return _refuse(reply)
        case Acknowledge(kind):
            return _ACKNOWLEDGEMENTS[kind]


def _proceed(reply: Proceed) -> bytes:
    response = ext_proc_pb2.ProcessingResponse()
    mutation = response.request_headers.response.header_mutation
    mutation.remove_headers.extend(CONTROL_HEADERS)
    own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
    own["queue_ms"].number_value = reply.waited_ns // 1_000_000
    own["priority"].number_value = reply.priority
    if reply.endpoint is not None:
        _set_header(mutation.set_headers.add(), DESTINATION, reply.endpoint)
        picked = response.dynamic_metadata.fields["envoy.lb"].struct_value.fields
        picked[DESTINATION].string_value = reply.endpoint
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


def _exempt(removed: tuple[str, ...]) -> bytes:
    response = ext_proc_pb2.ProcessingResponse()
    response.request_headers.response.header_mutation.remove_headers.extend(removed)
    return _serialized(response)


def _serialized(response: ext_proc_pb2.ProcessingResponse) -> bytes:
    data: bytes = response.SerializeToString()
    return data


_ACKNOWLEDGEMENTS = {kind: _acknowledgement(kind) for kind in MessageKind}
_EXEMPT = {
    False: _exempt(CONTROL_HEADERS),
    True: _exempt((*CONTROL_HEADERS, DESTINATION)),
}

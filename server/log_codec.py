"""The only file that knows Envoy's access log messages. Bytes in, plain values out."""

from collections.abc import Mapping
from typing import NamedTuple

from envoy.config.core.v3 import address_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from server.codec import METADATA_NAMESPACE, TICKET

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
USAGE_NAMESPACE = "flowcontrol.usage"
"""Dynamic metadata that Envoy makes of a response's token usage."""
DURATION_TAGS = {
    "parked_us": "DS_RX_BEG:US_TX_BEG",
    "ttft_us": "US_TX_BEG:US_RX_BODY_BEG",
    "generation_us": "US_RX_BODY_BEG:US_RX_END",
}
"""Custom tags of an entry, and the points in time between which each is measured. The time to the
first byte that Envoy itself logs is that of the headers, which come long before a token."""
LOAD_REPORT_HEADERS = (
    *("endpoint-load-metrics", "endpoint-load-metrics-json", "endpoint-load-metrics-bin"),
)
"""Where a model server reports its load in its responses (ORCA)."""

_FAULTS = (
    *("upstream_request_timeout", "upstream_remote_reset", "upstream_connection_failure"),
    *("upstream_connection_termination", "upstream_protocol_error", "no_healthy_upstream"),
    *(
        "upstream_retry_limit_exceeded",
        "stream_idle_timeout",
        "upstream_max_stream_duration_reached",
    ),
)
"""Flags of a response that the model server failed to give, whatever its status."""
_CLIENT_ERROR, _SERVER_ERROR = 400, 500
_NO_ROOM = frozenset({429, 503})
_BY_UPSTREAM = "via_upstream"
"""Envoy's word for a response that it did not make itself."""


class LogEntry(NamedTuple):
    """What Envoy says of one finished request. None: it does not know."""

    ticket: str
    status: int
    """0: there was no response."""
    is_success: bool
    """Whether it was answered below 400 and in full, unless it was the client who went away."""
    is_failure: bool = False
    """Whether the model server is to blame: 5xx, or it broke off."""
    was_turned_away: bool = False
    """Whether the model server answered that it has no room: 429 or 503, and not Envoy for it."""
    ttft_us: int | None = None
    generation_us: int | None = None
    parked_us: int | None = None
    """From the client's first byte to the model server's; more than our part of it."""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    endpoint: str = ""
    """Who was asked last; empty when nobody was."""
    load_report: Mapping[str, str] | None = None
    """Headers in which the endpoint spoke of its load."""


class MalformedLogError(Exception):
    """The bytes are no StreamAccessLogsMessage."""


def decode_log(data: bytes) -> list[LogEntry]:
    """Read one StreamAccessLogsMessage; an entry that is not of our requests has no ticket.

    Raises:
        MalformedLogError: it cannot be read.
    """
    message = als_pb2.StreamAccessLogsMessage()
    try:
        message.ParseFromString(data)
    except Exception as error:  # upb's DecodeError is not exported where it can be named
        text = "not a StreamAccessLogsMessage"
        raise MalformedLogError(text) from error
    return [_entry(entry) for entry in message.http_logs.log_entry]


def _entry(entry: accesslog_pb2.HTTPAccessLogEntry) -> LogEntry:
    common, response = entry.common_properties, entry.response
    metadata, tags = common.metadata.filter_metadata, common.custom_tags
    own = metadata[METADATA_NAMESPACE].fields if METADATA_NAMESPACE in metadata else {}
    tokens: dict[str, int | None] = {}
    if USAGE_NAMESPACE in metadata:
        usage = metadata[USAGE_NAMESPACE].fields
        tokens = {name: _whole(usage[name].number_value) for name in usage}
    status = response.response_code.value
    flags = common.response_flags
    is_faulty = common.HasField("response_flags") and any(getattr(flags, name) for name in _FAULTS)
    load_report = response.response_headers
    return LogEntry(
        ticket=own[TICKET].string_value if TICKET in own else "",
        status=status,
        is_success=status < _CLIENT_ERROR and not is_faulty,
        is_failure=status >= _SERVER_ERROR or is_faulty,
        was_turned_away=status in _NO_ROOM and response.response_code_details == _BY_UPSTREAM,
        ttft_us=_time(tags.get("ttft_us")),
        generation_us=_time(tags.get("generation_us")),
        parked_us=_time(tags.get("parked_us")),
        input_tokens=tokens.get("input_tokens"),
        cached_tokens=tokens.get("cached_tokens"),
        output_tokens=tokens.get("output_tokens"),
        request_bytes=entry.request.request_body_bytes,
        response_bytes=response.response_body_bytes,
        endpoint=_host_port(common.upstream_remote_address),
        load_report=dict(load_report) if load_report else None,
    )


def _time(tag: str | None) -> int | None:
    """Return a duration; None where Envoy knows none, and says so with a dash."""
    return _whole(float(tag)) if tag and tag.isdigit() else None


def _whole(number: float) -> int | None:
    """Return a number as a count; None if it is none that a request can have."""
    return int(number) if 0 <= number < 1e15 else None  # noqa: PLR2004 - years of microseconds


def _host_port(address: address_pb2.Address) -> str:
    where = address.socket_address
    host = where.address
    if not host:
        return ""
    return f"[{host}]:{where.port_value}" if ":" in host else f"{host}:{where.port_value}"

"""The only file that knows Envoy's access log messages. Bytes in, plain values out."""

from collections.abc import Mapping
from typing import NamedTuple

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from server.codec import METADATA_NAMESPACE, TICKET, parsed

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
USAGE_NAMESPACE = "flowcontrol.usage"
"""Dynamic metadata that Envoy makes of a response's token usage."""
REPORT_TAG = "flowcontrol"
"""Custom tag of an entry that says all we want to know in one line of words, as Envoy writes it.
To ask protobuf for the same, field by field, takes a third longer."""
_REPORT = (
    f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{TICKET})%",
    "%RESPONSE_CODE_DETAILS%",
    "%RESPONSE_FLAGS%",
    "%RESPONSE_CODE%",
    # The time to the first byte that Envoy itself logs is that of the headers, which come long
    # before a token.
    "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%",
    "%COMMON_DURATION(US_RX_BODY_BEG:US_RX_END:us)%",
    "%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
    f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:input_tokens)%",
    f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:cached_tokens)%",
    f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:output_tokens)%",
    "%BYTES_RECEIVED%",
    "%BYTES_SENT%",
    "%UPSTREAM_REMOTE_ADDRESS%",
)
REPORT_FORMAT = " ".join(_REPORT)
"""What Envoy does not know it writes as a dash."""

_FAULTS = frozenset(("UT", "UR", "UF", "UC", "UPE", "UH", "URX", "SI", "UMSDR"))
"""Flags of a response that the model server failed to give, whatever its status: upstream timeout,
reset, connect failure, termination, protocol error; none healthy, no try left; idle, too long."""
_CLIENT_LEFT = frozenset(("DC", "DR"))
_CLIENT_ERROR, _SERVER_ERROR = 400, 500
_NO_ROOM = frozenset({429, 503})
_BY_UPSTREAM = "via_upstream"
"""Envoy's word for a response that it did not make itself."""
_NO_HOST = ("-", "/")
"""How an address begins that is not known, and one of a Unix socket."""
_DIGITS_MAX = 15
"""Of a number that a request can have: years of microseconds."""


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
    was_abandoned: bool = False
    """Whether the client left, or Envoy answered, before the model server's own answer was whole:
    what it would have been nobody knows."""
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


def decode_log(data: bytes) -> list[LogEntry]:
    """Read one StreamAccessLogsMessage; an entry that is not of our requests has no ticket.

    Raises:
        MalformedMessageError: it cannot be read.
    """
    message = parsed(als_pb2.StreamAccessLogsMessage, data)
    return [_entry(entry) for entry in message.http_logs.log_entry]


def _entry(entry: accesslog_pb2.HTTPAccessLogEntry) -> LogEntry:
    report = entry.common_properties.custom_tags.get(REPORT_TAG, "")
    words = report.split(" ", len(_REPORT) - 1)  # an address comes last: a path may have spaces
    if len(words) != len(_REPORT):
        return _NO_REPORT
    ticket, details, flags, *numbers, address = words
    counts = [int(n) if n.isdecimal() and len(n) <= _DIGITS_MAX else None for n in numbers]
    status, ttft, generation, parked, input_, cached, output, received, sent = counts
    status = status or 0
    raised = () if flags == "-" else flags.split(",")
    is_faulty = not _FAULTS.isdisjoint(raised)
    is_failure = status >= _SERVER_ERROR or is_faulty
    is_whole = details == _BY_UPSTREAM and _CLIENT_LEFT.isdisjoint(raised)
    load_report = entry.response.response_headers
    return LogEntry(
        ticket,
        status,
        status < _CLIENT_ERROR and not is_faulty,
        is_failure,
        status in _NO_ROOM and details == _BY_UPSTREAM,
        not (is_whole or is_failure),
        ttft,
        generation,
        parked,
        input_,
        cached,
        output,
        received or 0,
        sent or 0,
        "" if address.startswith(_NO_HOST) else address,
        dict(load_report) if load_report else None,
    )


_NO_REPORT = LogEntry(ticket="", status=0, is_success=True)

"""Decodes Envoy's access log messages to plain values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

from flowcontrol_server.common.envoy_messages import StreamAccessLogsMessage
from flowcontrol_server.requests.codec import (
    METADATA_NAMESPACE,
    TICKET,
    MalformedMessageError,
    parsed,
)
from flowcontrol_server.requests.usage import COUNTS, ERROR, tokens
from flowcontrol_server.requests.wire import LogReport, UnexpectedError, log_reports

SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"
USAGE_NAMESPACE: Final = "flowcontrol.usage"
"""Dynamic metadata in which Envoy stores the token usage of a response."""
REPORT_TAG: Final = "flowcontrol"
"""Custom tag of an entry with all that is read of it, as one line of words that Envoy formats.
Reading the same field by field with protobuf takes a third longer."""
_REPORT: Final = (
    f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{TICKET})%",
    "%RESPONSE_CODE_DETAILS%",
    "%RESPONSE_FLAGS%",
    "%RESPONSE_CODE%",
    # The time to the first byte that Envoy itself logs is the time to the headers, which come long
    # before a token.
    "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%",
    "%COMMON_DURATION(US_RX_BODY_BEG:US_RX_END:us)%",
    "%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
    *(f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:{name})%" for name in COUNTS),
    f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:error)%/%GRPC_STATUS_NUMBER%",
    f"%DYNAMIC_METADATA({USAGE_NAMESPACE}:first_token_late_ms)%",
    "%BYTES_RECEIVED%",
    "%BYTES_SENT%",
    "%UPSTREAM_REMOTE_ADDRESS%",
)
REPORT_FORMAT: Final = " ".join(_REPORT)
"""Envoy writes a dash for an unknown value."""

_FAULTS: Final = frozenset(("UT", "UR", "UF", "UC", "UPE", "UH", "URX", "SI", "UMSDR"))
"""Response flags of a failure of the model server, whatever the status: upstream timeout, reset,
connect failure, termination, protocol error; none healthy, no retry left; idle, too long."""
_UNREACHABLE: Final = "UF"
_CLIENT_LEFT: Final = frozenset(("DC", "DR"))
CLIENT_ERROR, SERVER_ERROR, _STATUSES_END = 400, 500, 600
NO_ROOM: Final = frozenset({429, 503, 529})
"""529 is Anthropic's status for overloaded."""
GRPC_ERRORS: Final = {
    **dict.fromkeys((b"3", b"9", b"11", b"12"), 400),
    **dict.fromkeys((b"6", b"10"), 409),
    **dict.fromkeys((b"2", b"13", b"15"), 500),
    b"1": 499,
    b"4": 504,
    b"5": 404,
    b"7": 403,
    b"8": 429,
    b"14": 503,
    b"16": 401,
}
"""HTTP statuses of gRPC's errors, which a model server sends behind status 200. A method that it
lacks (12) is the client's error, and no failure of the server."""
_BY_UPSTREAM: Final = "via_upstream"
"""Envoy's response code details of a response that the model server made."""
_NO_HOST: Final = ("-", "/")
"""Prefixes of an unknown address, and of a Unix socket."""
_ENTRIES_MAX: Final = 10_000
"""Entries of one message. Envoy sends some hundred; 1 MiB could hold 500,000 empty ones."""
_MS_US: Final = 1000
_WORDS: Final = len(_REPORT)
_NUMBERS_FROM: Final = 3
"""Words before the numbers; one word follows them."""
_ERROR_AT: Final = _WORDS - 5
"""The word of the error in a response: the one that Envoy read, a slash, and gRPC's status."""
_ZERO: Final = 48
_NINE: Final = 9
_DIGITS_MAX: Final = 15
"""Digits of a number: enough for years in microseconds."""


@final
@dataclass(slots=True, init=False)
class LogEntry:
    """Envoy's report of one finished request. None: unknown."""

    ticket: str
    status: int
    """HTTP status; 0: there was no response. For a 200 with an error inside, or behind it in gRPC's
    trailers, that of the error."""
    is_success: bool
    """Whether the status is below 400 and the model server did not break the response off."""
    is_failure: bool = False
    """Whether the model server failed: 5xx, also inside a 200, or it broke the response off."""
    is_unreachable: bool = False
    """Whether no connection to the model server could be made."""
    was_turned_away: bool = False
    """Whether the model server, not Envoy, refused it for lack of room: 429, 503 or 529."""
    was_abandoned: bool = False
    """Whether the client left, or Envoy answered, before the model server's response was complete,
    so that its result is unknown."""
    ttft_us: int | None = None
    generation_us: int | None = None
    parked_us: int | None = None
    """From the client's first byte to the first byte sent to the model server, which includes more
    than the wait here."""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    endpoint: str = ""
    """The endpoint tried last; empty if none was."""
    load_report: Mapping[str, str] | None = None
    """Response headers in which the endpoint reported its load."""

    def __init__(  # noqa: PLR0913, PLR0917 - its fields; a dataclass's own is interpreted
        self,
        ticket: str,
        status: int,
        is_success: bool,  # noqa: FBT001 - a field
        is_failure: bool = False,  # noqa: FBT001, FBT002 - a field
        is_unreachable: bool = False,  # noqa: FBT001, FBT002 - a field
        was_turned_away: bool = False,  # noqa: FBT001, FBT002 - a field
        was_abandoned: bool = False,  # noqa: FBT001, FBT002 - a field
        ttft_us: int | None = None,
        generation_us: int | None = None,
        parked_us: int | None = None,
        input_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
        request_bytes: int = 0,
        response_bytes: int = 0,
        endpoint: str = "",
        load_report: Mapping[str, str] | None = None,
    ) -> None:
        self.ticket = ticket
        self.status = status
        self.is_success = is_success
        self.is_failure = is_failure
        self.is_unreachable = is_unreachable
        self.was_turned_away = was_turned_away
        self.was_abandoned = was_abandoned
        self.ttft_us = ttft_us
        self.generation_us = generation_us
        self.parked_us = parked_us
        self.input_tokens = input_tokens
        self.cached_tokens = cached_tokens
        self.output_tokens = output_tokens
        self.request_bytes = request_bytes
        self.response_bytes = response_bytes
        self.endpoint = endpoint
        self.load_report = load_report


def decode_log(data: bytes) -> Iterator[LogEntry]:
    """Read one StreamAccessLogsMessage; an entry of another request than ours has no ticket.

    The message is parsed at once. Each entry is read when the iterator reaches it.

    Raises:
        MalformedMessageError: it cannot be read, or has more than 10,000 entries.
    """
    try:
        reports = log_reports(data, REPORT_TAG, _ENTRIES_MAX)
    except (UnexpectedError, UnicodeDecodeError):
        reports = _reports_of_any(data)
    return map(_entry, reports)


def _reports_of_any(data: bytes) -> list[LogReport]:
    """Read any StreamAccessLogsMessage with protobuf."""
    entries = parsed(StreamAccessLogsMessage, data).http_logs.log_entry
    if len(entries) > _ENTRIES_MAX:
        message = f"a message must have at most {_ENTRIES_MAX} entries, got {len(entries)}"
        raise MalformedMessageError(message)
    return [
        LogReport(
            entry.common_properties.custom_tags.get(REPORT_TAG, "").encode(),
            dict(entry.response.response_headers) or None,
        )
        for entry in entries
    ]


def _entry(report: LogReport) -> LogEntry:
    words = report.report.split(b" ", _WORDS - 1)  # the address is last: a path may have spaces
    if len(words) != _WORDS:
        return _NO_REPORT
    try:
        ticket, details, flags = words[0].decode(), words[1].decode(), words[2].decode()
        address = words[-1].decode()
    except UnicodeDecodeError:
        return _NO_REPORT
    words[_ERROR_AT], _, grpc_status = words[_ERROR_AT].partition(b"/")
    numbers = [_count(words[at]) for at in range(_NUMBERS_FROM, _WORDS - 1)]
    status = numbers[0] or 0
    ttft, generation, parked = numbers[1], numbers[2], numbers[3]
    error, late_ms, received, sent = numbers[-4], numbers[-3], numbers[-2], numbers[-1]
    if error is None:
        error = GRPC_ERRORS.get(grpc_status)
    if error is not None and status < CLIENT_ERROR:
        status = error if CLIENT_ERROR <= error < _STATUSES_END else ERROR
    if late_ms and ttft is not None:
        ttft += late_ms * _MS_US
        generation = None if generation is None else max(0, generation - late_ms * _MS_US)
    is_faulty = has_client_left = is_unreachable = False
    if flags != "-":
        raised = flags.split(",")
        is_faulty = not _FAULTS.isdisjoint(raised)
        has_client_left = not _CLIENT_LEFT.isdisjoint(raised)
        is_unreachable = _UNREACHABLE in raised
    is_failure = status >= SERVER_ERROR or is_faulty
    is_by_upstream = details == _BY_UPSTREAM
    input_tokens, cached_tokens, output_tokens = tokens(numbers[4:-4])
    return LogEntry(
        ticket,
        status,
        status < CLIENT_ERROR and not is_faulty,
        is_failure,
        is_unreachable,
        status in NO_ROOM and is_by_upstream,
        not (is_failure or (is_by_upstream and not has_client_left)),
        ttft,
        generation,
        parked,
        input_tokens,
        cached_tokens,
        output_tokens,
        received or 0,
        sent or 0,
        "" if address.startswith(_NO_HOST) else address,
        report.load,
    )


def _count(word: bytes) -> int | None:
    """Return the number in a word; None: it is not one, or too long."""
    size = len(word)
    if not 0 < size <= _DIGITS_MAX:
        return None
    number = 0
    for at in range(size):
        digit = word[at] - _ZERO
        if not 0 <= digit <= _NINE:
            return None
        number = number * 10 + digit
    return number


_NO_REPORT: Final = LogEntry(ticket="", status=0, is_success=True)

"""Pure. Decodes the messages that Envoy sends for every request, without protobuf's objects.

Reading a field of such an object costs as much as finding it here. A message with another encoding
than that of protobuf's own encoders, or with more than Envoy sends for a request, is left to
protobuf, which reads every message and reports malformed ones.

    ProcessingRequest   request_headers = 2, response_headers = 3, metadata_context = 8,
                        attributes = 9, observability_mode = 10, protocol_config = 11
      HttpHeaders         headers = 1, end_of_stream = 3
        HeaderMap           headers = 1
          HeaderValue         key = 1, value = 2, raw_value = 3
      Metadata            filter_metadata = 1
      ProtocolConfiguration  request_body_mode = 1, response_body_mode = 2,
                        send_body_without_waiting_for_header_response = 3
    Struct              fields = 1
      Value               null = 1, number = 2, string = 3, bool = 4, struct = 5, list = 6
    StreamAccessLogsMessage  identifier = 1, http_logs = 2
      HTTPAccessLogEntries  log_entry = 1
        HTTPAccessLogEntry    common_properties = 1, response = 4
          AccessLogCommon       custom_tags = 22
          HTTPResponseProperties  response_headers = 4
    entry of a map      key = 1, value = 2
"""

from struct import Struct
from typing import Any, Final, final

_VARINT: Final = 0
_FIXED64: Final = 1
_DELIMITED: Final = 2
_FIXED32: Final = 5
"""Wire types: the lowest bits of a tag, below the field number."""
_FIRST: Final = 0x0A
_SECOND: Final = 0x12
_THIRD: Final = 0x1A
_FOURTH: Final = 0x22
_METADATA: Final = 0x42
_ATTRIBUTES: Final = 0x4A
_CONFIG: Final = 0x5A
_CUSTOM_TAGS: Final = 0xB2
"""Tags of delimited fields with the numbers 1, 2, 3, 4, 8, 9, 11, and 22."""
_HEADERS: Final = frozenset((_SECOND, _THIRD))
"""Tags of headers in a ProcessingRequest."""
_FIRST_NUMBER: Final = 0x08
_SECOND_NUMBER: Final = 0x10
_THIRD_NUMBER: Final = 0x18
_FOURTH_NUMBER: Final = 0x20
_OBSERVES: Final = 0x50
"""Tags of numbers and booleans, with the numbers 1, 2, 3, 4, and 10."""
_DOUBLE: Final = 0x11
_STRUCT: Final = 0x2A
_LIST: Final = 0x32
"""Tags in a Value."""
_MORE: Final = 0x80
_SHIFT_MAX: Final = 28
_DOUBLE_BYTES: Final = 8
_DEPTH_MAX: Final = 8
_double: Final = Struct("<d").unpack_from


class UnexpectedError(Exception):
    """The bytes have an unexpected encoding."""


@final
class FieldReader:
    """A position in a message, with methods that read fields there.

    Args:
        data: the message.
    """

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def varint(self, end: int) -> int:
        """Read a number of up to 35 bits, which must end before `end`."""
        data, at = self.data, self.at
        if at >= end:
            raise UnexpectedError
        value = data[at]
        at += 1
        if value >= _MORE:
            value -= _MORE
            shift = 7
            while True:
                if at >= end or shift > _SHIFT_MAX:
                    raise UnexpectedError
                byte = data[at]
                at += 1
                if byte < _MORE:
                    value |= byte << shift
                    break
                value |= (byte - _MORE) << shift
                shift += 7
        self.at = at
        return value

    def end_of(self, end: int) -> int:
        """Read the length of a delimited value; return where the value ends."""
        size = self.varint(end)
        after = self.at + size
        if after > end:
            raise UnexpectedError
        return after

    def raw(self, end: int) -> bytes:
        """Read a delimited value as bytes."""
        after = self.end_of(end)
        begin, self.at = self.at, after
        return self.data[begin:after]

    def text(self, end: int) -> str:
        """Read a delimited value as text; raises UnicodeDecodeError."""
        return self.raw(end).decode()

    def skip(self, tag: int, end: int) -> None:
        """Skip the value of a field."""
        kind = tag & 7
        if kind == _DELIMITED:
            self.at = self.end_of(end)
        elif kind == _VARINT:
            data, at = self.data, self.at
            while at < end and data[at] >= _MORE:
                at += 1
            self.at = at + 1
        elif kind == _FIXED64:
            self.at += _DOUBLE_BYTES
        elif kind == _FIXED32:
            self.at += _DOUBLE_BYTES // 2
        else:
            raise UnexpectedError
        if self.at > end:
            raise UnexpectedError

    def struct(self, end: int, depth: int = 0) -> dict[str, Any]:
        """Read a Struct as JSON values; numbers are floats."""
        fields: dict[str, Any] = {}
        while self.at < end:
            if self.varint(end) != _FIRST:
                raise UnexpectedError
            entry_end = self.end_of(end)
            name = ""
            value: Any = None
            is_read = False
            while self.at < entry_end:
                tag = self.varint(entry_end)
                if tag == _FIRST:
                    name = self.text(entry_end)
                elif tag == _SECOND and not is_read:
                    is_read = True
                    value = self._value(self.end_of(entry_end), depth)
                else:
                    raise UnexpectedError
            fields[name] = value
        return fields

    def named_structs(self, end: int, into: dict[str, dict[str, Any]]) -> None:
        """Read an entry of a map from names to Structs."""
        name = ""
        fields: dict[str, Any] | None = None
        while self.at < end:
            tag = self.varint(end)
            if tag == _FIRST:
                name = self.text(end)
            elif tag == _SECOND and fields is None:
                fields = self.struct(self.end_of(end))
            else:
                raise UnexpectedError
        into[name] = {} if fields is None else fields

    def texts(self, end: int) -> tuple[str, bytes]:
        """Read an entry of a map from texts to texts, the second as its bytes."""
        name, value = "", b""
        while self.at < end:
            tag = self.varint(end)
            if tag == _FIRST:
                name = self.text(end)
            elif tag == _SECOND:
                value = self.raw(end)
            else:
                raise UnexpectedError
        return name, value

    def _value(self, end: int, depth: int) -> Any:
        if self.at == end:
            return None
        if depth > _DEPTH_MAX:
            raise UnexpectedError
        tag = self.varint(end)
        value: Any = None
        if tag == _THIRD:
            value = header_text(self.raw(end))  # it may come from a client's header
        elif tag == _DOUBLE:
            if end - self.at != _DOUBLE_BYTES:
                raise UnexpectedError
            value = _double(self.data, self.at)[0]
            self.at = end
        elif tag == _FOURTH_NUMBER:
            value = self.varint(end) != 0
        elif tag == _FIRST_NUMBER:
            self.varint(end)
        else:
            value = self._nested(tag, end, depth + 1)
        if self.at != end:
            raise UnexpectedError
        return value

    def _nested(self, tag: int, end: int, depth: int) -> Any:
        if tag == _STRUCT:
            return self.struct(self.end_of(end), depth)
        if tag == _LIST:
            return self._list(self.end_of(end), depth)
        raise UnexpectedError

    def _list(self, end: int, depth: int) -> list[Any]:
        values: list[Any] = []
        while self.at < end:
            if self.varint(end) != _FIRST:
                raise UnexpectedError
            values.append(self._value(self.end_of(end), depth))
        return values


@final
class Opening:
    """A ProcessingRequest with headers: of a request, which opens a conversation, or a response.

    Args:
        data: the message.

    Raises:
        UnexpectedError: it has an unexpected encoding.
        UnicodeDecodeError: a name is not UTF-8.
    """

    __slots__ = ("attributes", "headers", "is_end", "is_response", "metadata", "modes")

    def __init__(self, data: bytes) -> None:
        self.headers: dict[str, str] = {}
        self.is_end = False
        self.is_response = False
        self.metadata: dict[str, dict[str, Any]] | None = None
        self.attributes: dict[str, dict[str, Any]] = {}
        self.modes: tuple[int, int] | None = None
        wire, end = FieldReader(data), len(data)
        is_headers = False
        while wire.at < end:
            tag = wire.varint(end)
            if tag in _HEADERS and not is_headers:
                is_headers = True
                self.is_response = tag == _THIRD
                self._read_headers(wire, wire.end_of(end))
            elif tag == _METADATA and self.metadata is None:
                self.metadata = _metadata(wire, wire.end_of(end))
            elif tag == _ATTRIBUTES and not self.attributes:
                wire.named_structs(wire.end_of(end), self.attributes)
            elif tag == _CONFIG and self.modes is None:
                self.modes = _modes(wire, wire.end_of(end))
            elif tag == _OBSERVES:
                wire.varint(end)
            else:
                raise UnexpectedError
        if not is_headers:
            raise UnexpectedError

    def _read_headers(self, wire: FieldReader, end: int) -> None:
        is_read = False
        while wire.at < end:
            tag = wire.varint(end)
            if tag == _FIRST and not is_read:
                is_read = True
                self._read_map(wire, wire.end_of(end))
            elif tag == _THIRD_NUMBER:
                self.is_end = wire.varint(end) != 0
            else:
                raise UnexpectedError

    def _read_map(self, wire: FieldReader, end: int) -> None:
        headers = self.headers
        while wire.at < end:
            if wire.varint(end) != _FIRST:
                raise UnexpectedError
            one_end = wire.end_of(end)
            name = value = ""
            raw = b""
            while wire.at < one_end:
                tag = wire.varint(one_end)
                if tag == _FIRST:
                    name = wire.text(one_end)
                elif tag == _THIRD:
                    raw = wire.raw(one_end)
                elif tag == _SECOND:
                    value = wire.text(one_end)
                else:
                    raise UnexpectedError
            if name not in headers:
                headers[name] = header_text(raw) if raw else value


def _metadata(wire: FieldReader, end: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    while wire.at < end:
        if wire.varint(end) != _FIRST:
            raise UnexpectedError
        wire.named_structs(wire.end_of(end), found)
    return found


def _modes(wire: FieldReader, end: int) -> tuple[int, int]:
    of_request = of_response = 0
    while wire.at < end:
        tag = wire.varint(end)
        number = wire.varint(end)
        if tag == _FIRST_NUMBER:
            of_request = number
        elif tag == _SECOND_NUMBER:
            of_response = number
        elif tag != _THIRD_NUMBER:
            raise UnexpectedError
    return of_request, of_response


def header_text(raw: bytes) -> str:
    """Decode a header as UTF-8, like bodies and settings, or as Latin-1 if it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


@final
class LogReport:
    """The fields read from one entry of the access log."""

    __slots__ = ("load", "report")

    def __init__(self, report: bytes, load: dict[str, str] | None) -> None:
        self.report = report
        """The custom tag; empty: there is none."""
        self.load = load
        """Logged headers of the response; None: there are none."""


def log_reports(data: bytes, tag: str, entries_max: int) -> list[LogReport]:
    """Read a StreamAccessLogsMessage.

    Args:
        data: the message.
        tag: name of the custom tag to read.
        entries_max: most entries of the message.

    Raises:
        UnexpectedError: it has an unexpected encoding, or more entries.
        UnicodeDecodeError: a name is not UTF-8.
    """
    reports: list[LogReport] = []
    wire, end = FieldReader(data), len(data)
    while wire.at < end:
        field = wire.varint(end)
        if field != _SECOND:
            if field != _FIRST:
                raise UnexpectedError
            wire.skip(field, end)
            continue
        logs_end = wire.end_of(end)
        while wire.at < logs_end:
            if wire.varint(logs_end) != _FIRST or len(reports) >= entries_max:
                raise UnexpectedError
            reports.append(_log_entry(wire, wire.end_of(logs_end), tag))
    return reports


def _log_entry(wire: FieldReader, end: int, tag: str) -> LogReport:
    found = LogReport(b"", None)
    while wire.at < end:
        field = wire.varint(end)
        if field == _FIRST:
            inner_end = wire.end_of(end)
            while wire.at < inner_end:
                inner = wire.varint(inner_end)
                if inner == _CUSTOM_TAGS:
                    name, value = wire.texts(wire.end_of(inner_end))
                    if name == tag:
                        found.report = value
                else:
                    wire.skip(inner, inner_end)
        elif field == _FOURTH:
            inner_end = wire.end_of(end)
            while wire.at < inner_end:
                inner = wire.varint(inner_end)
                if inner == _FOURTH:
                    name, value = wire.texts(wire.end_of(inner_end))
                    if found.load is None:
                        found.load = {}
                    found.load[name] = value.decode()
                else:
                    wire.skip(inner, inner_end)
        else:
            wire.skip(field, end)
    return found

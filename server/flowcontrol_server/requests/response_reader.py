"""Pure. Reads status, times and token usage of one response from its parts as they pass.

Behind a gateway that streams bodies through its endpoint picker, this replaces Envoy's access log:
status, time to the first token, tokens, an error inside a response of 200, and the endpoint that
served it. Nothing here delays or changes a response; unreadable parts are skipped.

A stream is read event by event, and a response that is one JSON object as a whole, if it has 16 KiB
at most. In a larger one the usage is searched for, and other counts in the last 16 KiB; in a line
of more than 64 KiB both there: engines write them after the answer.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, final

from flowcontrol_server.common.units import parse_whole
from flowcontrol_server.requests import usage
from flowcontrol_server.requests.log_codec import (
    CLIENT_ERROR,
    GRPC_ERRORS,
    NO_ROOM,
    SERVER_ERROR,
    LogEntry,
)

_EVENT_BYTES_MAX: Final = 65_536
_TAIL_BYTES: Final = 16_384
_STREAM, _LINES, _OBJECT, _UNREAD = range(4)
_EVENTS: Final = "text/event-stream"
_JSON_LINES: Final = "application/x-ndjson"
_JSON: Final = re.compile(r"application/json\s*(;|$)")
_RELEVANT: Final = re.compile(rb'"usage"|"error|_count"|^error:', re.MULTILINE)
"""Matches every event with counts or an error."""
_BLANK_LINES: Final = (b"\n\n", b"\n\r\n", b"\r\r")
"""Ends of an event."""
_TYPE: Final = re.compile(rb'"type"\s*:\s*"([\w.]+)"')
_EARLY: Final = frozenset(kind.encode() for kind in usage.EARLY_EVENTS)
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_COUNTS: Final = re.compile(
    rb'"(%s)"\s*:\s*([0-9]{1,15})(?![\w.])' % "|".join(usage.OUTERMOST).encode()
)
_US_NS: Final = 1_000
_STATUS_DIGITS: Final = 3


@final
class ResponseReader:
    """Reads one response.

    Args:
        headers: of the response, names in lower case.
        endpoint: the endpoint that served it; empty: unknown.
    """

    __slots__ = (
        "_bytes",
        "_counts",
        "_endpoint",
        "_error",
        "_first_ns",
        "_form",
        "_has_number",
        "_is_cut",
        "_is_passing",
        "_is_return_last",
        "_is_whole",
        "_json",
        "_rest",
        "_status",
    )

    def __init__(self, headers: Mapping[str, str], endpoint: str = "") -> None:
        self._status = parse_whole(headers.get(":status", ""), _STATUS_DIGITS) or 0
        self._endpoint = endpoint
        self._form = _form_of(headers)
        self._rest = bytearray()
        """Bytes of a line that has not ended; for an object, its last bytes."""
        self._json = b""
        """JSON so far of an event that has it on several lines."""
        self._is_return_last = False
        """The last line ended in CR; an LF that follows belongs to it and is not a blank line."""
        self._is_cut = False
        """The line that has not ended is too long, and only its last bytes are held."""
        self._counts: dict[str, int] = {}
        grpc_status = headers.get("grpc-status", "").encode(errors="replace")
        self._error: int | None = GRPC_ERRORS.get(grpc_status)
        """At first, that of gRPC in the headers; trailers, in which it may follow, are not read."""
        self._has_number = False
        self._first_ns: int | None = None
        self._bytes = 0
        self._is_passing = False
        """The body passes through here; otherwise neither it nor its end is known."""
        self._is_whole = False

    def take(self, body: bytes, now_ns: int, *, is_end: bool) -> None:
        """Take the next part of the body; the cost is linear in its length."""
        self._is_passing = True
        self._is_whole |= is_end
        self._bytes += len(body)
        if self._form in {_STREAM, _LINES}:
            self._take_lines(body, now_ns, is_end=is_end)
            return
        if body and self._first_ns is None:
            self._first_ns = now_ns
        if self._form == _OBJECT:
            self._rest += body
            if len(self._rest) > _EVENT_BYTES_MAX:
                self._read({"usage": _usage_in(bytes(self._rest))})
                del self._rest[:-_TAIL_BYTES]
            if is_end:
                self._read_object()

    def end(self, now_ns: int) -> None:
        """Note that the response has ended, with its headers or its trailers."""
        if not self._is_whole:
            self.take(b"", now_ns, is_end=True)

    def report(self, dispatched_ns: int, ended_ns: int) -> LogEntry:
        """Return the report of the response, in the form of an access log entry.

        Args:
            dispatched_ns: when its request was dispatched.
            ended_ns: when its stream ended.
        """
        status = self._status
        if self._error is not None and status < CLIENT_ERROR:
            status = self._error
        input_, cached, output = usage.tokens([self._counts.get(name) for name in usage.COUNTS])
        first_ns = self._first_ns
        is_failure = status >= SERVER_ERROR
        return LogEntry(
            ticket="",
            status=status,
            is_success=0 < status < CLIENT_ERROR,
            is_failure=is_failure,
            was_turned_away=status in NO_ROOM,
            was_abandoned=self._is_passing and not (self._is_whole or is_failure),
            ttft_us=None if first_ns is None else (first_ns - dispatched_ns) // _US_NS,
            generation_us=None if first_ns is None else (ended_ns - first_ns) // _US_NS,
            input_tokens=input_,
            cached_tokens=cached,
            output_tokens=output,
            response_bytes=self._bytes,
            endpoint=self._endpoint,
        )

    def _take_lines(self, body: bytes, now_ns: int, *, is_end: bool) -> None:
        rest = self._rest
        rest += body
        begin = max(body.rfind(b"\n"), body.rfind(b"\r")) + 1
        end = len(rest) - len(body) + begin if begin else 0
        whole = bytes(rest if is_end else rest[:end])
        del rest[: len(whole)]
        is_cut = self._is_cut
        if whole:
            self._is_cut = False
            whole = whole.removeprefix(b"\n") if self._is_return_last else whole
            self._is_return_last = whole.endswith(b"\r")
        if len(rest) > _EVENT_BYTES_MAX:
            del rest[:-_TAIL_BYTES]
            self._is_cut = True
        is_apart = not self._json and (self._form == _LINES or whole.endswith(_BLANK_LINES))
        if self._first_ns is not None and is_apart and not _RELEVANT.search(whole):
            return
        for line in whole.splitlines():
            if is_cut or len(line) > _EVENT_BYTES_MAX:
                self._read_end(line)
            else:
                self._read_line(line, now_ns)
            is_cut = False
        if is_end:
            self._read_event()

    def _read_end(self, line: bytes) -> None:
        """Read the end of a line that is too long."""
        self._read_event()
        self._read(_counts_at_end(line[-_TAIL_BYTES:]))

    def _read_line(self, line: bytes, now_ns: int) -> None:
        if not line:
            self._read_event()
            return
        is_error = False
        if self._form == _STREAM:
            name, colon, value = line.partition(b":")
            is_error = name == b"error"  # llama.cpp's servers before mid 2025
            if colon and name in {b"data", b"error"}:
                line = value
            elif (colon and name.isalpha()) or not self._json:
                return
        line = line.strip()
        if not line:
            return
        if self._first_ns is None:
            kind = _TYPE.search(line)
            if kind is None or kind[1] not in _EARLY:
                self._first_ns = now_ns
        if is_error:
            self._read({"error": _object(line) or "error"})
        elif (self._json or not self._read(_object(line))) and self._form == _STREAM:
            self._json = (self._json + line + b"\n")[: _EVENT_BYTES_MAX + 1]

    def _read_event(self) -> None:
        text, self._json = self._json, b""
        if text:
            self._read(_object(text))

    def _read_object(self) -> None:
        text = bytes(self._rest).lstrip()
        self._rest.clear()
        if _RELEVANT.search(text):
            is_short = len(text) <= _TAIL_BYTES
            self._read(_object(text) if is_short else _counts_at_end(text))

    def _read(self, content: dict[str, Any] | None) -> bool:
        """Note counts and error of an object; return False if there is no object."""
        if content is None:
            return False
        self._counts.update(usage.read_counts(content))
        error = usage.read_error(content)
        if error is not None and (error[1] or not self._has_number):
            self._error, self._has_number = error
        return True


def _form_of(headers: Mapping[str, str]) -> int:
    kind = headers.get("content-type", "").lower()
    if headers.get("content-encoding", "identity").lower() != "identity":
        return _UNREAD
    if kind.startswith(_EVENTS):
        return _STREAM
    if kind.startswith(_JSON_LINES):
        return _LINES
    return _OBJECT if _JSON.match(kind) else _UNREAD


def _counts_at_end(text: bytes) -> dict[str, Any]:
    """Return the counts at the end of an object whose beginning may be unknown."""
    end = text[-_TAIL_BYTES:]
    content: dict[str, Any] = {name.decode(): int(count) for name, count in _COUNTS.findall(end)}
    content["usage"] = _usage_in(text)
    return content


def _usage_in(text: bytes) -> dict[str, Any] | None:
    """Return the last whole usage in a part of an object."""
    found = list(_USAGE.finditer(text))
    return _object(text[found[-1].end() :], is_open=True) if found else None


def _object(text: bytes, *, is_open: bool = False) -> dict[str, Any] | None:
    """Return the JSON object in a text, with `is_open` the one that begins it; None: no object."""
    if not text.startswith(b"{"):
        return None
    try:
        if is_open:
            content, _ = json.JSONDecoder().raw_decode(text.decode())
        else:
            content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

"""Pure. Reads recorded traffic: the time of each request, and the lengths of prompt and answer.

Two formats are read, distinguished by their first line:

    Azure     CSV: TIMESTAMP,ContextTokens,GeneratedTokens (Patel et al., ISCA 2024)
    Mooncake  JSON lines: timestamp, input_length, output_length, hash_ids (Qin et al., FAST'25)

Azure's times are dates with seven digits of a second, Mooncake's are milliseconds. hash_ids
identify the blocks of 512 tokens of a prompt; prompts with the same beginning share the first ids.
"""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import chain, islice
from typing import NamedTuple

from flowcontrol.errors import FlowControlError

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):([0-5]\d):([0-5]\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?"
)
_SECOND_NS = 1_000_000_000
_MILLISECOND_NS = 1_000_000
_DAY_S = 86_400
_AZURE_FIELDS = 3
_COUNT_MAX = 10**15


class TraceError(FlowControlError):
    """A trace that cannot be read; gives the line and the reason."""

    def __init__(self, line_number: int, problem: str) -> None:
        super().__init__(f"line {line_number}: {problem}")


class TraceRow(NamedTuple):
    """One request of a trace."""

    at_ns: int
    """Time since the first request of the trace."""
    input_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    """Ids of the blocks of the prompt; empty: not in the trace."""


def read_trace(
    lines: Iterable[str], *, limit: int | None = None, scale: float = 1.0
) -> list[TraceRow]:
    """Read a trace of either format.

    Args:
        lines: Its lines, with or without line ends. Empty lines are ignored.
        limit: The most requests to read; None: all.
        scale: Factor on the rate; 2 halves all times. Above 0.

    Returns:
        The requests by time, the first at 0.

    Raises:
        TraceError: A line is not of its format, time goes back, or there is no request at all.
    """
    numbered = ((n, line.strip()) for n, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError(1, "must be a request or a header, the trace is empty")
    if first[1] == AZURE_HEADER:
        parsed = _azure(numbered)
    elif first[1].startswith("{"):
        parsed = _mooncake(chain([first], numbered))
    else:
        problem = f"must be {AZURE_HEADER} or a JSON object, got {first[1][:60]!r}"
        raise TraceError(first[0], problem)
    rows: list[TraceRow] = []
    begin_ns = last_ns = None
    for number, row in islice(parsed, limit):
        if begin_ns is None or last_ns is None:
            begin_ns = last_ns = row.at_ns
        if row.at_ns < last_ns:
            raise TraceError(number, "must not be earlier than the line before")
        last_ns = row.at_ns
        rows.append(row._replace(at_ns=round((row.at_ns - begin_ns) / scale)))
    if not rows and limit != 0:
        raise TraceError(first[0], "must be followed by a request, the trace has none")
    return rows


def per_second(rows: list[TraceRow]) -> float:
    """Return the mean rate of a trace; 0.0: it has no duration."""
    lasts_ns = rows[-1].at_ns if rows else 0
    return (len(rows) - 1) * _SECOND_NS / lasts_ns if lasts_ns else 0.0


def _azure(numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, TraceRow]]:
    for number, line in numbered:
        fields = line.split(",")
        if len(fields) != _AZURE_FIELDS:
            raise TraceError(number, f"must have 3 fields, got {len(fields)}")
        stamp, context, generated = fields
        row = TraceRow(
            _stamp_ns(stamp, number),
            _tokens("ContextTokens", context, number),
            _tokens("GeneratedTokens", generated, number),
        )
        yield number, row


def _stamp_ns(text: str, number: int) -> int:
    match = _STAMP.fullmatch(text)
    try:
        day = date.fromisoformat(match[1]).toordinal() if match else None
    except ValueError:
        day = None
    if match is None or day is None:
        problem = f"TIMESTAMP must be a time such as 2023-11-16 18:15:46.6805900, got {text!r}"
        raise TraceError(number, problem)
    seconds = day * _DAY_S + int(match[2]) * 3600 + int(match[3]) * 60 + int(match[4])
    return seconds * _SECOND_NS + int((match[5] or "").ljust(9, "0"))


def _tokens(name: str, text: str, number: int) -> int:
    value = int(text) if re.fullmatch(r"\d{1,9}", text) else 0
    if value < 1:
        raise TraceError(number, f"{name} must be a whole number >= 1, got {text!r}")
    return value


def _mooncake(numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, TraceRow]]:
    for number, line in numbered:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(number, f"must be JSON, got {line[:60]!r}") from error
        if not isinstance(entry, dict):
            raise TraceError(number, f"must be a JSON object, got {line[:60]!r}")
        hashes = entry.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(type(each) is int for each in hashes):
            raise TraceError(number, f"hash_ids must be a list of whole numbers, got {hashes!r}")
        row = TraceRow(
            _count(entry, "timestamp", 0, number) * _MILLISECOND_NS,
            _count(entry, "input_length", 1, number),
            _count(entry, "output_length", 1, number),
            tuple(hashes),
        )
        yield number, row


def _count(entry: dict[str, object], name: str, least: int, number: int) -> int:
    value = entry.get(name)
    if type(value) is not int or value < least:
        raise TraceError(number, f"{name} must be a whole number >= {least}, got {value!r}")
    if value > _COUNT_MAX:
        raise TraceError(number, f"{name} must be at most {_COUNT_MAX}, got {value!r}")
    return value

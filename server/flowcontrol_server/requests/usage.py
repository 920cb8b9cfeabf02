"""Pure. Where model servers report token usage in a response, and errors inside it.

One table for both readers: the script of the generated Envoy configuration gets it in Lua
(`tools/envoy`), and `ResponseReader` uses it for a response that passes through this service.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from flowcontrol_server.common.units import parse_whole

FIELDS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    # OpenAI's completions, then its responses and Anthropic's messages, then Ollama's own.
    ("input_tokens", ("usage", "prompt_tokens")),
    ("output_tokens", ("usage", "completion_tokens")),
    ("cached_tokens", ("usage", "prompt_tokens_details", "cached_tokens")),
    ("input_tokens", ("usage", "input_tokens")),
    ("output_tokens", ("usage", "output_tokens")),
    ("cached_tokens", ("usage", "input_tokens_details", "cached_tokens")),
    ("cache_read_tokens", ("usage", "cache_read_input_tokens")),
    ("cache_creation_tokens", ("usage", "cache_creation_input_tokens")),
    ("total_tokens", ("usage", "total_tokens")),
    ("total_tokens", ("prompt_eval_count",)),
    ("output_tokens", ("eval_count",)),
)
"""Our name, and the keys that lead to the number. The last one present counts."""
COUNTS: Final = (
    *("input_tokens", "cached_tokens", "output_tokens"),
    *("cache_read_tokens", "cache_creation_tokens", "total_tokens"),
)
"""The counts that `tokens` takes, in that order."""
WRAPPERS: Final = ("response", "message")
"""Objects inside an event of a stream with the fields that a complete response has at its top:
OpenAI's responses, Anthropic's messages."""
EARLY_EVENTS: Final = (
    *("ping", "message_start"),
    *("response.created", "response.queued", "response.in_progress"),
)
"""Types of events that a server sends before it has a token."""
ERROR_WORDS: Final = (
    ("overload", 503),
    ("unavailable", 503),
    ("rate_limit", 429),
    ("invalid", 400),
    ("bad_?request", 400),
    ("validation", 400),
    ("not_?found", 400),
)
"""Part of an error's type in lower case, and the HTTP status that it means; the first match counts.
Each is valid both as a regular expression and as a pattern of Lua."""
ERROR: Final = 500
"""The status of any other error."""

_ERROR_STATUSES: Final = range(400, 600)
_MESSAGE: Final = "message"
_WORDS: Final = tuple((re.compile(word), status) for word, status in ERROR_WORDS)
_PATHS: Final = tuple((name, path) for name, path in FIELDS if path[0] == "usage")
OUTERMOST: Final = {path[0]: name for name, path in FIELDS if path[0] != "usage"}
"""Our names of numbers at the top of a response, by key."""
_DIGITS_MAX: Final = 15


def read_counts(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of tokens in a response or an event, by our names."""
    found: dict[str, int] = {}
    for key, name in OUTERMOST.items():
        _note(found, name, content.get(key))
    _read_usage(found, content, is_begin=False)
    for wrapper in WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict):
            _read_usage(found, inner, is_begin=wrapper == _MESSAGE)
    return found


def read_error(content: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Return the status of the error in a response or an event, and whether it was a number there.

    None: it has no error.
    """
    found: tuple[int, bool] | None = None
    for wrapper in ("", *WRAPPERS):
        inner = content.get(wrapper) if wrapper else content
        if isinstance(inner, dict):
            found = _error_of(inner) or found
    return found


def tokens(counts: Sequence[int | None]) -> tuple[int | None, int | None, int | None]:
    """Return the tokens of the whole prompt, of its cached part, and of the answer.

    Args:
        counts: in the order of `COUNTS`; None: not reported.

    Anthropic counts tokens read from its cache, or written to it, in addition to the input; OpenAI
    counts them as part of it. Embeddings and reranking have no answer: their total shows that its
    tokens are zero. Ollama omits counts of zero: with a count for the prompt alone, the answer has
    none.
    """
    input_, cached, output, cache_read, cache_creation, total = counts
    if cache_read is not None or cache_creation is not None:
        input_ = (input_ or 0) + (cache_read or 0) + (cache_creation or 0)
        cached = cache_read
    if total is not None:
        input_ = total if input_ is None else input_
        output = max(0, total - input_) if output is None else output
    return input_, cached, output


def _read_usage(found: dict[str, int], content: Mapping[str, Any], *, is_begin: bool) -> None:
    usage = content.get("usage")
    if not isinstance(usage, dict):
        return
    for name, path in _PATHS:
        if is_begin and name == "output_tokens":
            continue  # Anthropic's first event has no answer to count yet, and may be the only one
        value: Any = usage
        for key in path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        _note(found, name, value)


def _note(found: dict[str, int], name: str, value: Any) -> None:
    number = _number(value)
    if number is not None:
        found[name] = number


def _number(value: Any) -> int | None:
    """Return a whole number of 15 digits at most, also from a text or a float; None: no number."""
    if isinstance(value, str):
        return parse_whole(value, _DIGITS_MAX)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < 10**_DIGITS_MAX else None


def _error_of(content: Mapping[str, Any]) -> tuple[int, bool] | None:
    error, kind = content.get("error"), content.get("error_type")
    if isinstance(error, dict):
        return _status_of(error)
    if content.get("object") == "error" or content.get("type") == "error":
        return _status_of(content)
    if isinstance(kind, str):
        return _status_of_word(kind), False
    return (ERROR, False) if isinstance(error, str) and error else None


def _status_of(error: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the status of an error, and whether it was a number."""
    status = ERROR
    for key in ("type", "http_code", "code"):
        value = error.get(key)
        number = _number(value)
        if number is not None and number in _ERROR_STATUSES:
            return number, True
        if number is None and isinstance(value, str) and value != "error":
            status = _status_of_word(value)
    return status, False


def _status_of_word(kind: str) -> int:
    kind = kind.lower()
    return next((status for word, status in _WORDS if word.search(kind)), ERROR)

"""Pure. The format of errors that the clients of each API expect.

A client library understands the errors of its own API only: Anthropic's looks for `type` at the
top, OpenAI's for `error`, Gemini's for `status` in it, Ollama's and KServe's for a text. The path
shows which API it is. A gRPC client gets the status from Envoy, with the body as its message, so
the body is plain text.
"""

import json
from enum import Enum, auto
from typing import Final


class Dialect(Enum):
    """The error format of an API."""

    __hash__ = object.__hash__  # as in Outcome

    OPENAI = auto()
    ANTHROPIC = auto()
    GEMINI = auto()
    PLAIN = auto()
    """{"error": "text"}: Ollama's /api/NAME, KServe's /v2."""
    GRPC = auto()


_OPENAI_TYPES: Final = {429: "rate_limit_error", 499: "invalid_request_error"}
_ANTHROPIC_TYPES: Final = {
    429: "rate_limit_error",
    499: "invalid_request_error",
    500: "api_error",
    503: "overloaded_error",
}
_GEMINI_STATUSES: Final = {
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
GEMINI_METHODS: Final = (
    *("generateContent", "streamGenerateContent", "countTokens"),
    *("embedContent", "batchEmbedContents"),
)
"""Methods of Gemini's API: each follows a colon at the end of a path that names the model."""
_OLLAMA, _KSERVE = "/api/", "/v2"


def dialect_of(path: str, content_type: str) -> Dialect:
    """Return the error format for the client of a request.

    Args:
        path: of the request, without its query.
        content_type: of the request; empty: it has none.
    """
    if content_type.startswith("application/grpc"):
        return Dialect.GRPC
    if path.endswith("/v1/messages") or "/v1/messages/" in path:
        return Dialect.ANTHROPIC
    if path.rpartition(":")[2] in GEMINI_METHODS:
        return Dialect.GEMINI
    if path == _KSERVE or path.startswith(f"{_KSERVE}/"):
        return Dialect.PLAIN
    if path.startswith(_OLLAMA) and "/" not in path.removeprefix(_OLLAMA):
        return Dialect.PLAIN  # others have OpenAI's API there, as /api/v1/chat/completions
    return Dialect.OPENAI


def content_type_of(dialect: Dialect) -> str:
    """Return the content type of an error's body."""
    return "text/plain" if dialect is Dialect.GRPC else "application/json"


def error_body(dialect: Dialect, status: int, reason: str, message: str) -> bytes:
    """Return the body of an error.

    Args:
        dialect: error format of the client.
        status: HTTP status.
        reason: stable code, for machines.
        message: text, for people.
    """
    match dialect:
        case Dialect.GRPC:
            return f"{reason}: {message}".encode()
        case Dialect.PLAIN:
            content: dict[str, object] = {"error": f"{reason}: {message}"}
        case Dialect.ANTHROPIC:
            error = {"type": _ANTHROPIC_TYPES[status], "message": f"{reason}: {message}"}
            content = {"type": "error", "error": error}
        case Dialect.GEMINI:
            text = f"{reason}: {message}"
            content = {
                "error": {"code": status, "message": text, "status": _GEMINI_STATUSES[status]}
            }
        case Dialect.OPENAI:
            kind = _OPENAI_TYPES.get(status, "server_error")
            content = {"error": {"message": message, "type": kind, "param": None, "code": reason}}
    return json.dumps(content).encode()

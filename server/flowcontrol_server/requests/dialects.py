"""Pure. How the clients of each API expect an error to be written.

A client's library reads the error of its own API and no other: Anthropic's looks for `type` at the
top, OpenAI's for `error`, Gemini's for a `status` in it, Ollama's and KServe's for a text. The path
says which API it is. A gRPC client gets its status from Envoy, and the body as that status'
message: plain text, then.
"""

import json
from enum import Enum, auto
from typing import Final


class Dialect(Enum):
    """An API's way to say an error."""

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
"""Gemini's, each behind a colon at the end of a path that names the model."""
_OLLAMA, _KSERVE = "/api/", "/v2"


def dialect_of(path: str, content_type: str) -> Dialect:
    """Return how the client of a request is to be answered.

    Args:
        path: of the request, without its query.
        content_type: of the request, empty if it says none.
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
    """Return what an error's body is."""
    return "text/plain" if dialect is Dialect.GRPC else "application/json"


def error_body(dialect: Dialect, status: int, reason: str, message: str) -> bytes:
    """Return the body of an error.

    Args:
        dialect: of the client.
        status: of HTTP.
        reason: stable, for machines.
        message: for people.
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

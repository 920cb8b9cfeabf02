"""Errors as the clients of each API expect them."""

import json

import pytest

from flowcontrol_server.requests.dialects import Dialect, content_type_of, dialect_of, error_body
from flowcontrol_server.requests.replies import REFUSALS


class TestDialectOf:
    """Whose client it is."""

    @pytest.mark.parametrize(
        ("path", "content_type", "expected"),
        [
            ("/v1/chat/completions", "application/json", Dialect.OPENAI),
            ("/v1/threads/t/messages", "application/json", Dialect.OPENAI),
            ("", "", Dialect.OPENAI),
            ("/v1/messages", "application/json", Dialect.ANTHROPIC),
            ("/anthropic/v1/messages", "", Dialect.ANTHROPIC),
            ("/v1/messages/count_tokens", "application/json", Dialect.ANTHROPIC),
            ("/api/chat", "application/json", Dialect.PLAIN),
            ("/api/chat/completions", "application/json", Dialect.OPENAI),
            ("/api/v1/chat/completions", "application/json", Dialect.OPENAI),
            ("/v2/models/llama/infer", "application/json", Dialect.PLAIN),
            ("/v2", "", Dialect.PLAIN),
            ("/v2beta/chat", "", Dialect.OPENAI),
            ("/v1beta/models/llama:generateContent", "application/json", Dialect.GEMINI),
            ("/v1beta/models/a/b:c:streamGenerateContent", "", Dialect.GEMINI),
            ("/v1/models/llama:predict", "application/json", Dialect.OPENAI),
            ("/v1/messages", "application/grpc", Dialect.GRPC),
            ("/inference.GRPCInferenceService/ModelInfer", "application/grpc+proto", Dialect.GRPC),
        ],
    )
    def test_table(self, path: str, content_type: str, expected: Dialect) -> None:
        """The path says it, but for gRPC."""
        assert dialect_of(path, content_type) is expected


class TestErrorBody:
    """What it is told."""

    def test_openai(self) -> None:
        """OpenAI's error object, the reason as its code."""
        body = error_body(Dialect.OPENAI, 503, "no-room", "there is no room")

        assert json.loads(body) == {
            "error": {
                "message": "there is no room",
                "type": "server_error",
                "param": None,
                "code": "no-room",
            }
        }

    def test_anthropic(self) -> None:
        """Anthropic's, which has no place for the reason but the message."""
        body = error_body(Dialect.ANTHROPIC, 503, "no-room", "there is no room")

        error = {"type": "overloaded_error", "message": "no-room: there is no room"}
        assert json.loads(body) == {"type": "error", "error": error}

    def test_gemini(self) -> None:
        """Google's, with its word for the status."""
        body = error_body(Dialect.GEMINI, 429, "no-room", "there is no room")

        assert json.loads(body) == {
            "error": {
                "code": 429,
                "message": "no-room: there is no room",
                "status": "RESOURCE_EXHAUSTED",
            }
        }

    def test_plain(self) -> None:
        """A text under `error`."""
        body = error_body(Dialect.PLAIN, 503, "no-room", "there is no room")

        assert json.loads(body) == {"error": "no-room: there is no room"}

    def test_grpc(self) -> None:
        """Text alone: it becomes the message of the status."""
        body = error_body(Dialect.GRPC, 503, "no-room", "there is no room")

        assert body == b"no-room: there is no room"
        assert content_type_of(Dialect.GRPC) == "text/plain"

    @pytest.mark.parametrize("dialect", Dialect)
    def test_every_refusal_can_be_said(self, dialect: Dialect) -> None:
        """No status is without a word in any of them."""
        for refused in REFUSALS.values():
            assert error_body(dialect, refused.status, refused.reason, refused.message)

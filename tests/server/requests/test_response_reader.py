"""What a response says of itself as it passes; streams are in test_usage."""

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from flowcontrol_server.requests.classify import served_endpoint
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.response_reader import ResponseReader
from tests.support.response_readers import cut_into

MS = 1_000_000
DISPATCHED, ENDED = 100 * MS, 900 * MS
USAGE = {"usage": {"prompt_tokens": 11, "completion_tokens": 7}}


def read(
    *parts: bytes,
    is_end: bool = True,
    trailers: bool = False,
    headers: Mapping[str, str] | None = None,
) -> LogEntry:
    """The report of a response in these parts, the first 300 ms after the dispatch."""
    said = {":status": "200", "content-type": "application/json"}
    reader = ResponseReader(said | dict(headers or {}), "10.0.0.5:8000")
    for number, part in enumerate(parts):
        is_last = is_end and not trailers and number == len(parts) - 1
        reader.take(part, DISPATCHED + 300 * MS + number, is_end=is_last)
    if trailers:
        reader.end(ENDED)
    return reader.report(DISPATCHED, ENDED)


def counts(entry: LogEntry) -> tuple[int | None, ...]:
    """Tokens of the prompt, from the cache, of the answer."""
    return entry.input_tokens, entry.cached_tokens, entry.output_tokens


class TestReport:
    """Status, times, and who served it."""

    def test_whole(self) -> None:
        """A response that came to its end."""
        body = json.dumps(USAGE).encode()
        entry = read(body[:9], body[9:])

        assert entry == LogEntry(
            ticket="",
            status=200,
            is_success=True,
            ttft_us=300_000,
            generation_us=500_000,
            input_tokens=11,
            output_tokens=7,
            response_bytes=len(body),
            endpoint="10.0.0.5:8000",
        )

    def test_ended_by_trailers(self) -> None:
        """Trailers end a body, too."""
        entry = read(json.dumps(USAGE).encode(), trailers=True)

        assert (counts(entry), entry.was_abandoned) == ((11, None, 7), False)

    def test_broken_off(self) -> None:
        """Whether the client left or the server broke off is not known."""
        entry = read(b'{"choices": [', is_end=False)

        assert (entry.is_success, entry.is_failure, entry.was_abandoned) == (True, False, True)

    def test_no_body(self) -> None:
        """Where the gateway keeps the body, the status is all there is."""
        entry = ResponseReader({":status": "200"}).report(DISPATCHED, ENDED)

        assert (entry.status, entry.ttft_us, entry.was_abandoned) == (200, None, False)

    @pytest.mark.parametrize(
        ("status", "flags"),
        [
            ("404", (False, False, False)),
            ("500", (False, True, False)),
            ("503", (False, True, True)),
        ],
    )
    def test_failures(self, status: str, flags: tuple[bool, ...]) -> None:
        """Success, failure and lack of room, by the status."""
        entry = read(b"{}", headers={":status": status})

        assert (entry.is_success, entry.is_failure, entry.was_turned_away) == flags

    @pytest.mark.parametrize(
        ("grpc_status", "status", "flags"),
        [
            ("0", 200, (True, False, False)),
            ("14", 503, (False, True, True)),
            ("8", 429, (False, False, True)),
            ("12", 400, (False, False, False)),
            ("\udcff", 200, (True, False, False)),
        ],
    )
    def test_grpc_status(self, grpc_status: str, status: int, flags: tuple[bool, ...]) -> None:
        """An error of gRPC without a message comes with the headers, behind status 200."""
        headers = {"content-type": "application/grpc", "grpc-status": grpc_status}
        entry = read(trailers=True, headers=headers)

        assert entry.status == status
        assert (entry.is_success, entry.is_failure, entry.was_turned_away) == flags

    def test_no_status(self) -> None:
        """A response without a readable status is no success."""
        entry = read(b"{}", headers={":status": "ok"})

        assert (entry.status, entry.is_success) == (0, False)


class TestObject:
    """A response that is one JSON object."""

    def test_error(self) -> None:
        """An error inside a response of 200 counts with its own status."""
        entry = read(b'{"error": {"message": "full", "code": 503}}')

        assert (entry.status, entry.is_failure, entry.was_turned_away) == (503, True, True)

    def test_longer_than_kept(self) -> None:
        """The usage behind a long answer is found, and what the answer says of usage is none."""
        long = {"data": [{"embedding": [0.1] * 20_000}], "note": '"usage": {"prompt_tokens": 9}'}
        body = json.dumps(long | USAGE | {"prompt_logprobs": None}).encode()

        assert counts(read(*cut_into(body, 8_000))) == (11, None, 7)

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ({"embeddings": [[0.123] * 3_000], "prompt_eval_count": 11}, (11, None, 0)),
            ({"context": [1] * 9_000, "prompt_eval_count": 11, "eval_count": 7}, (11, None, 7)),
            ({"response": '"eval_count": 9' + "x" * 20_000, "eval_count": 7}, (None, None, 7)),
            ({"response": "x" * 20_000, "eval_count": 7.5}, (None, None, None)),
        ],
    )
    def test_ollama(self, answer: dict[str, Any], expected: tuple[int | None, ...]) -> None:
        """Its counts stand behind a long answer, and beside no usage."""
        assert counts(read(json.dumps(answer).encode())) == expected

    def test_spaces_before_it(self) -> None:
        """Some servers send spaces while the client waits."""
        entry = read(b"  ", b"\n ", b'{"error": {"message": "full", "code": 503}}')

        assert entry.status == 503

    @pytest.mark.parametrize(
        ("kind", "body"),
        [("Application/JSON", b"%s"), ("Text/Event-Stream; charset=UTF-8", b"data: %s\n\n")],
    )
    def test_type_in_any_letters(self, kind: str, body: bytes) -> None:
        """The type of the content is what it is in capitals, too, as is identity."""
        headers = {"content-type": kind, "content-encoding": "Identity"}

        assert counts(read(body % json.dumps(USAGE).encode(), headers=headers)) == (11, None, 7)

    @pytest.mark.parametrize(
        "body", [b"", b"[1]", b"{oops", b"\xff" * 99, b"{" * 20_000, b'"usage": {"a"' * 9_000]
    )
    def test_unreadable(self, body: bytes) -> None:
        """What is no JSON object says nothing, and harms nothing."""
        assert counts(read(body)) == (None, None, None)

    @pytest.mark.parametrize(
        "headers", [{"content-encoding": "gzip"}, {"content-type": "text/plain"}]
    )
    def test_not_read(self, headers: dict[str, str]) -> None:
        """Compressed bodies, and other types, are not read; times are known all the same."""
        entry = read(json.dumps(USAGE).encode(), headers=headers)

        assert (counts(entry), entry.ttft_us) == ((None, None, None), 300_000)

    def test_time(self) -> None:
        """A long object in single bytes costs no more than its bytes."""
        reader = ResponseReader({":status": "200", "content-type": "application/json"})
        begun_s = time.process_time()
        for _ in range(200_000):
            reader.take(b"[", 0, is_end=False)

        assert time.process_time() - begun_s < 1.0


class TestServed:
    """The endpoint that a gateway says it used."""

    def test_read(self) -> None:
        """As the endpoint picker protocol has it."""
        said = {"envoy.lb": {"x-gateway-destination-endpoint-served": "10.0.0.7:8000"}}

        assert served_endpoint(said) == "10.0.0.7:8000"

    @pytest.mark.parametrize("said", [{}, {"envoy.lb": {}}, {"envoy.lb": "x"}])
    def test_unknown(self, said: dict[str, Any]) -> None:
        """Other gateways say nothing."""
        assert served_endpoint(said) == ""

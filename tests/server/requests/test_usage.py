"""Usage, errors and the first token of responses, as Envoy's script and our own reader find them.

Each case is read by both.
"""

import time

import pytest

from tests.support.response_readers import READERS, Reader, cut_into


@pytest.fixture(params=READERS, ids=lambda reader: reader.__name__)
def read_of(request: pytest.FixtureRequest) -> Reader:
    """One of the two."""
    reader: Reader = request.param
    return reader


LAST = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}\n\n'
USAGE = {"input_tokens": 11, "output_tokens": 7}
CACHED = b'data: {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}\n'


class TestUsage:
    """What is read."""

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    def test_chunks(self, read_of: Reader, size: int) -> None:
        """A line is read however it has been cut."""
        text = b'data: {"choices": [{"delta": {"content": "x"}}], "usage": null}\n\n' + LAST

        assert read_of(*cut_into(text, size)) == USAGE

    def test_last_counts(self, read_of: Reader) -> None:
        """Of several events the last one counts, also when its line does not end."""
        assert read_of(CACHED, LAST.rstrip()) == {**USAGE, "cached_tokens": 4}

    def test_before_usage(self, read_of: Reader) -> None:
        """What stands before the usage is no usage."""
        assert read_of(b'data: {"prompt_tokens": 99, "usage": {"completion_tokens": 7}}\n') == {
            "output_tokens": 7
        }

    def test_a_line_too_long(self, read_of: Reader) -> None:
        """Of a line of more than 64 KiB the end is read; the next one counts."""
        assert read_of(b"x" * 70_000, b"\n", LAST) == USAGE
        assert read_of(b'"usage": {"prompt_tokens"', b" " * 70_000, b": 1}\n") == {}

    @pytest.mark.parametrize("size", [1_000, 50_000, 66_000, 200_000])
    def test_responses_that_repeat_long_instructions(self, read_of: Reader, size: int) -> None:
        """The last event of OpenAI's responses holds all of the response, the usage at its end."""
        usage = b'"usage":{"input_tokens":11,"input_tokens_details":{"cached_tokens":3},'
        usage += b'"output_tokens":7},"metadata":{"output_tokens":"9"},"error":"no error here"'
        event = b'data: {"type":"response.completed","response":{"instructions":"%s",%s}}'
        event %= rb"\"usage\": {\"input_tokens\": 99}" * 4_000, usage
        text = LAST + event + b"\n\ndata: [DONE]\n\n"

        assert read_of(*cut_into(text, size)) == USAGE | {"cached_tokens": 3}
        assert read_of(event) == USAGE | {"cached_tokens": 3}

    def test_first_of_two_lines_too_long(self, read_of: Reader) -> None:
        """What stands in one line is not taken for the end of the next."""
        lines = LAST.rstrip() + b" " * 10_000 + b"\n" + b"x" * 70_000 + b"\n"

        assert read_of(lines[:10_000], lines[10_000:80_000], lines[80_000:]) == USAGE
        assert read_of(b"x" * 70_000 + b'"usage":{"prompt_tokens":', b"\n", b"11}\n") == {}

    def test_other_responses(self, read_of: Reader) -> None:
        """What is no stream of events is not read; what is one may say so in any letters."""
        assert read_of(LAST, kind=b"text/plain") == {}
        assert read_of(LAST, kind=b"Text/Event-Stream;charset=UTF-8") == USAGE

    @pytest.mark.parametrize("number", [b"11.0", b'"11"', b"1.1e1", b" 11 "])
    def test_numbers(self, read_of: Reader, number: bytes) -> None:
        """A number is read as loosely as in a JSON response."""
        assert read_of(b'data: {"usage": {"prompt_tokens":' + number + b"}}\n\n") == {
            "input_tokens": 11
        }

    @pytest.mark.parametrize("number", [b"-1", b"null", b'"many"', b"[11]", b"true"])
    def test_no_numbers(self, read_of: Reader, number: bytes) -> None:
        """What is no count is not read."""
        assert read_of(b'data: {"usage": {"prompt_tokens":' + number + b"}}\n\n") == {}

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    def test_event_of_several_lines(self, read_of: Reader, end: bytes) -> None:
        """JSON may be spread over the lines of an event."""
        lines = [b"data: {", b'data:  "usage": {', b'data: "prompt_tokens": 11,']
        lines += [b'data:   "completion_tokens": 7', b"data:  }", b"data: }", b"", b"data: [DONE]"]

        assert read_of(*(line + end for line in lines)) == USAGE

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    def test_event_of_several_lines_in_two_chunks(self, read_of: Reader, end: bytes) -> None:
        """Nothing of it is lost wherever it is cut, behind other events as well."""
        first = b'data: {"choices": [{"delta": {"content": "x"}}]}' + end * 2
        lines = [b"data: {", b'data:  "choices": [],', b'data:  "usage": {"prompt_tokens": 11,']
        lines += [b'data:   "completion_tokens": 7}', b"data: }", b"", b""]
        event = end.join(lines)

        for at in range(len(event)):
            assert read_of(first, event[:at], event[at:]) == USAGE, event[:at]

    def test_only_the_usage(self, read_of: Reader) -> None:
        """Numbers of the same name elsewhere are no usage: of a tool's arguments, of a vendor."""
        arguments = b'{"output_tokens": 123, "usage": {"completion_tokens": 777}}'
        event = b'{"choices": [{"delta": {"arguments": ' + arguments + b'}}], "usage": '
        event += b'{"prompt_tokens":11,"completion_tokens":7},"x":{"usage":{"prompt_tokens":500}}}'

        assert read_of(b"data: " + event + b"\n\n") == USAGE

    def test_anthropic(self, read_of: Reader) -> None:
        """Cached tokens, and the answer's own from the last event that counts it."""
        begin = b'{"type":"message_start","message":{"usage":{"input_tokens":12,"output_tokens":1,'
        begin += b'"cache_creation_input_tokens":3,"cache_read_input_tokens":9000}}}'
        cache = {"input_tokens": 9015, "cached_tokens": 9000}

        assert read_of(b"event: message_start\ndata: " + begin + b"\n\n") == cache
        end = b'data: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
        assert read_of(b"data: " + begin + b"\n\n", end) == {**cache, "output_tokens": 7}

    def test_responses(self, read_of: Reader) -> None:
        """OpenAI's responses have the usage within the response."""
        event = b'{"type":"response.completed","response":{"error":null,"usage":{"input_tokens":11,'
        event += b'"input_tokens_details":{"cached_tokens":3},"output_tokens":7,'
        event += b'"output_tokens_details":{"reasoning_tokens":2},"total_tokens":18}}}'

        assert read_of(b"data: " + event + b"\n\n") == USAGE | {"cached_tokens": 3}

    def test_ollama(self, read_of: Reader) -> None:
        """Ollama's own API answers with lines of JSON."""
        lines = b'{"response":"hi","done":false}\n'
        lines += b'{"done":true,"prompt_eval_count":11,"eval_count":7}\n'

        assert read_of(lines, kind=b"application/x-ndjson") == USAGE

    def test_ollama_without_an_answer(self, read_of: Reader) -> None:
        """It leaves out a count of zero."""
        line = b'{"response":"","done":true,"prompt_eval_count":11}\n'

        assert read_of(line, kind=b"application/x-ndjson") == {
            "input_tokens": 11,
            "output_tokens": 0,
        }

    @pytest.mark.parametrize("size", [1_000, 100_000])
    @pytest.mark.parametrize(
        ("end", "expected"),
        [
            (b'"prompt_eval_count": 11,"eval_count":7}', USAGE),
            (b'"prompt_eval_count":11.5,"eval_count":"7"}', {}),
            (b'"prompt_eval_count":1234567890123456,"eval_count":7', {"output_tokens": 7}),
        ],
    )
    def test_ollama_with_a_long_context(
        self, read_of: Reader, size: int, end: bytes, expected: dict[str, float]
    ) -> None:
        """Its last line holds the tokens of all before, and the counts behind them."""
        text = b'{"done":true,"context":[' + b"12345," * 20_000 + b"1]," + end + b"\n"

        assert read_of(*cut_into(text, size), kind=b"application/x-ndjson") == expected

    def test_ollama_behind_a_line_too_long(self, read_of: Reader) -> None:
        """What is left of a line that was dropped does not spoil the next."""
        chunks = [b'{"response":"' + b"x" * 70_000, b'"}\n']
        chunks += [b'{"done":true,"prompt_eval_count":11,"eval_count":7}\n']

        assert read_of(*chunks, kind=b"application/x-ndjson") == USAGE


class TestObject:
    """A response that is one JSON object."""

    JSON = b"application/json"
    COUNTS = b'"usage": {"prompt_tokens": 11, "completion_tokens": 7, "x": {"y": "}"}}'

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (JSON, USAGE),
            (b"Application/JSON ; charset=utf-8", USAGE),
            (b"application/json-seq", {}),
            (b"application/jsonl", {}),
        ],
    )
    def test_content_types(self, read_of: Reader, kind: bytes, expected: dict[str, float]) -> None:
        """JSON may name its character set."""
        assert read_of(b'{"choices": [], ' + self.COUNTS + b"}", kind=kind) == expected

    @pytest.mark.parametrize("size", [1, 7])
    def test_chunks(self, read_of: Reader, size: int) -> None:
        """It is read however it has been cut."""
        body = b'{"choices": [{"text": "\\"usage\\""}], ' + self.COUNTS + b"}"

        assert read_of(*cut_into(body, size), kind=self.JSON) == USAGE

    @pytest.mark.parametrize("size", [5_000, 1 << 20])
    @pytest.mark.parametrize("before", [0, 10_000, 30_000, 300_000])
    @pytest.mark.parametrize("behind", [0, 10_000, 30_000, 300_000])
    def test_length(self, read_of: Reader, size: int, before: int, behind: int) -> None:
        """Usage is found in front of long log probabilities, and behind a long answer."""
        text = rb"\"usage\": {\"prompt_tokens\": 99}" * (before // 35)
        body = b'{"text": "' + text + b'", ' + self.COUNTS + b', "prompt_logprobs": ['
        body += b"-1.25," * (behind // 6) + b"0]}"

        assert read_of(*cut_into(body, size), kind=self.JSON) == USAGE

    @pytest.mark.parametrize("numbers", [3, 3_000, 30_000])
    def test_ollama(self, read_of: Reader, numbers: int) -> None:
        """Counts at the top stand at the end."""
        body = b'{"embeddings": [[' + b"0.25," * numbers + b'1]], "prompt_eval_count": 11}'

        assert read_of(*cut_into(body, 8_000), kind=self.JSON) == {
            "input_tokens": 11,
            "output_tokens": 0,
        }

    def test_no_usage(self, read_of: Reader) -> None:
        """What is no usage is not read: a list, null, numbers inside of others, no JSON."""
        for body in (
            b'[{"usage": {"prompt_tokens": 11}}]',
            b'{"usage": null, "data": {"usage": {"prompt_tokens": 11}}}',
            b'{"data": {"eval_count": 7}}',
            b'"usage": {"prompt_tokens": 11}',
            b"",
        ):
            assert read_of(body, kind=self.JSON) == {}, body

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (b'{"message": "full", "code": 503}', 503),
            (b'{"type": "overloaded_error"}', 503),
            (b'"it failed"', 500),
        ],
    )
    def test_error(self, read_of: Reader, error: bytes, status: int) -> None:
        """An error inside a response of 200 counts, also behind spaces sent meanwhile."""
        assert read_of(b" ", b"\n ", b'{"error": ' + error + b"}", kind=self.JSON) == {
            "error": status
        }


ERRORS = {
    "sglang": (
        b'data: {"error":{"message":"full","type":"SERVICE_UNAVAILABLE","code":503}}\n\ndata: x',
        503,
    ),
    "vllm": (b'data: {"error": {"message": "x", "type": "InternalServerError", "code": 500}}', 500),
    "vllm before 0.10": (
        b'data: {"object":"error","message":"x","type":"BadRequestError","param":null,"code":400}',
        400,
    ),
    "tgi": (b'data:{"error":"Model is overloaded","error_type":"overloaded"}\n\n', 503),
    "tgi, generation": (b'data:{"error":"failed","error_type":"generation"}\n\n', 500),
    "triton": (b'data: {"error":"in ensemble, failed"}\n\n', 500),
    "llama.cpp": (
        b'data: {"error":{"code":503,"message":"Loading","type":"unavailable_error"}}\n\n',
        503,
    ),
    "llama.cpp before 2025": (
        b'error: {"code":500,"message":"context shift is disabled","type":"server_error"}\n\n',
        500,
    ),
    "anthropic": (
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
        503,
    ),
    "responses, failed": (
        b'data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n',
        500,
    ),
    "responses, client": (
        b'data: {"type":"error","code":"invalid_prompt","message":"x","param":null}\n\n',
        400,
    ),
    "a gateway": (b'data: {"error": {"message": "TimeoutError", "code": 504}}\n\n', 504),
}


class TestErrors:
    """An error inside a stream of status 200."""

    @pytest.mark.parametrize(("event", "status"), ERRORS.values(), ids=ERRORS)
    def test_read(self, read_of: Reader, event: bytes, status: int) -> None:
        """The error of each engine, as the HTTP status it stands for, first or after tokens."""
        assert read_of(event) == {"error": status}
        assert read_of(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', event) == {
            "error": status
        }

    def test_ollama(self, read_of: Reader) -> None:
        """Ollama writes it as a line of its own."""
        line = b'{"error":"an error was encountered while running the model"}\n'
        assert read_of(line, kind=b"application/x-ndjson") == {"error": 500}

    @pytest.mark.parametrize(
        "event",
        [
            b'{"error": null, "choices": []}',
            b'{"error": "", "choices": []}',
            b'{"choices": [{"delta": {"content": "\\"error\\": {\\"code\\": 500}"}}]}',
            b'{"choices": [{"delta": {"arguments": {"error": {"code": 500}}}}]}',
            b'{"type":"response.output_item.done","item":{"type":"mcp_call","error":"refused"}}',
        ],
    )
    def test_no_error(self, read_of: Reader, event: bytes) -> None:
        """What a model says of errors is none."""
        assert read_of(b"data: " + event + b"\n\n") == {}


class TestFirstToken:
    """How much later than the first byte the first token came."""

    def test_comments(self, read_of: Reader) -> None:
        """Comments that keep a connection alive are no tokens."""
        token = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
        chunks = b": keepalive\n\n", b":\n\n", token, token

        assert read_of(*chunks, chunk_ms=700) == {"first_token_late_ms": 1400}
        assert read_of(token, token, chunk_ms=700) == {}

    @pytest.mark.parametrize(
        "kind", ["ping", "message_start", "response.created", "response.in_progress"]
    )
    def test_events_without_tokens(self, read_of: Reader, kind: str) -> None:
        """Neither are events that say that the request has been accepted."""
        early = f'event: {kind}\ndata: {{"type": "{kind}"}}\n\n'.encode()
        token = b'data: {"type":"content_block_delta","delta":{"text":"hi"}}\n\n'

        assert read_of(early, token, chunk_ms=700) == {"first_token_late_ms": 700}


class TestTime:
    """A worker of Envoy serves others meanwhile."""

    @pytest.mark.parametrize("byte", [b"x", b" ", b'"', b'"a', b'"usage":', b'"a":1 '])
    def test_small_chunks(self, read_of: Reader, byte: bytes) -> None:
        """Many small chunks of one line: a byte used to cost a copy of all before it."""
        chunks = [b"data: {", *[byte] * (60_000 // len(byte)), b"\n"]
        read_of(b"")  # generating Envoy's configuration takes seconds, once
        begun_s = time.process_time()
        read_of(*chunks)

        assert time.process_time() - begun_s < 1.0

    @pytest.mark.parametrize(
        "byte", [b"x", b" ", b'"', b'"a', b'"usage":', b'"usage":{', b'"a":1 ']
    )
    def test_large_chunks(self, read_of: Reader, byte: bytes) -> None:
        """A megabyte in one line."""
        read_of(b"")  # generating Envoy's configuration takes seconds, once
        begun_s = time.process_time()
        read_of(b'data: {"usage":{' + byte * (2**20 // len(byte)) + b"\n")
        read_of(
            *cut_into(b'{"usage":{' + byte * (2**20 // len(byte)), 65_536), kind=TestObject.JSON
        )

        assert time.process_time() - begun_s < 1.0

"""Envoy's access log settles what the engine has let go: what it took, and of which request.

Token usage is read by Envoy from the response, streamed or not; no body reaches the service. What
the service was told is asserted from its debug log, what it made of it from its metrics.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from flowcontrol_server.common import envoy_messages
from flowcontrol_server.requests import codec
from flowcontrol_server.requests.log_codec import SERVICE
from tests.e2e.backend import Call
from tests.e2e.client import Caller
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e

USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 3},
}
TOKENS = {"input_tokens": 11, "output_tokens": 7, "cached_tokens": 3}
NO_TOKENS = dict.fromkeys(TOKENS)
JSON = {"content-type": "application/json"}
SPEC = Spec(max_concurrency=4, log_level="debug", settlement={"lostAfter": "1s"})


@pytest.fixture(scope="module")
def spec() -> Spec:
    """A service that logs what it is told, and soon gives up."""
    return SPEC


def log_every_50_ms(configuration: dict[str, Any]) -> None:
    """Let Envoy log requests while they go on, too."""
    (listener,) = configuration["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["access_log_options"] = {"access_log_flush_interval": "0.05s"}


def hold_little(configuration: dict[str, Any]) -> None:
    """Let Envoy hold 32 KiB of a body."""
    (listener,) = configuration["static_resources"]["listeners"]
    listener["per_connection_buffer_limit_bytes"] = 2**15


def event(content: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DELTA = event({"choices": [{"delta": {"content": "x"}}], "usage": None})
LAST = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"


async def started(gateway: Gateway, **request: Any) -> tuple[Caller, Call]:
    """A request that has reached the model server."""
    caller = await gateway.call(**request)
    return caller, await gateway.next_call()


async def reported(gateway: Gateway, call: Call) -> dict[str, Any]:
    """What the service was told of a request, once, of which its canonical line gives the id."""
    request_id = (await gateway.decided(call.name))["request_id"]

    def line() -> dict[str, Any] | None:
        lines = gateway.stack.events("request_reported")
        mine = [
            line
            for line in lines
            if line["ticket"].split(".")[1] == str(request_id) and line["result"] != "foreign"
        ]
        assert len(mine) < 2
        return mine[0] if mine else None

    found = await eventually(line, what=f"the report of request {request_id}")
    assert isinstance(found, dict)
    assert found["result"] == "settled"
    return found


def of(line: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that a test is about."""
    return {name: line[name] for name in expected}


class TestTokens:
    """Token usage, as the model server says it."""

    @pytest.mark.parametrize(
        "content_type", ["application/json", "application/json; charset=utf-8"]
    )
    async def test_whole_response(self, gateway: Gateway, content_type: str) -> None:
        """A response that is no stream is read, whatever stands beside its media type."""
        caller, call = await started(gateway)
        body = json.dumps({"choices": [], "usage": USAGE}).encode()
        await call.respond(body, content_type=content_type)
        reply = await caller.reply()
        line = await reported(gateway, call)

        assert body == reply.body
        assert of(line, TOKENS) == TOKENS
        assert line["response_bytes"] == len(body)
        assert line["request_bytes"] == len(b"{}")

    async def test_longer_than_the_buffer(self, start: Start) -> None:
        """A response is read as it passes, so Envoy need not hold it."""
        gateway = await start(dataclasses.replace(SPEC, edit_envoy=hold_little))
        caller, call = await started(gateway)
        body = json.dumps({"data": [0.5] * 200_000, "usage": USAGE}).encode()
        await call.respond(body)
        reply = await caller.reply()
        line = await reported(gateway, call)

        assert (reply.status, reply.body == body) == (200, True)
        assert of(line, TOKENS) == TOKENS

    async def test_compressed(self, gateway: Gateway) -> None:
        """No model server is asked to compress what is to be read."""
        caller, call = await started(gateway, headers={"accept-encoding": "gzip, deflate"})
        await call.respond()
        await caller.reply()

        assert "accept-encoding" not in call.headers

    async def test_stream_with_usage(self, gateway: Gateway) -> None:
        """The last event of a stream with stream_options.include_usage is read."""
        caller, call = await started(gateway)
        await call.stream(DELTA, DELTA)
        await call.send(LAST, DONE)
        await call.end()
        await caller.head()
        body = await caller.rest()
        line = await reported(gateway, call)

        assert body == DELTA * 2 + LAST + DONE
        assert of(line, TOKENS) == TOKENS

    async def test_stream_without_usage(self, start: Start) -> None:
        """Without it the request is settled all the same; its tokens stay estimated."""
        gateway = await start(SPEC)  # reports of other tests would be counted, too
        caller, call = await started(gateway)
        await call.stream(DELTA, DONE)
        await call.end()
        await caller.head()
        await caller.rest()
        line = await reported(gateway, call)
        metrics = await gateway.metrics()

        assert of(line, TOKENS) == NO_TOKENS
        assert metrics['flowcontrol_unmetered_responses_total{priority="0"}'] == 1

    async def test_last_usage_counts(self, gateway: Gateway) -> None:
        """Of a stream that says its usage with each event, the last one counts."""
        caller, call = await started(gateway)
        await call.stream(event({"usage": {"prompt_tokens": 11, "completion_tokens": 1}}))
        await call.send(LAST)
        await call.end()
        await caller.head()
        await caller.rest()

        assert of(await reported(gateway, call), TOKENS) == TOKENS

    @pytest.mark.parametrize(
        "strange",
        [
            b"data: {nonsense\n\n",
            b"data: " + b"y" * 3_000_000 + b"\n\n",
            event({"choices": "z" * 3_000_000}),
            b": a comment\n\nevent: ping\n\n",
            event([1, 2]),
            event({"usage": {"prompt_tokens": "many", "completion_tokens": -1e300}}),
            event({"choices": [{"delta": {"content": '"usage": {"prompt_tokens": 99}'}}]}),
            event({"prompt_tokens": 99}),
            b'data: {"usage":' * 100_000 + b"\n\n",
        ],
        ids=[
            *("malformed", "huge", "huge-json", "no-data", "list", "wrong-types"),
            *("quoted", "elsewhere", "nested"),
        ],
    )
    async def test_strange_event(self, gateway: Gateway, strange: bytes) -> None:
        """A malformed or huge event reaches the client as it is, and hides no usage after it."""
        caller, call = await started(gateway)
        await call.stream(DELTA)
        await call.send(strange, LAST)
        await call.end()
        await caller.head()
        body = await caller.rest()

        assert DELTA + strange + LAST == body
        assert of(await reported(gateway, call), TOKENS) == TOKENS

    async def test_event_in_pieces(self, gateway: Gateway) -> None:
        """An event is read also if it arrives piece by piece, and with other ends of lines."""
        caller, call = await started(gateway)
        last = LAST.replace(b"\n", b"\r\n")
        await call.stream(DELTA + last[:30])
        await caller.head()
        for at in range(30, len(last), 7):
            await caller.piece()
            await call.send(last[at : at + 7])
        await call.end()
        body = await caller.rest()

        assert of(await reported(gateway, call), TOKENS) == TOKENS
        assert last.endswith(body)

    async def test_broken_off_as_it_begins(self, gateway: Gateway) -> None:
        """Anthropic's first event says nothing of the answer yet: what it took is estimated."""
        caller, call = await started(gateway, path="/v1/messages")
        usage = {"input_tokens": 8, "output_tokens": 1}
        await call.stream(event({"type": "message_start", "message": {"usage": usage}}))
        await caller.head()
        await caller.piece()
        call.reset()
        line = await reported(gateway, call)

        assert [line[n] for n in TOKENS] == [8, None, None]

    @pytest.mark.parametrize("scalar", ["1", "-1.5e3", '"x"', '"usage"', "null", "true", "false"])
    async def test_bare_scalar(self, gateway: Gateway, scalar: str) -> None:
        """An event that is JSON, but no object, is no event to fall over."""
        caller, call = await started(gateway)
        bare = f"data: {scalar}\n\n".encode()
        await call.stream(bare, LAST)
        await call.end()
        await caller.head()

        assert await caller.rest() == bare + LAST
        assert of(await reported(gateway, call), TOKENS) == TOKENS

    async def test_malformed_response(self, gateway: Gateway) -> None:
        """A response that says JSON and is none reaches the client, and is settled."""
        caller, call = await started(gateway)
        await call.respond(b"{oops")
        reply = await caller.reply()
        line = await reported(gateway, call)

        assert reply.body == b"{oops"
        assert of(line, TOKENS) == NO_TOKENS
        assert line["is_success"] is True

    async def test_other_apis(self, gateway: Gateway) -> None:
        """The usage of OpenAI's responses and of Anthropic's messages is read, too."""
        caller, call = await started(gateway, path="/v1/responses")
        done = {"input_tokens": 5, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 4}}
        await call.stream(event({"type": "response.completed", "response": {"usage": done}}))
        await call.end()
        await caller.head()
        await caller.rest()
        responses = await reported(gateway, call)
        caller, call = await started(gateway, path="/v1/messages")
        await call.stream(
            event({"type": "message_start", "message": {"usage": {"input_tokens": 8}}})
        )
        await call.send(event({"type": "message_delta", "usage": {"output_tokens": 9}}))
        await call.end()
        await caller.head()
        await caller.rest()
        messages = await reported(gateway, call)

        assert [responses[n] for n in TOKENS] == [5, 6, 4]
        assert [messages[n] for n in TOKENS] == [8, 9, None]

    @pytest.mark.parametrize(
        ("usage", "expected"),
        [
            (
                {
                    "input_tokens": 12,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 9000,
                    "output_tokens": 7,
                },
                [9012, 7, 9000],
            ),
            ({"prompt_tokens": 5, "total_tokens": 5}, [5, 0, None]),
            ({"prompt_tokens": 11.0, "completion_tokens": "7"}, [11, 7, None]),
        ],
        ids=["anthropic", "embeddings", "loose"],
    )
    @pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
    async def test_same_either_way(
        self,
        gateway: Gateway,
        usage: dict[str, object],
        expected: list[int | None],
        *,
        is_stream: bool,
    ) -> None:
        """A stream is read as loosely as a whole response, caches and totals included."""
        caller, call = await started(gateway)
        if is_stream:
            await call.stream(event({"usage": usage}))
            await call.end()
        else:
            await call.respond(json.dumps({"usage": usage}).encode())
        await caller.head()
        await caller.rest()
        line = await reported(gateway, call)

        assert [line[n] for n in TOKENS] == expected


class TestErrorInside:
    """A response of status 200 that carries an error is a failure."""

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            ({"error": {"message": "full", "type": "SERVICE_UNAVAILABLE", "code": 503}}, 503),
            ({"error": {"message": "quota exceeded"}}, 500),
            ({"error": None, "choices": []}, 200),
            ({"choices": []}, 200),
        ],
        ids=["code", "message", "null", "none"],
    )
    @pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
    async def test_error(
        self, gateway: Gateway, error: dict[str, object], status: int, *, is_stream: bool
    ) -> None:
        """It counts with the error's status, streamed or not."""
        caller, call = await started(gateway)
        if is_stream:
            await call.stream(event(error), DONE)
            await call.end()
        else:
            await call.respond(json.dumps(error).encode())
        await caller.head()
        await caller.rest()
        line = await reported(gateway, call)

        assert (line["status"], line["is_success"]) == (status, status == 200)


class TestOutcome:
    """Status, endpoint and times."""

    async def test_times(self, gateway: Gateway) -> None:
        """Time to first token counts from dispatch to the first byte of the body, not the head."""
        holders = [await started(gateway) for _ in range(4)]
        caller = await gateway.call()
        await gateway.until(waiting=1)
        await holders[0][1].respond()
        call = await gateway.next_call()
        await call.stream()  # the head alone
        await caller.head()
        await gateway.until(in_flight=4)
        await call.send(DELTA)
        await caller.piece()
        await call.send(DELTA)
        await call.end()
        await caller.rest()
        for _, holder in holders[1:]:
            await holder.respond()
        line = await reported(gateway, call)
        decided = await gateway.decided(call.name)

        assert line["status"] == 200
        assert line["endpoint"] == str(call.endpoint)
        assert line["parked_us"] >= decided["waited_ms"] * 1000
        # In all no more than the request was in flight. Envoy takes the time once in each turn of
        # its loop: on a busy machine two steps may have the same.
        in_flight_us = decided["in_flight_ms"] * 1000
        assert 0 <= line["ttft_us"] <= in_flight_us
        assert 0 <= line["generation_us"] <= in_flight_us
        assert line["ttft_us"] + line["generation_us"] <= in_flight_us * 1.1 + 5_000

    async def test_first_token_after_comments(self, gateway: Gateway) -> None:
        """Comments that keep the connection alive are no tokens: the time runs on."""
        caller, call = await started(gateway)
        await call.stream(b": keepalive\n\n")
        await caller.head()
        await caller.piece()
        begun_s = time.monotonic()
        await asyncio.sleep(0.3)  # what is measured
        await call.send(DELTA)
        await call.end()
        await caller.rest()
        line = await reported(gateway, call)

        assert 290_000 < line["ttft_us"] < (time.monotonic() - begun_s) * 1e6 + 1e6
        assert line["generation_us"] < 290_000

    async def test_model_server_fails(self, gateway: Gateway) -> None:
        """An error of the model server's is one of the request's, with its status."""
        caller, call = await started(gateway)
        await call.respond(b"{}", status=500)
        await caller.reply()
        line = await reported(gateway, call)

        assert of(line, {"status": 0, "is_success": 0}) == {"status": 500, "is_success": False}

    async def test_model_server_breaks_off(self, gateway: Gateway) -> None:
        """A response that breaks off is a failure, although it began with 200."""
        caller, call = await started(gateway)
        await call.stream(DELTA)
        await caller.head()
        await caller.piece()
        call.reset()
        line = await reported(gateway, call)

        assert of(line, {"status": 0, "is_success": 0}) == {"status": 200, "is_success": False}

    async def test_client_hangs_up(self, gateway: Gateway) -> None:
        """A client that has enough is no failure of the model server's."""
        caller, call = await started(gateway)
        await call.stream(DELTA)
        await caller.head()
        await caller.piece()
        await caller.hang_up()
        line = await reported(gateway, call)

        assert of(line, {"status": 0, "is_success": 0}) == {"status": 200, "is_success": True}

    @pytest.mark.parametrize("begins", [True, False], ids=["answering", "hung"])
    async def test_abandoned(self, gateway: Gateway, *, begins: bool) -> None:
        """What the model server would have made of it nobody knows: neither good nor bad."""
        before = await gateway.metrics()
        caller, call = await started(gateway, objective="chat")
        if begins:
            await call.stream(DELTA)
            await caller.head()
            await caller.piece()
        await caller.hang_up()
        await reported(gateway, call)
        after = await gateway.metrics()

        result = "good" if begins else "abandoned"
        series = f'flowcontrol_objective_responses_total{{objective="chat",result="{result}"}}'
        unmetered = 'flowcontrol_unmetered_responses_total{priority="10"}'
        assert [after[name] - before.get(name, 0) for name in (series, unmetered)] == [1, 0]
        names = [name for name in after if name.startswith("flowcontrol_endpoint_responses")]
        assert {name: after[name] - before.get(name, 0) for name in names if after[name]} == {
            name: 0 for name in names if after[name]
        }

    async def test_load_report(self, gateway: Gateway) -> None:
        """A report of load in a response's header arrives with its request."""
        report = 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4}}'
        caller, call = await started(gateway)
        await call.respond(b"{}", headers={"endpoint-load-metrics": report})
        await caller.reply()
        line = await reported(gateway, call)

        assert line["load_report"] == {"endpoint-load-metrics": report}

    async def test_same_client_id_twice(self, gateway: Gateway) -> None:
        """Requests that a client gives the same id are told apart."""
        callers = [await gateway.call(name="twice") for _ in range(2)]
        calls = [await gateway.next_call() for _ in range(2)]
        for number, call in enumerate(calls):
            usage = {"prompt_tokens": 100 + number, "completion_tokens": 1}
            await call.respond(json.dumps({"usage": usage}).encode())
        for caller in callers:
            await caller.reply()

        def lines() -> list[dict[str, Any]]:
            ids = [
                line["request_id"]
                for line in gateway.stack.events("request_decided")
                if line["client_request_id"] == "twice"
            ]
            return [
                line
                for line in gateway.stack.events("request_reported")
                if int(line["ticket"].split(".")[1]) in ids
            ]

        found = await eventually(lambda: len(lines()) == 2 and lines(), what="both reports")
        assert sorted(line["input_tokens"] for line in found) == [100, 101]
        assert {line["result"] for line in found} == {"settled"}


class TestAccounts:
    """What the service makes of it."""

    async def test_metrics(self, gateway: Gateway) -> None:
        """Tokens, bytes, statuses and times to first token are counted by priority."""
        before = await gateway.metrics()
        caller, call = await started(gateway, objective="chat")
        body = json.dumps({"usage": USAGE}).encode()
        await call.respond(body)
        await caller.reply()
        await reported(gateway, call)
        after = await gateway.metrics()

        answered = f'endpoint="{call.endpoint}",result="success"'
        expected = {
            'flowcontrol_tokens_total{kind="input",priority="10"}': 11,
            'flowcontrol_tokens_total{kind="output",priority="10"}': 7,
            'flowcontrol_tokens_total{kind="cached",priority="10"}': 3,
            'flowcontrol_body_bytes_total{direction="response",priority="10"}': len(body),
            'flowcontrol_responses_total{priority="10",status="2xx"}': 1,
            'flowcontrol_ttft_seconds_count{priority="10"}': 1,
            'flowcontrol_access_log_entries_total{result="settled"}': 1,
            f"flowcontrol_endpoint_responses_total{{{answered}}}": 1,
        }
        assert {n: after[n] - before.get(n, 0) for n in expected} == expected

    async def test_not_ours(self, gateway: Gateway) -> None:
        """Exempt and refused requests have no ticket, and Envoy does not report them."""
        before = len(gateway.stack.events("request_reported"))
        exempt, answered = await started(gateway, path="/v1/models", method="GET", body=None)
        await answered.respond()
        await exempt.reply()
        holders = [await started(gateway) for _ in range(4)]
        refused = await gateway.call(headers={"x-llm-d-inference-ttl": "1ms"})
        reply = await refused.reply()
        for caller, call in holders:
            await call.respond()
            await caller.reply()
        for _, call in holders:  # the log is in order: what came before is there, too
            await reported(gateway, call)

        assert reply.status == 429
        lines = gateway.stack.events("request_reported")[before:]
        assert [line["result"] for line in lines] == ["settled"] * 4

    async def test_reclaimed(self, start: Start) -> None:
        """What was ended in flight is settled as anything that was dispatched."""
        reclaim = {"mode": "before-first-byte"}
        gateway = await start(Spec(log_level="debug", flow_control={"reclaim": reclaim}))
        batch, call = await started(gateway, objective="batch")
        person = await gateway.call(objective="chat")
        assert (await batch.reply()).status == 429
        await (await gateway.next_call()).respond()
        await person.reply()

        assert (await reported(gateway, call))["result"] == "settled"

    async def test_logged_as_it_goes_on(self, start: Start) -> None:
        """An entry of a response that goes on settles nothing, and frees no slot."""
        gateway = await start(dataclasses.replace(SPEC, edit_envoy=log_every_50_ms))
        caller, call = await started(gateway)
        await call.stream(DELTA)
        entries = gateway.stack.access_log
        await eventually(lambda: len(entries()) > 2, what="entries of a response that goes on")
        await call.send(LAST, DONE)
        await call.end()
        await caller.head()
        await caller.rest()

        assert of(await reported(gateway, call), TOKENS) == TOKENS

    async def test_every_one_of_many(self, start: Start) -> None:
        """Of many requests at once, each is settled once, and nothing is kept of any."""
        gateway = await start(Spec(max_concurrency=50))
        (backend,) = gateway.backends
        backend.is_answering = True
        for _ in range(5):
            callers = [await gateway.call() for _ in range(100)]
            for caller in callers:
                assert (await caller.reply()).status == 200

        async def is_settled() -> bool:
            found = await gateway.metrics()
            return found['flowcontrol_access_log_entries_total{result="settled"}'] == 500

        await eventually(is_settled, what="all reports")
        found = await gateway.metrics()
        others = [n for n in found if n.startswith("flowcontrol_access_log_entries")]
        assert sum(found[name] for name in others) == 500
        assert found["flowcontrol_awaited_settlements"] == 0
        assert found["flowcontrol_lost_settlements_total"] == 0

    async def test_garbage(self, gateway: Gateway) -> None:
        """Messages and tickets that make no sense are counted and skipped, and the stream lives."""
        before = await gateway.metrics()
        async with grpc.aio.insecure_channel(str(gateway.stack.ext_proc)) as channel:
            stream = channel.stream_unary(f"/{SERVICE}/StreamAccessLogs")()  # type: ignore[call-arg]  # as documented
            for message in (b"\xff\xff", b"", b"garbage"):
                await stream.write(message)
            await stream.done_writing()
            assert await stream == b""
        after = await gateway.metrics()

        name = 'flowcontrol_access_log_entries_total{result="malformed"}'
        assert after[name] - before[name] == 2  # b"" is a message without entries
        assert after["flowcontrol_access_log_streams"] == before["flowcontrol_access_log_streams"]


class TestLoss:
    """The log is a help, not a need."""

    async def test_never_settled(self, start: Start) -> None:
        """A request that Envoy does not report is counted as lost, and nothing waits for it."""
        gateway = await start(SPEC)
        caller, call = await started(gateway)
        await call.respond()
        await caller.reply()
        await reported(gateway, call)  # there is a log
        request = envoy_messages.ProcessingRequest()
        request.request_headers.SetInParent()
        async with grpc.aio.insecure_channel(str(gateway.stack.grpc)) as channel:
            process = channel.stream_stream(f"/{codec.SERVICE}/Process")()  # type: ignore[call-arg]  # as documented
            await process.write(request.SerializeToString())
            await process.read()
            await process.done_writing()

        async def is_lost() -> bool:
            return await gateway.metric("flowcontrol_lost_settlements_total") == 1

        await eventually(is_lost, what="the loss to be counted")
        assert await gateway.metric("flowcontrol_awaited_settlements") == 0

    async def test_service_restarts(self, start: Start) -> None:
        """What another life of the service let go is foreign to this one; the log comes back."""
        gateway = await start(SPEC)
        caller, call = await started(gateway)
        await call.stream(DELTA)
        await caller.head()
        await caller.piece()
        gateway.stack.service.send_signal(15)
        await gateway.stack.service.exited()
        await gateway.stack.start_service()
        await call.send(LAST)
        await call.end()
        await caller.rest()

        async def is_foreign() -> bool:
            found = await gateway.metrics()
            return found['flowcontrol_access_log_entries_total{result="foreign"}'] == 1

        await eventually(is_foreign, what="the entry of the former life")
        following, answered = await started(gateway)
        await answered.respond(json.dumps({"usage": USAGE}).encode())
        await following.reply()

        assert of(await reported(gateway, answered), TOKENS) == TOKENS

"""The simulated model server over HTTP: answers, usage, refusals, failures, aborts and metrics."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from flowcontrol.errors import ListenError
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol_server.tools.model_server import model_application, run

Client = TestClient[web.Request, web.Application]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
FAIL = "/control/fail"
HELLO = {"messages": [{"role": "user", "content": "Hello, how are you?"}]}
FAST = ModelServerConfig(step_base_ns=1, sequence_ns=0, prefill_token_ns=0, context_token_ns=0)
ENDLESS = replace(FAST, sequences_max=1, kv_tokens=10**9, step_base_ns=1_000_000)
ENDLESS_TOKENS = 10**8  # 28 hours at 1 ms each.


@contextlib.asynccontextmanager
async def serving(config: ModelServerConfig) -> AsyncIterator[Client]:
    """A client of a server of that size and speed."""
    async with TestClient(TestServer(model_application("demo", config))) as client:
        yield client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """A client of a server whose steps take a nanosecond."""
    async with serving(FAST) as client:
        yield client


async def post(client: Client, path: str, body: object) -> dict[str, object]:
    """The JSON of an answer that must be 200."""
    async with client.post(path, json=body) as response:
        assert response.status == 200
        answer = await response.json()
        assert isinstance(answer, dict)
        return answer


async def stream(client: Client, path: str, body: dict[str, object]) -> list[str]:
    """The data of a stream's events."""
    async with client.post(path, json=body | {"stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        text = await response.text()
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


async def refusal(response: aiohttp.ClientResponse) -> tuple[int, str, str]:
    """Status, type and message of an error, which has OpenAI's shape."""
    body = await response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status
    return response.status, error["type"], error["message"]


async def metrics(client: Client) -> dict[str, float]:
    """The samples of GET /metrics, with the model's label checked and removed."""
    async with client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    samples = [line.split(" ") for line in lines if not line.startswith(("#", "vllm:cache_config"))]
    assert all(name.endswith('{model_name="demo"}') for name, _ in samples)
    return {name.removesuffix('{model_name="demo"}'): float(value) for name, value in samples}


async def until_waiting(client: Client, count: int) -> None:
    """Return when so many requests wait."""
    while (await metrics(client))["vllm:num_requests_waiting"] != count:
        pass


class TestAnswers:
    """OpenAI's two APIs."""

    async def test_chat(self, client: Client) -> None:
        """19 characters are 4 tokens; each word is one."""
        answer = await post(client, CHAT, HELLO | {"max_tokens": 3})
        assert str(answer.pop("id")).startswith("chatcmpl-")
        assert isinstance(answer.pop("created"), int)
        assert answer == {
            "object": "chat.completion",
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "This answer is "},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
            "usage": {
                "prompt_tokens": 4,
                "completion_tokens": 3,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    @pytest.mark.parametrize(
        ("path", "body", "prompt_tokens"),
        [
            (TEXT, {"prompt": ""}, 1),
            (TEXT, {"prompt": "x" * 40}, 10),
            (TEXT, {"prompt": [1, 2, 3]}, 3),
            (CHAT, {"messages": [{"role": "user"}]}, 1),
            (CHAT, {"messages": [{"content": None}, {"content": "12345678"}]}, 2),
            (CHAT, {"messages": [{"content": "12"}, {"content": "3456789"}]}, 2),
            (CHAT, {"messages": [{"content": [{"type": "text", "text": "x" * 80}]}]}, 20),
            (CHAT, {"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}, 1),
        ],
    )
    async def test_prompt_tokens(
        self, client: Client, path: str, body: dict[str, object], prompt_tokens: int
    ) -> None:
        """Four characters a token over all text, at least one; token ids count themselves."""
        answer = await post(client, path, body | {"max_tokens": 1})
        usage = answer["usage"]
        assert isinstance(usage, dict)
        assert usage["prompt_tokens"] == prompt_tokens

    @pytest.mark.parametrize(
        ("limits", "output_tokens"),
        [
            ({}, 64),
            ({"max_tokens": 5}, 5),
            ({"max_completion_tokens": 6}, 6),
            ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
            ({"max_tokens": None}, 64),
        ],
    )
    async def test_output_tokens(
        self, client: Client, limits: dict[str, object], output_tokens: int
    ) -> None:
        """Answers have the asked length, 64 if none is asked."""
        events = await stream(client, CHAT, HELLO | limits)
        assert len(events) == output_tokens + 1

    async def test_request_id_names_the_answer(self, client: Client) -> None:
        """As vLLM does, so that a gateway's id can be found again."""
        headers = {"X-Request-Id": 'a"b'}
        async with client.post(CHAT, json=HELLO | {"max_tokens": 1}, headers=headers) as response:
            assert (await response.json())["id"] == 'chatcmpl-a"b'

    async def test_health_and_models(self, client: Client) -> None:
        """What probes and clients ask first."""
        async with client.get("/health") as response:
            assert (response.status, await response.text()) == (200, "")
        async with client.get("/v1/models") as response:
            models = await response.json()
        assert (models["object"], models["data"][0]["id"]) == ("list", "demo")


class TestStreams:
    """Server-sent events, one per token."""

    async def test_chat(self, client: Client) -> None:
        """The role comes first, the reason to finish last, then [DONE]."""
        *chunks, done = await stream(client, CHAT, HELLO | {"max_tokens": 3})
        parsed = [json.loads(chunk) for chunk in chunks]
        assert done == "[DONE]"
        assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in parsed] == [
            ({"role": "assistant", "content": "This "}, None),
            ({"content": "answer "}, None),
            ({"content": "is "}, "length"),
        ]
        assert {(c["object"], c["model"]) for c in parsed} == {("chat.completion.chunk", "demo")}
        assert len({c["id"] for c in parsed}) == 1
        assert all("usage" not in c for c in parsed)

    async def test_text(self, client: Client) -> None:
        """A stream says the same as a whole answer."""
        body: dict[str, object] = {"prompt": "x", "max_tokens": 40}
        whole = await post(client, TEXT, body)
        assert str(whole["id"]).startswith("cmpl-")
        assert whole["object"] == "text_completion"
        *chunks, _ = await stream(client, TEXT, body)
        text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        assert whole["choices"] == [choice]

    async def test_include_usage(self, client: Client) -> None:
        """One more chunk without choices has the usage; in all others it is null."""
        body = HELLO | {"max_tokens": 2, "stream_options": {"include_usage": True}}
        *chunks, last, _ = await stream(client, CHAT, body)
        assert [json.loads(chunk)["usage"] for chunk in chunks] == [None, None]
        assert json.loads(last)["choices"] == []
        usage = json.loads(last)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 2)

    async def test_one_token(self, client: Client) -> None:
        """The first is the last."""
        chunk, done = await stream(client, CHAT, HELLO | {"max_tokens": 1})
        choice = json.loads(chunk)["choices"][0]
        assert choice["delta"] == {"role": "assistant", "content": "This "}
        assert (choice["finish_reason"], done) == ("length", "[DONE]")


class TestRefusals:
    """HTTP errors have OpenAI's shape and say what is wrong."""

    @pytest.mark.parametrize(
        ("path", "body", "message"),
        [
            (CHAT, "{", "body must be JSON, got b'{'"),
            (CHAT, "[]", "body must be an object, got []"),
            (CHAT, "{}", "messages must be present, got {}"),
            (CHAT, '{"messages": []}', "messages must be not empty, got []"),
            (TEXT, '{"prompt": "", "max_tokens": 0}', "max_tokens must be greater than 0, got 0"),
            (TEXT, '{"prompt": "", "n": 2}', "n must be 1, got 2"),
            (TEXT, '{"prompt": "", "stream": 1}', "stream must be a valid boolean, got 1"),
            (
                TEXT,
                '{"prompt": "", "max_tokens": 32768}',
                "prompt_tokens + output_tokens must be <= kv_tokens (32768), got 32769",
            ),
            (FAIL, '{"mode": ""}', "mode must be 'none', 'status', 'reset' or 'hang', got ''"),
            (
                FAIL,
                '{"mode": "hang", "count": 0, "for": 3}',
                "count must be greater than or equal to 1, got 0; for must be absent, got 3",
            ),
            (
                FAIL,
                '{"mode": "status", "status": 200}',
                "status must be greater than or equal to 400, got 200",
            ),
        ],
    )
    async def test_bad_body(self, client: Client, path: str, body: str, message: str) -> None:
        """400 with every problem; nothing was submitted."""
        async with client.post(path, data=body) as response:
            assert await refusal(response) == (400, "invalid_request_error", message)
        assert set((await metrics(client)).values()) == {0.0}

    async def test_unknown_path_and_method(self, client: Client) -> None:
        """Errors of the router have the same shape."""
        async with client.get("/v2/models") as response:
            assert (await refusal(response))[:2] == (404, "invalid_request_error")
        async with client.get(CHAT) as response:
            assert (await refusal(response))[:2] == (405, "invalid_request_error")


class TestFailures:
    """Failures on command."""

    async def test_status(self, client: Client) -> None:
        """The next two requests fail with that status, the third does not."""
        order = {"mode": "status", "status": 502, "count": 2}
        assert await post(client, FAIL, order) == order
        for path, body in ((CHAT, HELLO), (TEXT, {"prompt": "x"})):
            async with client.post(path, json=body) as response:
                assert await refusal(response) == (502, "server_error", "failed on command")
        await post(client, CHAT, HELLO)

    async def test_once_by_default_with_503(self, client: Client) -> None:
        """An order without numbers is for one request."""
        await post(client, FAIL, {"mode": "status"})
        async with client.post(CHAT, json=HELLO) as response:
            assert response.status == 503
        await post(client, CHAT, HELLO)

    async def test_until_changed(self, client: Client) -> None:
        """Null lasts until another order."""
        await post(client, FAIL, {"mode": "status", "count": None})
        for _ in range(5):
            async with client.post(CHAT, json=HELLO) as response:
                assert response.status == 503
        await post(client, FAIL, {"mode": "none"})
        await post(client, CHAT, HELLO)

    async def test_reset_of_a_stream(self, client: Client) -> None:
        """The first token arrives, then the connection breaks; the job is aborted."""
        await post(client, FAIL, {"mode": "reset"})
        async with client.post(CHAT, json=HELLO | {"stream": True}) as response:
            assert b'"content":"This "' in await response.content.readline()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        await post(client, CHAT, HELLO)
        assert (await metrics(client))["vllm:num_requests_running"] == 0

    @pytest.mark.parametrize("max_tokens", [1, 64])
    async def test_reset_of_a_whole_answer(self, client: Client, max_tokens: int) -> None:
        """The connection breaks before the headers, even when the first token is the last."""
        await post(client, FAIL, {"mode": "reset"})
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await client.post(CHAT, json=HELLO | {"max_tokens": max_tokens})
        await post(client, CHAT, HELLO)

    async def test_hang(self, client: Client) -> None:
        """Of two requests one is answered and one is not."""
        await post(client, FAIL, {"mode": "hang"})
        requests = {asyncio.create_task(post(client, CHAT, HELLO)) for _ in range(2)}
        done, hanging = await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(hanging)) == (1, 1)
        await post(client, CHAT, HELLO)
        for task in hanging:
            assert not task.done()
            task.cancel()
        await asyncio.wait(hanging)


class TestDisconnects:
    """A client that leaves frees its place at once."""

    async def test_running_and_waiting(self, caplog: pytest.LogCaptureFixture) -> None:
        """The one place is held for 28 hours, and the queue before us too, until both leave."""
        async with serving(ENDLESS) as client:
            endless = HELLO | {"stream": True, "max_tokens": ENDLESS_TOKENS}
            running = await client.post(CHAT, json=endless)
            waiting = await client.post(CHAT, json=endless)
            await running.content.readline()
            values = await metrics(client)
            assert values["vllm:num_requests_running"] == 1
            assert values["vllm:num_requests_waiting"] == 1
            mine = asyncio.create_task(post(client, TEXT, {"prompt": "x" * 8, "max_tokens": 1}))
            await until_waiting(client, 2)
            waiting.close()
            await until_waiting(client, 1)  # else the running job might go first, and it begin
            running.close()
            await mine
            values = await metrics(client)
            assert values["vllm:num_requests_running"] == 0
            assert values["vllm:num_requests_waiting"] == 0
            # The waiting job never began: 4 prompt tokens of the running one, 2 of ours.
            assert values["vllm:prompt_tokens_total"] == 6
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    async def test_whole_answer(self) -> None:
        """It holds for answers that are not streamed, which have written nothing yet."""
        async with serving(ENDLESS) as client:
            endless = HELLO | {"max_tokens": ENDLESS_TOKENS}
            gone = asyncio.create_task(post(client, CHAT, endless))
            while (await metrics(client))["vllm:num_requests_running"] == 0:
                pass
            gone.cancel()
            await asyncio.wait({gone})
            await post(client, CHAT, HELLO | {"max_tokens": 1})


class TestMetrics:
    """Names and values of vLLM."""

    async def test_values(self, client: Client) -> None:
        """Totals count what was answered; nothing runs or waits afterwards."""
        await post(client, TEXT, {"prompt": "x" * 40, "max_tokens": 7})
        await stream(client, CHAT, HELLO | {"max_tokens": 5})
        assert await metrics(client) == {
            "vllm:num_requests_running": 0,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0,
            "vllm:prompt_tokens_total": 14,
            "vllm:generation_tokens_total": 12,
            "vllm:num_preemptions_total": 0,
        }


class TestRun:
    """The process around it."""

    def test_port_in_use(self) -> None:
        """One line says which address, and why."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ListenError) as caught:
                run("127.0.0.1", port, "demo", FAST)

        assert str(caught.value) == f"cannot listen on 127.0.0.1:{port}: in use by another process"

    @pytest.mark.slow
    @pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
    async def test_signal(self, signal_number: signal.Signals) -> None:
        """SIGTERM and SIGINT end it with 0, an answer under way included."""
        code = (
            "from flowcontrol_server.tools.model_server import *;"
            "from flowcontrol.simulation.model_server import *;"
            "run('127.0.0.1', 0, 'demo', ModelServerConfig())"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert "model_server_listening" in line
        port = int(line.rpartition("port=")[2])
        async with aiohttp.ClientSession() as session:
            body = HELLO | {"stream": True, "max_tokens": 10_000}
            async with session.post(f"http://127.0.0.1:{port}{CHAT}", json=body) as response:
                await response.content.readline()
                process.send_signal(signal_number)
                assert await process.wait() == 0

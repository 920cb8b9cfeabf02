"""Every refusal as OpenAI's own Python client sees it."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest

from flowcontrol.v1 import flowcontrol_pb2 as api
from tests.e2e.backend import Call
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway, unique
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

LIMITED, LIMITED_PRIORITY = "limited", 50
REASON = "x-llm-d-request-dropped-reason"
COMPLETION = b"""{"id": "c", "object": "chat.completion", "created": 1, "model": "llama",
 "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant",
 "content": "Hello"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}"""
CHUNK = b"""data: {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "llama", \
"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\n"""


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot; two may wait, and only one of them in the band of LIMITED."""
    band = {"match": {"minPriority": LIMITED_PRIORITY}, "maxRequests": 1}
    return Spec(flow_control={"maxRequests": 2, "bands": [band]})


@contextlib.asynccontextmanager
async def client_of(gateway: Gateway, retries: int = 0) -> AsyncIterator["Client"]:
    """OpenAI's client, told of nothing but the gateway's address."""
    told: list[tuple[float, int]] = []

    async def note(response: httpx2.Response) -> None:
        if "retry-after" in response.headers:
            now_s = asyncio.get_running_loop().time()
            told.append((now_s, int(response.headers["retry-after"])))

    async with openai.AsyncOpenAI(
        base_url=f"http://{gateway.stack.gateway}/v1",
        api_key="none",
        max_retries=retries,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]}),
    ) as client:
        yield Client(client, told)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator["Client"]:
    """A client that does not try again by itself."""
    async with client_of(gateway) as client:
        yield client


class Client:
    """Asks for chat completions.

    Args:
        client: OpenAI's.
        told: every Retry-After it has been told, and when.
    """

    def __init__(self, client: openai.AsyncOpenAI, told: list[tuple[float, int]]) -> None:
        self.told = told
        self._client = client

    async def ask(
        self, *, objective: str = "", ttl: str = "", name: str = ""
    ) -> openai.types.chat.ChatCompletion:
        """Return a completion."""
        headers = {"x-request-id": name or unique()}
        if objective:
            headers["x-llm-d-inference-objective"] = objective
        if ttl:
            headers["x-llm-d-inference-ttl"] = ttl
        return await self._client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": "Hi"}], extra_headers=headers
        )

    async def ask_for_stream(self) -> list[str | None]:
        """Return the pieces of a streamed completion."""
        stream = await self._client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        return [chunk.choices[0].delta.content async for chunk in stream]


class Asking:
    """A request under way, whose refusal is wanted."""

    def __init__(self, client: Client, **options: str) -> None:
        self.task = asyncio.ensure_future(client.ask(**options))

    async def refused(self) -> openai.APIStatusError:
        """Return the refusal."""
        with pytest.raises(openai.APIStatusError) as caught:
            await self.task
        return caught.value


def told(error: openai.APIStatusError) -> tuple[int, str, str | None, str | None]:
    """Return what a refusal says: status, reason, type and code, the last two from its body."""
    return error.status_code, error.response.headers[REASON], error.type, error.code


@pytest.fixture
async def limited(gateway: Gateway) -> AsyncIterator[str]:
    """An objective whose band is new, and has therefore no history of how fast it drains."""

    def is_known(snapshot: api.Snapshot) -> bool:
        return LIMITED in {objective.name for objective in snapshot.objectives}

    gateway.stack.declare(LIMITED, LIMITED_PRIORITY)
    await gateway.until_so(is_known)
    yield LIMITED
    gateway.stack.remove_manifest(f"{LIMITED}.yaml")
    await gateway.until_so(lambda snapshot: not is_known(snapshot))


async def fill(gateway: Gateway, objective: str) -> Call:
    """Fill the slot and the band: one request is dispatched there, and one waits."""
    await gateway.call(objective=objective)
    occupying = await gateway.next_call()
    await gateway.call(objective=objective)
    await gateway.until(waiting=1)
    return occupying


async def serve_all(call: Call, gateway: Gateway, count: int) -> None:
    """Answer the call, and so many that follow."""
    await call.respond()
    for _ in range(count):
        await (await gateway.next_call()).respond()


class TestServed:
    """What is not refused."""

    async def test_completion(self, gateway: Gateway, client: Client) -> None:
        """A completion comes through as the model server made it."""
        asking = asyncio.ensure_future(client.ask())
        call = await gateway.next_call()
        await call.respond(COMPLETION)

        assert (await asking).choices[0].message.content == "Hello"

    async def test_stream(self, gateway: Gateway, client: Client) -> None:
        """So does a stream."""
        asking = asyncio.ensure_future(client.ask_for_stream())
        call = await gateway.next_call()
        await call.stream(CHUNK, CHUNK, b"data: [DONE]\n\n")
        await call.end()

        assert await asking == ["Hello", "Hello"]


class TestRateLimit:
    """429: there is capacity, but others hold it."""

    async def test_queue_is_full(self, gateway: Gateway, client: Client, limited: str) -> None:
        """The second to wait where one may is refused at once, and told when to come back.

        The band has dispatched one request within a second or so: the next room is that far away.
        """
        occupying = await fill(gateway, limited)
        error = await Asking(client, objective=limited).refused()
        await serve_all(occupying, gateway, 1)

        assert isinstance(error, openai.RateLimitError)
        expected = (429, "rejected-saturated", "rate_limit_error", "rejected-saturated")
        assert expected == told(error)
        assert error.response.headers["content-type"] == "application/json"
        assert 1 <= int(error.response.headers["retry-after"]) <= 5
        assert isinstance(error.body, dict)
        assert {"message", "type", "param", "code"} == error.body.keys()

    async def test_waited_too_long(self, gateway: Gateway, client: Client) -> None:
        """Who has waited as long as it was willing to is refused at that moment, not later."""
        _, occupying = await gateway.occupy()
        error = await Asking(client, ttl="300ms", name="expiring").refused()
        line = await gateway.decided("expiring")
        await occupying.respond()

        assert isinstance(error, openai.RateLimitError)
        expected = (429, "rejected-ttl-expired", "rate_limit_error", "rejected-ttl-expired")
        assert expected == told(error)
        assert "retry-after" not in error.response.headers
        assert 300 <= line["waited_ms"] < 400
        assert line["outcome"] == "evicted-ttl"

    async def test_spent_ttl_is_not_tried_again(self, gateway: Gateway) -> None:
        """Although it may retry, the client does not park the request a second time."""
        caller, occupying = await gateway.occupy()
        async with client_of(gateway, retries=2) as client:
            error = await Asking(client, ttl="1s", name="spent").refused()
        await gateway.decided("spent")
        decided = [
            line["outcome"]
            for line in gateway.stack.events("request_decided")
            if line["client_request_id"] == "spent"
        ]
        await occupying.respond()
        await caller.reply()

        assert decided == ["evicted-ttl"]
        assert error.response.headers["x-should-retry"] == "false"
        assert error.response.headers["x-llm-d-flow-limit"] == "ttl"

    async def test_displaced(self, gateway: Gateway, client: Client) -> None:
        """The newest of the lowest band makes room when a better request finds the queue full."""
        _, occupying = await gateway.occupy()
        await gateway.call(objective="batch", name="older")
        await gateway.until(waiting=1)
        newest = Asking(client, objective="batch", name="newest")
        await gateway.until(waiting=2)
        await gateway.call(objective="chat", name="better")
        error = await newest.refused()
        await occupying.respond()
        served = []
        for _ in range(2):
            call = await gateway.next_call()
            served.append(call.name)
            await call.respond()

        assert isinstance(error, openai.RateLimitError)
        expected = (429, "evicted-priority", "rate_limit_error", "evicted-priority")
        assert expected == told(error)
        assert 1 <= int(error.response.headers["retry-after"]) <= 30
        assert served == ["better", "older"]

    async def test_retry_after_is_honoured(self, gateway: Gateway, limited: str) -> None:
        """A client that tries again comes back no sooner than it was told to, and is served."""
        occupying = await fill(gateway, limited)
        async with client_of(gateway, retries=1) as client:
            asking = asyncio.ensure_future(client.ask(objective=limited, name="returning"))
            line = await gateway.decided("returning")
            await serve_all(occupying, gateway, 1)
            call = await gateway.next_call()
            await call.respond(COMPLETION)
            completion = await asking
        told_s, wait_s = client.told[0]

        assert (line["outcome"], line["http_status"]) == ("rejected-capacity", 429)
        assert call.name == "returning"
        assert wait_s >= 1
        assert call.arrived_s - told_s >= wait_s
        assert len(client.told) == 1
        assert completion.choices[0].message.content == "Hello"


class TestUnavailable:
    """503: there is no capacity at all."""

    async def test_pool_stays_empty(self, start: Start) -> None:
        """Who has waited in vain for a model server to appear is told that there is none."""
        empty = Spec(is_pool_empty=True, flow_control={"maxRequests": 1, "noEndpointTTL": "500ms"})
        gateway = await start(empty)
        async with client_of(gateway) as client:
            first = Asking(client, name="first")
            await gateway.until(waiting=1)
            second = await Asking(client, name="second").refused()
            error = await first.refused()
        outcomes = await gateway.outcomes("first", "second")
        line = await gateway.decided("first")

        assert isinstance(error, openai.InternalServerError)
        expected = (503, "rejected-no-endpoints", "server_error", "rejected-no-endpoints")
        assert expected == told(error) == told(second)
        assert outcomes == ["evicted-no-endpoints", "rejected-no-endpoints"]
        assert 500 <= line["waited_ms"] < 600

    async def test_shutting_down(self, start: Start) -> None:
        """While the service drains, new and waiting requests are sent to another replica."""
        gateway = await start(Spec(flow_control={"drainBudget": "1s"}))
        occupant, occupying = await gateway.occupy()
        async with client_of(gateway) as client:
            waiting = Asking(client, name="waiting")
            await gateway.until(waiting=1)
            gateway.stack.service.send_signal(signal.SIGTERM)
            await gateway.until_so(lambda snapshot: snapshot.draining)
            arriving = await Asking(client, name="arriving").refused()
            evicted = await waiting.refused()
        outcomes = await gateway.outcomes("waiting", "arriving")
        await occupying.respond()
        await occupant.reply()

        assert isinstance(evicted, openai.InternalServerError)
        expected = (503, "rejected-shutting-down", "server_error", "rejected-shutting-down")
        assert expected == told(evicted) == told(arriving)
        assert 1 <= int(evicted.response.headers["retry-after"]) <= 2
        assert outcomes == ["evicted-drained", "rejected-draining"]

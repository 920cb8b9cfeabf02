"""Refusals as Anthropic's own Python client, a gRPC client and an Ollama client see them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import grpc
import pytest

from tests.e2e.gateway import Gateway, unique
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

REASON = "x-llm-d-request-dropped-reason"
TIMEOUT_S = 20.0
MESSAGE = b"""{"id": "m", "type": "message", "role": "assistant", "model": "llama",
 "content": [{"type": "text", "text": "Hello"}], "stop_reason": "end_turn",
 "usage": {"input_tokens": 1, "output_tokens": 1}}"""


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot; nobody may wait for it."""
    return Spec(flow_control={"maxRequests": 0})


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client, told of nothing but the gateway's address."""
    address = f"http://{gateway.stack.gateway}"
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


async def ask(client: anthropic.AsyncAnthropic) -> Any:
    """Ask for a message."""
    return await client.messages.create(
        model="llama",
        max_tokens=10,
        messages=[{"role": "user", "content": "Hi"}],
        extra_headers={"x-request-id": unique()},
    )


class TestAnthropic:
    """Anthropic's client."""

    async def test_answer(self, gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
        """What the model server says comes through."""
        asking = asyncio.ensure_future(ask(client))
        await (await gateway.next_call()).respond(MESSAGE)
        message = await asking

        assert message.content[0].text == "Hello"

    async def test_refusal(self, gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
        """It raises its own exception, and finds its own error in the body."""
        _, occupying = await gateway.occupy()
        with pytest.raises(anthropic.RateLimitError) as caught:
            await ask(client)
        await occupying.respond()

        error: Any = caught.value
        assert error.status_code == 429
        assert error.response.headers[REASON] == "rejected-saturated"
        assert error.type == "rate_limit_error"
        expected = (
            "rejected-saturated: the queue for this request is full (band 0, limit reached: all)"
        )
        assert error.body == {
            "type": "error",
            "error": {"type": "rate_limit_error", "message": expected},
        }


class TestGrpc:
    """A gRPC client, of KServe's or Triton's protocol say."""

    @staticmethod
    async def _refused(gateway: Gateway) -> grpc.aio.AioRpcError:
        """Return the error of a call that finds the queue full."""
        _, occupying = await gateway.occupy()
        async with grpc.aio.insecure_channel(str(gateway.stack.gateway)) as channel:
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # type: ignore[call-arg]  # bytes to bytes
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", timeout=TIMEOUT_S)
        await occupying.respond()
        return caught.value

    async def test_refusal(self, gateway: Gateway) -> None:
        """It gets a status, with the reason as its message."""
        error = await self._refused(gateway)

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (
            error.details()
            == "rejected-saturated: the queue for this request is full (band 0, limit reached: all)"
        )

    async def test_when_to_come_back(self, gateway: Gateway) -> None:
        """Its own retries wait for that: they read no Retry-After, and would come at once."""
        said: Any = (await self._refused(gateway)).trailing_metadata()
        seconds = int(said["retry-after"])

        assert 1 <= seconds <= 30
        assert said["grpc-retry-pushback-ms"] == str(1000 * seconds)

    async def test_watched_health(self, gateway: Gateway) -> None:
        """A client that watches its server's health has its stream all day: it takes no slot."""
        headers = {"content-type": "application/grpc", "te": "trailers"}
        await gateway.call("/grpc.health.v1.Health/Watch", headers=headers)
        watching = await gateway.next_call()
        caller, serving = await gateway.occupy()
        await serving.respond()
        reply = await caller.reply()
        await watching.respond()

        assert reply.status == 200


class TestKserve:
    """A client of KServe's protocol over HTTP, as Triton's."""

    @pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/models/llama/ready"])
    async def test_health(self, gateway: Gateway, path: str) -> None:
        """A server is not dead because its queue is full."""
        occupant, occupying = await gateway.occupy()
        caller = await gateway.call(path, method="GET", body=None)
        await (await gateway.next_call()).respond()
        reply = await caller.reply()
        await occupying.respond()
        await occupant.reply()

        assert reply.status == 200


class TestPlain:
    """Clients that read a text under `error`, as Ollama's does."""

    async def test_refusal(self, gateway: Gateway) -> None:
        """They find it."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call("/api/chat")
        reply = await caller.reply()
        await occupying.respond()

        assert reply.status == 429
        expected = (
            "rejected-saturated: the queue for this request is full (band 0, limit reached: all)"
        )
        assert json.loads(reply.body) == {"error": expected}

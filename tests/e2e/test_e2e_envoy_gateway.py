"""Behind Envoy Gateway: what it made of `envoy-config --envoy-gateway`, on a real Envoy."""

import signal
from dataclasses import replace
from typing import Any

import pytest

from flowcontrol_server.requests.replies import UNREACHABLE
from tests.e2e.conftest import Start
from tests.e2e.envoy_gateway import UNGATED, envoy_gateway
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e

REASON = "x-llm-d-request-dropped-reason"
EVENTS = [b'data: {"token": "%d"}\n\n' % number for number in range(20)]
SPEC = Spec(picker="least-loaded", edit_envoy=envoy_gateway)


def try_once(configuration: dict[str, Any]) -> None:
    """The translation, but without 20 s of further tries at a service that is gone."""
    envoy_gateway(configuration)
    manager = configuration["static_resources"]["listeners"][0]["defaultFilterChain"]["filters"][-1]
    (ext_proc,) = (
        each["typedConfig"]
        for each in manager["typedConfig"]["httpFilters"]
        if "ext_proc" in each["name"]
    )
    ext_proc["grpcService"]["retryPolicy"]["numRetries"] = 1


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot."""
    return SPEC


async def test_waits_its_turn(gateway: Gateway) -> None:
    """A request waits for the slot, and its answer says how long."""
    _, occupying = await gateway.occupy()
    caller = await gateway.call()
    await gateway.until(waiting=1)
    await occupying.respond()
    call = await gateway.next_call()
    await call.stream(*EVENTS)
    await call.end()
    status = await caller.head()

    assert await caller.rest() == b"".join(EVENTS)
    assert status == 200
    assert float(caller.headers["x-llm-d-flow-queue-duration-ms"]) >= 0
    assert "x-llm-d-inference-ttl" not in call.headers


async def test_refused(gateway: Gateway) -> None:
    """A wait that is too long ends with the reason."""
    _, occupying = await gateway.occupy()
    caller = await gateway.call(headers={"x-llm-d-inference-ttl": "200ms"})
    reply = await caller.reply()
    await occupying.respond()

    assert (reply.status, reply.headers[REASON]) == (429, "rejected-ttl-expired")


async def test_leaves_with_a_large_body(gateway: Gateway) -> None:
    """A client that leaves gives up its place, whatever it still had to send."""
    _, occupying = await gateway.occupy()
    caller = await gateway.call(body=b"x" * 2_000_000)
    await gateway.until(waiting=1)
    caller.reset()
    await gateway.until(waiting=0)
    await occupying.respond()


async def test_other_routes(gateway: Gateway) -> None:
    """A route without the policy is not gated, although the slot is taken."""
    _, occupying = await gateway.occupy()
    caller = await gateway.call(f"{UNGATED}/v1/models", method="GET", body=None)
    await (await gateway.next_call()).respond(b"{}")

    assert (await caller.reply()).status == 200
    await occupying.respond()


async def test_settled(gateway: Gateway) -> None:
    """The access log reports what a request took."""
    name = 'flowcontrol_tokens_total{kind="output",priority="0"}'
    before = (await gateway.metrics()).get(name, 0)
    caller = await gateway.call()
    call = await gateway.next_call()
    await call.respond(b'{"usage": {"prompt_tokens": 11, "completion_tokens": 7}}')
    await caller.reply()

    async def is_counted() -> bool:
        return (await gateway.metrics()).get(name, 0) == before + 7

    await eventually(is_counted, what="its tokens in the metrics")


async def test_without_the_gate(start: Start) -> None:
    """When the service is killed, an answer goes on and no new request passes."""
    gateway = await start(replace(SPEC, edit_envoy=try_once))
    caller = await gateway.call()
    call = await gateway.next_call()
    await call.stream(EVENTS[0])
    await caller.head()
    gateway.stack.service.send_signal(signal.SIGKILL)
    await gateway.stack.service.exited()
    refused = await (await gateway.call()).reply()
    await call.send(EVENTS[1])
    await call.end()

    assert await caller.rest() == EVENTS[0] + EVENTS[1]
    assert (refused.status, refused.headers[REASON]) == (503, UNREACHABLE.reason)

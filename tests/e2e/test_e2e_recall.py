"""Requests that are taken back while their bodies stream through the endpoint picker.

Whatever the phase, either both bodies come through byte for byte, or the client is told.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from flowcontrol_server.requests.replies import UNREACHABLE
from tests.e2e.client import Caller
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.gateway_shapes import SHAPES, Shape, ai_gateway_buffered, istio
from tests.e2e.harness import Spec, eventually
from tests.e2e.replicas import Replicas
from tests.support.valkey_server import BINARY

pytestmark = pytest.mark.e2e

REASON = "x-llm-d-request-dropped-reason"
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(20)]
BODY = b"".join(b"%08x" % number for number in range(40_000))
"""320 KB: more than the window of a parked request, of which no two stretches are alike."""
ANNOUNCED = {"content-length": str(len(BODY))}
TLS = {"tls": {"selfSigned": True}}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.__name__)
def spec(request: pytest.FixtureRequest) -> Spec:
    """One slot behind each gateway's wiring, which a person may take from a batch request."""
    return Spec(
        picker="least-loaded",
        edit_envoy=request.param,
        flow_control={"reclaim": {"mode": "any-time"}},
        settings=TLS,
    )


class TestParked:
    """A request that waits is taken back by an operator."""

    @pytest.mark.parametrize("sent", [0, 1000, len(BODY)])
    async def test_evicted(self, gateway: Gateway, sent: int) -> None:
        """Its client is told, before the body has come, in the midst of it and behind it."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call(headers=ANNOUNCED, body=None, flow_id="evicted")
        await caller.send(BODY[:sent])
        await gateway.until(waiting=1)
        evicted = await gateway.evict("evicted")
        reply = await caller.reply()
        await occupying.respond()
        await gateway.until(in_flight=0, within_s=FREED_S)

        assert evicted == 1
        assert (reply.status, reply.headers[REASON]) == (429, "evicted-operator")
        assert gateway.arrived.empty()


class TestInFlight:
    """A request of a batch is ended for a person."""

    async def test_body_under_way(self, gateway: Gateway) -> None:
        """The batch client is told in the midst of its upload; the person is served."""
        batch = await gateway.call(objective="batch", name="batch", headers=ANNOUNCED, body=None)
        await batch.send(BODY[:100_000])
        await gateway.until(in_flight=1)
        person = await gateway.call(objective="chat", body=BODY)
        reply = await batch.reply()
        call = await gateway.next_call()
        await call.respond(BODY[::-1])
        answer = await person.reply()

        assert (reply.status, reply.headers[REASON]) == (429, "evicted")
        assert call.body == BODY
        assert answer.body == BODY[::-1]

    async def test_body_whole(self, gateway: Gateway) -> None:
        """The batch client is told while it waits for its response; the model server stops."""
        batch = await gateway.call(objective="batch", body=BODY)
        call = await gateway.next_call()
        person = await gateway.call(objective="chat")
        reply = await batch.reply()
        await (await gateway.next_call()).respond()

        assert call.body == BODY
        assert (reply.status, reply.headers[REASON]) == (429, "evicted")
        assert (await person.reply()).status == 200
        await asyncio.wait_for(call.gone.wait(), FREED_S)

    async def test_in_response(self, gateway: Gateway) -> None:
        """The batch client sees that its response breaks off, and got what was sent until then."""
        batch = await gateway.call(objective="batch", body=BODY)
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        status, piece = await batch.head(), await batch.piece()
        person = await gateway.call(objective="chat")
        await (await gateway.next_call()).respond()

        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await batch.rest()
        assert (status, piece) == (200, EVENTS[0])
        assert (await person.reply()).status == 200
        await asyncio.wait_for(call.gone.wait(), FREED_S)


async def lose_the_lease(replicas: Replicas) -> None:
    """Let the leader lose its lease, which no other replica can get."""
    leader = await replicas.leader()
    replicas.redis.stop()
    await eventually(
        lambda: "leader_stepped_down" in replicas.logs(leader), 10, "the leader to step down"
    )


async def hand_over(replicas: Replicas) -> None:
    """End the leader, whose place the other replica takes."""
    leader = await replicas.leader()
    replicas.kill(leader, signal.SIGTERM)
    await replicas.leader(but=leader)


@pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server")
@pytest.mark.parametrize(
    ("shape", "stand_down"),
    [*((shape, lose_the_lease) for shape in (*SHAPES, ai_gateway_buffered)), (istio, hand_over)],
    ids=lambda each: each.__name__,
)
async def test_leader_stands_down(
    tmp_path: Path, shape: Shape, stand_down: Callable[[Replicas], Awaitable[None]]
) -> None:
    """Bodies under way pass to their end, both ways; the clients of parked requests are told."""
    async with Replicas(tmp_path, 2, TLS, shape) as replicas:
        await replicas.leader()
        streaming = await replicas.call("streaming", body=BODY)
        answering = await replicas.next_call(10)
        await answering.stream(*EVENTS[:10])
        await streaming.head()
        uploading = await replicas.call("uploading", body=None, **_announced())
        await uploading.send(BODY[:100_000])
        parked = [await _parked(replicas, number) for number in range(3)]
        await stand_down(replicas)
        refused = [await caller.reply() for caller in parked]
        await uploading.send(BODY[100_000:])
        uploaded = await replicas.next_call(10)
        await uploaded.respond(BODY[::-1])
        await answering.send(*EVENTS[10:])
        await answering.end()
        answered = await uploading.reply()

        assert await streaming.rest() == b"".join(EVENTS)
        assert uploaded.body == BODY
        assert (answered.status, answered.body) == (200, BODY[::-1])
        told = {(reply.status, reply.headers[REASON]) for reply in refused}
        assert told == {(503, UNREACHABLE.reason)}
        assert replicas.arrived.empty()


async def _parked(replicas: Replicas, number: int) -> Caller:
    """A request that waits, of whose body nothing has come, some, or all."""
    caller = await replicas.call(f"parked-{number}", body=None, **_announced())
    await caller.send(BODY[: (0, 1000, len(BODY))[number]])
    leader = await replicas.leader()
    waiting = 'flowcontrol_waiting_requests{priority="0"}'

    async def waits() -> bool:
        return await replicas.metric(leader, waiting) == number + 1

    await eventually(waits, what="the request to wait")
    return caller


def _announced() -> dict[str, str]:
    return {name.replace("-", "_"): value for name, value in ANNOUNCED.items()}

"""Behind gateways that stream both bodies through their endpoint picker, as each of them wires it.

What a client sends reaches the model server byte for byte, and its answer reaches the client.
"""

import asyncio
import dataclasses
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import CHAT, call
from tests.e2e.conftest import Start
from tests.e2e.faulty_service import FAULT
from tests.e2e.gateway import Gateway
from tests.e2e.gateway_shapes import (
    SHAPES,
    Shape,
    ai_gateway_buffered,
    istio,
    istio_with_override,
    kgateway,
    streaming,
)
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_service.py")))
REASON = "x-llm-d-request-dropped-reason"
EVENTS = [b'data: {"token": "%d"}\n\n' % number for number in range(300)]


def pattern(size: int) -> bytes:
    """Bytes of which no two stretches are alike."""
    return b"".join(b"%08x" % number for number in range(size // 8 + 1))[:size]


def picking(shape: Shape, **more: Any) -> Spec:
    """A slot behind one gateway's wiring, with a certificate of the service's own."""
    settings = {"tls": {"selfSigned": True}}
    return Spec(picker="least-loaded", edit_envoy=shape, settings=settings, **more)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.__name__)
def spec(request: pytest.FixtureRequest) -> Spec:
    """A slot behind one gateway's wiring; what speaks TLS and what does not meets one port."""
    return picking(request.param, settlement={"accessLog": False})


class TestBodies:
    """Both ways, whole."""

    @pytest.mark.parametrize("size", [0, 1, 60_000, 300_000, 3_000_000])
    async def test_sizes(self, gateway: Gateway, size: int) -> None:
        """A body comes through that waits behind another request, and its answer comes back."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call(body=pattern(size))
        await gateway.until(waiting=1)
        await occupying.respond()
        call = await gateway.next_call()
        await call.respond(pattern(size)[::-1])
        reply = await caller.reply()

        assert call.body == pattern(size)
        assert (reply.status, reply.body) == (200, pattern(size)[::-1])
        assert "x-llm-d-inference-ttl" not in call.headers

    async def test_20_mb(self, gateway: Gateway) -> None:
        """A body of images, and as much back."""
        caller = await gateway.call(body=pattern(20_000_000))
        call = await gateway.next_call()
        responding = asyncio.ensure_future(call.respond(pattern(20_000_000)))
        reply = await caller.reply()
        await responding

        assert call.body == pattern(20_000_000)
        assert reply.body == pattern(20_000_000)

    async def test_slow_upload(self, gateway: Gateway) -> None:
        """A request is let on while its body is still on the way, and the rest follows."""
        body = pattern(300_000)
        caller = await gateway.call(headers={"content-length": str(len(body))}, body=None)
        await caller.send(body[:100])
        await gateway.until(in_flight=1)
        for begin in range(100, len(body), 30_000):
            await caller.send(body[begin : begin + 30_000])
            await gateway.snapshot()  # a while
        call = await gateway.next_call()
        await call.respond()

        assert (await caller.reply()).status == 200
        assert call.body == body

    async def test_in_chunks(self, gateway: Gateway) -> None:
        """A body of no announced length."""
        headers = {"transfer-encoding": "chunked"}
        caller = await gateway.call(headers=headers, body=pattern(200_000))
        call = await gateway.next_call()
        await call.respond()

        assert (await caller.reply()).status == 200
        assert call.body == pattern(200_000)

    async def test_no_body(self, gateway: Gateway) -> None:
        """A GET waits like all others."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call("/v1/responses/1", method="GET", body=None)
        await gateway.until(waiting=1)
        await occupying.respond()
        call = await gateway.next_call()
        await call.respond(b'{"data": []}')

        assert (await caller.reply()).body == b'{"data": []}'

    async def test_exempt(self, gateway: Gateway) -> None:
        """An exempt path passes while the slot is taken, with its bodies."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call("/v1/models", method="GET", body=pattern(70_000))
        call = await gateway.next_call()
        await call.respond(pattern(70_000))
        reply = await caller.reply()
        await occupying.respond()

        assert call.body == reply.body == pattern(70_000)

    async def test_events(self, gateway: Gateway) -> None:
        """Events of a response come through one by one."""
        caller = await gateway.call(body=pattern(1000))
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        await caller.head()
        assert await caller.piece() == EVENTS[0]
        for event in EVENTS[1:]:
            await call.send(event)
        await call.end()

        assert await caller.rest() == b"".join(EVENTS[1:])
        await gateway.until(in_flight=0)


class TestEnds:
    """However a request ends, its slot is free again."""

    async def test_refused(self, gateway: Gateway) -> None:
        """A request that has waited too long is told so, although its body is here."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call(headers={"x-llm-d-inference-ttl": "200ms"}, body=pattern(5000))
        reply = await caller.reply()
        await occupying.respond()

        assert (reply.status, reply.headers[REASON]) == (429, "rejected-ttl-expired")

    @pytest.mark.parametrize("size", [2, 1_000_000])
    async def test_client_leaves_while_parked(self, gateway: Gateway, size: int) -> None:
        """It gives up its place."""
        _, occupying = await gateway.occupy()
        caller = await gateway.call(body=pattern(size))
        await gateway.until(waiting=1)
        caller.reset()
        await gateway.until(waiting=0)
        await occupying.respond()

    async def test_client_leaves_in_flight(self, gateway: Gateway) -> None:
        """It gives up its slot."""
        caller = await gateway.call(body=pattern(100_000))
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        await caller.head()
        caller.reset()
        await gateway.until(in_flight=0)

    async def test_model_server_breaks_off(self, gateway: Gateway) -> None:
        """The client notices, and the slot is free."""
        caller = await gateway.call(body=pattern(1000))
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        await caller.head()
        call.reset()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await caller.rest()
        await gateway.until(in_flight=0)


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}\n\n'
FULL = b'data: {"error": {"message": "full", "type": "SERVICE_UNAVAILABLE", "code": 503}}\n\n'
COUNTS = (
    'flowcontrol_tokens_total{kind="input",priority="0"}',
    'flowcontrol_tokens_total{kind="output",priority="0"}',
    'flowcontrol_responses_total{priority="0",status="2xx"}',
    'flowcontrol_responses_total{priority="0",status="5xx"}',
)


class TestSettlement:
    """Without an access log the response tells what the request took."""

    @pytest.mark.parametrize(
        ("events", "expected"), [([USAGE], (11, 7, 1, 0)), ([FULL], (0, 0, 0, 1))]
    )
    async def test_from_the_response(
        self, gateway: Gateway, spec: Spec, events: list[bytes], expected: tuple[int, ...]
    ) -> None:
        """Tokens, and an error inside a response of 200; the status, where no body passes."""
        before = await _counts(gateway)
        caller = await gateway.call(body=pattern(100))
        call = await gateway.next_call()
        await call.stream(EVENTS[0], *events)
        await call.end()
        await caller.head()
        await caller.rest()
        await gateway.until(in_flight=0)
        after = await _counts(gateway)

        if spec.edit_envoy is istio_with_override:
            expected = (0, 0, 1, 0)
        assert tuple(b - a for a, b in zip(before, after, strict=True)) == expected


async def _counts(gateway: Gateway) -> list[float]:
    said = await gateway.metrics()
    return [said.get(name, 0) for name in COUNTS]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_drain(start: Start, shape: Shape) -> None:
    """A response that is under way at SIGTERM is sent whole; what waits is served behind it."""
    gateway = await start(picking(shape))
    caller = await gateway.call(body=pattern(100_000))
    call = await gateway.next_call()
    await call.stream(*EVENTS[:10])
    await caller.head()
    parked = await gateway.call(body=pattern(300_000))
    await gateway.until(waiting=1)
    gateway.stack.service.send_signal(signal.SIGTERM)
    body = b""
    for event in EVENTS[10:20]:
        await asyncio.sleep(0.2)  # longer than it takes to close the other doors
        await call.send(event)
        body += await caller.piece()
    await call.end()
    body += await caller.rest()
    served = await gateway.next_call()
    await served.respond(b"served")

    assert body == b"".join(EVENTS[:20])
    assert served.body == pattern(300_000)
    assert (await parked.reply()).body == b"served"
    assert await gateway.stack.service.exited() == 0


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_engine_fails(start: Start, shape: Shape) -> None:
    """A fault of the engine refuses what waits; bodies under way pass to their end, both ways."""
    spec = dataclasses.replace(picking(shape), service=FAULTY, max_concurrency=2)
    gateway = await start(spec)
    gateway.expected_complaints.add("processor_failed")
    body = pattern(300_000)
    streaming, serving = await gateway.occupy()
    await serving.stream(*EVENTS[:10])
    await streaming.head()
    uploading = await gateway.call(headers={"content-length": str(len(body))}, body=None)
    await uploading.send(body[:1000])
    await gateway.until(in_flight=2)
    parked = await gateway.call(body=pattern(100_000))
    await gateway.until(waiting=1)
    culprit = await gateway.call(flow_id=FAULT)
    statuses = [(await parked.reply()).status, (await culprit.reply()).status]
    await uploading.send(body[1000:])
    uploaded = await gateway.next_call()
    await uploaded.respond(body[::-1])
    answered = await uploading.reply()
    await serving.send(*EVENTS[10:])
    await serving.end()

    assert statuses == [500, 500]
    assert uploaded.body == body
    assert (answered.status, answered.body) == (200, body[::-1])
    assert await streaming.rest() == b"".join(EVENTS)
    assert await gateway.stack.service.exited() == 1


async def test_client_that_reads_nothing(gateway: Gateway) -> None:
    """The model server is held back; what has come of its response is in Envoy, not here."""
    caller = await gateway.call()
    call = await gateway.next_call()
    await call.stream(b"first")
    await caller.head()
    before = gateway.stack.service.resident_bytes()
    part, sent = pattern(1_000_000), 0

    async def send() -> None:
        nonlocal sent
        for _ in range(200):
            await call.send(part)
            sent += 1
        await call.end()

    async def is_held_back() -> bool:
        last = sent
        await asyncio.sleep(0.5)  # what a second part would take many times over
        return sent == last

    sending = asyncio.ensure_future(send())
    await eventually(is_held_back, 60.0, "the model server is held back")
    held, grown = sent, gateway.stack.service.resident_bytes() - before
    body = await caller.rest()
    await sending

    assert held < 150
    assert grown < 20_000_000
    assert body == b"first" + part * 200


async def test_buffered(start: Start) -> None:
    """Where the gateway lets us choose, it keeps the bodies although it was told otherwise."""
    gateway = await start(picking(ai_gateway_buffered))
    caller = await gateway.call(body=pattern(100_000))
    call = await gateway.next_call()
    await call.stream(*EVENTS[:10])
    await caller.head()
    first = await caller.piece()
    await call.end()

    assert first + await caller.rest() == b"".join(EVENTS[:10])
    assert call.body == pattern(100_000)


def _impatient(configuration: dict[str, Any], mode: str) -> None:
    streaming(configuration, mode, mode)
    (listener,) = configuration["static_resources"]["listeners"]
    (manager,) = listener["filter_chains"][0]["filters"]
    manager["typed_config"]["stream_idle_timeout"] = "0.5s"


@pytest.mark.parametrize("mode", ["NONE", "BUFFERED", "FULL_DUPLEX_STREAMED"])
async def test_envoy_gives_up(start: Start, mode: str) -> None:
    """A request that waits longer than Envoy lets it gets Envoy's own answer, and leaves."""
    shape = partial(_impatient, mode=mode)
    patient = {"noEndpointTTL": "60s"}
    gateway = await start(picking(shape, is_pool_empty=True, flow_control=patient))
    reply = await (await gateway.call(body=pattern(100), name="given-up")).reply()

    assert (reply.status, reply.body) == (504, b"stream timeout")
    assert await gateway.outcomes("given-up") == ["evicted-cancelled"]


@pytest.mark.parametrize(
    ("request_", "response"),
    [("FULL_DUPLEX_STREAMED", "STREAMED"), ("STREAMED", "FULL_DUPLEX_STREAMED")],
)
async def test_one_body_to_be_sent_back(start: Start, request_: str, response: str) -> None:
    """Where Envoy waits for one body alone, the other passes as well, and is read."""
    shape = partial(streaming, request=request_, response=response)
    gateway = await start(picking(shape, settlement={"accessLog": False}))
    before = await _counts(gateway)
    _, occupying = await gateway.occupy()
    caller = await gateway.call(body=pattern(300_000))
    await gateway.until(waiting=1)
    await occupying.respond()
    call = await gateway.next_call()
    await call.stream(*EVENTS, USAGE)
    await caller.head()
    first = await caller.piece()
    await call.end()
    rest = await caller.rest()
    await gateway.until(in_flight=0)
    after = await _counts(gateway)

    assert call.body == pattern(300_000)
    assert first + rest == b"".join([*EVENTS, USAGE])
    assert [b - a for a, b in zip(before, after, strict=True)] == [11, 7, 2, 0]


def with_large_buffers(configuration: dict[str, Any]) -> None:
    """A gateway whose Envoy sends parts of bodies larger than a gRPC message usually is."""
    kgateway(configuration)
    (listener,) = configuration["static_resources"]["listeners"]
    listener["per_connection_buffer_limit_bytes"] = 32 << 20


async def test_large_parts(start: Start) -> None:
    """They pass as they come, from a request that waits as well."""
    gateway = await start(picking(with_large_buffers))
    _, occupying = await gateway.occupy()
    caller = await gateway.call(body=pattern(20_000_000))
    await gateway.until(waiting=1)
    await occupying.respond()
    call = await gateway.next_call()
    await call.respond()

    assert (await caller.reply()).status == 200
    assert call.body == pattern(20_000_000)


async def test_two_gateways(start: Start) -> None:
    """An Envoy that speaks TLS and one that does not ask one port, at the same time."""
    gateway = await start(picking(kgateway))
    other = await gateway.stack.start_other_envoy(istio)
    _, occupying = await gateway.occupy()
    sent = {"x-request-id": "by-the-other"}
    caller = await call(other, CHAT, headers=sent, body=pattern(100_000))
    await gateway.until(waiting=1)
    await occupying.respond()
    answering = await gateway.next_call()
    await answering.respond(b"served")

    assert (await caller.reply()).body == b"served"
    assert answering.body == pattern(100_000)

"""Envoy's streams through grpcio's port: each way in which a request can end, once.

All other end-to-end tests use the direct port, whose decisions come from the same code. The two
differ in how a stream of gRPC is read, answered and ended, and that is asserted here.
"""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.faulty_service import FAULT
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(3)]
REASON = "x-llm-d-request-dropped-reason"
CRASHING = (sys.executable, str(Path(__file__).with_name("faulty_service.py")))


@pytest.fixture(scope="module")
def door() -> str:
    """The port that this module is about."""
    return "grpcio"


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot, two may wait; what has not begun to be answered may be ended."""
    reclaim = {"mode": "before-first-byte"}
    return Spec(flow_control={"maxRequests": 2, "reclaim": reclaim}, picker="least-loaded")


class TestDispatched:
    """Requests that reached a model server."""

    async def test_response(self, gateway: Gateway) -> None:
        """A whole response ends the request, of a large body too."""
        body = bytes(range(256)) * 4096
        caller = await gateway.call(name="whole", body=body)
        call = await gateway.next_call()
        await call.respond(b'{"ok": true}')
        reply = await caller.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)

        assert (reply.status, reply.body) == (200, b'{"ok": true}')
        assert body == call.body
        line = await gateway.decided("whole")
        assert (line["outcome"], line["byte_size"]) == ("dispatched", len(body))

    async def test_stream(self, gateway: Gateway) -> None:
        """A stream holds its slot until its last byte; the next request is dispatched then."""
        first, serving = await gateway.occupy()
        await serving.stream(*EVENTS)
        await first.head()
        second = await gateway.call(name="second")
        await gateway.until(waiting=1, in_flight=1)
        await serving.end()
        call = await gateway.next_call()
        await call.respond()

        assert await first.rest() == b"".join(EVENTS)
        assert call.name == "second"
        assert (await second.reply()).status == 200

    async def test_client_leaves(self, gateway: Gateway) -> None:
        """A client that breaks off during the response frees the slot, and the server is told."""
        leaving, call = await gateway.occupy()
        await call.stream(EVENTS[0])
        await leaving.head()
        leaving.reset()
        await gateway.until(in_flight=0, within_s=FREED_S)

        await asyncio.wait_for(call.gone.wait(), FREED_S)

    async def test_server_resets(self, gateway: Gateway) -> None:
        """A model server that breaks off before its response frees the slot, for a 503."""
        caller, call = await gateway.occupy()
        call.reset()
        reply = await caller.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)

        assert (reply.status, REASON in reply.headers) == (503, False)

    async def test_reclaimed(self, gateway: Gateway) -> None:
        """A batch request that has not begun to be answered gets 429, and its slot goes to chat."""
        batch = await gateway.call(objective="batch", name="reclaimed")
        call = await gateway.next_call()
        person = await gateway.call(objective="chat", name="person")
        refused = await batch.reply()
        following = await gateway.next_call()
        await following.respond()
        await asyncio.wait_for(call.gone.wait(), FREED_S)

        assert (refused.status, refused.headers[REASON]) == (429, "evicted")
        assert (following.name, (await person.reply()).status) == ("person", 200)
        assert await gateway.outcomes("reclaimed") == ["reclaimed"]


class TestNotDispatched:
    """Requests that never reached a model server."""

    async def test_client_leaves(self, gateway: Gateway) -> None:
        """A client that leaves while it waits is evicted, and its request is never sent on."""
        occupant, occupying = await gateway.occupy()
        leaving = await gateway.call(name="leaving")
        await gateway.until(waiting=1)
        leaving.reset()
        await gateway.until(waiting=0, in_flight=1, within_s=FREED_S)
        line = await gateway.decided("leaving")
        await occupying.respond()
        await occupant.reply()

        assert (line["outcome"], line["http_status"]) == ("evicted-cancelled", 499)
        assert len(gateway.backends[0].calls) == 1

    async def test_queue_is_full(self, gateway: Gateway) -> None:
        """Nobody waits beyond the limit: 429 for the newcomer, or for who is worth less."""
        occupant, occupying = await gateway.occupy()
        older = await gateway.call(name="older")
        await gateway.until(waiting=1)
        newer = await gateway.call(name="newer")
        await gateway.until(waiting=2)
        refused = await (await gateway.call(name="refused")).reply()
        person = await gateway.call(objective="chat", name="person")
        displaced = await newer.reply()
        served = []
        await occupying.respond()
        for _ in range(2):
            call = await gateway.next_call()
            served.append(call.name)
            await call.respond()

        assert (refused.status, refused.headers[REASON]) == (429, "rejected-saturated")
        assert (displaced.status, displaced.headers[REASON]) == (429, "evicted-priority")
        assert served == ["person", "older"]
        for caller in (occupant, older, person):
            assert (await caller.reply()).status == 200

    async def test_waited_too_long(self, gateway: Gateway) -> None:
        """A request whose time to wait is over gets 429 then."""
        occupant, occupying = await gateway.occupy()
        ttl = {"x-llm-d-inference-ttl": "300ms"}
        reply = await (await gateway.call(name="expiring", headers=ttl)).reply()
        line = await gateway.decided("expiring")
        await occupying.respond()
        await occupant.reply()

        assert (reply.status, reply.headers[REASON]) == (429, "rejected-ttl-expired")
        assert line["outcome"] == "evicted-ttl"
        assert line["waited_ms"] >= 300

    async def test_no_endpoints(self, start: Start) -> None:
        """With no model server known it gets 503."""
        empty = Spec(is_pool_empty=True, flow_control={"noEndpointTTL": "100ms"})
        gateway = await start(empty)
        reply = await (await gateway.call(name="nowhere")).reply()

        assert (reply.status, reply.headers[REASON]) == (503, "rejected-no-endpoints")
        assert await gateway.outcomes("nowhere") == ["evicted-no-endpoints"]


class TestServiceEnds:
    """Requests whose service goes."""

    async def test_drain(self, start: Start) -> None:
        """What waits gets 503 when the budget is spent; a response outlives the service, whole."""
        gateway = await start(Spec(flow_control={"drainBudget": "500ms"}))
        streaming, serving = await gateway.occupy()
        await serving.stream(EVENTS[0])
        await streaming.head()
        waiting = await gateway.call(name="waiting")
        await gateway.until(waiting=1)
        gateway.stack.service.send_signal(signal.SIGTERM)
        drained = await waiting.reply()
        status = await gateway.stack.service.exited()
        await serving.send(*EVENTS[1:])
        await serving.end()

        assert (drained.status, drained.headers[REASON]) == (503, "rejected-shutting-down")
        assert await streaming.rest() == b"".join(EVENTS)
        assert status == 0

    @pytest.mark.interpreted
    async def test_fault(self, start: Start) -> None:
        """A fault in the engine: 500 for who waits, exit status 1, and the response comes whole."""
        gateway = await start(Spec(service=CRASHING))
        gateway.expected_complaints.add("processor_failed")
        streaming, serving = await gateway.occupy()
        await serving.stream(EVENTS[0])
        await streaming.head()
        waiting = await gateway.call(name="waiting")
        await gateway.until(waiting=1)
        culprit = await gateway.call(flow_id=FAULT, name="culprit")
        replies = [await caller.reply() for caller in (waiting, culprit)]
        status = await gateway.stack.service.exited()
        await serving.send(*EVENTS[1:])
        await serving.end()

        assert [(reply.status, reply.headers[REASON]) for reply in replies] == [
            (500, "internal")
        ] * 2
        assert await streaming.rest() == b"".join(EVENTS)
        assert status == 1

    async def test_killed(self, start: Start) -> None:
        """The response under way outlives a killed service: Envoy fails open."""
        gateway = await start(Spec())
        streaming, serving = await gateway.occupy()
        await serving.stream(EVENTS[0])
        await streaming.head()
        gateway.stack.service.send_signal(signal.SIGKILL)
        await gateway.stack.service.exited()

        await serving.send(*EVENTS[1:])
        await serving.end()
        assert await streaming.rest() == b"".join(EVENTS)

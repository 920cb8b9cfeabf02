"""SIGTERM: nobody is left without an answer, and no response is cut short."""

import asyncio
import signal

import pytest

from tests.e2e.client import fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import LIVENESS, NOT_SERVING, READINESS, SERVING, Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e

EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(50)]
REASON = "x-llm-d-request-dropped-reason"
QUICK_S = 5.0
"""Longest a service may take to end when there is nothing to wait for."""


async def readiness(gateway: Gateway) -> set[int]:
    """Return every health status that readiness has, under each of its names on both ports."""
    ports = (gateway.stack.grpc, gateway.stack.ext_proc)
    return {await gateway.health(port, name) for port in ports for name in READINESS}


async def liveness(gateway: Gateway) -> set[int]:
    """Return every health status that liveness has, on both ports."""
    ports = (gateway.stack.grpc, gateway.stack.ext_proc)
    return {await gateway.health(port, LIVENESS) for port in ports}


async def is_avoided(gateway: Gateway) -> bool:
    """Return whether Envoy's health checks have found the service unhealthy."""
    clusters = (await fetch(gateway.stack.admin, "/clusters")).body.decode()
    return f"ext_proc::{gateway.stack.door}::health_flags::/failed_active_hc" in clusters


class TestDrain:
    """One service to each test: none survives it."""

    async def test_parked_and_in_flight(self, start: Start) -> None:
        """The whole story of a drain, longer than Envoy takes to find the service unhealthy.

        What waits is dispatched as slots free; what still waits when the budget is spent gets 503;
        what comes is told why it is refused; what is in flight outlives the service, byte for byte.
        """
        gateway = await start(Spec(flow_control={"drainBudget": "6s"}))
        clock = asyncio.get_running_loop().time
        first, serving_first = await gateway.occupy()
        await serving_first.stream(*EVENTS[:10])
        second = await gateway.call(name="second")
        await gateway.until(waiting=1)
        third = await gateway.call(name="third")
        await gateway.until(waiting=2)
        before = await readiness(gateway), await liveness(gateway)

        gateway.stack.service.send_signal(signal.SIGTERM)
        began_s = clock()
        await gateway.until_so(lambda snapshot: snapshot.draining)
        during = await readiness(gateway), await liveness(gateway)
        late = await (await gateway.call(name="late")).reply()

        await serving_first.send(*EVENTS[10:])
        await serving_first.end()
        await first.head()
        first_body = await first.rest()
        serving_second = await gateway.next_call()
        await serving_second.stream(*EVENTS[:10])
        await second.head()

        await eventually(lambda: is_avoided(gateway), 5.0, "Envoy finds the service unhealthy")
        later = await (await gateway.call(name="later")).reply()
        evicted = await third.reply()
        evicted_s = clock() - began_s
        status = await gateway.stack.service.exited()
        await serving_second.send(*EVENTS[10:])
        await serving_second.end()
        second_body = await second.rest()
        outcomes = await gateway.outcomes("second", "third", "late")

        assert ({SERVING}, {SERVING}) == before
        assert ({NOT_SERVING}, {SERVING}) == during
        assert (late.status, late.headers[REASON]) == (503, "rejected-shutting-down")
        assert (later.status, later.headers[REASON]) == (503, "rejected-shutting-down")
        assert b"".join(EVENTS) == first_body
        assert serving_second.name == "second"
        assert (evicted.status, evicted.headers[REASON]) == (503, "rejected-shutting-down")
        assert 6.0 <= evicted_s < 6.5
        assert status == 0
        assert b"".join(EVENTS) == second_body
        assert outcomes == ["dispatched", "evicted-drained", "rejected-draining"]
        assert gateway.stack.events("drain_began") != []
        assert gateway.stack.events("service_stopped")[0]["exit_status"] == 0

    async def test_nothing_waits(self, start: Start) -> None:
        """With nothing waiting the service ends at once; what is in flight is not cut short.

        Neither a stream under way nor a response of which nothing has been sent yet.
        """
        gateway = await start(Spec(max_concurrency=2))
        streaming = await gateway.call(name="streaming")
        serving_stream = await gateway.next_call()
        await serving_stream.stream(*EVENTS[:10])
        await streaming.head()
        thinking = await gateway.call(name="thinking")
        serving_thought = await gateway.next_call()
        await gateway.until(in_flight=2)
        gateway.stack.service.send_signal(signal.SIGTERM)
        status = await gateway.stack.service.exited(QUICK_S)
        await serving_stream.send(*EVENTS[10:])
        await serving_stream.end()
        await serving_thought.respond(b"x" * 100_000)
        body = await streaming.rest()
        reply = await thinking.reply()

        assert status == 0
        assert b"".join(EVENTS) == body
        assert (reply.status, reply.body) == (200, b"x" * 100_000)

    async def test_idle(self, start: Start) -> None:
        """An idle service ends at once, with ctrl-C too.

        Whoever watches readiness sees it go, on both ports; liveness is still well then.
        """
        gateway = await start(Spec())
        ports = (gateway.stack.grpc, gateway.stack.ext_proc)
        async with (
            gateway.watching(ports[0], "readiness") as at_main,
            gateway.watching(ports[1], "readiness") as at_probes,
            gateway.watching(ports[1], LIVENESS) as alive,
        ):
            gateway.stack.service.send_signal(signal.SIGINT)
            status = await gateway.stack.service.exited(QUICK_S)

            assert status == 0
            assert at_main == at_probes == [SERVING, NOT_SERVING]
            assert list(dict.fromkeys(alive)) == [SERVING]
            assert len(gateway.stack.events("drain_began")) == 1

"""When the service fails: of itself, or by force."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import Caller
from tests.e2e.conftest import Start
from tests.e2e.faulty_service import FAULT
from tests.e2e.gateway import LIVENESS, NOT_SERVING, SERVING, Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_service.py")))
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(50)]
REASON = "x-llm-d-request-dropped-reason"


async def crowd(gateway: Gateway) -> tuple[Caller, Any, list[Caller]]:
    """Take the last slot with a request whose response has begun, and let three wait behind it."""
    streaming, serving = await gateway.occupy()
    await serving.stream(*EVENTS[:10])
    await streaming.head()
    parked = [await gateway.call(name=f"parked-{number}") for number in range(3)]
    await gateway.until(waiting=3)
    return streaming, serving, parked


@pytest.mark.interpreted
class TestProcessorFails:
    """A fault inside the engine ends the service, and nobody is left waiting for it."""

    async def test_refuse(self, start: Start) -> None:
        """Every parked request gets 500; health goes; the exit status is 1; responses complete."""
        gateway = await start(Spec(service=FAULTY))
        gateway.expected_complaints.add("processor_failed")
        streaming, serving, parked = await crowd(gateway)
        async with (
            gateway.watching(gateway.stack.ext_proc, "readiness") as ready,
            gateway.watching(gateway.stack.ext_proc, LIVENESS) as alive,
        ):
            parked.append(await gateway.call(flow_id=FAULT, name="culprit"))
            replies = [await caller.reply() for caller in parked]
            status = await gateway.stack.service.exited()
            statuses = ready[-1], alive[-1]
        await serving.send(*EVENTS[10:])
        await serving.end()
        body = await streaming.rest()
        fault = gateway.stack.events("processor_failed")
        outcomes = await gateway.outcomes("parked-0", "culprit")

        assert [(r.status, r.headers[REASON]) for r in replies] == [(500, "internal")] * 4
        assert statuses == (NOT_SERVING, NOT_SERVING)
        assert status == 1
        assert len(fault) == 1
        assert "a planted fault" in str(fault[0])
        assert outcomes == ["internal", "internal"]
        assert b"".join(EVENTS) == body

    async def test_continue(self, start: Start) -> None:
        """Where the operator chose so, requests go on ungated; the service ends likewise."""
        gateway = await start(Spec(service=FAULTY, requests={"onFault": "continue"}))
        gateway.expected_complaints.add("processor_failed")
        streaming, serving, parked = await crowd(gateway)
        parked.append(await gateway.call(flow_id=FAULT, name="culprit"))
        calls = [await gateway.next_call() for _ in parked]
        status = await gateway.stack.service.exited()
        for call in calls:
            await call.respond()
        replies = [await caller.reply() for caller in parked]
        await serving.send(*EVENTS[10:])
        await serving.end()
        body = await streaming.rest()

        assert {"parked-0", "parked-1", "parked-2", "culprit"} == {call.name for call in calls}
        assert [reply.status for reply in replies] == [200] * 4
        assert status == 1
        assert b"".join(EVENTS) == body


def try_longer(configuration: dict[str, Any]) -> None:
    """Let Envoy try longer than a slow machine takes to start a service, and more often."""
    listener = configuration["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each["typed_config"] for each in manager["http_filters"]}
    policy = filters["envoy.filters.http.ext_proc"]["grpc_service"]["retry_policy"]
    policy["num_retries"] = 200
    policy["retry_back_off"] = {"base_interval": "0.1s", "max_interval": "0.3s"}


class TestKilled:
    """SIGKILL: no service has a say in that."""

    async def test_parked_requests_wait_for_the_successor(self, start: Start) -> None:
        """What was parked is parked again at the service that takes the place of the killed one.

        Envoy sends it there by itself. What was in flight goes on, its response begun or not.
        """
        gateway = await start(Spec(max_concurrency=2, edit_envoy=try_longer))
        thinking, serving_thought = await gateway.occupy()
        streaming, serving_stream, parked = await crowd(gateway)
        gateway.stack.service.send_signal(signal.SIGKILL)
        status = await gateway.stack.service.exited()
        await serving_thought.respond()
        reply = await thinking.reply()
        await serving_stream.send(*EVENTS[10:])
        await serving_stream.end()
        body = await streaming.rest()
        await gateway.stack.start_service()
        served = []
        for _ in parked:
            call = await gateway.next_call()
            assert 1 <= (await gateway.snapshot()).in_flight <= 2
            served.append(call.name)
            await call.respond()
        replies = [await caller.reply() for caller in parked]

        assert status == -signal.SIGKILL
        assert reply.status == 200
        assert body == b"".join(EVENTS)
        assert [reply.status for reply in replies] == [200] * 3
        assert {"parked-0", "parked-1", "parked-2"} == set(served)
        assert await gateway.health(gateway.stack.ext_proc, LIVENESS) == SERVING

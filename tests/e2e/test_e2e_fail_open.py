"""When flow control dies: responses that have begun complete, and no request passes ungated.

The backends' own list of calls is the evidence: every request is there once, or was refused.
"""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flowcontrol_server.requests.dialects import Dialect, content_type_of, error_body
from flowcontrol_server.requests.replies import UNREACHABLE, UNREACHABLE_RETRY_S
from tests.e2e.backend import Call
from tests.e2e.client import CHAT, Caller, Reply, fetch
from tests.e2e.conftest import Start
from tests.e2e.faulty_service import FAULT
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Edit, Spec, eventually

pytestmark = pytest.mark.e2e

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_service.py")))
IS_LONG = "FLOWCONTROL_LONG_TESTS" in os.environ
"""Whether to run at the size of a busy gateway."""
STREAMS, WAITING, STALL_S = (200, 500, 30.0) if IS_LONG else (30, 100, 3.0)
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(50)]
REASON = "x-llm-d-request-dropped-reason"
FOR_LONG = 60.0
STOPPED_S = 30.0


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def door(request: pytest.FixtureRequest) -> str:
    """Both ports: how each loses its streams differs."""
    return str(request.param)


def ext_proc_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The ext_proc filter's settings."""
    listener = configuration["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each["typed_config"] for each in manager["http_filters"]}
    found: dict[str, Any] = filters["envoy.filters.http.ext_proc"]
    return found


def retrying(number: int, *, ping: str = "10s") -> Edit:
    """Let Envoy try so often to find the service again, and notice so soon that it is silent."""

    def edit(configuration: dict[str, Any]) -> None:
        policy = ext_proc_of(configuration)["grpc_service"]["retry_policy"]
        policy["num_retries"] = number
        policy["retry_back_off"] = {"base_interval": "0.1s", "max_interval": "0.3s"}
        clusters = configuration["static_resources"]["clusters"]
        (cluster,) = [each for each in clusters if each["name"] == "ext_proc"]
        (protocol,) = cluster["typed_extension_protocol_options"].values()
        http2 = protocol["explicit_http_config"]["http2_protocol_options"]
        http2["connection_keepalive"] = {"interval": ping, "timeout": ping}

    return edit


@dataclass
class Crowd:
    """Responses that have begun, on every slot, and requests that wait behind them."""

    gateway: Gateway
    streaming: list[Caller]
    serving: list[Call]
    parked: list[Caller]

    sent: int = 10
    """Events of each response that the backend has sent."""

    async def send_until(self, end: int) -> None:
        """Send more of every response: its events up to this one."""
        for call in self.serving:
            await call.send(*EVENTS[self.sent : end])
        self.sent = end

    async def bodies(self) -> set[bytes]:
        """Send the rest of every response; return all that differ, as the clients have them."""
        await self.send_until(len(EVENTS))
        for call in self.serving:
            await call.end()
        return {await caller.rest() for caller in self.streaming}

    async def serve_waiting(self) -> list[Reply]:
        """Answer all that waited, one by one as they come."""
        for _ in self.parked:
            call = await self.gateway.next_call(FOR_LONG)
            await call.respond()
        return await self.replies()

    async def replies(self) -> list[Reply]:
        """What those that waited are told."""
        for caller in self.parked:
            caller.patience_s = FOR_LONG
        return [await caller.reply() for caller in self.parked]

    def calls(self) -> Counter[str]:
        """What the backend has been asked, and how often."""
        (backend,) = self.gateway.backends
        return Counter(call.name for call in backend.calls)


async def crowd(gateway: Gateway) -> Crowd:
    """Fill every slot with a response that has begun, and let others wait."""
    streaming = [await gateway.call(name=f"stream-{number}") for number in range(STREAMS)]
    serving = [await gateway.next_call() for _ in streaming]
    for call in serving:
        await call.stream(*EVENTS[:10])
    for caller in streaming:
        await caller.head()
    parked = [await gateway.call(name=f"parked-{number}") for number in range(WAITING)]
    await gateway.until(waiting=WAITING)
    return Crowd(gateway, streaming, serving, parked)


def once(*kinds: str) -> Counter[str]:
    """Every request of these kinds, once."""
    sizes = {"stream": STREAMS, "parked": WAITING}
    return Counter(f"{kind}-{number}" for kind in kinds for number in range(sizes[kind]))


async def kill(gateway: Gateway) -> None:
    """End the service as the kernel does when memory is short."""
    gateway.stack.service.send_signal(signal.SIGKILL)
    await gateway.stack.service.exited()


class TestKilled:
    """SIGKILL: of an operator, or of the kernel that is out of memory."""

    @pytest.mark.timeout(300)
    async def test_with_successor(self, start: Start) -> None:
        """Every response completes; every waiting request waits again and is served once."""
        edit = retrying(400)
        gateway = await start(Spec(max_concurrency=STREAMS, edit_envoy=edit))
        busy = await crowd(gateway)
        await kill(gateway)
        await busy.send_until(20)
        before = busy.calls()
        await gateway.stack.start_service()
        replies = await busy.serve_waiting()
        bodies = await busy.bodies()

        assert before == once("stream")
        assert bodies == {b"".join(EVENTS)}
        assert [reply.status for reply in replies] == [200] * WAITING
        assert busy.calls() == once("stream", "parked")

    @pytest.mark.timeout(300)
    async def test_without_successor(self, start: Start) -> None:
        """Every response completes; every waiting request gets 503 and reaches no model server."""
        gateway = await start(Spec(max_concurrency=STREAMS, edit_envoy=retrying(2)))
        busy = await crowd(gateway)
        await kill(gateway)
        replies = await busy.replies()
        bodies = await busy.bodies()

        assert bodies == {b"".join(EVENTS)}
        assert {(r.status, r.headers[REASON], r.headers["retry-after"]) for r in replies} == {
            (UNREACHABLE.status, UNREACHABLE.reason, str(UNREACHABLE_RETRY_S))
        }
        assert busy.calls() == once("stream")

    async def test_continue(self, start: Start) -> None:
        """Where the operator prefers to serve ungated, waiting requests pass."""
        spec = Spec(requests={"onFault": "continue"}, edit_envoy=retrying(2))
        gateway = await start(spec)
        streaming, serving = await gateway.occupy()
        await serving.stream(*EVENTS[:10])
        parked = [await gateway.call(name=f"parked-{number}") for number in range(3)]
        await gateway.until(waiting=3)
        await kill(gateway)
        for _ in parked:
            await (await gateway.next_call()).respond()
        replies = [await caller.reply() for caller in parked]
        await serving.send(*EVENTS[10:])
        await serving.end()
        await streaming.head()

        assert await streaming.rest() == b"".join(EVENTS)
        assert [reply.status for reply in replies] == [200] * 3


class TestStopped:
    """SIGSTOP: the service is silent, its connections stay."""

    @pytest.mark.timeout(300)
    async def test_longer_than_envoy_waits(self, start: Start) -> None:
        """Envoy hangs up on it: every response completes, the others wait for its return."""
        edit = retrying(400, ping="10s" if IS_LONG else "1s")
        gateway = await start(Spec(max_concurrency=STREAMS, edit_envoy=edit))
        busy = await crowd(gateway)
        gateway.stack.service.send_signal(signal.SIGSTOP)
        try:
            await eventually(lambda: timeouts(gateway), STOPPED_S, "Envoy hangs up")
            await busy.send_until(20)
            await asyncio.sleep(STALL_S)  # the case itself: it is silent for so long
            before = busy.calls()
        finally:
            gateway.stack.service.send_signal(signal.SIGCONT)
        replies = await busy.serve_waiting()
        bodies = await busy.bodies()

        assert before == once("stream")
        assert bodies == {b"".join(EVENTS)}
        assert [reply.status for reply in replies] == [200] * WAITING
        assert busy.calls() == once("stream", "parked")


async def timeouts(gateway: Gateway) -> int:
    """How often Envoy has hung up on the silent service."""
    reply = await fetch(gateway.stack.admin, "/stats?filter=ext_proc.http2.keepalive_timeout")
    return int(reply.body.decode().rpartition(":")[2])


@pytest.mark.interpreted
class TestProcessorFails:
    """A fault inside the engine."""

    @pytest.mark.timeout(300)
    async def test_refuse(self, start: Start) -> None:
        """Every response completes; every waiting request gets 500, once."""
        gateway = await start(Spec(service=FAULTY, max_concurrency=STREAMS))
        gateway.expected_complaints.add("processor_failed")
        busy = await crowd(gateway)
        busy.parked.append(await gateway.call(flow_id=FAULT, name="culprit"))
        replies = await busy.replies()
        status = await gateway.stack.service.exited()
        bodies = await busy.bodies()

        assert status == 1
        assert bodies == {b"".join(EVENTS)}
        assert {(r.status, r.headers[REASON]) for r in replies} == {(500, "internal")}
        assert busy.calls() == once("stream")


DIALECTS = {
    Dialect.OPENAI: (CHAT, "application/json"),
    Dialect.ANTHROPIC: ("/v1/messages?beta=true", "application/json"),
    Dialect.GEMINI: ("/v1beta/models/llama:streamGenerateContent?alt=sse", "application/json"),
    Dialect.PLAIN: ("/api/chat", "application/json"),
}


class TestGone:
    """What Envoy does with each kind of request while there is no flow control."""

    async def test_errors(self, start: Start) -> None:
        """Every client is told in the words of its own API."""
        gateway = await start(Spec(edit_envoy=retrying(0)))
        await kill(gateway)
        replies = {}
        for dialect, (path, kind) in DIALECTS.items():
            caller = await gateway.call(path, headers={"content-type": kind})
            replies[dialect] = await caller.reply()

        _, reason, message, _ = UNREACHABLE
        for dialect, reply in replies.items():
            body = json.loads(error_body(dialect, 503, reason, message))
            assert (reply.status, json.loads(reply.body)) == (503, body)
            assert reply.headers["content-type"] == content_type_of(dialect)
            assert reply.headers[REASON] == reason
            assert reply.headers["retry-after"] == str(UNREACHABLE_RETRY_S)
            assert reply.headers["x-request-id"].startswith("test-")

    async def test_grpc(self, start: Start) -> None:
        """A gRPC client gets UNAVAILABLE."""
        gateway = await start(Spec(edit_envoy=retrying(0)))
        await kill(gateway)
        headers = {"content-type": "application/grpc", "te": "trailers"}
        reply = await (await gateway.call("/inference.GRPC/ModelInfer", headers=headers)).reply()

        assert (reply.status, reply.headers["grpc-status"]) == (200, "14")
        assert reply.headers["grpc-message"] == f"{UNREACHABLE.reason}: {UNREACHABLE.message}"

    async def test_exempt(self, start: Start) -> None:
        """Exempt requests pass at once; what only looks like one does not."""
        gateway = await start(Spec())
        await kill(gateway)
        (backend,) = gateway.backends
        backend.is_answering = True
        passes = [("GET", "/health"), ("GET", "/v1/models"), ("HEAD", "/v1/models/llama?x=1")]
        statuses = []
        for method, path in passes:
            caller = await gateway.call(path, method=method, body=None)
            statuses.append(await caller.head())

        assert statuses == [200] * len(passes)
        assert [(call.method, call.path) for call in backend.calls] == passes

    async def test_not_exempt(self, start: Start) -> None:
        """A path that only looks exempt, or is so for another method, stays shut."""
        gateway = await start(Spec(edit_envoy=retrying(0)))
        await kill(gateway)
        (backend,) = gateway.backends
        denied = [
            ("POST", "/v1/models/llama:predict"),
            ("GET", "/v1/models/..%2fchat/completions"),
            ("GET", "/v1/models/../chat/completions"),
            ("GET", "/healthy"),
        ]
        statuses = []
        for method, path in denied:
            caller = await gateway.call(path, method=method, body=None)
            statuses.append(await caller.head())

        assert statuses == [503] * len(denied)
        assert backend.calls == []

    async def test_exempt_only_with_gate(self, start: Start) -> None:
        """Where the operator says so, exempt requests are refused like all others."""
        spec = Spec(requests={"exemptWithoutGate": False}, edit_envoy=retrying(0))
        gateway = await start(spec)
        (backend,) = gateway.backends
        backend.is_answering = True
        before = await (await gateway.call("/health", method="GET", body=None)).reply()
        await kill(gateway)
        after = await (await gateway.call("/health", method="GET", body=None)).reply()

        assert (before.status, after.status) == (200, 503)
        assert len(backend.calls) == 1

"""What a test holds in its hands: clients in front, backends behind, the engine's account between.

The engine's state is asserted from its own gRPC API, and what became of a request from the
canonical log line.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin import api as admin
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.requests import codec
from tests.e2e.backend import ARRIVAL_S, Backend, Call
from tests.e2e.client import CHAT, Caller, call, fetch
from tests.e2e.harness import ADMIN_TOKEN, Stack, eventually

ANSWER_S = 5.0
"""How long the service may take to say how it is."""
FREED_S = 1.0
"""Longest time between the end of a request and its slot being free."""
SERVING = int(health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)
READINESS = ("", "readiness", codec.SERVICE, admin.SERVICE)
"""Names whose health says whether to send requests here."""
LIVENESS = "liveness"
_names = itertools.count(1)


@final
class Gateway:
    """A stack in use by one test; leaving the context asserts that all slots are free again."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.arrived: asyncio.Queue[Call] = asyncio.Queue()
        """Calls in the order in which they reached the backends."""
        self.backends = [Backend(address, self.arrived) for address in stack.endpoints]
        self._channel = grpc.aio.insecure_channel(str(stack.grpc))
        self._api = api_grpc.FlowControlStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self.expected_complaints: set[str] = set()
        """Log events of level warning or worse that the test means to cause."""
        self._complaints_before = len(stack.complaints())
        self._strays_before = len(stack.stray_lines())
        self._callers: list[Caller] = []
        self._running = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        for backend in self.backends:
            await self._running.enter_async_context(backend)
        self._running.push_async_callback(self._channel.close, None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async with self._running:
            for caller in self._callers:
                await caller.hang_up()
            service = self.stack.service
            if service.exit_status() is None and not service.is_told_to_end:
                await self.until(waiting=0, in_flight=0, within_s=FREED_S)
            complaints = self.stack.complaints()[self._complaints_before :]
            assert [c for c in complaints if c["event"] not in self.expected_complaints] == []
            assert self.stack.stray_lines()[self._strays_before :] == []

    # Clients

    async def call(
        self,
        path: str = CHAT,
        *,
        method: str = "POST",
        objective: str | None = None,
        flow_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = b"{}",
        name: str | None = None,
    ) -> Caller:
        """Send a request through Envoy. It is closed, if need be, when the test is over.

        Args:
            path: to ask for.
            method: of the request.
            objective: its InferenceObjective.
            flow_id: its fairness id.
            headers: more of them.
            body: None for none.
            name: its x-request-id, by which log and backend know it; unique when left out.
        """
        sent = {"x-request-id": name or unique()}
        if objective is not None:
            sent["x-llm-d-inference-objective"] = objective
        if flow_id is not None:
            sent["x-llm-d-inference-fairness-id"] = flow_id
        sent |= headers or {}
        caller = await call(self.stack.gateway, path, method=method, headers=sent, body=body)
        self._callers.append(caller)
        return caller

    async def occupy(self) -> tuple[Caller, Call]:
        """Take a free slot with a request that stays in flight until the test ends it."""
        caller = await self.call(flow_id="occupant")
        return caller, await self.next_call()

    # Backends

    async def next_call(self, within_s: float = ARRIVAL_S) -> Call:
        """Wait for the next request to reach a backend."""
        async with asyncio.timeout(within_s):
            return await self.arrived.get()

    # The engine's account

    async def snapshot(self) -> api.Snapshot:
        """Return the engine's state now."""
        snapshot: api.Snapshot = await self._api.GetSnapshot(
            api.GetSnapshotRequest(), timeout=ANSWER_S
        )
        return snapshot

    async def until(
        self, *, waiting: int | None = None, in_flight: int | None = None, within_s: float = 5.0
    ) -> api.Snapshot:
        """Wait until so many requests wait, or are in flight; return the snapshot."""
        return await self.until_so(
            lambda snapshot: (
                waiting in {None, snapshot.waiting} and in_flight in {None, snapshot.in_flight}
            ),
            within_s,
        )

    async def until_so(
        self, is_so: Callable[[api.Snapshot], bool], within_s: float = 5.0
    ) -> api.Snapshot:
        """Wait for a snapshot that fulfils the condition; return it."""
        last = api.Snapshot()

        async def look() -> bool:
            nonlocal last
            last = await self.snapshot()
            return is_so(last)

        try:
            await eventually(look, within_s, "the state that the test waits for")
        except AssertionError as error:
            error.add_note(str(last))
            raise
        return last

    async def evict(self, flow_id: str, priority: int = 0) -> int:
        """Refuse all of a flow that waits, as an operator does; return how many."""
        request = api.EvictFlowRequest(priority=priority, flow_id=flow_id)
        proof = (("authorization", f"Bearer {ADMIN_TOKEN}"),)
        reply = await self._api.EvictFlow(request, metadata=proof, timeout=ANSWER_S)
        return int(reply.evicted)

    async def decided(self, name: str) -> dict[str, Any]:
        """Wait for the canonical log line of a request; return its fields."""
        return (await self._decided([name]))[name]

    async def outcomes(self, *names: str) -> list[str]:
        """Wait until these requests are decided and gone; return what became of each."""
        decided = await self._decided(names)
        return [decided[name]["outcome"] for name in names]

    async def _decided(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        wanted = set(names)
        found: dict[str, dict[str, Any]] = {}

        def are_there() -> bool:
            lines = self.stack.events("request_decided")
            mine = [line for line in lines if line["client_request_id"] in wanted]
            found.update({line["client_request_id"]: line for line in mine})
            assert len(mine) == len(found), "a request is decided once"
            return found.keys() == wanted

        try:
            await eventually(are_there, what="the canonical lines of all of them")
        except AssertionError as error:
            error.add_note(f"missing: {sorted(wanted - found.keys())}")
            raise
        return found

    async def metric(self, name: str) -> float:
        """Return the value of a metric that has no labels."""
        return (await self.metrics())[name]

    async def metrics(self) -> Mapping[str, float]:
        """Return every sample of the service's metrics, by its name and labels."""
        reply = await fetch(self.stack.http, "/metrics")
        lines = [line for line in reply.body.decode().splitlines() if line[:1] != "#"]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    # Health

    async def health(self, address: Address | Path, service: str) -> int:
        """Ask the health service at that address."""
        async with grpc.aio.insecure_channel(str(address)) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return int(reply.status)

    @contextlib.asynccontextmanager
    async def watching(self, address: Address | Path, service: str) -> AsyncIterator[list[int]]:
        """Watch the health of a service at that address: a list that grows."""
        statuses: list[int] = []

        async def follow() -> None:
            async with grpc.aio.insecure_channel(str(address)) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                with contextlib.suppress(grpc.aio.AioRpcError):  # the service is gone
                    watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
                    async for reply in watch:
                        statuses.append(reply.status)  # noqa: PERF401 - as they come

        following = asyncio.ensure_future(follow())
        try:
            await eventually(lambda: statuses, what=f"health of {service!r} at {address}")
            yield statuses
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


def unique() -> str:
    """Return a name for a request that no other request of this run has."""
    return f"test-{next(_names)}"

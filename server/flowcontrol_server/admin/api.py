"""Our own gRPC API, flowcontrol.v1: snapshots, explanations and commands.

No method touches the engine directly: queries and commands go to the processor, like facts.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, final

import grpc

from flowcontrol.request import FlowKey, Outcome
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin.inquiry import NotKnownError, explain
from flowcontrol_server.admin.messages import (
    add_status,
    decision_message,
    duration_message,
    snapshot_message,
)
from flowcontrol_server.admin.objectives import (
    FROM_ELSEWHERE,
    ObjectiveAccess,
    ObjectiveMethods,
    while_running,
)
from flowcontrol_server.common.places import NoPlaceError, Places
from flowcontrol_server.common.status import ServiceStatus
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import LogJoin

SERVICE = api.DESCRIPTOR.services_by_name["FlowControl"].full_name
_FLOWS_DEFAULT = 20
_FLOWS_MAX = 1000
_DECISIONS_DEFAULT = 50
_DECISIONS_MAX = 1000
WATCHES_MAX = 64
"""Most concurrent watches; each snapshot is O(flows), at up to 10 a second."""
WATCHES_PER_PEER_MAX = 8
"""Most concurrent watches from one address."""
_INTERVAL_S = (0.1, 1.0, 60.0)
"""Shortest, default and longest time between two snapshots."""


@final
class FlowControlServicer(ObjectiveMethods, api_grpc.FlowControlServicer):
    """Serves the API from the processor's answers.

    Args:
        gate: the way to the processor.
        pool: the name of the inference pool.
        log_join: counts the requests that the access log has reported.
        drain: starts a drain, as SIGTERM does, and returns its budget; a second call has no effect.
        objectives: the access to objectives.
        status: the current problems, version and configuration.
        role: returns the role of this process in the election, in words; empty: no election.
    """

    def __init__(  # noqa: PLR0913 - each is one source of answers
        self,
        gate: FlowGate,
        pool: str,
        log_join: LogJoin,
        drain: Callable[[], int],
        objectives: ObjectiveAccess = FROM_ELSEWHERE,
        *,
        status: ServiceStatus | None = None,
        role: Callable[[], str] = lambda: "",
    ) -> None:
        super().__init__(gate, objectives)
        self._pool = pool
        self._log_join = log_join
        self._drain = drain
        self._status = status
        self._role = role
        self._watch_places = Places(WATCHES_MAX, WATCHES_PER_PEER_MAX)

    async def GetSnapshot(  # noqa: N802 - as in the .proto
        self, request: api.GetSnapshotRequest, context: Any
    ) -> api.Snapshot:
        """Return the current state."""
        return await self._snapshot(request.flows_max, context)

    async def WatchSnapshot(  # noqa: N802 - as in the .proto
        self, request: api.WatchSnapshotRequest, context: Any
    ) -> AsyncIterator[api.Snapshot]:
        """Yield the state at the requested interval, until the client leaves."""
        shortest, default, longest = _INTERVAL_S
        asked = request.interval.ToNanoseconds() / 1e9
        interval_s = min(max(asked, shortest), longest) if asked else default
        try:
            with self._watch_places.taken(context.peer().rpartition(":")[0]):
                while True:
                    yield await self._snapshot(request.flows_max, context)
                    await asyncio.sleep(interval_s)
        except NoPlaceError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"watches {error}")

    async def Explain(  # noqa: N802 - as in the .proto
        self, request: api.ExplainRequest, context: Any
    ) -> api.Explanation:
        """Explain what a request waits for, or its outcome."""
        try:
            answer = explain(self._gate, request.request_id, self._role)
            return await while_running(answer, context)
        except NotKnownError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise  # abort has raised already

    async def ListDecisions(  # noqa: N802 - as in the .proto
        self, request: api.ListDecisionsRequest, context: Any
    ) -> api.ListDecisionsResponse:
        """Return the newest decisions."""
        known = [each.value for each in Outcome]
        if request.outcome and request.outcome not in known:
            rule = f"outcome must be one of {', '.join(known)}, got {request.outcome!r}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, rule)
        recent = self._gate.recent
        newest = recent.newest(
            min(request.count_max or _DECISIONS_DEFAULT, _DECISIONS_MAX),
            priority=request.priority if request.HasField("priority") else None,
            flow_id=request.flow_id or None,
            outcome=request.outcome or None,
        )
        live = self._gate.live
        return api.ListDecisionsResponse(
            decisions=[decision_message(each, live(each.decision.request_id)) for each in newest],
            kept=len(recent),
        )

    async def Drain(  # noqa: N802 - as in the .proto
        self, _request: api.DrainRequest, _context: Any
    ) -> api.DrainResponse:
        """Start a drain."""
        return api.DrainResponse(budget=duration_message(self._drain()))

    async def EvictFlow(  # noqa: N802 - as in the .proto
        self, request: api.EvictFlowRequest, context: Any
    ) -> api.EvictFlowResponse:
        """Evict the waiting requests of one flow."""
        if not request.flow_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "flow_id must not be empty")
        key = FlowKey(request.priority, request.flow_id)
        evicted = await while_running(self._gate.evict_flow(key), context)
        return api.EvictFlowResponse(evicted=evicted)

    async def _snapshot(self, flows_max: int, context: Any) -> api.Snapshot:
        snapshot = await while_running(self._gate.snapshot(), context)
        shown = min(flows_max or _FLOWS_DEFAULT, _FLOWS_MAX)
        counts = self._log_join.counts(time.monotonic_ns())
        refusals = self._gate.inbox_refusals
        message = snapshot_message(snapshot, self._pool, refusals, counts, shown)
        if self._status is not None:
            add_status(message, self._status)
        return message

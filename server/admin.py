"""Our own gRPC API, flowcontrol.v1: what there is to see, to ask and to do.

Nothing here reads or touches the engine: questions and orders go to the processor as facts do.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, final

import grpc

from flowcontrol.request import FlowKey
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from server.admin_objectives import (
    FROM_ELSEWHERE,
    ObjectiveAccess,
    ObjectiveMethods,
    while_running,
)
from server.gate import FlowGate
from server.inquiry import NotKnownError, explain
from server.messages import decision_message, duration_message, snapshot_message
from server.settlement import Settlement

SERVICE = api.DESCRIPTOR.services_by_name["FlowControl"].full_name
_FLOWS_DEFAULT = 20
_FLOWS_MAX = 1000
_DECISIONS_DEFAULT = 50
_DECISIONS_MAX = 1000
_INTERVAL_S = (0.1, 1.0, 60.0)
"""Shortest, default and longest time between two snapshots."""


@final
class FlowControlServicer(ObjectiveMethods, api_grpc.FlowControlServicer):
    """Asks the processor, and answers.

    Args:
        gate: the way to the processor.
        pool: the name of the inference pool.
        settlement: knows what the access log has told, and what not.
        drain: begins what SIGTERM begins, and returns its budget; called again it changes nothing.
        objectives: where they come from.
    """

    def __init__(
        self,
        gate: FlowGate,
        pool: str,
        settlement: Settlement,
        drain: Callable[[], int],
        objectives: ObjectiveAccess = FROM_ELSEWHERE,
    ) -> None:
        super().__init__(gate, objectives)
        self._pool = pool
        self._settlement = settlement
        self._drain = drain

    async def GetSnapshot(  # noqa: N802 - as the .proto says
        self, request: api.GetSnapshotRequest, context: Any
    ) -> api.Snapshot:
        """Return the state now."""
        return await self._snapshot(request.flows_max, context)

    async def WatchSnapshot(  # noqa: N802 - as the .proto says
        self, request: api.WatchSnapshotRequest, context: Any
    ) -> AsyncIterator[api.Snapshot]:
        """Yield the state at the interval asked for, until the caller is gone."""
        shortest, default, longest = _INTERVAL_S
        asked = request.interval.ToNanoseconds() / 1e9
        interval_s = min(max(asked, shortest), longest) if asked else default
        while True:
            yield await self._snapshot(request.flows_max, context)
            await asyncio.sleep(interval_s)

    async def Explain(  # noqa: N802 - as the .proto says
        self, request: api.ExplainRequest, context: Any
    ) -> api.Explanation:
        """Say of one request what it waits for, or what became of it."""
        try:
            return await while_running(explain(self._gate, request.request_id), context)
        except NotKnownError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise  # abort has raised already

    async def ListDecisions(  # noqa: N802 - as the .proto says
        self, request: api.ListDecisionsRequest, _context: Any
    ) -> api.ListDecisionsResponse:
        """Return the newest decisions."""
        recent = self._gate.recent
        newest = recent.newest(
            min(request.count_max or _DECISIONS_DEFAULT, _DECISIONS_MAX),
            priority=request.priority if request.HasField("priority") else None,
            flow_id=request.flow_id or None,
            outcome=request.outcome or None,
        )
        live = self._gate.live
        return api.ListDecisionsResponse(
            decisions=[
                decision_message(each, recent, live(each.decision.request_id)) for each in newest
            ],
            kept=len(recent),
        )

    async def Drain(  # noqa: N802 - as the .proto says
        self, _request: api.DrainRequest, _context: Any
    ) -> api.DrainResponse:
        """Begin the end."""
        return api.DrainResponse(budget=duration_message(self._drain()))

    async def EvictFlow(  # noqa: N802 - as the .proto says
        self, request: api.EvictFlowRequest, context: Any
    ) -> api.EvictFlowResponse:
        """Refuse what waits of one flow."""
        if not request.flow_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "flow_id must not be empty")
        key = FlowKey(request.priority, request.flow_id)
        evicted = await while_running(self._gate.evict_flow(key), context)
        return api.EvictFlowResponse(evicted=evicted)

    async def _snapshot(self, flows_max: int, context: Any) -> api.Snapshot:
        snapshot = await while_running(self._gate.snapshot(), context)
        shown = min(flows_max or _FLOWS_DEFAULT, _FLOWS_MAX)
        counts = self._settlement.counts(time.monotonic_ns())
        return snapshot_message(snapshot, self._pool, self._gate.inbox_refusals, counts, shown)

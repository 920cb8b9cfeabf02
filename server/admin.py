"""Our own gRPC API, flowcontrol.v1: the snapshot, once or again and again."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, final

import grpc
from google.protobuf.duration_pb2 import Duration

from flowcontrol.errors import NotRunningError
from flowcontrol.snapshot import BandSnapshot, FlowSnapshot, Snapshot
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from server.admin_objectives import FROM_ELSEWHERE, ObjectiveAccess, ObjectiveMethods
from server.gate import FlowGate

SERVICE = api.DESCRIPTOR.services_by_name["FlowControl"].full_name
_FLOWS_DEFAULT = 20
_FLOWS_MAX = 1000
_INTERVAL_S = (0.1, 1.0, 60.0)
"""Shortest, default and longest time between two snapshots."""


@final
class FlowControlServicer(ObjectiveMethods, api_grpc.FlowControlServicer):
    """Answers from snapshots the processor takes on request; never touches the engine.

    Args:
        gate: whose engine it is about.
        pool: name of the pool.
        objectives: where they come from.
    """

    def __init__(
        self, gate: FlowGate, pool: str, objectives: ObjectiveAccess = FROM_ELSEWHERE
    ) -> None:
        super().__init__(gate, objectives)
        self._pool = pool

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

    async def _snapshot(self, flows_max: int, context: Any) -> api.Snapshot:
        try:
            snapshot = await self._gate.snapshot()
        except NotRunningError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise  # abort has raised already
        shown = min(flows_max or _FLOWS_DEFAULT, _FLOWS_MAX)
        return _to_message(snapshot, self._pool, self._gate.inbox_refusals, shown)


def _to_message(snapshot: Snapshot, pool: str, inbox_refusals: int, flows_max: int) -> api.Snapshot:
    message = api.Snapshot(
        pool=pool,
        saturation=snapshot.saturation,
        waiting=snapshot.waiting,
        waiting_bytes=snapshot.waiting_bytes,
        in_flight=snapshot.in_flight,
        draining=snapshot.is_draining,
        inbox_refusals=inbox_refusals,
        unknown_objectives=snapshot.unknown_objectives,
        bands=[_band(band, snapshot, flows_max) for band in snapshot.bands],
        endpoints=[
            api.Endpoint(
                address=endpoint.address,
                in_flight=endpoint.in_flight,
                saturation=endpoint.saturation,
            )
            for endpoint in snapshot.endpoints
        ],
        objectives=[
            api.Objective(name=name, priority=priority)
            for name, priority in sorted(snapshot.objectives.items())
        ],
    )
    message.time.GetCurrentTime()
    return message


def _band(band: BandSnapshot, snapshot: Snapshot, flows_max: int) -> api.Band:
    totals = snapshot.totals.get(band.priority)
    counts = {o.value: count for o, count in totals.outcomes.items()} if totals else {}
    if totals:
        counts["completed"] = totals.completed
    return api.Band(
        priority=band.priority,
        declared=band.is_declared,
        waiting=band.waiting,
        waiting_bytes=band.waiting_bytes,
        in_flight=band.in_flight,
        oldest_wait=_duration(band.oldest_wait_ns),
        ceiling=band.ceiling,
        requests_max=band.requests_max,
        bytes_max=band.bytes_max,
        flow_count=band.flow_count,
        flows=[_flow(flow) for flow in band.flows[:flows_max]],
        outcomes=[api.OutcomeCount(outcome=o, count=count) for o, count in sorted(counts.items())],
    )


def _flow(flow: FlowSnapshot) -> api.Flow:
    return api.Flow(
        flow_id=flow.flow_id,
        waiting=flow.waiting,
        waiting_bytes=flow.waiting_bytes,
        in_flight=flow.in_flight,
        oldest_wait=_duration(flow.oldest_wait_ns),
    )


def _duration(duration_ns: int | None) -> Duration | None:
    if duration_ns is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(duration_ns)
    return duration

"""Pure. Takes the snapshots that everybody who only wants to look is given."""

from heapq import nlargest

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.band import Band
from flowcontrol.controller import FlowController
from flowcontrol.flow import Flow
from flowcontrol.snapshot import (
    BandSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    LimitSnapshot,
    Snapshot,
)


def take_snapshot(controller: FlowController, now_ns: int, flows_max: int) -> Snapshot:
    """Return the state of the machine, frozen; O(bands + flows).

    Args:
        controller: read, not changed; by its owner only.
        now_ns: the time.
        flows_max: flows shown per band, those with the longest backlog.
    """
    pool = controller.pool
    saturation = pool.saturation()
    return Snapshot(
        saturation=saturation,
        waiting=controller.waiting,
        waiting_bytes=controller.capacity.bytes,
        in_flight=controller.in_flight,
        is_draining=controller.is_draining,
        bands=tuple(
            _band_snapshot(band, ceiling, now_ns, flows_max) for band, ceiling in controller.gates()
        ),
        totals={
            priority: tally.totals() for priority, tally in controller.decisions.tallies.items()
        },
        endpoints=tuple(
            EndpointSnapshot(
                endpoint.address,
                pool.loads[endpoint.address].requests if pool.picks else None,
                pool.endpoint_saturation(endpoint.address),
            )
            for endpoint in pool.endpoints
        ),
        objectives=dict(controller.bands.objectives),
        unknown_objectives=controller.bands.unknown_objectives,
        settlements=controller.settlement.seen,
        lost_settlements=controller.settlement.lost,
        limits=tuple(
            LimitSnapshot(role.value, detector.limit, detector.raised, detector.lowered)
            for role, detectors in pool.detectors.items()
            for detector in detectors
            if isinstance(detector, AdaptiveDetector)
        ),
        goodput=controller.decisions.goodput.snapshot(),
    )


def _band_snapshot(band: Band, ceiling: float, now_ns: int, flows_max: int) -> BandSnapshot:
    flows = [_flow_snapshot(flow, now_ns) for flow in band.flows.values()]
    waits = [flow.oldest_wait_ns for flow in flows if flow.oldest_wait_ns is not None]
    return BandSnapshot(
        priority=band.priority,
        is_declared=band.is_declared,
        waiting=band.waiting,
        waiting_bytes=band.capacity.bytes,
        in_flight=band.in_flight,
        oldest_wait_ns=max(waits, default=None),
        ceiling=ceiling,
        requests_max=band.settings.limits.requests_max,
        bytes_max=band.settings.limits.bytes_max,
        flow_count=len(flows),
        flows=tuple(nlargest(flows_max, flows, key=lambda flow: (flow.waiting, flow.in_flight))),
    )


def _flow_snapshot(flow: Flow, now_ns: int) -> FlowSnapshot:
    return FlowSnapshot(
        flow_id=flow.key.flow_id,
        waiting=len(flow),
        waiting_bytes=flow.capacity.bytes,
        in_flight=flow.in_flight,
        oldest_wait_ns=now_ns - flow.oldest.arrived_ns if flow else None,
    )

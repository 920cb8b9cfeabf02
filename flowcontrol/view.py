"""Pure. Takes the snapshots that everybody who only wants to look is given."""

from collections.abc import Mapping
from dataclasses import replace
from heapq import nlargest

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.band import Band
from flowcontrol.config import Concurrency, Role
from flowcontrol.controller import FlowController
from flowcontrol.flow import Flow
from flowcontrol.forecast import Ahead
from flowcontrol.pool import Detector, Pool
from flowcontrol.snapshot import (
    BandSnapshot,
    DetectorSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    MoveSnapshot,
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
            replace(
                _band_snapshot(band, ceiling, controller.config.weights, now_ns, flows_max),
                expected_wait_ns=_expected_wait_ns(
                    controller, band, now_ns, has_room=saturation < ceiling
                ),
            )
            for band, ceiling in controller.gates()
        ),
        totals={
            priority: tally.totals() for priority, tally in controller.decisions.tallies.items()
        },
        endpoints=endpoint_snapshots(controller),
        objectives=dict(controller.bands.objectives),
        unknown_objectives=controller.bands.unknown_objectives,
        detectors=detector_snapshots(pool, now_ns),
        goodput=controller.decisions.goodput.snapshot(),
    )


def _expected_wait_ns(
    controller: FlowController, band: Band, now_ns: int, *, has_room: bool
) -> int | None:
    """Return what one more would wait: nothing, where there is room and nobody before it."""
    if has_room and not band.waiting and not controller.bands.waiting_above(band):
        return 0
    return controller.forecast(band, Ahead(band.waiting), now_ns).wait_ns


def endpoint_snapshots(controller: FlowController) -> tuple[EndpointSnapshot, ...]:
    """Return every endpoint of the pool, with its load."""
    pool = controller.pool
    return tuple(
        EndpointSnapshot(
            endpoint.address,
            pool.loads[endpoint.address].requests if pool.picks else None,
            pool.endpoint_saturation(endpoint.address),
        )
        for endpoint in pool.endpoints
    )


def detector_snapshots(pool: Pool, now_ns: int) -> tuple[DetectorSnapshot, ...]:
    """Return what each detector makes of each stage that has endpoints."""
    return tuple(
        _detector_snapshot(role, len(stage.addresses), detector, now_ns)
        for role, stage in pool.stages.items()
        if stage.addresses
        for detector in pool.detectors[role]
    )


def _detector_snapshot(
    role: Role, endpoints: int, detector: Detector, now_ns: int
) -> DetectorSnapshot:
    settings, limit = detector.settings, None
    moves: tuple[MoveSnapshot, ...] = ()
    raised, lowered = None, None
    if isinstance(detector, AdaptiveDetector):
        limit, raised, lowered = detector.limit, detector.raised, detector.lowered
        moves = tuple(
            MoveSnapshot(now_ns - each.at_ns, each.address, each.before, each.after, each.reason)
            for each in detector.moves
        )
    elif isinstance(settings, Concurrency) and settings.requests_max is not None:
        limit = settings.requests_max * endpoints
    kind = type(settings).__name__.lower()
    return DetectorSnapshot(role.value, kind, detector.saturation(), limit, moves, raised, lowered)


def _band_snapshot(
    band: Band, ceiling: float, weights: Mapping[str, float], now_ns: int, flows_max: int
) -> BandSnapshot:
    all_weights = _weight_sum(band, weights)
    flows = [
        _flow_snapshot(flow, band, weights, all_weights, now_ns) for flow in band.flows.values()
    ]
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


def flow_snapshot(
    flow: Flow, band: Band, weights: Mapping[str, float], now_ns: int
) -> FlowSnapshot:
    """Return one flow of a band; O(flows of the band)."""
    return _flow_snapshot(flow, band, weights, _weight_sum(band, weights), now_ns)


def _weight_sum(band: Band, weights: Mapping[str, float]) -> float:
    return sum(weights.get(flow_id, 1.0) for flow_id in band.flows)


def _flow_snapshot(
    flow: Flow, band: Band, weights: Mapping[str, float], all_weights: float, now_ns: int
) -> FlowSnapshot:
    flow_id = flow.key.flow_id
    return FlowSnapshot(
        flow_id=flow.key.flow_id,
        waiting=len(flow),
        waiting_bytes=flow.capacity.bytes,
        in_flight=flow.in_flight,
        oldest_wait_ns=now_ns - flow.oldest.arrived_ns if flow else None,
        share=band.shares.of(flow_id),
        fair_share=weights.get(flow_id, 1.0) / all_weights,
    )

"""Pure. Takes snapshots of the engine."""

from collections.abc import Mapping
from dataclasses import replace
from heapq import nlargest
from operator import attrgetter
from typing import Final

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.auto import AutoDetector
from flowcontrol.band import Band
from flowcontrol.config import Concurrency, Role
from flowcontrol.controller import FlowController
from flowcontrol.flow import Flow
from flowcontrol.forecast import Ahead, Forecast
from flowcontrol.pool import Detector, Pool
from flowcontrol.views.snapshot import (
    BandSnapshot,
    DetectorSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    MoveSnapshot,
    Snapshot,
)

_BY_BACKLOG: Final = attrgetter("waiting", "in_flight")


_NO_WAIT: Final = Forecast(0, 0, 0)


def take_snapshot(controller: FlowController, now_ns: int, flows_max: int) -> Snapshot:
    """Return the state of the engine, frozen. O(flows + endpoints).

    Args:
        controller: not changed; only its owner may call this.
        now_ns: the time.
        flows_max: flows shown of each band, those with the longest backlogs.
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
            _with_forecast(
                _band_snapshot(band, ceiling, controller.config.weights, now_ns, flows_max),
                _next_forecast(controller, band, now_ns, has_room=saturation < ceiling),
            )
            for band, ceiling in controller.gates()
        ),
        totals={
            priority: tally.totals() for priority, tally in controller.decisions.tallies.items()
        },
        endpoints=endpoint_snapshots(controller),
        objectives=dict(controller.bands.objectives),
        unknown_objectives=controller.bands.unknown_objectives,
        limits=controller.config.limits,
        detectors=detector_snapshots(pool, now_ns),
        goodput=controller.decisions.goodput.snapshot(),
        recovered=controller.recovery.count,
    )


def _next_forecast(
    controller: FlowController, band: Band, now_ns: int, *, has_room: bool
) -> Forecast:
    """Return the forecast of one more request: no wait, if there is room and nothing is ahead."""
    if has_room and not band.waiting and not controller.bands.waiting_above(band):
        return _NO_WAIT
    return controller.forecast(band, Ahead(band.waiting), now_ns)


def _with_forecast(band: BandSnapshot, expected: Forecast) -> BandSnapshot:
    return replace(band, expected_wait_ns=expected.wait_ns, late_wait_ns=expected.late_ns)


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
    """Return the detectors of each stage that has endpoints."""
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
    if isinstance(detector, AdaptiveDetector | AutoDetector):
        limit, raised, lowered = detector.limit, detector.moves.raised, detector.moves.lowered
        moves = tuple(
            MoveSnapshot(now_ns - each.at_ns, each.address, each.before, each.after, each.reason)
            for each in detector.moves.latest
        )
    elif isinstance(settings, Concurrency) and settings.requests_max is not None:
        limit = settings.requests_max * endpoints
    kind = type(settings).__name__.lower()
    return DetectorSnapshot(role.value, kind, detector.saturation(), limit, moves, raised, lowered)


def _band_snapshot(
    band: Band, ceiling: float, weights: Mapping[str, float], now_ns: int, flows_max: int
) -> BandSnapshot:
    all_weights = _weight_sum(band, weights)
    shown = nlargest(flows_max, band.flows.values(), key=_BY_BACKLOG)
    waiting = (flow for flow in band.flows.values() if flow.waiting)
    arrived_ns = min((flow.oldest.arrived_ns for flow in waiting), default=None)
    return BandSnapshot(
        priority=band.priority,
        is_declared=band.is_declared,
        waiting=band.waiting,
        waiting_bytes=band.capacity.bytes,
        in_flight=band.in_flight,
        oldest_wait_ns=None if arrived_ns is None else now_ns - arrived_ns,
        ceiling=ceiling,
        limits=band.settings.limits,
        flow_count=len(band.flows),
        flows=tuple(_flow_snapshot(flow, band, weights, all_weights, now_ns) for flow in shown),
    )


def flow_snapshot(
    flow: Flow, band: Band, weights: Mapping[str, float], now_ns: int
) -> FlowSnapshot:
    """Return one flow of a band; O(weights)."""
    return _flow_snapshot(flow, band, weights, _weight_sum(band, weights), now_ns)


def _weight_sum(band: Band, weights: Mapping[str, float]) -> float:
    named = [weight for flow_id, weight in weights.items() if flow_id in band.flows]
    return len(band.flows) - len(named) + sum(named)


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

"""Pure. Explains one live request: what it waits for, and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from heapq import nlargest
from typing import Final, final

from flowcontrol.band import Band
from flowcontrol.controller import FlowController
from flowcontrol.flow import Lease
from flowcontrol.forecast import Forecast
from flowcontrol.picker import FULL
from flowcontrol.views.snapshot import EndpointSnapshot, FlowSnapshot
from flowcontrol.views.view import endpoint_snapshots, flow_snapshot

_FLOWS_SHOWN_MAX = 10
_SECOND_NS: Final = 1_000_000_000
_HARDLY: Final = 0.01
"""Within this part of a mean turn, one random turn in a hundred comes."""


class Gate(Enum):
    """What keeps a request waiting; the first that applies."""

    NO_ENDPOINTS = "no-endpoints"
    """The pool is empty."""
    POOL_FULL = "pool-full"
    """No endpoint has room: the saturation is 1 or more."""
    HIGHER_BAND = "higher-band"
    """A higher band has work waiting, and is itself gated."""
    CEILING = "ceiling"
    """The pool has room, but not for this band: the saturation is at its ceiling."""
    SUBSET = "subset"
    """The pool has room, but no endpoint has that the request, or the head of its flow, may go
    to."""
    PROMPTS = "prompts"
    """There is a place for it, but endpoints must read earlier prompts first."""
    TURN = "turn"
    """Nothing: it is dispatched in one of the next turns."""
    NONE = "none"
    """The request does not wait."""


@final
@dataclass(frozen=True, slots=True)
class Explanation:
    """One live request, and what it waits for."""

    request_id: int
    is_in_flight: bool
    priority: int
    flow_id: str
    objective: str | None
    age_ns: int
    """Time since its arrival."""
    deadline_in_ns: int | None
    """Time until it has waited too long; None: never, or it does not wait."""
    endpoint: str | None
    """Where it was sent, if the engine picks."""
    is_reclaimed: bool
    """Whether it is being ended for a more important request."""
    gate: Gate
    saturation: float
    ceiling: float
    """Saturation at which its band is gated."""
    gating_priority: int
    """Priority of the gated band ahead of it, or of its own."""
    in_flight: int
    """Requests in flight in the pool."""
    endpoints: tuple[EndpointSnapshot, ...]
    flow: FlowSnapshot
    """Its flow, with share and fair share."""
    position: int = 0
    """Requests ahead of it in all."""
    ahead_in_flow: int = 0
    ahead_in_band: int = 0
    """Requests ahead of it in its band, including its own flow; estimated by turns."""
    ahead_above: Mapping[int, int] = field(default_factory=dict)
    """Requests waiting in higher bands, by priority."""
    rivals: tuple[FlowSnapshot, ...] = ()
    """The other flows of its band with the longest backlogs."""
    expected_wait_ns: int | None = None
    """Wait from now within which half of all requests stay; None: unknown."""
    expected_at_arrival_ns: int | None = None
    late_wait_ns: int | None = None
    """Wait from now within which nine in ten stay; None: unknown."""
    is_hopeless: bool = False
    """Whether 99 in a hundred such requests are evicted before their turn."""


def explain(controller: FlowController, request_id: int, now_ns: int) -> Explanation | None:
    """Return what a live request waits for; None: there is no such request. O(its band)."""
    lease = controller.leases.get(request_id)
    if lease is None:
        return None
    key = lease.flow.key
    band = controller.bands.by_priority[key.priority]
    saturation = controller.pool.saturation()
    gates = controller.gates()
    ceiling = next(ceiling for each, ceiling in gates if each is band)
    gated = next(
        (
            each
            for each, limit in gates
            if each.waiting and (saturation >= limit or controller.held_until_ns(each) is not None)
        ),
        band,
    )
    above = {
        each.priority: each.waiting
        for each in controller.bands
        if each.priority > band.priority and each.waiting
    }
    forecast = controller.expected(request_id, now_ns)
    is_waiting = forecast is not None
    weights = controller.config.weights
    return Explanation(
        request_id,
        lease.is_in_flight,
        key.priority,
        key.flow_id,
        lease.request.objective,
        now_ns - lease.arrived_ns,
        None if lease.is_in_flight or lease.deadline_ns is None else lease.deadline_ns - now_ns,
        lease.endpoint,
        lease.is_reclaimed,
        _gate(controller, lease, gated, ceiling, now_ns),
        saturation,
        ceiling,
        max(gated.priority, key.priority) if is_waiting else key.priority,
        controller.in_flight,
        endpoint_snapshots(controller),
        flow_snapshot(lease.flow, band, weights, now_ns),
        position=0 if forecast is None else forecast.position,
        ahead_in_flow=lease.flow.place(lease) if is_waiting else 0,
        ahead_in_band=forecast.position - sum(above.values()) if forecast is not None else 0,
        ahead_above=above if is_waiting else {},
        rivals=tuple(
            flow_snapshot(each, band, weights, now_ns)
            for each in nlargest(
                _FLOWS_SHOWN_MAX,
                (flow for flow in band.flows.values() if flow and flow is not lease.flow),
                key=len,
            )
        ),
        expected_wait_ns=None if forecast is None else forecast.wait_ns,
        expected_at_arrival_ns=None if lease.forecast is None else lease.forecast.wait_ns,
        late_wait_ns=None if forecast is None else forecast.late_ns,
        is_hopeless=forecast is not None and _is_hopeless(lease, band, forecast, now_ns),
    )


def _is_hopeless(lease: Lease, band: Band, forecast: Forecast, now_ns: int) -> bool:
    """Whether a waiting request hardly gets a turn before its deadline. O(waiting of its flow).

    The number ahead does not show that, because those requests have deadlines, too. In a flow that
    asks for more than it gets, every request becomes the first just before it is evicted, and some
    are served then. So let the requests before it leave one after the other, by dispatch or at
    their deadlines, at the rate of the whole band, sped up by as much as the shortest wait in a
    hundred was below its raw forecast. If a turn comes in the time left in no more than one case in
    a hundred, the request is hopeless, as are most of a job whose requests arrived at once.
    """
    rate, deadline_ns = band.drain_rate.per_second(now_ns), lease.deadline_ns
    raw_ns, early_ns = forecast.raw_ns, band.calibration.early(forecast)
    if deadline_ns is None or not (rate and raw_ns and early_ns):
        return False
    if now_ns + early_ns < deadline_ns:
        return False
    turn_ns = _SECOND_NS / rate * min(1.0, early_ns / raw_ns)
    mine, first_ns = lease.flow.order_of(lease), float(now_ns)
    for each in sorted(lease.flow.leases(), key=lease.flow.order_of):
        if lease.flow.order_of(each) >= mine or first_ns > deadline_ns:
            break
        at_ns = first_ns + turn_ns
        if each.deadline_ns is not None:
            at_ns = min(at_ns, max(first_ns, each.deadline_ns))
        first_ns = at_ns
    return first_ns + _HARDLY * turn_ns > deadline_ns


def _gate(
    controller: FlowController, lease: Lease, gated: Band, ceiling: float, now_ns: int
) -> Gate:
    """Return the first gate that applies."""
    pool = controller.pool
    saturation = pool.saturation()
    is_full = saturation >= FULL
    gates = (
        (lease.is_in_flight, Gate.NONE),
        (pool.is_empty, Gate.NO_ENDPOINTS),
        (is_full and pool.held_ns(now_ns) is None, Gate.POOL_FULL),
        (is_full, Gate.PROMPTS),
        (gated.priority > lease.flow.key.priority, Gate.HIGHER_BAND),
        (saturation >= ceiling, Gate.CEILING),
        (not all(map(pool.has_room_for, _first_of_flow(lease))), Gate.SUBSET),
        (controller.held_until_ns(gated) is not None, Gate.PROMPTS),
    )
    return next((gate for holds, gate in gates if holds), Gate.TURN)


def _first_of_flow(lease: Lease) -> tuple[Lease, ...]:
    """Return a request, and the head of its flow, if any request of it waits."""
    return (lease, lease.flow.head) if lease.flow else (lease,)

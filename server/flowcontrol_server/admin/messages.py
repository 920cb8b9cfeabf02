"""Converts the engine's views to messages of our gRPC API, and those to JSON for the dashboard."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from flowcontrol.request import Outcome
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.views.explain import Explanation
from flowcontrol.views.snapshot import (
    BandSnapshot,
    DetectorSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    Snapshot,
)
from flowcontrol_server.admin.wording import classified, reason, sentences
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.common.status import ServiceStatus
from flowcontrol_server.requests.classify import Origin
from flowcontrol_server.requests.log_join import Counts
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.recent import Decided


def snapshot_message(
    snapshot: Snapshot, pool: str, inbox_refusals: int, settlements: Counts, flows_max: int
) -> api.Snapshot:
    """Return a snapshot as a message, with at most `flows_max` flows of each band."""
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
        endpoints=[_endpoint(endpoint) for endpoint in snapshot.endpoints],
        objectives=objective_messages(snapshot),
        detectors=[_detector(detector) for detector in snapshot.detectors],
        settlements=api.Settlements(**settlements._asdict()),
        limits=snapshot.limits.given(),
    )
    message.time.GetCurrentTime()
    return message


def objective_messages(snapshot: Snapshot) -> list[api.Objective]:
    """Return the objectives in effect as messages, by name."""
    return [
        api.Objective(name=name, priority=priority)
        for name, priority in sorted(snapshot.objectives.items())
    ]


def add_status(message: api.Snapshot, status: ServiceStatus) -> None:
    """Add the current problems, the version and the configuration to a snapshot."""
    for problem in status.problems():
        about, text = plain(problem.about), plain(problem.text)  # file names may not be UTF-8
        added = message.problems.add(kind=problem.kind, about=about, text=text)
        added.since.FromNanoseconds(int(problem.since_s * 1e9))
    runs = status.about()
    message.standby = not runs.is_deciding
    message.about.version = runs.version
    message.about.configuration_hash = runs.configuration
    message.about.configuration_changed.FromNanoseconds(int(runs.changed_s * 1e9))
    message.about.configuration_changes.extend(runs.changes)


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
        oldest_wait=duration_message(band.oldest_wait_ns),
        ceiling=band.ceiling,
        limits=band.limits.given(),
        flow_count=band.flow_count,
        flows=[_flow(flow) for flow in band.flows[:flows_max]],
        outcomes=[api.OutcomeCount(outcome=o, count=count) for o, count in sorted(counts.items())],
        expected_wait=duration_message(band.expected_wait_ns),
        expected_wait_p90=duration_message(band.late_wait_ns),
    )


def _detector(detector: DetectorSnapshot) -> api.Detector:
    return api.Detector(
        stage=detector.stage,
        kind=detector.kind,
        saturation=detector.saturation,
        requests_limit=detector.requests_limit,
        moves=[
            api.Move(
                ago=duration_message(move.ago_ns),
                address=move.address or "",
                before=move.before,
                after=move.after,
                reason=move.reason,
            )
            for move in detector.moves
        ],
    )


def _endpoint(endpoint: EndpointSnapshot) -> api.Endpoint:
    return api.Endpoint(
        address=endpoint.address,
        in_flight=endpoint.in_flight,
        saturation=endpoint.saturation,
    )


def _flow(flow: FlowSnapshot) -> api.Flow:
    return api.Flow(
        flow_id=flow.flow_id,
        waiting=flow.waiting,
        waiting_bytes=flow.waiting_bytes,
        in_flight=flow.in_flight,
        oldest_wait=duration_message(flow.oldest_wait_ns),
        share=flow.share,
        fair_share=flow.fair_share,
    )


def decision_message(decided: Decided, live: Parked | None) -> api.DecisionRecord:
    """Return a decision as a message; `live`: its request; None: the request has ended."""
    request, decision = decided.request, decided.decision
    in_flight_ns = None
    if decision.outcome is Outcome.DISPATCHED and live is not None:
        in_flight_ns = time.monotonic_ns() - decided.decided_ns
    time_of_day = Timestamp()
    time_of_day.FromNanoseconds(decided.wall_ns)
    return api.DecisionRecord(
        request_id=decision.request_id,
        client_request_id=decided.client_request_id,
        time=time_of_day,
        outcome=decision.outcome.value,
        reason=reason(decision),
        priority=decision.priority,
        flow_id=decision.flow_id,
        objective=request.objective or "",
        waited=duration_message(decision.waited_ns),
        expected_wait=duration_message(decision.expected_wait_ns),
        endpoint=decision.endpoint or "",
        retry_after=duration_message(decision.retry_after_ns),
        saturation=decision.saturation,
        waiting=decision.waiting,
        in_flight=duration_message(in_flight_ns),
        ended=live is None,
    )


def explanation_message(explained: Explanation, parked: Parked) -> api.Explanation:
    """Return the explanation of a live request as a message."""
    return api.Explanation(
        request_id=explained.request_id,
        client_request_id=parked.client_request_id,
        state=api.Explanation.IN_FLIGHT if explained.is_in_flight else api.Explanation.WAITING,
        sentences=sentences(explained),
        priority=explained.priority,
        flow_id=explained.flow_id,
        age=duration_message(explained.age_ns),
        deadline_in=duration_message(explained.deadline_in_ns),
        gate=None if explained.is_in_flight else explained.gate.name,
        saturation=explained.saturation,
        ceiling=explained.ceiling,
        gating_priority=explained.gating_priority,
        in_flight=explained.in_flight,
        endpoints=[_endpoint(endpoint) for endpoint in explained.endpoints],
        ahead_in_flow=explained.ahead_in_flow,
        ahead_in_band=explained.ahead_in_band,
        ahead_above=explained.ahead_above,
        flow=_flow(explained.flow),
        rivals=[_flow(flow) for flow in explained.rivals],
        expected_wait=duration_message(explained.expected_wait_ns),
        expected_wait_p90=duration_message(explained.late_wait_ns),
        expected_at_arrival=duration_message(explained.expected_at_arrival_ns),
        position=explained.position,
    )


def plain_message(message: Message) -> dict[str, Any]:
    """Return a message as JSON values, by the names of its fields.

    Unset fields are None; durations and times are seconds; texts are safe to show.
    """
    return {
        field.name: None
        if field.has_presence and not message.HasField(field.name)
        else _plain(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one for each kind of value
    match value:
        case str():
            return plain(value)
        case Duration():
            return round(value.ToNanoseconds() / 1e9, 4)
        case Timestamp():
            return value.ToNanoseconds() / 1e9
        case Message():
            return plain_message(value)
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case Sequence():
            return [_plain(each) for each in value]
        case _:
            return value


def add_origin(answer: api.Explanation, objective: str | None, origin: Origin | None) -> None:
    """Add the origins of objective and flow id to an explanation."""
    answer.objective = objective or ""
    if origin is not None:
        answer.objective_origin, answer.flow_id_origin = origin
        answer.sentences.append(classified(objective, answer.flow_id, origin))


def duration_message(duration_ns: int | None) -> Duration | None:
    """Return a duration as a message."""
    if duration_ns is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(duration_ns)
    return duration

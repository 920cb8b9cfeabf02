"""Pure. Decisions and explanations in words, the same in API, dashboard and terminal."""

from flowcontrol.events import Decision
from flowcontrol.request import Outcome, Scope
from flowcontrol.views.explain import Explanation, Gate
from flowcontrol.views.snapshot import EndpointSnapshot
from flowcontrol_server.requests.classify import Origin

_REASONS = {
    Outcome.REJECTED_CAPACITY: "the queue had no room for it",
    Outcome.REJECTED_NO_ENDPOINTS: "the pool was empty and the queue had no room for it",
    Outcome.REJECTED_DRAINING: "the service was draining",
    Outcome.EVICTED_TTL: "it waited {waited}, longer than permitted",
    Outcome.EVICTED_NO_ENDPOINTS: "it waited {waited}, longer than permitted with an empty pool",
    Outcome.EVICTED_DISPLACED: "it was displaced by another request after {waited}",
    Outcome.EVICTED_CANCELLED: "its client left after {waited}",
    Outcome.EVICTED_DRAINED: "the drain's budget ended before its turn, after {waited}",
    Outcome.EVICTED_OPERATOR: (
        "an operator evicted the waiting requests of its flow, this one after {waited}"
    ),
    Outcome.EVICTED_STOOD_DOWN: (
        "another replica decides now; its client got an error after {waited}"
    ),
    Outcome.EVICTED_MOVED: "Envoy sent it again after {waited} here",
    Outcome.RECLAIMED: "it was ended in flight for a waiting request of higher priority",
    Outcome.INTERNAL: "flow control failed",
}
_GATES = {
    Gate.NO_ENDPOINTS: "It waits because the pool has no endpoint",
    Gate.SUBSET: "It waits because no endpoint permitted for it, or for the first request of its "
    "flow, has room; other requests are dispatched meanwhile",
    Gate.PROMPTS: (
        "It waits, although a slot is free, because model servers still read prompts that were "
        "sent before"
    ),
    Gate.TURN: "Nothing blocks it; it is dispatched next",
    Gate.NONE: "Nothing blocks it; it is dispatched next",
}
_SCOPES = {
    Scope.FLOW: "the queue of its flow",
    Scope.BAND: "the queue of its band",
    Scope.ALL: "the queue of all bands",
}
_SECOND_NS = 1_000_000_000
_SHOWN_MAX = 3
_AT_ONCE_NS = 10_000_000
"""A shorter wait is the time for one turn of the processor on a busy machine."""


def reason(decision: Decision) -> str:
    """Return the reason of a decision, as a clause without a full stop."""
    load, left = _percent(decision.saturation), f"{decision.waiting} left waiting"
    if decision.outcome is not Outcome.DISPATCHED:
        why = _REASONS[decision.outcome].format(waited=duration(decision.waited_ns))
        if decision.without_room:
            scopes = " and ".join(_SCOPES[scope] for scope in decision.without_room)
            why = f"{scopes} had no room for it"
        return f"{why} ({load} saturation, {left})"
    circumstances = f"({load} saturation with it, {left})"
    if decision.waited_ns < _AT_ONCE_NS:
        return f"there was room at once {circumstances}"
    expected = ""
    if decision.expected_wait_ns is not None:
        expected = f", {duration(decision.expected_wait_ns)} expected"
    return f"its turn came after {duration(decision.waited_ns)}{expected} {circumstances}"


def sentences(explained: Explanation) -> list[str]:
    """Return the explanation of a live request, one sentence each."""
    age = duration(explained.age_ns)
    subject = f"Request {explained.request_id} of {explained.flow_id} in band {explained.priority}"
    if explained.is_in_flight:
        where = f" at {explained.endpoint}" if explained.endpoint else ""
        lines = [f"{subject} is in flight{where}; it arrived {age} ago."]
        if explained.is_reclaimed:
            lines.append("It is being ended for a waiting request of higher priority.")
        return [*lines, _share(explained)]
    expected = "remaining wait unknown: no recent dispatches"
    if explained.gate is Gate.NO_ENDPOINTS:
        expected = "its remaining wait is unknown while the pool has no endpoint"
    elif explained.expected_wait_ns is not None:
        expected = f"it is expected to wait {duration(explained.expected_wait_ns)} more"
        if explained.late_wait_ns is not None:
            expected += f", in nine of ten cases at most {duration(explained.late_wait_ns)}"
    deadline = ""
    if explained.deadline_in_ns is not None:
        deadline = f"; it is evicted in {duration(explained.deadline_in_ns)} at the latest"
        if explained.is_hopeless:
            deadline += ". It is expected to be evicted before its turn"
    return [
        f"{subject} has waited {age}.",
        f"{_gate(explained)}.",
        f"{_ahead(explained)}.",
        _share(explained),
        f"{expected[0].upper()}{expected[1:]}{deadline}.",
    ]


def classified(objective: str | None, flow_id: str, origin: Origin) -> str:
    """Return a sentence with the origins of the objective and the flow id of a request."""
    return (
        f"Its objective is {objective or 'none'} ({origin.objective}), "
        f"its flow id {flow_id} ({origin.flow_id})."
    )


def _gate(explained: Explanation) -> str:
    load, ceiling = _percent(explained.saturation), _percent(explained.ceiling)
    match explained.gate:
        case Gate.POOL_FULL:
            fullest = sorted(explained.endpoints, key=lambda each: -each.saturation)
            named = ", ".join(_endpoint(each) for each in fullest[:_SHOWN_MAX])
            return f"It waits because the pool is full: {load}, {explained.in_flight} in flight" + (
                f" ({named})" if named else ""
            )
        case Gate.HIGHER_BAND:
            return (
                f"It waits because band {explained.gating_priority} has requests waiting and is "
                f"gated itself, at {load} saturation; no lower band may overtake it"
            )
        case Gate.CEILING:
            return (
                f"It waits because its band may fill the pool to {ceiling} only, and the pool is "
                f"at {load}"
            )
        case _:
            return _GATES[explained.gate]


def _endpoint(endpoint: EndpointSnapshot) -> str:
    in_flight = "" if endpoint.in_flight is None else f"{endpoint.in_flight} in flight, "
    return f"{endpoint.address} {in_flight}{_percent(endpoint.saturation)}"


def _ahead(explained: Explanation) -> str:
    others = explained.ahead_in_band - explained.ahead_in_flow
    parts = [
        f"{count} in band {priority}"
        for priority, count in sorted(explained.ahead_above.items(), reverse=True)
    ]
    if explained.ahead_in_flow:
        parts.append(f"{explained.ahead_in_flow} of its own flow")
    if others > 0:
        parts.append(f"about {others} of other flows in its band, as they take turns")
    return f"Ahead of it: {', '.join(parts)}" if parts else "No request is ahead of it"


def _share(explained: Explanation) -> str:
    flow = explained.flow
    share, fair = _percent(flow.share), _percent(flow.fair_share)
    return f"{flow.flow_id} recently got {share} of its band's service; its fair share is {fair}."


def duration(duration_ns: int) -> str:
    """Return a duration in a readable unit: 340 ms, 4.2 s, 3 min 20 s."""
    if duration_ns < _SECOND_NS:
        return f"{duration_ns / 1e6:.0f} ms"
    seconds = duration_ns / _SECOND_NS
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    return f"{int(seconds // _MINUTE_S)} min {int(seconds % _MINUTE_S)} s"


_MINUTE_S = 60


def _percent(part: float) -> str:
    return f"{part:.0%}"

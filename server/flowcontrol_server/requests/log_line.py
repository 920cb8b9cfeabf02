"""Pure. The canonical log line of a request that is decided and gone."""

from json.encoder import encode_basestring_ascii
from typing import Final

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.requests.gate import Parked
from flowcontrol_server.requests.replies import status_of

_US_NS: Final = 1_000
_RATIO_MAX: Final = 1e6
_THOUSANDTHS: Final = tuple(f"{number:03d}" for number in range(1000))


def request_line(
    parked: Parked, decision: Decision, timestamp: str, *, continue_on_fault: bool = False
) -> str:
    """Return the line as JSON, by hand: json.dumps takes twice as long.

    Args:
        parked: the request.
        decision: about it, the last if there were two.
        timestamp: of the line, ISO 8601.
        continue_on_fault: when it was the engine that failed, the request was let on.
    """
    request, outcome = parked.request, decision.outcome
    left_ns = parked.left_ns or parked.decided_ns
    status, in_flight_ns = "null", 0
    if outcome.was_dispatched:
        in_flight_ns = max(0, left_ns - parked.decided_ns)
    if outcome is not Outcome.DISPATCHED:
        status = str(status_of(outcome, continue_on_fault=continue_on_fault) or "null")
    return (
        f'{{"event": "request_decided", "level": "info", "request_id": {request.request_id}'
        f', "client_request_id": {_quoted(parked.client_request_id)}'
        f', "flow_id": {_quoted(decision.flow_id)}'
        f', "objective": {_quoted(request.objective)}'
        f', "model": {_quoted(request.model)}'
        f', "priority": {decision.priority}'
        f', "outcome": "{outcome.value}"'
        f', "http_status": {status}'
        f', "waited_ms": {_ms(decision.waited_ns)}'
        f', "in_flight_ms": {_ms(in_flight_ns)}'
        f', "byte_size": {request.byte_size}'
        f', "saturation": {_thousandths(int(min(decision.saturation, _RATIO_MAX) * 1000 + 0.5))}'
        f', "waiting": {decision.waiting}'
        f', "endpoint": {_quoted(decision.endpoint)}'
        f', "timestamp": "{timestamp}"}}\n'
    )


def _ms(duration_ns: int) -> str:
    """Write a duration in milliseconds, to the nearest microsecond."""
    return _thousandths((duration_ns + _US_NS // 2) // _US_NS)


def _thousandths(count: int) -> str:
    """Write so many thousandths, by hand: to format a float takes ten times as long."""
    return f"{count // 1000}.{_THOUSANDTHS[count % 1000]}"


def _quoted(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)

"""Pure. The canonical log line of a request that is decided and has left."""

from json.encoder import encode_basestring_ascii
from typing import Final

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.replies import status_of

_US_NS: Final = 1_000
_RATIO_MAX: Final = 1e6
_THOUSAND: Final = 1000
_THOUSANDTHS: Final = tuple(f".{number:03d}" for number in range(_THOUSAND))
_WORDS: Final = {outcome: (outcome.value, outcome.was_dispatched) for outcome in Outcome}
"""By outcome: its name, and whether it was dispatched. An attribute of an enum runs Python code."""
_DISPATCHED: Final = Outcome.DISPATCHED
_quoted: Final = encode_basestring_ascii


def request_line(
    parked: Parked, decision: Decision, timestamp: str, *, continue_on_fault: bool = False
) -> str:
    """Return the line as JSON, formatted by hand: json.dumps takes twice as long.

    Args:
        parked: the request.
        decision: the decision about it, the last if there were two.
        timestamp: of the line, ISO 8601.
        continue_on_fault: whether the request passed if the engine failed.
    """
    request, outcome = parked.request, decision.outcome
    word, was_dispatched = _WORDS[outcome]
    left_ns = parked.left_ns or parked.decided_ns
    status, in_flight_ns = "null", 0
    if was_dispatched:
        in_flight_ns = max(0, left_ns - parked.decided_ns)
    if outcome is not _DISPATCHED:
        status = str(status_of(outcome, continue_on_fault=continue_on_fault) or "null")
    return (
        f'{{"event": "request_decided", "level": "info", "request_id": {request.request_id}'
        f', "client_request_id": {_quoted(parked.client_request_id)}'
        f', "flow_id": {_quoted(decision.flow_id)}'
        f', "objective": {_quoted_or_null(request.objective)}'
        f', "model": {_quoted(request.model)}'
        f', "priority": {decision.priority}'
        f', "outcome": "{word}"'
        f', "http_status": {status}'
        f', "waited_ms": {_ms(decision.waited_ns)}'
        f', "in_flight_ms": {_ms(in_flight_ns)}'
        f', "byte_size": {request.byte_size}'
        f', "saturation": {_thousandths(int(min(decision.saturation, _RATIO_MAX) * 1000 + 0.5))}'
        f', "waiting": {decision.waiting}'
        f', "endpoint": {_quoted_or_null(decision.endpoint)}'
        f', "timestamp": "{timestamp}"}}\n'
    )


def _ms(duration_ns: int) -> str:
    """Format a duration in milliseconds, to the nearest microsecond."""
    return _thousandths((duration_ns + _US_NS // 2) // _US_NS)


def _thousandths(count: int) -> str:
    """Format so many thousandths by hand: formatting a float takes ten times as long."""
    if count < _THOUSAND:
        return "0" + _THOUSANDTHS[count]
    return str(count // _THOUSAND) + _THOUSANDTHS[count % _THOUSAND]


def _quoted_or_null(text: str | None) -> str:
    return "null" if text is None else _quoted(text)

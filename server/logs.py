"""Logs: one canonical line per request at its end, and rare lines in the past tense.

JSON on standard error. No header values and no bodies, but for the flow id and x-request-id.
"""

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from typing import Final, final

import structlog

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from server.gate import Parked
from server.replies import REFUSALS

WRITE_WITHIN_S: Final = 0.02
_MS_NS: Final = 1_000_000
_DISPATCHED: Final = (Outcome.DISPATCHED, Outcome.RECLAIMED)
_log = structlog.get_logger()


def configure(level: str) -> None:
    """Set structlog up for the process.

    Args:
        level: debug, info, warning or error; request lines are written at info.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@final
class RequestLog:
    """The canonical lines of requests that are decided and gone.

    They are put together as requests end, and written many at once, a moment later: through
    structlog's processors, one by one, they cost as much as all else that is done for a request.

    Args:
        soon: calls what it is given within `WRITE_WITHIN_S`.
    """

    def __init__(self, soon: Callable[[Callable[[], None]], object]) -> None:
        self._soon = soon
        self._lines: list[str] = []

    def request_ended(self, parked: Parked, decision: Decision) -> None:
        """Take note of a request that is decided and gone."""
        facts = parked.facts
        left_ns = parked.left_ns or parked.decided_ns
        refused = REFUSALS.get(decision.outcome)
        status = "null" if refused is None else str(refused.status)
        in_flight_ns = 0
        if decision.outcome in _DISPATCHED:
            in_flight_ns = max(0, left_ns - parked.decided_ns)
        if not self._lines:
            self._soon(self.write)
        self._lines.append(  # by hand: json.dumps takes twice as long
            f'{{"event": "request_decided", "level": "info", "request_id": {parked.request_id}'
            f', "client_request_id": {_quoted(facts.client_request_id)}'
            f', "flow_id": {_quoted(decision.flow_id)}'
            f', "objective": {_quoted(facts.objective)}'
            f', "model": {_quoted(facts.model)}'
            f', "priority": {decision.priority}'
            f', "outcome": "{decision.outcome.value}"'
            f', "http_status": {status}'
            f', "waited_ms": {decision.waited_ns / _MS_NS:.3f}'
            f', "in_flight_ms": {in_flight_ns / _MS_NS:.3f}'
            f', "byte_size": {facts.byte_size}'
            f', "saturation": {decision.saturation:.3f}'
            f', "waiting": {decision.waiting}'
            f', "endpoint": {_quoted(decision.endpoint)}'
            f', "timestamp": "{datetime.now(UTC).isoformat(timespec="microseconds")[:26]}Z"}}\n'
        )

    def write(self) -> None:
        """Write what has been put together so far."""
        lines, self._lines = self._lines, []
        if lines and _log.is_enabled_for(logging.INFO):
            sys.stderr.write("".join(lines))
            sys.stderr.flush()


def _quoted(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)

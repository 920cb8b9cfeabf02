"""Logs: one canonical line per request at its end, and rare lines in the past tense.

JSON on standard error, as far as that takes it. No header values and no bodies, but for the flow
id and x-request-id.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from typing import Final, final

import structlog

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from server.gate import Parked
from server.log_sink import STANDARD_ERROR, Sink
from server.replies import status_of

WRITE_WITHIN_S: Final = 0.02
_MS_NS: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000


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
        logger_factory=structlog.WriteLoggerFactory(STANDARD_ERROR),  # type: ignore[arg-type]  # writes, flushes
        cache_logger_on_first_use=True,
    )


@final
class RequestLog:
    """The canonical lines of requests that are decided and gone.

    They are put together as requests end, and written many at once, a moment later: through
    structlog's processors, one by one, they cost as much as all else that is done for a request.
    Configure structlog first.

    Args:
        soon: calls what it is given within `WRITE_WITHIN_S`.
        sink: takes the lines.
    """

    def __init__(
        self, soon: Callable[[Callable[[], None]], object], sink: Sink = STANDARD_ERROR
    ) -> None:
        self._soon = soon
        self._sink = sink
        self._is_wanted = bool(structlog.get_logger().is_enabled_for(logging.INFO))
        self._lines: list[str] = []
        self._second = 0
        self._written = ""

    def request_ended(
        self, parked: Parked, decision: Decision, *, continue_on_fault: bool = False
    ) -> None:
        """Take note of a request that is decided and gone.

        Args:
            parked: the request.
            decision: about it, the last if there were two.
            continue_on_fault: when it was the engine that failed, the request was let on.
        """
        if not self._is_wanted:
            return
        facts, outcome = parked.facts, decision.outcome
        left_ns = parked.left_ns or parked.decided_ns
        status, in_flight_ns = "null", 0
        if outcome.was_dispatched:
            in_flight_ns = max(0, left_ns - parked.decided_ns)
        if outcome is not Outcome.DISPATCHED:
            status = str(status_of(outcome, continue_on_fault=continue_on_fault) or "null")
        if not self._lines:
            self._soon(self.write)
        self._lines.append(  # by hand: json.dumps takes twice as long
            f'{{"event": "request_decided", "level": "info", "request_id": {parked.request_id}'
            f', "client_request_id": {_quoted(facts.client_request_id)}'
            f', "flow_id": {_quoted(decision.flow_id)}'
            f', "objective": {_quoted(facts.objective)}'
            f', "model": {_quoted(facts.model)}'
            f', "priority": {decision.priority}'
            f', "outcome": "{outcome.value}"'
            f', "http_status": {status}'
            f', "waited_ms": {decision.waited_ns / _MS_NS:.3f}'
            f', "in_flight_ms": {in_flight_ns / _MS_NS:.3f}'
            f', "byte_size": {facts.byte_size}'
            f', "saturation": {decision.saturation:.3f}'
            f', "waiting": {decision.waiting}'
            f', "endpoint": {_quoted(decision.endpoint)}'
            f', "timestamp": "{self._timestamp()}"}}\n'
        )

    def _timestamp(self) -> str:
        """Return the time as structlog writes it; of that the second is written once."""
        second, rest_ns = divmod(time.time_ns(), _SECOND_NS)
        if second != self._second:
            self._second = second
            self._written = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._written}.{rest_ns // 1000:06d}Z"

    def write(self) -> None:
        """Write what has been put together so far."""
        lines, self._lines = self._lines, []
        if lines:
            self._sink.write("".join(lines))


def _quoted(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)

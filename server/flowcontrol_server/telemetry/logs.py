"""Logs: one canonical line per request at its end, and rare lines in the past tense.

JSON on standard error, as far as that takes it. No header values and no bodies, but for the flow
id and x-request-id.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, final

import structlog

from flowcontrol.events import Decision
from flowcontrol_server.requests.gate import Parked
from flowcontrol_server.requests.log_line import request_line
from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR, Sink

WRITE_WITHIN_S: Final = 0.02
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
        if not self._lines:
            self._soon(self.write)
        self._lines.append(
            request_line(parked, decision, self._timestamp(), continue_on_fault=continue_on_fault)
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

"""Logs: one canonical line for each request at its end, and rare other lines.

They are JSON on standard error; lines that it does not take are dropped. They contain no header
values and no bodies, except the flow id and x-request-id.
"""

import logging
from collections.abc import Callable
from typing import Final

import structlog

from flowcontrol_server.requests.request_log import RequestLog
from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR, Sink

WRITE_WITHIN_S: Final = 0.02
_TRACEBACKS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
"""Without the values of variables, such as headers, credentials and tokens."""


def configure(level: str) -> None:
    """Set structlog up for the process.

    Args:
        level: debug, info, warning or error; request lines are written at info.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _TRACEBACKS,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(STANDARD_ERROR),  # type: ignore[arg-type]  # writes, flushes
        cache_logger_on_first_use=True,
    )


def request_log(
    soon: Callable[[Callable[[], None]], object], sink: Sink = STANDARD_ERROR
) -> RequestLog:
    """Return the writer of the canonical lines, at level info; configure structlog first.

    Args:
        soon: calls its argument within `WRITE_WITHIN_S`.
        sink: takes the lines.
    """
    is_wanted = bool(structlog.get_logger().is_enabled_for(logging.INFO))
    return RequestLog(soon, sink.write, is_wanted=is_wanted)

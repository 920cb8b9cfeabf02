"""Logs: one canonical line per request at its end, and rare lines in the past tense.

JSON on standard error. No header values and no bodies, but for the flow id and x-request-id.
"""

import logging
import sys

import structlog

from flowcontrol.events import Decision
from server.gate import Parked
from server.replies import REFUSALS

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


def request_ended(parked: Parked, decision: Decision) -> None:
    """Write the canonical line of a request that is decided and gone."""
    refused = REFUSALS.get(decision.outcome)
    in_flight_ns = max(0, (parked.left_ns or parked.decided_ns) - parked.decided_ns)
    _log.info(
        "request_decided",
        request_id=parked.request_id,
        client_request_id=parked.facts.client_request_id,
        flow_id=decision.flow_id,
        objective=parked.facts.objective,
        model=parked.facts.model,
        priority=decision.priority,
        outcome=decision.outcome.value,
        http_status=None if refused is None else refused.status,
        waited_ms=_ms(decision.waited_ns),
        in_flight_ms=_ms(in_flight_ns if decision.outcome.was_dispatched else 0),
        byte_size=parked.facts.byte_size,
        saturation=round(decision.saturation, 3),
        waiting=decision.waiting,
        endpoint=decision.endpoint,
    )


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1_000_000, 3)

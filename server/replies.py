"""Pure. What a client is told: the one table from outcomes to HTTP."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, final

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol.retry import retry_after_s
from server.dialects import Dialect, content_type_of, error_body

REASON_HEADER = "x-llm-d-request-dropped-reason"
REFUSALS_MAX = 2_048
"""Room for all that differ: by outcome, dialect and Retry-After, none or up to 30 s. Each is made
once, when it first comes: to make them was a quarter of what it costs to expire a whole queue."""


class Refused(NamedTuple):
    """How one outcome looks to a client."""

    status: int
    reason: str
    message: str
    grpc_status: int


_RESOURCE_EXHAUSTED, _INTERNAL, _UNAVAILABLE, _CANCELLED = 8, 13, 14, 1

REFUSALS = {
    Outcome.REJECTED_CAPACITY: Refused(
        429, "rejected-saturated", "the queue for this request is full", _RESOURCE_EXHAUSTED
    ),
    Outcome.REJECTED_NO_ENDPOINTS: Refused(
        503, "rejected-no-endpoints", "no model server is available", _UNAVAILABLE
    ),
    Outcome.REJECTED_DRAINING: Refused(
        503, "rejected-shutting-down", "this gateway is shutting down", _UNAVAILABLE
    ),
    Outcome.EVICTED_TTL: Refused(
        429, "rejected-ttl-expired", "the request waited too long for its turn", _RESOURCE_EXHAUSTED
    ),
    Outcome.EVICTED_NO_ENDPOINTS: Refused(
        503, "rejected-no-endpoints", "no model server became available in time", _UNAVAILABLE
    ),
    Outcome.EVICTED_DISPLACED: Refused(
        429,
        "evicted-priority",
        "the queue is full, and another request took the place",
        _RESOURCE_EXHAUSTED,
    ),
    Outcome.EVICTED_CANCELLED: Refused(
        499, "rejected-context-cancelled", "the client went away", _CANCELLED
    ),
    Outcome.EVICTED_DRAINED: Refused(
        503, "rejected-shutting-down", "this gateway is shutting down", _UNAVAILABLE
    ),
    Outcome.EVICTED_OPERATOR: Refused(
        429, "evicted-operator", "an operator cleared this queue", _RESOURCE_EXHAUSTED
    ),
    Outcome.RECLAIMED: Refused(
        429, "evicted", "ended for a request of higher priority", _RESOURCE_EXHAUSTED
    ),
    Outcome.INTERNAL: Refused(500, "internal", "flow control failed", _INTERNAL),
}
"""Every outcome but DISPATCHED. Statuses and reasons are those of the reference implementation.

429: there is capacity, others hold it. 503: there is none.
"""


@final
@dataclass(slots=True)
class Proceed:
    """Let the request go on, to `endpoint` where the engine is the picker."""

    request_id: int
    priority: int
    waited_ns: int
    endpoint: str | None = None
    fallbacks: tuple[str, ...] = ()
    """Where to send it if it cannot be sent there, best first."""
    headroom: float = 0.0
    """Room left in the pool just after, from 0 to 1."""
    position: int = 0
    """How many stood ahead of it when it began to wait."""
    awaits_answer: bool = False
    """Whether we want to be told when the response begins."""


class EnginePriority(NamedTuple):
    """How a model server that schedules by priority is told of the band."""

    header: str
    sign: int
    """1 where it serves larger numbers first, as we do; -1 where smaller ones."""


ENGINE_PRIORITIES = {
    "vllm": EnginePriority("x-vllm-priority", -1),
    "sglang": EnginePriority("x-override-priority", 1),
}
"""Both let the header overrule the `priority` of the body, which Envoy cannot change unbuffered."""


@final
@dataclass(frozen=True, slots=True)
class Exempt:
    """Let the request go on as if we were not there."""


@final
@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the client in place of the model server."""

    status: int
    reason: str
    """Also the response code details in Envoy's access log."""
    body: bytes
    grpc_status: int
    retry_after_s: int | None = None
    content_type: str = "application/json"


Answer = Proceed | Exempt | Refuse


def answer(
    decision: Decision,
    chance: float,
    dialect: Dialect = Dialect.OPENAI,
    *,
    continue_on_fault: bool = False,
) -> Answer:
    """Put a decision into words for Envoy.

    Args:
        decision: of the engine, or of the gate when the engine has failed.
        chance: from 0 to 1, spreads Retry-After so that a crowd does not come back as one.
        dialect: how its client wants to be told.
        continue_on_fault: let a request on, ungated, when it was the engine that failed.
    """
    if decision.outcome is Outcome.DISPATCHED:
        return Proceed(
            decision.request_id,
            decision.priority,
            decision.waited_ns,
            decision.endpoint,
            decision.fallbacks,
            headroom=max(0.0, 1.0 - decision.saturation),
            position=decision.position,
            awaits_answer=decision.awaits_answer,
        )
    if status_of(decision.outcome, continue_on_fault=continue_on_fault) is None:
        return Exempt()
    return refusal(decision, chance, dialect)


def status_of(outcome: Outcome, *, continue_on_fault: bool) -> int | None:
    """Return the HTTP status a client is told; None: its request goes on, gated or not."""
    if outcome is Outcome.DISPATCHED or (outcome is Outcome.INTERNAL and continue_on_fault):
        return None
    return REFUSALS[outcome].status


def refusal(decision: Decision, chance: float, dialect: Dialect = Dialect.OPENAI) -> Refuse:
    """Put any other decision than to dispatch into words for Envoy.

    Args:
        decision: of the engine, or of the gate when the engine has failed.
        chance: from 0 to 1, as for `answer`.
        dialect: how its client wants to be told.
    """
    return _refusal(decision.outcome, dialect, retry_after_s(decision.retry_after_ns, chance))


@lru_cache(REFUSALS_MAX)
def _refusal(outcome: Outcome, dialect: Dialect, retry_after_s: int | None) -> Refuse:
    refused = REFUSALS[outcome]
    return Refuse(
        refused.status,
        refused.reason,
        error_body(dialect, refused.status, refused.reason, refused.message),
        refused.grpc_status,
        retry_after_s,
        content_type_of(dialect),
    )

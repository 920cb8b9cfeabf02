"""Pure. Answers to clients: the table from outcomes to HTTP."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, final

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol.retry import retry_after_s
from flowcontrol_server.requests.dialects import Dialect, content_type_of, error_body

REASON_HEADER: Final = "x-llm-d-request-dropped-reason"
DURATION_HEADER: Final = "x-llm-d-flow-queue-duration-ms"
BAND_HEADER: Final = "x-llm-d-flow-priority"
LIMIT_HEADER: Final = "x-llm-d-flow-limit"
"""The limits that refused the request: of its flow, its band, all bands, or a time."""
SHOULD_RETRY_HEADER: Final = "x-should-retry"
"""Read by the official clients of OpenAI and Anthropic, which retry 429 twice by themselves."""
PUSHBACK_HEADER: Final = "grpc-retry-pushback-ms"
"""Read by gRPC clients with a retry policy, which ignore Retry-After. Negative: no retry at
all."""
REFUSALS_MAX: Final = 2_048
"""Refusals that are cached. Those of one second differ by outcome, dialect, band, Retry-After and
seconds waited. Building each of them was a quarter of the cost of expiring a queue."""
_RETRY_AFTER_MAX_S: Final = 30
_SECOND_NS: Final = 1_000_000_000


class Refused(NamedTuple):
    """The answer to a client for one outcome."""

    status: int
    reason: str
    message: str
    grpc_status: int


_RESOURCE_EXHAUSTED, _INTERNAL, _UNAVAILABLE, _CANCELLED = 8, 13, 14, 1
UNREACHABLE: Final = Refused(
    503, "rejected-unavailable", "flow control is not available", _UNAVAILABLE
)
"""The answer of Envoy itself while this service is unreachable (`envoy-config`)."""
UNREACHABLE_RETRY_S: Final = 5
"""Retry-After of that answer. Envoy has tried for 15 s by then."""

REFUSALS: Final = {
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
    Outcome.EVICTED_STOOD_DOWN: UNREACHABLE,
    Outcome.RECLAIMED: Refused(
        429, "evicted", "ended for a request of higher priority", _RESOURCE_EXHAUSTED
    ),
    Outcome.INTERNAL: Refused(500, "internal", "flow control failed", _INTERNAL),
}
"""Every outcome that clients see. Statuses and reasons are those of the reference implementation.

429: the capacity is in use by others. 503: there is no capacity.
"""

_UNANSWERED: Final = (Outcome.DISPATCHED, Outcome.EVICTED_MOVED)
_TIMES: Final[dict[Outcome, tuple[str, ...]]] = {
    Outcome.EVICTED_TTL: ("ttl",),
    Outcome.EVICTED_NO_ENDPOINTS: ("no-endpoint-ttl",),
}
"""Outcomes of a limit on time, with the name of the limit."""


class EnginePriority(NamedTuple):
    """How the band is passed to a model server that schedules by priority."""

    header: str
    sign: int
    """1: it serves larger numbers first, as this service does; -1: smaller ones."""


ENGINE_PRIORITIES: Final = {
    "vllm": EnginePriority("x-vllm-priority", -1),
    "sglang": EnginePriority("x-override-priority", 1),
}
"""In both, the header overrides `priority` in the body, which Envoy cannot change unbuffered."""


@final
@dataclass(frozen=True, slots=True)
class Exempt:
    """Let the request pass as if this service did not exist."""


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
    headers: tuple[tuple[str, str], ...] = ()
    """Further headers."""

    def __hash__(self) -> int:
        """Return the hash of the body, which bytes cache; one of all fields would not be cached."""
        return hash(self.body)


Answer = Decision | Exempt | Refuse
"""A decision as an answer dispatches its request."""


def answer(
    decision: Decision,
    chance: float,
    dialect: Dialect = Dialect.OPENAI,
    *,
    continue_on_fault: bool = False,
) -> Answer:
    """Return the answer to Envoy for a decision.

    Args:
        decision: of the engine, or of the gate when the engine has failed.
        chance: from 0 to 1, spreads Retry-After so that clients do not all come back at once.
        dialect: error format of its client.
        continue_on_fault: let the request pass ungated if the engine failed.
    """
    if decision.outcome is Outcome.DISPATCHED:
        return decision
    if decision.outcome is Outcome.EVICTED_MOVED:
        return unavailable(dialect)  # for a client that still waits
    if status_of(decision.outcome, continue_on_fault=continue_on_fault) is None:
        return Exempt()
    return refusal(decision, chance, dialect)


def status_of(outcome: Outcome, *, continue_on_fault: bool) -> int | None:
    """Return the HTTP status a client gets; None: its request goes on, here or elsewhere."""
    if outcome in _UNANSWERED or (outcome is Outcome.INTERNAL and continue_on_fault):
        return None
    return REFUSALS[outcome].status


def refusal(decision: Decision, chance: float, dialect: Dialect = Dialect.OPENAI) -> Refuse:
    """Return the answer to Envoy for any decision but a dispatch.

    Args:
        decision: of the engine, or of the gate when the engine has failed.
        chance: from 0 to 1, as for `answer`.
        dialect: error format of its client.
    """
    waited_s = decision.waited_ns // _SECOND_NS
    retry_s = retry_after_s(decision.retry_after_ns, chance)
    if retry_s is None and decision.outcome is Outcome.EVICTED_DISPLACED:
        retry_s = min(max(1, waited_s), _RETRY_AFTER_MAX_S)  # no rate of dispatches is known
    limits = _TIMES.get(decision.outcome)
    if limits is None:
        limits = tuple([scope.value for scope in decision.without_room])
    return _refusal(decision.outcome, dialect, retry_s, decision.priority, waited_s, limits)


@lru_cache
def unavailable(dialect: Dialect) -> Refuse:
    """Return the answer if another replica decides and Envoy cannot ask it.

    It is the same as Envoy's own answer while no replica is reachable.
    """
    status, reason, message, grpc_status = UNREACHABLE
    return Refuse(
        status,
        reason,
        error_body(dialect, status, reason, message),
        grpc_status,
        UNREACHABLE_RETRY_S,
        content_type_of(dialect),
        _pushback(dialect, UNREACHABLE_RETRY_S),
    )


@lru_cache(REFUSALS_MAX)
def _refusal(  # noqa: PLR0913, PLR0917 - all that refusals differ in
    outcome: Outcome,
    dialect: Dialect,
    retry_after_s: int | None,
    priority: int,
    waited_s: int,
    limits: tuple[str, ...],
) -> Refuse:
    refused = REFUSALS[outcome]
    is_internal = outcome is Outcome.INTERNAL
    circumstances = [f"waited {waited_s} s"] if waited_s else []
    circumstances.append(f"band {priority}")
    headers = [(BAND_HEADER, str(priority)), (DURATION_HEADER, str(waited_s * 1000))]
    if limits:
        circumstances.append(f"limit reached: {', '.join(limits)}")
        headers.append((LIMIT_HEADER, ", ".join(limits)))
    if outcome is Outcome.EVICTED_TTL:  # it has waited its time; a retry would double that
        headers.append((SHOULD_RETRY_HEADER, "false"))
        headers += _pushback(dialect, -1)
    elif retry_after_s is not None:
        headers += _pushback(dialect, retry_after_s)
    message = refused.message if is_internal else f"{refused.message} ({', '.join(circumstances)})"
    return Refuse(
        refused.status,
        refused.reason,
        error_body(dialect, refused.status, refused.reason, message),
        refused.grpc_status,
        retry_after_s,
        content_type_of(dialect),
        () if is_internal else tuple(headers),
    )


def _pushback(dialect: Dialect, seconds: int) -> tuple[tuple[str, str], ...]:
    """Return when a gRPC client is to come back; nothing for others."""
    return ((PUSHBACK_HEADER, str(seconds * 1000)),) if dialect is Dialect.GRPC else ()

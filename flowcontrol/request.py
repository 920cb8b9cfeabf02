"""Pure. A request as the engine knows it, and the ways it can end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, final

DEFAULT_FLOW_ID = "default-flow"
DEFAULT_PRIORITY = 0
"""Of a request that names no known objective; the InferenceObjective CRD's own default."""


class FlowKey(NamedTuple):
    """Names one flow: the requests of one tenant at one priority.

    A larger priority is served first. A negative priority is sheddable.
    """

    priority: int
    flow_id: str


class Scope(Enum):
    """What a limit on waiting requests is of."""

    FLOW = "flow"
    BAND = "band"
    ALL = "all"


@final
@dataclass(slots=True)
class Request:
    """What the gate tells the engine of a request. Never changed after it is handed over."""

    request_id: int
    """Unique in this process; drawn from a counter, never the client's own id."""
    flow_id: str = DEFAULT_FLOW_ID
    objective: str | None = None
    """Name of the InferenceObjective; the engine alone knows which priority that means."""
    byte_size: int = 0
    """Size of the request as announced; what the byte limits count."""
    ttl_ns: int | None = None
    """How long the client is willing to wait, from arrival; can only shorten the band's own."""
    input_tokens: int | None = None
    """Tokens of the prompt, where Envoy knows them; else estimated from the byte size."""
    output_tokens_max: int | None = None
    """The most tokens the client asked for."""
    ttft_slo_ns: int | None = None
    """When its first token is due, from arrival."""
    model: str = ""
    """Names what is alike in output length."""
    subset: tuple[str, ...] | None = None
    """Endpoints it may go to, where the engine picks; None: any."""


class Outcome(Enum):
    """What became of a request. The value is the word used in logs, metrics and the API.

    Reject: never queued. Evict: queued, then removed undispatched.
    """

    __hash__ = object.__hash__  # members are single; Enum's own is Python, and asked at each count

    DISPATCHED = "dispatched"
    REJECTED_CAPACITY = "rejected-capacity"
    REJECTED_NO_ENDPOINTS = "rejected-no-endpoints"
    REJECTED_DRAINING = "rejected-draining"
    EVICTED_TTL = "evicted-ttl"
    EVICTED_NO_ENDPOINTS = "evicted-no-endpoints"
    EVICTED_DISPLACED = "evicted-displaced"
    EVICTED_CANCELLED = "evicted-cancelled"
    EVICTED_DRAINED = "evicted-drained"
    EVICTED_OPERATOR = "evicted-operator"
    RECLAIMED = "reclaimed"
    """Ended in flight for a better waiting request."""
    INTERNAL = "internal"
    """The engine failed; decided by the gate, because nobody else is left to decide."""

    @property
    def was_dispatched(self) -> bool:
        """Whether the request reached a model server."""
        return self in _REACHED

    @property
    def group(self) -> "Group":
        """What it is counted as where few numbers have room."""
        if self is Outcome.DISPATCHED:
            return Group.DISPATCHED
        return Group.REFUSED if self in _REFUSED else Group.EVICTED


class Group(Enum):
    """Outcomes that mean much the same to whoever looks at many."""

    DISPATCHED = "dispatched"
    REFUSED = "refused"
    """Rejected, or the engine failed."""
    EVICTED = "evicted"
    """Evicted, or reclaimed: it had been taken in, and was ended all the same."""


_REACHED = (Outcome.DISPATCHED, Outcome.RECLAIMED)
_REFUSED = (
    Outcome.REJECTED_CAPACITY,
    Outcome.REJECTED_NO_ENDPOINTS,
    Outcome.REJECTED_DRAINING,
    Outcome.INTERNAL,
)


def by_group(counts: Mapping[Outcome, int]) -> Counter[Group]:
    """Return how many outcomes there were of each group."""
    groups: Counter[Group] = Counter()
    for outcome, count in counts.items():
        groups[outcome.group] += count
    return groups

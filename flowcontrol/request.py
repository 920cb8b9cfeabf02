"""Pure. A request as the engine knows it, and the ways it can end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, final

DEFAULT_FLOW_ID: Final = "default-flow"
DEFAULT_PRIORITY: Final = 0
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
@dataclass(slots=True, init=False)
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
    prefix: tuple[int, ...] = ()
    """Hashes of the blocks its prompt begins with, each over all before it too; empty: unknown."""
    arrived_ns: int | None = None
    """When it came, monotonic: before it was handed over, and long before if it waited at another
    replica. None: in the turn that takes it in."""

    def __init__(  # noqa: PLR0913, PLR0917 - its fields; as in `events`
        self,
        request_id: int,
        flow_id: str = DEFAULT_FLOW_ID,
        objective: str | None = None,
        byte_size: int = 0,
        ttl_ns: int | None = None,
        input_tokens: int | None = None,
        output_tokens_max: int | None = None,
        ttft_slo_ns: int | None = None,
        model: str = "",
        subset: tuple[str, ...] | None = None,
        prefix: tuple[int, ...] = (),
        arrived_ns: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.flow_id = flow_id
        self.objective = objective
        self.byte_size = byte_size
        self.ttl_ns = ttl_ns
        self.input_tokens = input_tokens
        self.output_tokens_max = output_tokens_max
        self.ttft_slo_ns = ttft_slo_ns
        self.model = model
        self.subset = subset
        self.prefix = prefix
        self.arrived_ns = arrived_ns


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
    EVICTED_STOOD_DOWN = "evicted-stood-down"
    """Another replica decides now, and this request cannot be moved there: its client is told."""
    EVICTED_MOVED = "evicted-moved"
    """Another replica decides now, and Envoy asks it; the client is told nothing here."""
    RECLAIMED = "reclaimed"
    """Ended in flight for a better waiting request."""
    INTERNAL = "internal"
    """The engine failed; decided by the gate, because the engine no longer can."""

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
    """Outcomes that mean much the same where many are looked at."""

    DISPATCHED = "dispatched"
    REFUSED = "refused"
    """Rejected, or the engine failed."""
    EVICTED = "evicted"
    """Evicted, or reclaimed: it had been taken in, and was ended all the same."""


_REACHED: Final = (Outcome.DISPATCHED, Outcome.RECLAIMED)
_REFUSED: Final = (
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

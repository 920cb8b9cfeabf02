"""Pure. A request as the engine knows it, and the ways it can end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, final

DEFAULT_FLOW_ID: Final = "default-flow"
DEFAULT_PRIORITY: Final = 0
"""Priority of a request without a known objective, as in the InferenceObjective CRD."""


class FlowKey(NamedTuple):
    """Names one flow: the requests of one tenant at one priority.

    A larger priority is served first. A negative priority is sheddable.
    """

    priority: int
    flow_id: str


class Scope(Enum):
    """The scope of a limit on waiting requests."""

    FLOW = "flow"
    BAND = "band"
    ALL = "all"


@final
@dataclass(slots=True, init=False)
class Request:
    """A request as the gate describes it to the engine. Never changed after the hand-over."""

    request_id: int
    """Unique in this process; from a counter, never the client's own id."""
    flow_id: str = DEFAULT_FLOW_ID
    objective: str | None = None
    """Name of the InferenceObjective; the engine alone maps it to a priority."""
    byte_size: int = 0
    """Announced size of the request, which the byte limits count."""
    ttl_ns: int | None = None
    """How long the client is willing to wait, from arrival; only shortens the band's limit."""
    input_tokens: int | None = None
    """Tokens of the prompt, if Envoy knows them; None: estimated from the byte size."""
    output_tokens_max: int | None = None
    """The most tokens the client asked for."""
    ttft_slo_ns: int | None = None
    """When its first token is due, from arrival."""
    model: str = ""
    """Requests of one model are taken to have similar output lengths."""
    subset: tuple[str, ...] | None = None
    """Endpoints it may go to, if the engine picks; None: any."""
    prefix: tuple[int, ...] = ()
    """Hashes of the first blocks of its prompt, each over all before it, too; empty: unknown."""
    arrived_ns: int | None = None
    """When it arrived, monotonic: before the hand-over, and long before it if it waited at another
    replica. None: the time of the turn that takes it in."""

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
    """The outcome of a request. The value is the word used in logs, metrics and the API.

    Rejected: never queued. Evicted: queued, then removed undispatched.
    """

    __hash__ = object.__hash__  # members are singletons; Enum's own is slow, and called often

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
    """Another replica decides now, and the request cannot be moved: the client gets an error."""
    EVICTED_MOVED = "evicted-moved"
    """Envoy asks again, because another replica decides now or for its next attempt; the client
    does not see it."""
    RECLAIMED = "reclaimed"
    """Ended in flight for a more important waiting request."""
    INTERNAL = "internal"
    """The engine failed; set by the gate, because the engine no longer decides."""

    @property
    def was_dispatched(self) -> bool:
        """Whether the request reached a model server."""
        return self in _REACHED

    @property
    def group(self) -> "Group":
        """The group it belongs to in summaries."""
        if self is Outcome.DISPATCHED:
            return Group.DISPATCHED
        return Group.REFUSED if self in _REFUSED else Group.EVICTED


class Group(Enum):
    """Outcomes with much the same meaning, for summaries."""

    DISPATCHED = "dispatched"
    REFUSED = "refused"
    """Rejected, or the engine failed."""
    EVICTED = "evicted"
    """Evicted or reclaimed: accepted first, and then ended."""


_REACHED: Final = (Outcome.DISPATCHED, Outcome.RECLAIMED)
_REFUSED: Final = (
    Outcome.REJECTED_CAPACITY,
    Outcome.REJECTED_NO_ENDPOINTS,
    Outcome.REJECTED_DRAINING,
    Outcome.INTERNAL,
)


def by_group(counts: Mapping[Outcome, int]) -> Counter[Group]:
    """Return the number of outcomes in each group."""
    groups: Counter[Group] = Counter()
    for outcome, count in counts.items():
        groups[outcome.group] += count
    return groups

"""Pure. The facts that the engine takes in, and the decisions that it returns.

Facts are plain classes with slots, built once and never changed after they are put into the inbox.
Facts that come with every request have an explicit constructor, because the one of a dataclass
stays interpreted where this module is compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

from flowcontrol.config import ControllerConfig, Role
from flowcontrol.memory import EngineMemory
from flowcontrol.request import Outcome, Request, Scope


@final
@dataclass(slots=True, init=False)
class Arrived:
    """A request has arrived and wants to be dispatched."""

    request: Request

    def __init__(self, request: Request) -> None:
        self.request = request


@final
@dataclass(slots=True, init=False)
class Left:
    """The stream of a request has ended, for any reason.

    The gate need not know whether the request was still waiting: a decision may be on its way.
    """

    request_id: int
    outcome: Outcome = Outcome.EVICTED_CANCELLED
    """Its outcome if it was waiting: its client left, or this replica stood down."""

    def __init__(self, request_id: int, outcome: Outcome = Outcome.EVICTED_CANCELLED) -> None:
        self.request_id = request_id
        self.outcome = outcome


@final
@dataclass(slots=True)
class Answered:
    """The first byte of a response has been seen."""

    request_id: int
    endpoint: str = ""
    """The endpoint that served it, not always the one picked; empty: unknown."""


@final
@dataclass(slots=True, init=False)
class Settled:
    """Actual usage of a finished request, from Envoy's access log; before or after `Left`.

    None: unknown, because the response had no usage, or no first byte.
    """

    request_id: int
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    ttft_ns: int | None = None
    """Time from the dispatch to the first byte of the response's body."""
    generation_ns: int | None = None
    """Time from that first byte to the last."""
    is_success: bool = True
    """Whether the model server answered below 400."""
    was_turned_away: bool = False
    """Whether the model server refused it for lack of room: 429 or 503."""
    was_answered: bool = True
    """False: its client left before a response had begun."""
    was_sent: bool = True
    """False: it could not be sent, and another attempt was dispatched in its place."""

    def __init__(  # noqa: PLR0913, PLR0917 - its fields
        self,
        request_id: int,
        input_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
        ttft_ns: int | None = None,
        generation_ns: int | None = None,
        is_success: bool = True,  # noqa: FBT001, FBT002 - a field
        was_turned_away: bool = False,  # noqa: FBT001, FBT002 - a field
        was_answered: bool = True,  # noqa: FBT001, FBT002 - a field
        was_sent: bool = True,  # noqa: FBT001, FBT002 - a field
    ) -> None:
        self.request_id = request_id
        self.input_tokens = input_tokens
        self.cached_tokens = cached_tokens
        self.output_tokens = output_tokens
        self.ttft_ns = ttft_ns
        self.generation_ns = generation_ns
        self.is_success = is_success
        self.was_turned_away = was_turned_away
        self.was_answered = was_answered
        self.was_sent = was_sent


@final
@dataclass(slots=True)
class LoadObserved:
    """The load that an endpoint reported in one scrape."""

    address: str
    waiting: int
    """Requests queued inside the engine."""
    running: int | None
    """Requests being processed; None: not reported."""
    kv_usage: float | None
    """Part of the KV cache in use, 0 to 1; None: not reported, which is never taken for zero."""
    kv_tokens: int | None = None
    """Tokens that its KV cache holds; None: not reported."""


@final
@dataclass(slots=True)
class ObjectivesChanged:
    """The whole set of declared objectives, name to priority, which defines the bands."""

    priorities: Mapping[str, int]


class Endpoint(NamedTuple):
    """One model server."""

    address: str
    """host:port, an IPv6 host in brackets."""
    role: Role = Role.BOTH


@final
@dataclass(slots=True)
class EndpointsChanged:
    """The whole set of endpoints the pool now has, as host:port."""

    addresses: tuple[str, ...]
    roles: Mapping[str, Role] = field(default_factory=dict)
    """Roles of endpoints that do not do everything."""


@final
@dataclass(slots=True)
class Reconfigured:
    """Other settings, in force from now on, for waiting requests, too."""

    config: ControllerConfig


@final
@dataclass(slots=True)
class FlowEvicted:
    """An operator evicts all waiting requests of a flow; those in flight go on."""

    priority: int
    flow_id: str


@final
@dataclass(slots=True)
class DrainBegan:
    """Refuse arrivals from now on; evict what still waits when the budget has passed."""

    budget_ns: int


@final
@dataclass(slots=True)
class RecoveredLease:
    """A request that another process dispatched and that may still be in flight."""

    ticket: str
    """Identifies it in Envoy's access log."""
    endpoint: str | None = None
    """Where it was sent; None: Envoy chose."""
    tokens: float = 0.0
    """Estimated tokens of prompt and answer."""
    age_ns: int = 0
    """Time since its dispatch."""


@final
@dataclass(slots=True)
class LeasesRecovered:
    """Requests in flight when this process began to decide; replaces earlier ones."""

    leases: tuple[RecoveredLease, ...] = ()
    age_max_ns: int = 600_000_000_000
    """Time since its dispatch after which a lease is taken to be over."""
    count_running_within_ns: int = 0
    """For so long, the first report of an endpoint adds the requests that it works on beyond those
    known to be in flight there."""


@final
@dataclass(slots=True)
class RecoveredLeaseEnded:
    """The access log has reported the end of a request that another process dispatched."""

    ticket: str


@final
@dataclass(slots=True)
class MemoryRestored:
    """What another process had learnt; comes once endpoints and objectives are known."""

    memory: EngineMemory


@final
@dataclass(slots=True)
class SettlementLost:
    """The usage of a request stays unknown: the access log has not reported it in time."""

    request_id: int


Change = (
    ObjectivesChanged
    | EndpointsChanged
    | Reconfigured
    | FlowEvicted
    | DrainBegan
    | LeasesRecovered
    | RecoveredLeaseEnded
    | MemoryRestored
    | SettlementLost
)
"""Facts that do not come with a request."""
Fact = (
    Arrived
    | Left
    | Answered
    | Settled
    | LoadObserved
    | ObjectivesChanged
    | EndpointsChanged
    | Reconfigured
    | FlowEvicted
    | DrainBegan
    | LeasesRecovered
    | RecoveredLeaseEnded
    | MemoryRestored
    | SettlementLost
)


@final
@dataclass(slots=True, init=False)
class Decision:
    """The only decision about a request, with its circumstances."""

    request_id: int
    outcome: Outcome
    priority: int
    """Priority of its band."""
    flow_id: str
    waited_ns: int
    endpoint: str | None = None
    """Where to send it, if the engine picks."""
    retry_after_ns: int | None = None
    """When room is expected for this client, from now; None: unknown, or no use."""
    saturation: float = 0.0
    """Saturation of the pool, just after the decision."""
    waiting: int = 0
    """Requests waiting in the same band, just after the decision."""
    is_reclaimable: bool = False
    """Whether a second decision may follow, to end what this one dispatches."""
    awaits_answer: bool = False
    """Whether the first byte must be reported to the engine (`Answered`)."""
    expected_wait_ns: int | None = None
    """Wait that was forecast when it began. None: unknown, never began, or not forecast (one in
    eight is, unless `forecasts` is set)."""
    without_room: tuple[Scope, ...] = ()
    """The scopes whose limits had no room for it, if it was rejected for that."""
    fallbacks: tuple[str, ...] = ()
    """Where to send it if the endpoint is unreachable, best first."""
    position: int = 0
    """Estimated number ahead of it when it began to wait; 0: none, or not forecast."""
    late_wait_ns: int | None = None
    """Wait within which nine in ten were expected to stay, when it began; None as above."""

    def __init__(  # noqa: PLR0913, PLR0917 - its fields
        self,
        request_id: int,
        outcome: Outcome,
        priority: int,
        flow_id: str,
        waited_ns: int,
        endpoint: str | None = None,
        retry_after_ns: int | None = None,
        saturation: float = 0.0,
        waiting: int = 0,
        is_reclaimable: bool = False,  # noqa: FBT001, FBT002 - a field
        awaits_answer: bool = False,  # noqa: FBT001, FBT002 - a field
        expected_wait_ns: int | None = None,
        without_room: tuple[Scope, ...] = (),
        fallbacks: tuple[str, ...] = (),
        position: int = 0,
        late_wait_ns: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.outcome = outcome
        self.priority = priority
        self.flow_id = flow_id
        self.waited_ns = waited_ns
        self.endpoint = endpoint
        self.retry_after_ns = retry_after_ns
        self.saturation = saturation
        self.waiting = waiting
        self.is_reclaimable = is_reclaimable
        self.awaits_answer = awaits_answer
        self.expected_wait_ns = expected_wait_ns
        self.without_room = without_room
        self.fallbacks = fallbacks
        self.position = position
        self.late_wait_ns = late_wait_ns

"""Pure. Facts go in, decisions come out.

Facts are plain slots classes, built once and never touched after the hand-over to the inbox. What
comes with every request has its constructor written out: that of a dataclass stays interpreted
where this module is compiled.
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
    """A request stands at the gate and wants to be dispatched."""

    request: Request

    def __init__(self, request: Request) -> None:
        self.request = request


@final
@dataclass(slots=True, init=False)
class Left:
    """The stream of a request has ended, for whatever reason.

    The gate need not know whether the request was still waiting: a decision may be crossing it.
    """

    request_id: int
    outcome: Outcome = Outcome.EVICTED_CANCELLED
    """What becomes of it where it waits: its client went away, or this replica stood down."""

    def __init__(self, request_id: int, outcome: Outcome = Outcome.EVICTED_CANCELLED) -> None:
        self.request_id = request_id
        self.outcome = outcome


@final
@dataclass(slots=True)
class Answered:
    """The first byte of a response has been seen."""

    request_id: int
    endpoint: str = ""
    """That served it, where that is known: not always the one that was picked."""


@final
@dataclass(slots=True, init=False)
class Settled:
    """What a finished request really took, as Envoy's access log tells; before or after `Left`.

    None where it is not known: no usage in the response, no first byte.
    """

    request_id: int
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    ttft_ns: int | None = None
    """From the dispatch to the first byte of the response's body."""
    generation_ns: int | None = None
    """From that first byte to the last."""
    is_success: bool = True
    """Whether the model server answered below 400."""
    was_turned_away: bool = False
    """Whether it answered that it has no room: 429 or 503."""

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
    ) -> None:
        self.request_id = request_id
        self.input_tokens = input_tokens
        self.cached_tokens = cached_tokens
        self.output_tokens = output_tokens
        self.ttft_ns = ttft_ns
        self.generation_ns = generation_ns
        self.is_success = is_success
        self.was_turned_away = was_turned_away


@final
@dataclass(slots=True)
class LoadObserved:
    """What an endpoint last said of its own load."""

    address: str
    waiting: int
    """Requests queued inside the engine."""
    running: int | None
    """Requests it works on; None if it does not say."""
    kv_usage: float | None
    """From 0 to 1; None if it does not say: absence is never zero."""
    kv_tokens: int | None = None
    """Tokens that its KV cache holds; None if it does not say."""


@final
@dataclass(slots=True)
class ObjectivesChanged:
    """The whole set of objectives now declared, name to priority; bands follow from it."""

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
    """Of those that do not do everything."""


@final
@dataclass(slots=True)
class Reconfigured:
    """Other settings, in force from now on for what waits, too."""

    config: ControllerConfig


@final
@dataclass(slots=True)
class FlowEvicted:
    """An operator wants nothing of this flow to wait any more; what is in flight goes on."""

    priority: int
    flow_id: str


@final
@dataclass(slots=True)
class DrainBegan:
    """Refuse arrivals from now on; what still waits when the budget is spent is evicted."""

    budget_ns: int


@final
@dataclass(slots=True)
class RecoveredLease:
    """A request that another process dispatched, as far as is known still in flight."""

    ticket: str
    """Names it in Envoy's access log."""
    endpoint: str | None = None
    """Where it was sent, None where Envoy chose."""
    tokens: float = 0.0
    """Prompt and answer, as estimated."""
    age_ns: int = 0
    """Since its dispatch."""


@final
@dataclass(slots=True)
class LeasesRecovered:
    """What was in flight when this process began to decide; replaces what was recovered before."""

    leases: tuple[RecoveredLease, ...] = ()
    age_max_ns: int = 600_000_000_000
    """Since its dispatch, after which a lease is taken to be over."""
    count_running_within_ns: int = 0
    """For how long from now an endpoint's first report counts: requests that it works on beyond
    those known to be in flight there are added."""


@final
@dataclass(slots=True)
class RecoveredLeaseEnded:
    """The access log has reported the end of a request that another process dispatched."""

    ticket: str


@final
@dataclass(slots=True)
class MemoryRestored:
    """What another process had learnt, once endpoints and objectives are known."""

    memory: EngineMemory


@final
@dataclass(slots=True)
class SettlementLost:
    """What a request really took will not be known: the access log has not reported it in time."""

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
"""What does not come with a request."""
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
    """The one and only answer to a request, with what there is to say about it."""

    request_id: int
    outcome: Outcome
    priority: int
    """Of the band it was decided in."""
    flow_id: str
    waited_ns: int
    endpoint: str | None = None
    """Where to send it, when the engine is the picker."""
    retry_after_ns: int | None = None
    """When room is expected for this client; None when unknown or pointless."""
    saturation: float = 0.0
    """Of the pool, just after the decision."""
    waiting: int = 0
    """Requests waiting in the same band, just after the decision."""
    is_reclaimable: bool = False
    """Whether a second decision may follow: to end what is dispatched with this one."""
    awaits_answer: bool = False
    """Whether the first byte must be reported to the engine (`Answered`)."""
    expected_wait_ns: int | None = None
    """What the wait was expected to be when it began; None when it was unknown or not forecast (one
    in eight is, unless `forecasts` is set), or never began."""
    without_room: tuple[Scope, ...] = ()
    """Whose limits had no room for it, where that is why it was rejected."""
    fallbacks: tuple[str, ...] = ()
    """Where to send it if the endpoint cannot be reached, best first."""
    position: int = 0
    """How many stood ahead of it when it began to wait, estimated; 0 where it was not forecast."""
    late_wait_ns: int | None = None
    """What nine in ten waits were expected to stay within when it began; None as above."""

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

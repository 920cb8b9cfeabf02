"""Pure. Facts go in, decisions come out.

Facts are plain slots classes, built once and never touched after the hand-over to the inbox.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol.config import ControllerConfig, Role
from flowcontrol.request import Outcome, Request, Scope


@final
@dataclass(slots=True)
class Arrived:
    """A request stands at the gate and wants to be dispatched."""

    request: Request


@final
@dataclass(slots=True)
class Left:
    """The stream of a request has ended, for whatever reason.

    The gate need not know whether the request was still waiting: a decision may be crossing it.
    """

    request_id: int


@final
@dataclass(slots=True)
class Answered:
    """The first byte of a response has been seen."""

    request_id: int


@final
@dataclass(slots=True)
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


@final
@dataclass(slots=True)
class ObjectivesChanged:
    """The whole set of objectives now declared, name to priority; bands follow from it."""

    priorities: Mapping[str, int]


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


Change = ObjectivesChanged | EndpointsChanged | Reconfigured | FlowEvicted | DrainBegan
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
)


@final
@dataclass(slots=True)
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
    """Whether the engine wants to be told of the first byte (`Answered`)."""
    expected_wait_ns: int | None = None
    """What the wait was expected to be when it began; None when it was unknown, or never began."""
    without_room: tuple[Scope, ...] = ()
    """Whose limits had no room for it, where that is why it was rejected."""
    fallbacks: tuple[str, ...] = ()
    """Where to send it if the endpoint cannot be reached, best first."""
    position: int = 0
    """How many stood ahead of it when it began to wait, an estimate; 0 where nobody asks for it."""

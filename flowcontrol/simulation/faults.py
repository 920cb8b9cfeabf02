"""Pure. What can go wrong, and when. Nothing here is decided by chance: a scenario says it.

Times are of the virtual clock; a fault that lasts holds from `from_ns` until just before
`until_ns`. `addresses` names the servers concerned, None: all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from flowcontrol.events import LoadObserved


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointGone:
    """A server crashes with all it has, and comes back empty."""

    address: str
    from_ns: int
    until_ns: int
    noticed_after_ns: int = 0
    """How long Envoy and the engine believe it there, or not yet back. What is sent to it meanwhile
    fails when Envoy gives up connecting."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsStale:
    """No scrape succeeds."""

    from_ns: int
    until_ns: int
    addresses: tuple[str, ...] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLie:
    """Scrapes succeed and say what is not true."""

    from_ns: int
    until_ns: int
    addresses: tuple[str, ...] | None = None
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0

    def tell(self, address: str) -> LoadObserved:
        """Return the lie."""
        return LoadObserved(address, self.waiting, self.running, self.kv_usage)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SettlementsSlow:
    """The access log of what ends now arrives late."""

    from_ns: int
    until_ns: int
    delay_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SettlementsLost:
    """The access log of what ends now never arrives."""

    from_ns: int
    until_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionsSlow:
    """What the engine decides now takes effect late; a client may leave in between."""

    from_ns: int
    until_ns: int
    delay_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStalled:
    """The engine gets no turn; what happens meanwhile reaches it in one batch."""

    from_ns: int
    until_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClockJumped:
    """The engine's clock jumps forward, as after a suspended machine; the world's does not."""

    at_ns: int
    by_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectivesEdited:
    """An operator applies other objectives."""

    at_ns: int
    priorities: Mapping[str, int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DrainBegins:
    """The gateway gets the order to shut down; no successor takes its place."""

    at_ns: int
    budget_ns: int


Fault = (
    EndpointGone
    | MetricsStale
    | MetricsLie
    | SettlementsSlow
    | SettlementsLost
    | DecisionsSlow
    | EngineStalled
    | ClockJumped
    | ObjectivesEdited
    | DrainBegins
)


@final
class Conditions:
    """What the faults that last make of a moment. Of several of a kind the last named counts."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._metrics = [f for f in faults if isinstance(f, MetricsStale | MetricsLie)]
        self._settlement = [f for f in faults if isinstance(f, SettlementsSlow | SettlementsLost)]
        self._decisions = [f for f in faults if isinstance(f, DecisionsSlow)]

    def observed(self, truth: LoadObserved, now_ns: int) -> LoadObserved | None:
        """Return what a scrape says, None when it fails."""
        for fault in reversed(self._metrics):
            is_meant = fault.addresses is None or truth.address in fault.addresses
            if is_meant and fault.from_ns <= now_ns < fault.until_ns:
                return fault.tell(truth.address) if isinstance(fault, MetricsLie) else None
        return truth

    def settlement_delay_ns(self, usual_ns: int, now_ns: int) -> int | None:
        """Return after how long the access log arrives, None when it never does."""
        for fault in reversed(self._settlement):
            if fault.from_ns <= now_ns < fault.until_ns:
                return fault.delay_ns if isinstance(fault, SettlementsSlow) else None
        return usual_ns

    def decision_delay_ns(self, now_ns: int) -> int:
        """Return after how long decisions take effect."""
        for fault in reversed(self._decisions):
            if fault.from_ns <= now_ns < fault.until_ns:
                return fault.delay_ns
        return 0

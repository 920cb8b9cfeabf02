"""Pure. Faults of a scenario. None of them is random: the scenario gives their times.

Times are of the virtual clock. A fault with a duration lasts from `from_ns` until just before
`until_ns`. `addresses` names the servers concerned; None: all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from flowcontrol.events import LoadObserved


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointGone:
    """A server crashes with all its requests, and comes back empty."""

    address: str
    from_ns: int
    until_ns: int
    noticed_after_ns: int = 0
    """Delay until Envoy and the engine notice that it is gone, and that it is back. A request sent
    to it meanwhile fails when Envoy's connect timeout ends."""


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
    """Scrapes succeed with wrong values."""

    from_ns: int
    until_ns: int
    addresses: tuple[str, ...] | None = None
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0

    def observed(self, address: str) -> LoadObserved:
        """Return the wrong values."""
        return LoadObserved(address, self.waiting, self.running, self.kv_usage)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SettlementsSlow:
    """Access log entries of requests that end now arrive late."""

    from_ns: int
    until_ns: int
    delay_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SettlementsLost:
    """Access log entries of requests that end now never arrive."""

    from_ns: int
    until_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionsSlow:
    """Decisions take effect late; a client may leave in between."""

    from_ns: int
    until_ns: int
    delay_ns: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStalled:
    """The engine gets no turn; the facts of that time reach it in one batch."""

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
    """The gateway begins to shut down, without a successor."""

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
    """The effect of faults at a time. Of several faults of a kind, the last one named applies."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._metrics = [f for f in faults if isinstance(f, MetricsStale | MetricsLie)]
        self._settlement = [f for f in faults if isinstance(f, SettlementsSlow | SettlementsLost)]
        self._decisions = [f for f in faults if isinstance(f, DecisionsSlow)]

    def observed(self, truth: LoadObserved, now_ns: int) -> LoadObserved | None:
        """Return the result of a scrape; None: it fails."""
        for fault in reversed(self._metrics):
            is_meant = fault.addresses is None or truth.address in fault.addresses
            if is_meant and fault.from_ns <= now_ns < fault.until_ns:
                return fault.observed(truth.address) if isinstance(fault, MetricsLie) else None
        return truth

    def settlement_delay_ns(self, usual_ns: int, now_ns: int) -> int | None:
        """Return the delay of the access log; None: it never arrives."""
        for fault in reversed(self._settlement):
            if fault.from_ns <= now_ns < fault.until_ns:
                return fault.delay_ns if isinstance(fault, SettlementsSlow) else None
        return usual_ns

    def decision_delay_ns(self, now_ns: int) -> int:
        """Return the delay until decisions take effect."""
        for fault in reversed(self._decisions):
            if fault.from_ns <= now_ns < fault.until_ns:
                return fault.delay_ns
        return 0

"""Pure. The endpoints of the pool, what is in flight at each, and where there is room.

A request in flight is counted from its dispatch to the end of its stream, so the counts are exact.
The pool is full as soon as any of its detectors says so, in any of its stages: with endpoints that
only prefill and others that only decode, either kind alone can be what everybody waits for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

from flowcontrol.config import Picker, Role
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease

FULL = 1.0
"""The saturation at which a pool, or an endpoint, takes no more."""


class Endpoint(NamedTuple):
    """One model server."""

    address: str
    """host:port"""
    role: Role = Role.BOTH


@final
@dataclass(slots=True, eq=False)
class Load:
    """What is in flight at one endpoint, or in the pool."""

    requests: int = 0
    tokens: float = 0.0

    def add(self, lease: Lease) -> None:
        """Count a dispatch."""
        self.requests += 1
        self.tokens += sum(lease.tokens[:2])

    def take(self, lease: Lease) -> None:
        """Count its end."""
        assert self.requests > 0, "released more than was charged"
        self.requests -= 1
        self.tokens = self.tokens - sum(lease.tokens[:2]) if self.requests else 0.0


class StageLoad(Protocol):
    """What a detector can read of the stage it watches."""

    @property
    def addresses(self) -> Sequence[str]:
        """The endpoints of the stage."""

    def pool(self) -> Load:
        """Return what is in flight in the whole stage."""

    def at(self, address: str) -> Load | None:
        """Return what is in flight at one endpoint, None while Envoy picks."""


class Detector(Protocol):
    """Says how full one stage of the pool is. 1.0 is full.

    Told of everything that happens; both questions cost O(1), but for the endpoints of the stage
    when they or their metrics change.
    """

    def saturation(self) -> float:
        """Return the load of the stage."""

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint."""

    def endpoints_changed(self, now_ns: int) -> None:
        """Notice that the stage has other endpoints."""

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Notice a dispatch, already counted in the stage's load."""

    def released(self, lease: Lease, now_ns: int) -> None:
        """Notice the end of a request in flight, already taken from the stage's load."""

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in what an endpoint says of itself."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request really took."""

    def advance(self, now_ns: int) -> None:
        """Let time pass."""

    def next_change_ns(self) -> int | None:
        """Return when time alone will change the answer; None if it will not."""


@final
class Stage:
    """The endpoints that do one part of the work, and the detectors that watch them."""

    def __init__(self, pool: "Pool", addresses: tuple[str, ...]) -> None:
        self._pool = pool
        self.addresses = addresses

    def pool(self) -> Load:
        """Return what is in flight: every request passes every stage."""
        return self._pool.total

    def at(self, address: str) -> Load | None:
        """Return what is in flight at one endpoint, None while Envoy picks."""
        return self._pool.loads[address] if self._pool.picks else None


class DetectorFactory(Protocol):
    """Makes the detectors of one stage."""

    def __call__(self, stage: StageLoad, now_ns: int) -> list[Detector]:
        """Return new detectors for a stage."""


@final
class Pool:
    """Counts requests in flight and asks the detectors.

    Args:
        picker: who chooses the endpoint. When it is the engine, what is in flight at endpoints that
            have left the pool no longer counts against those that remain.
        make_detectors: for each stage; a stage keeps its detectors when only its endpoints change.
    """

    def __init__(self, picker: Picker, make_detectors: DetectorFactory) -> None:
        self.picks = picker is Picker.LEAST_LOADED
        self.total = Load()
        """In flight in the pool; with a picker only at present endpoints."""
        self.loads: dict[str, Load] = {}
        """At each endpoint, and while there is any at those that have left."""
        self.endpoints: tuple[Endpoint, ...] = ()
        self._make_detectors = make_detectors
        self._stages: dict[Role, Stage] = {}
        self._detectors: dict[Role, list[Detector]] = {}
        self._all: list[Detector] = []
        self._turns: dict[str, int] = {}
        self._turn = 0

    @property
    def is_empty(self) -> bool:
        """Whether the pool has no endpoint."""
        return not self.endpoints

    def saturation(self) -> float:
        """Return the load of the pool; an empty one is full. With a picker O(endpoints)."""
        if not self.endpoints:
            return FULL
        load = max(detector.saturation() for detector in self._all)
        if self.picks and load < FULL and self._best() is None:
            return FULL
        return load

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint: the fullest of what its stages' detectors say."""
        return max(
            detector.endpoint_saturation(address)
            for role, stage in self._stages.items()
            if address in stage.addresses
            for detector in self._detectors[role]
        )

    def set_endpoints(self, endpoints: Sequence[Endpoint], now_ns: int) -> None:
        """Replace the pool; an endpoint keeps its count, across an absence too. O(endpoints)."""
        self.endpoints = tuple({endpoint.address: endpoint for endpoint in endpoints}.values())
        present = {endpoint.address for endpoint in self.endpoints}
        kept = {a: load for a, load in self.loads.items() if load.requests and a not in present}
        self.loads = kept | {a: self.loads.get(a, Load()) for a in sorted(present)}
        self._turns = {address: self._turns.get(address, 0) for address in present}
        if self.picks:
            mine = [self.loads[address] for address in present]
            self.total.requests = sum(load.requests for load in mine)
            self.total.tokens = sum(load.tokens for load in mine)
        self._set_stages(now_ns)

    def _set_stages(self, now_ns: int) -> None:
        roles = {endpoint.role for endpoint in self.endpoints}
        wanted = (Role.BOTH,) if roles <= {Role.BOTH} else (Role.PREFILL, Role.DECODE)
        for gone in self._stages.keys() - set(wanted):
            del self._stages[gone], self._detectors[gone]
        for role in wanted:
            addresses = tuple(e.address for e in self.endpoints if e.role in (role, Role.BOTH))
            stage = self._stages.get(role)
            if stage is None:
                stage = self._stages[role] = Stage(self, addresses)
                self._detectors[role] = self._make_detectors(stage, now_ns)
            stage.addresses = addresses
        self._all = [
            each
            for role in wanted
            if self._stages[role].addresses
            for each in self._detectors[role]
        ]
        for detector in self._all:
            detector.endpoints_changed(now_ns)

    def reconfigure(self, picker: Picker, make_detectors: DetectorFactory, now_ns: int) -> None:
        """Take other detectors; what is in flight stays counted. O(endpoints)."""
        self.picks = picker is Picker.LEAST_LOADED
        self._make_detectors = make_detectors
        self._stages.clear()
        self._detectors.clear()
        self._all = []
        if self.endpoints:
            self.set_endpoints(self.endpoints, now_ns)

    def charge(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch; with a picker, choose the endpoint and write it into the lease."""
        self.total.add(lease)
        if self.picks:
            lease.endpoint = self._best()
            assert lease.endpoint is not None, "nothing is dispatched to a full pool"
            self.loads[lease.endpoint].add(lease)
            self._turn += 1
            self._turns[lease.endpoint] = self._turn
        for detector in self._all:
            detector.charged(lease, now_ns)

    def release(self, lease: Lease, now_ns: int) -> None:
        """Give back the slot of a request that has ended."""
        address = lease.endpoint
        if address is not None:
            self.loads[address].take(lease)
        if address is None or address in self._turns:
            self.total.take(lease)
        elif not self.loads[address].requests:
            del self.loads[address]
        for detector in self._all:
            detector.released(lease, now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in what an endpoint says of itself; nothing, if it has left."""
        if load.address in self._turns:
            for detector in self._all:
                detector.observed(load, now_ns)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request really took."""
        for detector in self._all:
            detector.settled(lease, settled, now_ns)

    def advance(self, now_ns: int) -> None:
        """Let time pass."""
        for detector in self._all:
            detector.advance(now_ns)

    def next_change_ns(self) -> int | None:
        """Return when time alone will change the saturation."""
        changes = (detector.next_change_ns() for detector in self._all)
        return min((change for change in changes if change is not None), default=None)

    def _best(self) -> str | None:
        """Return the endpoint with the most room, None if none has any; the longest unused."""
        candidates = self._stages[
            Role.DECODE if Role.DECODE in self._stages else Role.BOTH
        ].addresses
        loads = ((self.endpoint_saturation(a), self._turns[a], a) for a in candidates)
        best = min(loads, default=(FULL, 0, ""))
        return best[2] if best[0] < FULL else None

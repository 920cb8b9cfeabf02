"""Pure. The endpoints of the pool, what is in flight at each, and where there is room.

A request in flight is counted from its dispatch to the end of its stream, so the counts are exact.
The pool is full as soon as any of its detectors says so, in any of its stages: with endpoints that
only prefill and others that only decode, either kind alone can be what everybody waits for.

Where the engine picks, what exceeds one endpoint's limit fills no other: the load of the pool is
the mean of its endpoints' loads, each full at most, and it is full when none has room.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import nextafter
from typing import Final, NamedTuple, Protocol, final

from flowcontrol.config import Detector as DetectorSettings
from flowcontrol.config import Picker, Role
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.lines import Subset

FULL: Final = 1.0
"""The saturation at which a pool, or an endpoint, takes no more."""
_ALMOST_FULL = nextafter(FULL, 0)


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
        self.tokens += lease.tokens_total

    def take(self, lease: Lease) -> None:
        """Count its end."""
        assert self.requests > 0, "released more than was charged"
        self.requests -= 1
        self.tokens -= lease.tokens_total
        if not self.requests:
            self.tokens = 0.0  # whatever rounding has left


_NOTHING: Final = Load()
"""In flight at an endpoint that has left."""


class StageLoad(Protocol):
    """What a detector can read of the stage it watches."""

    @property
    def addresses(self) -> Sequence[str]:
        """The endpoints of the stage."""

    @property
    def is_picked(self) -> bool:
        """Whether the engine picks which endpoint of the stage a request goes to."""

    def pool(self) -> Load:
        """Return the account of what is in flight in the whole stage: always the same one."""

    def at(self, address: str) -> Load | None:
        """Return what is in flight at one endpoint, None while Envoy picks."""

    def picked_for(self, lease: Lease) -> str | None:
        """Return the endpoint of the stage that was picked for a request; None: Envoy's choice."""


class Detector(Protocol):
    """Says how full one stage of the pool is. 1.0 is full.

    Told of everything that happens, but of nothing except ends and settlements while its stage has
    no endpoints. Both questions cost O(1), but for the endpoints of the stage when they or their
    metrics change.
    """

    @property
    def settings(self) -> DetectorSettings:
        """What it goes by."""

    counts_dispatches: bool
    """Whether it keeps an account of its own: hears of dispatches, their ends and settlements."""
    has_timer: bool
    """Whether time alone can change its answers."""
    revision: int
    """Changes whenever an endpoint's load may have changed of which it did not hear just now."""

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

    def __init__(self, pool: "Pool", role: Role, addresses: tuple[str, ...]) -> None:
        self._pool = pool
        self._role = role
        self.addresses = addresses

    @property
    def is_picked(self) -> bool:
        """Whether the engine picks an endpoint here: never for who only prefills."""
        return self._pool.picks and self._role is not Role.PREFILL

    def pool(self) -> Load:
        """Return what is in flight: every request passes every stage."""
        return self._pool.total

    def at(self, address: str) -> Load | None:
        """Return what is in flight at one endpoint, None while it is not picked by the engine."""
        return self._pool.loads.get(address, _NOTHING) if self.is_picked else None

    def picked_for(self, lease: Lease) -> str | None:
        """Return the endpoint of the stage that was picked for a request, if one was."""
        return None if self._role is Role.PREFILL else lease.endpoint


class DetectorFactory(Protocol):
    """Makes the detectors of one stage."""

    def __call__(self, stage: StageLoad, now_ns: int, before: Sequence[Detector]) -> list[Detector]:
        """Return detectors for a stage; those it had before hand on what they know."""


@final
class Pool:
    """Counts requests in flight and asks the detectors.

    Args:
        picker: who chooses the endpoint. What the engine sent to an endpoint that has left the pool
            no longer counts against those that remain.
        make_detectors: for each stage; a stage keeps its detectors when only its endpoints change.
        fallbacks_max: endpoints named beside the one picked.
    """

    def __init__(
        self, picker: Picker, make_detectors: DetectorFactory, fallbacks_max: int = 0
    ) -> None:
        self.picks = picker is Picker.LEAST_LOADED
        self.fallbacks_max = fallbacks_max
        self.total = Load()
        """In flight, but for what was sent to endpoints that have left."""
        self.loads: dict[str, Load] = {}
        """At each endpoint, and while there is any at those that have left."""
        self.endpoints: tuple[Endpoint, ...] = ()
        self.stages: dict[Role, Stage] = {}
        self.detectors: dict[Role, list[Detector]] = {}
        """Of each stage."""
        self.has_timer = False
        """Whether time alone can change the saturation."""
        self._make_detectors = make_detectors
        self._unplaced = Load()
        """In flight where Envoy sent it."""
        self._all: list[Detector] = []
        """Of the stages that have endpoints."""
        self._counting: list[Detector] = []
        """Those of them that hear of dispatches."""
        self._hearing: list[Detector] = []
        """Those of every stage: what was dispatched may end while no endpoint is there."""
        self._timed: list[Detector] = []
        self._asked: list[Detector] = []
        """Those that say how full the pool is; with a picker, of the stage that is not picked."""
        self._detectors_of: dict[str, list[Detector]] = {}
        """By endpoint, those of its stage: where it is in both, of that for which one is picked."""
        self._pick_stage = Stage(self, Role.BOTH, ())
        self._turns: dict[str, int] = {}
        """When each endpoint was last picked, counted in picks."""
        self._turn = 0
        self._rooms: KeyedHeap[str, tuple[float, int]] = KeyedHeap()
        """Endpoints to pick from: the least loaded first, among equals the longest unused."""
        self._room_loads: dict[str, float] = {}
        """Load of the same, full at most."""
        self._load_sum = 0.0
        """Of these, together."""
        self._revision = 0
        self._saturation: float | None = None
        """The load of the pool; None when it has to be computed anew."""

    @property
    def is_empty(self) -> bool:
        """Whether the pool has no endpoint."""
        return not self.endpoints

    def saturation(self) -> float:
        """Return the load of the pool; an empty one is full."""
        known = self._saturation
        if known is None:
            known = self._saturation = self._measure()
        return known

    def _measure(self) -> float:
        if not self.endpoints:
            return FULL
        load = 0.0
        if self.picks:
            if self.best() is None:
                return FULL
            # Somebody has room, whatever the sum has become by rounding.
            load = self._load_sum / len(self._rooms)
            if load > _ALMOST_FULL:
                load = _ALMOST_FULL
        # While some are still where Envoy sent them, the pool is counted as a whole as well.
        for detector in self._all if self._unplaced.requests else self._asked:
            saturation = detector.saturation()
            if saturation > load:
                load = saturation
        return load

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint: the fullest of what its stage's detectors say."""
        load = 0.0
        for detector in self._detectors_of[address]:
            saturation = detector.endpoint_saturation(address)
            if saturation > load:
                load = saturation
        return load

    def set_endpoints(self, endpoints: Sequence[Endpoint], now_ns: int) -> None:
        """Replace the pool; an endpoint keeps its count, across an absence too. O(endpoints)."""
        self.endpoints = tuple({endpoint.address: endpoint for endpoint in endpoints}.values())
        present = [endpoint.address for endpoint in self.endpoints]
        gone = self.loads.keys() - set(present)
        kept = {a: load for a, load in self.loads.items() if a in gone and load.requests}
        self.loads = kept | {a: self.loads.get(a, Load()) for a in present}
        self._turns = {address: self._turns.get(address, 0) for address in present}
        counted = [self._unplaced, *(self.loads[address] for address in present)]
        self.total.requests = sum(load.requests for load in counted)
        self.total.tokens = sum(load.tokens for load in counted)
        self._set_stages(now_ns)

    def _set_stages(self, now_ns: int, *, renews: bool = False) -> None:
        roles = {endpoint.role for endpoint in self.endpoints}
        if not roles and self.stages:
            wanted = tuple(self.stages)  # an absence, not another pool
        else:
            wanted = (Role.BOTH,) if roles <= {Role.BOTH} else (Role.PREFILL, Role.DECODE)
        for gone in [role for role in self.stages if role not in wanted]:
            del self.stages[gone], self.detectors[gone]
        for role in wanted:
            addresses = tuple(e.address for e in self.endpoints if e.role in (role, Role.BOTH))
            stage = self.stages.setdefault(role, Stage(self, role, addresses))
            if renews or role not in self.detectors:
                before = self.detectors.get(role, ())
                self.detectors[role] = self._make_detectors(stage, now_ns, before)
            stage.addresses = addresses
        self._all = [
            d for role in wanted if self.stages[role].addresses for d in self.detectors[role]
        ]
        self._counting = [each for each in self._all if each.counts_dispatches]
        everywhere = [detector for role in wanted for detector in self.detectors[role]]
        self._hearing = [each for each in everywhere if each.counts_dispatches]
        self._timed = [each for each in self._all if each.has_timer]
        self.has_timer = bool(self._timed)
        picked = wanted[-1] if self.picks else None  # of the two stages, the one that decodes
        self._asked = [
            detector
            for role in wanted
            if role is not picked and self.stages[role].addresses
            for detector in self.detectors[role]
        ]
        self._pick_stage = self.stages[wanted[-1]]
        self._detectors_of = {
            endpoint.address: self.detectors[
                endpoint.role if endpoint.role in wanted else wanted[-1]
            ]
            for endpoint in self.endpoints
        }
        for detector in self._all:
            detector.endpoints_changed(now_ns)
        self._changed(everywhere=True)

    def reconfigure(self, picker: Picker, make_detectors: DetectorFactory, now_ns: int) -> None:
        """Take other detectors; what is in flight stays counted. O(endpoints)."""
        self.picks = picker is Picker.LEAST_LOADED
        self._make_detectors = make_detectors
        self._set_stages(now_ns, renews=True)

    def charge(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch; with a picker, choose the endpoint and write it into the lease."""
        self.total.add(lease)
        if self.picks:
            address = lease.endpoint = self.room_for(lease)
            assert address is not None, "nothing is dispatched to a full pool"
            if self.fallbacks_max:
                lease.fallbacks = self._fallbacks(lease)
            self.loads[address].add(lease)
            self._turn += 1
            self._turns[address] = self._turn
        else:
            self._unplaced.add(lease)
        for detector in self._counting:
            detector.charged(lease, now_ns)
        self._changed(lease.endpoint)

    def release(self, lease: Lease, now_ns: int) -> None:
        """Give back the slot of a request that has ended."""
        address = lease.endpoint
        if address is None:
            self._unplaced.take(lease)
            self.total.take(lease)
        else:
            self.loads[address].take(lease)
            if address in self._turns:
                self.total.take(lease)
            elif not self.loads[address].requests:
                del self.loads[address]
        for detector in self._hearing:
            detector.released(lease, now_ns)
        self._changed(address, everywhere=address is None)

    def counts(self, lease: Lease) -> bool:
        """Whether a request in flight holds a slot of the pool as it is now."""
        return lease.endpoint is None or lease.endpoint in self._turns

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in what an endpoint says of itself; nothing, if it has left."""
        if load.address not in self._turns:
            return
        for detector in self._all:
            detector.observed(load, now_ns)
        self._changed(load.address)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request really took."""
        for detector in self._hearing:
            detector.settled(lease, settled, now_ns)
        self._changed()

    def advance(self, now_ns: int) -> None:
        """Let time pass."""
        for detector in self._timed:
            detector.advance(now_ns)
        self._changed()

    def next_change_ns(self) -> int | None:
        """Return when time alone will change the saturation."""
        changes = (detector.next_change_ns() for detector in self._timed)
        return min((change for change in changes if change is not None), default=None)

    def best(self) -> str | None:
        """Return the endpoint with the most room, None if none has any; the longest unused."""
        first = self._rooms.first()
        return first[1] if first is not None and first[0][0] < FULL else None

    def serves(self, lease: Lease) -> bool:
        """Whether a request has something to wait for: an endpoint of its subset, or any pool."""
        subset = lease.request.subset
        if subset is None or not self.picks or not self.endpoints:
            return True
        return any(address in self._room_loads for address in subset)

    def has_room_for(self, lease: Lease) -> bool:
        """Whether a request can go, while the pool is not full."""
        return lease.request.subset is None or self.has_room_in(lease.request.subset)

    def has_room_in(self, subset: Subset) -> bool:
        """Whether any of these endpoints has room, while the pool is not full. O(subset)."""
        if not self.picks:
            return True
        return any(self._room_loads.get(address, FULL) < FULL for address in subset)

    def room_for(self, lease: Lease) -> str | None:
        """Return where a request would go: as `best`, among those it may go to. O(its subset)."""
        subset = lease.request.subset
        if subset is None:
            return self.best()
        load, _, address = min(self._places(lease), default=(FULL, 0, ""))
        return address if load < FULL else None

    def _fallbacks(self, lease: Lease) -> tuple[str, ...]:
        """Return where to send a request if its endpoint cannot be reached; O(endpoints)."""
        places = nsmallest(self.fallbacks_max + 1, self._places(lease))
        others = [address for _, _, address in places if address != lease.endpoint]
        return tuple(others[: self.fallbacks_max])

    def _places(self, lease: Lease) -> Iterator[tuple[float, int, str]]:
        subset = lease.request.subset
        for address in self._room_loads if subset is None else subset:
            if address in self._room_loads:
                yield self._room_loads[address], self._turns[address], address

    def _changed(self, address: str | None = None, *, everywhere: bool = False) -> None:
        """Note that the load of the pool, and perhaps of one or all of its endpoints, is another.

        O(log endpoints); O(endpoints) only when all of them may have changed.
        """
        self._saturation = None
        if not self.picks:
            return
        revision = sum([detector.revision for detector in self._all])
        if everywhere or revision != self._revision:
            self._revision = revision
            self._rooms = KeyedHeap()
            self._room_loads.clear()
            self._load_sum = 0.0
            for each in self._pick_stage.addresses:
                self._find_room(each)
        elif address in self._room_loads:
            self._find_room(address)

    def _find_room(self, address: str) -> None:
        load = self.endpoint_saturation(address)
        self._rooms.put(address, (load, self._turns[address]))
        if load > FULL:
            load = FULL
        self._load_sum += load - self._room_loads.get(address, 0.0)
        self._room_loads[address] = load

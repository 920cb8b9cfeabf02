"""Pure. The endpoints of the pool, what is in flight at each, and how full that makes it.

A request in flight is counted from its dispatch to the end of its stream, so the counts are exact.
The pool is full as soon as any detector of any stage says so: where some endpoints only prefill and
others only decode, either stage alone can hold up every request.

Where the engine picks (`picker`), load beyond one endpoint's limit does not fill the others: the
load of the pool is the mean of its endpoints' loads, each 1.0 at most, and the pool is full when no
endpoint has room.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

from flowcontrol.config import Detector as DetectorSettings
from flowcontrol.config import Picker, Role
from flowcontrol.events import Endpoint, LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.lines import Subset
from flowcontrol.picker import FULL, EndpointPicker


@final
@dataclass(slots=True, eq=False)
class InFlight:
    """What is in flight at one endpoint, or in the pool."""

    requests: int = 0
    tokens: float = 0.0
    begun: int = 0
    """How many were dispatched so far."""

    def add(self, lease: Lease) -> None:
        """Count a dispatch."""
        self.requests += 1
        self.begun += 1
        self.tokens += lease.tokens_total

    def take(self, lease: Lease) -> None:
        """Count its end."""
        assert self.requests > 0, "released more than was charged"
        self.requests -= 1
        self.tokens -= lease.tokens_total
        if not self.requests:
            self.tokens = 0.0  # whatever rounding has left


_ALMOST_FULL: Final = 1 - 1e-9
"""A larger load counts as full: a mean may be off by rounding."""
_NOTHING: Final = InFlight()
"""In flight at an endpoint that has left."""


class StageLoad(Protocol):
    """What a detector can read of the stage it watches."""

    @property
    def addresses(self) -> Sequence[str]:
        """The endpoints of the stage."""

    @property
    def is_picked(self) -> bool:
        """Whether the engine picks which endpoint of the stage a request goes to."""

    def pool(self) -> InFlight:
        """Return the account of what is in flight in the whole stage: always the same object."""

    def at(self, address: str) -> InFlight | None:
        """Return the account of one endpoint; None while Envoy picks."""

    def picked_for(self, lease: Lease) -> str | None:
        """Return the endpoint of the stage that was picked for a request; None: Envoy picked."""


class Detector(Protocol):
    """Measures how full one stage of the pool is. 1.0 is full.

    It is called with every event of its stage; while the stage has no endpoints, only with ends and
    settlements. The loads cost O(1), and O(endpoints) after endpoints or metrics have changed.
    """

    @property
    def settings(self) -> DetectorSettings:
        """Its settings."""

    counts_dispatches: bool
    """Whether it must be called with dispatches, their ends and settlements."""
    has_timer: bool
    """Whether time alone can change its answers."""
    revision: int
    """Changes whenever the load of an endpoint may have changed that the call was not about."""

    def saturation(self) -> float:
        """Return the load of the stage."""

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint."""

    def unheld(self) -> float:
        """Return the load of the stage as if nothing were held back."""

    def holds(self, address: str) -> bool:
        """Whether an endpoint must not be sent a request just now, whatever its load."""

    def reads(self, address: str) -> bool:
        """Whether an endpoint reads a prompt: others are preferred."""

    def reading_ns(self, lease: Lease) -> float:
        """Return how long reading a prompt occupies all endpoints together; 0: unknown."""

    def endpoints_changed(self, now_ns: int) -> None:
        """Take in that the endpoints of the stage have changed."""

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Take in a dispatch, which the stage's account already counts."""

    def released(self, lease: Lease, now_ns: int) -> None:
        """Take in the end of a request, which the stage's account no longer counts."""

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in one scrape of an endpoint."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used."""

    def advance(self, now_ns: int) -> Sequence[str]:
        """Let time pass; return the endpoints whose load this changed."""

    def next_change_ns(self) -> int | None:
        """Return when time alone next changes a load; None: it does not."""


class WithoutPace(ABC):
    """What a detector answers that does not pace prompts."""

    @abstractmethod
    def saturation(self) -> float:
        """Return the load of the stage."""

    def unheld(self) -> float:
        """Return the same: nothing is held back."""
        return self.saturation()

    def holds(self, address: str) -> bool:  # noqa: ARG002 - never
        """Return False: only the load holds requests back."""
        return False

    def reads(self, address: str) -> bool:  # noqa: ARG002 - unknown
        """Return False: it is unknown."""
        return False

    def reading_ns(self, lease: Lease) -> float:  # noqa: ARG002 - unknown
        """Return 0: it is unknown."""
        return 0.0


@final
class Stage:
    """The endpoints that prefill, or that decode, or all where nothing is split."""

    def __init__(self, pool: "Pool", role: Role, addresses: tuple[str, ...]) -> None:
        self._pool = pool
        self._role = role
        self.addresses = addresses

    @property
    def is_picked(self) -> bool:
        """Whether the engine picks endpoints here: never in a stage that only prefills."""
        return self._pool.picks and self._role is not Role.PREFILL

    def pool(self) -> InFlight:
        """Return the account of the pool: every request passes every stage."""
        return self._pool.total

    def at(self, address: str) -> InFlight | None:
        """Return the account of one endpoint; None where the engine does not pick."""
        return self._pool.loads.get(address, _NOTHING) if self.is_picked else None

    def picked_for(self, lease: Lease) -> str | None:
        """Return the endpoint of the stage that was picked for a request, if one was."""
        return None if self._role is Role.PREFILL else lease.endpoint


class DetectorFactory(Protocol):
    """Makes the detectors of one stage."""

    def __call__(self, stage: StageLoad, now_ns: int, before: Sequence[Detector]) -> list[Detector]:
        """Return detectors for a stage, which take over what those `before` have learnt."""


@final
class Pool:
    """Counts requests in flight, and combines the loads that the detectors measure.

    Args:
        picker: whether Envoy or the engine chooses endpoints. A request that the engine sent to an
            endpoint that has left the pool does not count against those that remain.
        make_detectors: makes those of a stage, which keeps them when only its endpoints change.
        fallbacks_max: how many endpoints to name besides the one picked.
    """

    def __init__(
        self, picker: Picker, make_detectors: DetectorFactory, fallbacks_max: int = 0
    ) -> None:
        self.fallbacks_max = fallbacks_max
        self.total = InFlight()
        """In flight, except at endpoints that have left."""
        self.loads: dict[str, InFlight] = {}
        """In flight at each endpoint, including those that have left with requests in flight."""
        self.endpoints: tuple[Endpoint, ...] = ()
        self.picker = EndpointPicker()
        """Chooses endpoints, while `picks` is set."""
        self._set_picker(picker)
        self.stages: dict[Role, Stage] = {}
        self.is_empty = True
        """Whether it has no endpoint; with prefill and decode apart, none that decodes."""
        self.detectors: dict[Role, list[Detector]] = {}
        """The detectors of each stage."""
        self.has_timer = False
        """Whether time alone can change the saturation."""
        self._make_detectors = make_detectors
        self._present: frozenset[str] = frozenset()
        """The addresses of the endpoints."""
        self._unplaced = InFlight()
        """In flight at endpoints of Envoy's choice."""
        self._all: list[Detector] = []
        """Detectors of the stages that have endpoints."""
        self._counting: list[Detector] = []
        """Those of them that are called with dispatches."""
        self._counting_ends: list[Detector] = []
        """The same of every stage: a request may end while its stage has no endpoint."""
        self._timed: list[Detector] = []
        self._asked: list[Detector] = []
        """Detectors whose loads are the load of the pool. With a picker, its stage is left out."""
        self._detectors_of: dict[str, list[Detector]] = {}
        """By endpoint, those of its stage; for an endpoint in both, of the one with the picker."""
        self._pick_stage = Stage(self, Role.BOTH, ())
        self._to_pick: frozenset[str] = frozenset()
        """The addresses of its endpoints."""
        self._revision = 0
        self._spares_readers = False
        self._saturation: float | None = None
        """The load of the pool; None: it must be computed again."""

    def saturation(self) -> float:
        """Return the load of the pool, 1.0 is full; an empty pool is full."""
        known = self._saturation
        if known is None:
            known = self._saturation = self._measure()
        return known

    def load(self) -> float:
        """Return the load of the pool as if nothing were held back."""
        if self.picks and len(self.picker):
            return self.picker.mean()
        return self.saturation()

    def unheld(self) -> float:
        """Return the load of the pool as if every prompt sent were read. O(detectors)."""
        load = self.saturation()
        if load < FULL or self.is_empty:
            return load
        load = self.picker.mean() if self.picks else 0.0
        for detector in self._asking():
            load = max(load, detector.unheld())
        return load if load >= FULL or load < _ALMOST_FULL else FULL

    def _asking(self) -> list[Detector]:
        """Return the detectors to ask: all, while requests of Envoy's choice are in flight."""
        return self._all if self._unplaced.requests else self._asked

    def spare_readers(self, *, is_on: bool) -> None:
        """Prefer endpoints that read no prompt, or stop preferring them. O(endpoints)."""
        if is_on is not self._spares_readers:
            self._spares_readers = is_on
            self._changed(everywhere=True)

    def reading_ns(self, lease: Lease) -> float:
        """Return how long reading a prompt occupies the endpoints of the slower stage, together."""
        return max([detector.reading_ns(lease) for detector in self._all], default=0.0)

    def held_ns(self, now_ns: int) -> int | None:
        """Return how long free places are held back for prompts to be read, from now.

        None: a place is free at once, or no place is free, or Envoy picks and it is unknown.
        """
        if self.load() > _ALMOST_FULL or self.saturation() < FULL:
            return None
        next_ns = self.next_change_ns()
        return None if next_ns is None else max(0, next_ns - now_ns)

    def _measure(self) -> float:
        if self.is_empty:
            return FULL
        load = 0.0
        if self.picks:
            load = self.picker.saturation()
            if load >= FULL:
                return FULL
        for detector in self._asking():
            saturation = detector.saturation()
            if saturation > load:
                load = saturation
        return load

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint: the largest that its stage's detectors measure."""
        load = 0.0
        for detector in self._detectors_of[address]:
            saturation = detector.endpoint_saturation(address)
            if saturation > load:
                load = saturation
        return load

    def set_endpoints(self, endpoints: Sequence[Endpoint], now_ns: int) -> None:
        """Replace the endpoints; each keeps its account, even across an absence. O(endpoints)."""
        self.endpoints = tuple({endpoint.address: endpoint for endpoint in endpoints}.values())
        present = [endpoint.address for endpoint in self.endpoints]
        gone = self.loads.keys() - set(present)
        kept = {a: load for a, load in self.loads.items() if a in gone and load.requests}
        self.loads = kept | {a: self.loads.get(a, InFlight()) for a in present}
        self._present = frozenset(present)
        self.picker.set_endpoints(present)
        counted = [self._unplaced, *(self.loads[address] for address in present)]
        self.total.requests = sum(load.requests for load in counted)
        self.total.tokens = sum(load.tokens for load in counted)
        self._set_stages(now_ns)

    def _set_stages(self, now_ns: int, *, renews: bool = False) -> None:
        roles = {endpoint.role for endpoint in self.endpoints}
        if not roles and self.stages:
            wanted = tuple(self.stages)  # it is taken to be an absence
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
        self.is_empty = not self.stages[wanted[-1]].addresses
        self._all = [
            d for role in wanted if self.stages[role].addresses for d in self.detectors[role]
        ]
        self._counting = [each for each in self._all if each.counts_dispatches]
        everywhere = [detector for role in wanted for detector in self.detectors[role]]
        self._counting_ends = [each for each in everywhere if each.counts_dispatches]
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
        self._to_pick = frozenset(self._pick_stage.addresses)
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
        """Replace the detectors; requests in flight stay counted. O(endpoints)."""
        self._set_picker(picker)
        self._make_detectors = make_detectors
        self._set_stages(now_ns, renews=True)

    def _set_picker(self, picker: Picker) -> None:
        self.picks = picker is not Picker.OFF
        self.picker.set_affinity(is_on=picker is Picker.PREFIX_AFFINITY)

    def charge(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch; with a picker, choose the endpoint and set it in the lease."""
        if self.picks:
            address = lease.endpoint = self.picker.cached_at(lease.request) or self.room_for(lease)
            assert address is not None, "nothing is dispatched to a full pool"
            if self.fallbacks_max:
                subset = lease.request.subset
                lease.fallbacks = self.picker.fallbacks(subset, address, self.fallbacks_max)
            self.picker.picked(address, lease.request)
        self._count(lease, now_ns)

    def _count(self, lease: Lease, now_ns: int) -> None:
        """Count a request at the endpoint of its lease, and call the detectors."""
        address = lease.endpoint
        self.total.add(lease)
        load = self._unplaced if address is None else self.loads[address]
        load.add(lease)
        for detector in self._counting:
            detector.charged(lease, now_ns)
        self._changed(address)

    def moved(self, lease: Lease, address: str, now_ns: int) -> None:
        """Count a request in flight at the endpoint that serves it, if that was not picked.

        It may take that endpoint over its limit. Nothing changes if Envoy picks, if the endpoint is
        not in the pool, or if it only prefills.
        """
        if lease.endpoint is None or lease.endpoint == address or address not in self._to_pick:
            return
        self.release(lease, now_ns)
        lease.endpoint = address
        self._count(lease, now_ns)

    def take_up(self, lease: Lease) -> None:
        """Count a request that another process dispatched, at the endpoint of its lease.

        Detectors are not called: how it fares is no evidence about their own dispatches.
        """
        address = lease.endpoint
        if address is None:
            self._unplaced.add(lease)
            self.total.add(lease)
        else:
            self.loads.setdefault(address, InFlight()).add(lease)
            if address in self._present:
                self.total.add(lease)
        self._changed(address, everywhere=address is None)

    def release(self, lease: Lease, now_ns: int) -> None:
        """Free the slot of a request that has ended."""
        address = lease.endpoint
        if address is None:
            self._unplaced.take(lease)
            self.total.take(lease)
        else:
            self.loads[address].take(lease)
            if address in self._present:
                self.total.take(lease)
            elif not self.loads[address].requests:
                del self.loads[address]
        for detector in self._counting_ends:
            detector.released(lease, now_ns)
        self._changed(address, everywhere=address is None)

    def counts(self, lease: Lease) -> bool:
        """Whether a request in flight holds a slot of the present pool."""
        return lease.endpoint is None or lease.endpoint in self._present

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in a scrape of an endpoint; ignored if it has left."""
        if load.address not in self._present:
            return
        for detector in self._all:
            detector.observed(load, now_ns)
        self._changed(load.address)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used."""
        for detector in self._counting_ends:
            detector.settled(lease, settled, now_ns)
        self._changed()

    def advance(self, now_ns: int) -> None:
        """Let time pass."""
        self._changed()
        for detector in self._timed:
            for address in detector.advance(now_ns):
                self._changed(address)

    def next_change_ns(self) -> int | None:
        """Return when time alone next changes the saturation; None: it does not."""
        changes = (detector.next_change_ns() for detector in self._timed)
        return min((change for change in changes if change is not None), default=None)

    def limits_changed(self) -> None:
        """Note that the limits of detectors have changed. O(endpoints)."""
        self._changed(everywhere=True)

    def serves(self, lease: Lease) -> bool:
        """Whether a request has something to wait for: an endpoint of its subset, if it has one."""
        subset = lease.request.subset
        if subset is None or not self.picks or self.is_empty:
            return True
        return any(address in self.picker for address in subset)

    def has_room_for(self, lease: Lease) -> bool:
        """Whether a request can be dispatched, while the pool is not full."""
        return lease.request.subset is None or self.has_room_in(lease.request.subset)

    def has_room_in(self, subset: Subset) -> bool:
        """Whether any of these endpoints has room, while the pool is not full. O(subset)."""
        if not self.picks:
            return True
        return self.picker.has_room_in(subset)

    def room_for(self, lease: Lease) -> str | None:
        """Return the endpoint that a request would be sent to, None if none has room. O(subset)."""
        subset = lease.request.subset
        return self.picker.best() if subset is None else self.picker.best_of(subset)

    def _changed(self, address: str | None = None, *, everywhere: bool = False) -> None:
        """Note that the load of the pool has changed, and perhaps of one or all endpoints.

        O(log endpoints); O(endpoints) if all of them may have changed.
        """
        self._saturation = None
        if not self.picks:
            return
        revision = sum([detector.revision for detector in self._all])
        if everywhere or revision != self._revision:
            self._revision = revision
            self.picker.clear()
            for each in self._pick_stage.addresses:
                self._measure_endpoint(each)
        elif address is not None and address in self.picker:
            self._measure_endpoint(address)

    def _measure_endpoint(self, address: str) -> None:
        is_held = is_reading = False
        for detector in self._detectors_of[address]:
            is_held = is_held or detector.holds(address)
            is_reading = is_reading or (self._spares_readers and detector.reads(address))
        load = self.endpoint_saturation(address)
        self.picker.put(address, load, is_held=is_held, is_reading=is_reading)

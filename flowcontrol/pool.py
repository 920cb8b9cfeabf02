"""Pure. The endpoints of the pool, what is in flight at each, and how full that makes it.

A request in flight is counted from its dispatch to the end of its stream, so the counts are exact.
The pool is full as soon as any of its detectors says so, in any of its stages: with endpoints that
only prefill and others that only decode, either kind alone can be what all requests wait for.

Where the engine picks (`picker`), what exceeds one endpoint's limit fills no other: the load of the
pool is the mean of its endpoints' loads, each full at most, and it is full when none has room.
"""

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
    """How many ever were."""

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
"""More than that is full: a mean may be off by rounding."""
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
        """Return the account of what is in flight in the whole stage: always the same one."""

    def at(self, address: str) -> InFlight | None:
        """Return what is in flight at one endpoint, None while Envoy picks."""

    def picked_for(self, lease: Lease) -> str | None:
        """Return the endpoint of the stage that was picked for a request; None: Envoy's choice."""


class Detector(Protocol):
    """Says how full one stage of the pool is. 1.0 is full.

    Is called with everything that happens, but only with ends and settlements while its stage has
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
    """Changes whenever an endpoint's load may have changed other than by the call just made."""

    def saturation(self) -> float:
        """Return the load of the stage."""

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint."""

    def unheld(self) -> float:
        """Return the load of the stage, whether or not it must be sent nothing for the moment."""

    def holds(self, address: str) -> bool:
        """Whether an endpoint must be sent nothing for the moment, whatever its load is."""

    def reads(self, address: str) -> bool:
        """Whether an endpoint is to be picked only where all others read a prompt, too."""

    def reading_ns(self, lease: Lease) -> float:
        """Return the time of all endpoints together that a prompt takes; 0: it is not known."""

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

    def advance(self, now_ns: int) -> Sequence[str]:
        """Let time pass; return the endpoints whose load is another now."""

    def next_change_ns(self) -> int | None:
        """Return when time alone will change the answer; None if it will not."""


class WithoutPace:
    """The answers of a detector that does not know how long prompts take to be read."""

    def holds(self, address: str) -> bool:  # noqa: ARG002 - at no time
        """No: only the load holds requests back."""
        return False

    def reads(self, address: str) -> bool:  # noqa: ARG002 - it is not known
        """No: only the load makes a difference between endpoints."""
        return False

    def reading_ns(self, lease: Lease) -> float:  # noqa: ARG002 - it is not known
        """Return 0: it is not known."""
        return 0.0


@final
class Stage:
    """The endpoints that do one part of the work, and the detectors that watch them."""

    def __init__(self, pool: "Pool", role: Role, addresses: tuple[str, ...]) -> None:
        self._pool = pool
        self._role = role
        self.addresses = addresses

    @property
    def is_picked(self) -> bool:
        """Whether the engine picks an endpoint here: never where there is only prefill."""
        return self._pool.picks and self._role is not Role.PREFILL

    def pool(self) -> InFlight:
        """Return what is in flight: every request passes every stage."""
        return self._pool.total

    def at(self, address: str) -> InFlight | None:
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
        self.fallbacks_max = fallbacks_max
        self.total = InFlight()
        """In flight, but for what was sent to endpoints that have left."""
        self.loads: dict[str, InFlight] = {}
        """In flight at each endpoint, also at those that have left until it has ended."""
        self.endpoints: tuple[Endpoint, ...] = ()
        self.picker = EndpointPicker()
        """Chooses where to send a request, while `picks`."""
        self._set_picker(picker)
        self.stages: dict[Role, Stage] = {}
        self.is_empty = True
        """Whether it has no endpoint, or none that decodes, where prefill and decode run apart."""
        self.detectors: dict[Role, list[Detector]] = {}
        """Of each stage."""
        self.has_timer = False
        """Whether time alone can change the saturation."""
        self._make_detectors = make_detectors
        self._present: frozenset[str] = frozenset()
        """The addresses of the endpoints."""
        self._unplaced = InFlight()
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
        """By endpoint, those of its stage; of the stage that is picked for, where it is in both."""
        self._pick_stage = Stage(self, Role.BOTH, ())
        self._to_pick: frozenset[str] = frozenset()
        """The addresses of its endpoints."""
        self._revision = 0
        self._spares_readers = False
        self._saturation: float | None = None
        """The load of the pool; None when it has to be computed again."""

    def saturation(self) -> float:
        """Return the load of the pool; an empty one is full."""
        known = self._saturation
        if known is None:
            known = self._saturation = self._measure()
        return known

    def load(self) -> float:
        """Return the load of the pool, whether or not it may be sent something just now."""
        if self.picks and len(self.picker):
            return self.picker.mean()
        return self.saturation()

    def unheld(self) -> float:
        """Return the load of the pool as if all prompts were read that were sent. O(detectors)."""
        load = self.saturation()
        if load < FULL or self.is_empty:
            return load
        load = self.picker.mean() if self.picks else 0.0
        for detector in self._asking():
            load = max(load, detector.unheld())
        return load if load >= FULL or load < _ALMOST_FULL else FULL

    def _asking(self) -> list[Detector]:
        """Return who says how full the pool is; while Envoy sent some, it counts as a whole too."""
        return self._all if self._unplaced.requests else self._asked

    def spare_readers(self, *, is_on: bool) -> None:
        """Pick an endpoint that reads a prompt only where all do, or no longer; O(endpoints)."""
        if is_on is not self._spares_readers:
            self._spares_readers = is_on
            self._changed(everywhere=True)

    def reading_ns(self, lease: Lease) -> float:
        """Return the time that a prompt takes of the endpoints of the slower stage, together."""
        return max([detector.reading_ns(lease) for detector in self._all], default=0.0)

    def held_ns(self, now_ns: int) -> int | None:
        """Return when something may be sent to places that are free, but for prompts to be read.

        From now; None where a place is free at once, where none is, and where that cannot be told
        because Envoy picks.
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
        self.is_empty = not self.stages[wanted[-1]].addresses
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
        """Take other detectors; what is in flight stays counted. O(endpoints)."""
        self._set_picker(picker)
        self._make_detectors = make_detectors
        self._set_stages(now_ns, renews=True)

    def _set_picker(self, picker: Picker) -> None:
        self.picks = picker is not Picker.OFF
        self.picker.set_affinity(is_on=picker is Picker.PREFIX_AFFINITY)

    def charge(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch; with a picker, choose the endpoint and write it into the lease."""
        if self.picks:
            address = lease.endpoint = self.picker.cached_at(lease.request) or self.room_for(lease)
            assert address is not None, "nothing is dispatched to a full pool"
            if self.fallbacks_max:
                subset = lease.request.subset
                lease.fallbacks = self.picker.fallbacks(subset, address, self.fallbacks_max)
            self.picker.picked(address, lease.request)
        self._count(lease, now_ns)

    def _count(self, lease: Lease, now_ns: int) -> None:
        """Count a request at the endpoint that its lease names, and let detectors notice it."""
        address = lease.endpoint
        self.total.add(lease)
        load = self._unplaced if address is None else self.loads[address]
        load.add(lease)
        for detector in self._counting:
            detector.charged(lease, now_ns)
        self._changed(address)

    def moved(self, lease: Lease, address: str, now_ns: int) -> None:
        """Count a request in flight at the endpoint that serves it, if another was picked.

        That endpoint may exceed its limit by it. Nothing changes where Envoy picks, or if the
        endpoint is not one to pick from: none of the pool, or one that only prefills.
        """
        if lease.endpoint is None or lease.endpoint == address or address not in self._to_pick:
            return
        self.release(lease, now_ns)
        lease.endpoint = address
        self._count(lease, now_ns)

    def take_up(self, lease: Lease) -> None:
        """Count a request that another process dispatched, at the endpoint its lease names.

        Not reported to detectors that count dispatches: what came of it is no evidence of theirs.
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
        """Give back the slot of a request that has ended."""
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
        for detector in self._hearing:
            detector.released(lease, now_ns)
        self._changed(address, everywhere=address is None)

    def counts(self, lease: Lease) -> bool:
        """Whether a request in flight holds a slot of the pool as it is now."""
        return lease.endpoint is None or lease.endpoint in self._present

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in what an endpoint says of itself; nothing, if it has left."""
        if load.address not in self._present:
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
        self._changed()
        for detector in self._timed:
            for address in detector.advance(now_ns):
                self._changed(address)

    def next_change_ns(self) -> int | None:
        """Return when time alone will change the saturation."""
        changes = (detector.next_change_ns() for detector in self._timed)
        return min((change for change in changes if change is not None), default=None)

    def limits_changed(self) -> None:
        """Note that detectors go by other limits than before; O(endpoints)."""
        self._changed(everywhere=True)

    def serves(self, lease: Lease) -> bool:
        """Whether a request has something to wait for: an endpoint of its subset, or any pool."""
        subset = lease.request.subset
        if subset is None or not self.picks or self.is_empty:
            return True
        return any(address in self.picker for address in subset)

    def has_room_for(self, lease: Lease) -> bool:
        """Whether a request can go, while the pool is not full."""
        return lease.request.subset is None or self.has_room_in(lease.request.subset)

    def has_room_in(self, subset: Subset) -> bool:
        """Whether any of these endpoints has room, while the pool is not full. O(subset)."""
        if not self.picks:
            return True
        return self.picker.has_room_in(subset)

    def room_for(self, lease: Lease) -> str | None:
        """Return where a request would go, of the endpoints that it may go to. O(its subset)."""
        subset = lease.request.subset
        return self.picker.best() if subset is None else self.picker.best_of(subset)

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

"""Pure. Checks the safety of a run with accounts that are independent of the engine.

    every request that arrived is decided once, for its own band and flow
    a request that has left before its dispatch is never dispatched
    no request waits while a slot is free that it may have, and no slot is taken twice

The engine checks its own accounts itself.
"""

from collections import Counter
from typing import NamedTuple, final

from flowcontrol.config import Ceilings, Concurrency, ControllerConfig, Picker
from flowcontrol.events import Arrived, Decision, EndpointsChanged, Fact, Left, ObjectivesChanged
from flowcontrol.lines import Subset
from flowcontrol.request import DEFAULT_PRIORITY, FlowKey, Outcome

_SHOWN_MAX = 5


class SafetyError(AssertionError):
    """The engine did what it must never do."""


class LivenessError(AssertionError):
    """The engine did not do what it must finally do."""


class Slots(NamedTuple):
    """Slots of an engine that counts requests and gates no band below a full pool."""

    each: int
    """Slots at one endpoint."""
    is_picked: bool
    """Whether the engine picks, so that each endpoint has its own slots."""


def slots_of(config: ControllerConfig) -> Slots | None:
    """Return the slots of an engine with this configuration.

    None: it does not only count requests at each endpoint, or it gates bands below a full pool.
    Such rules leave slots free on purpose.
    """
    detector, *others = config.detectors
    ceilings = config.ceilings
    if others or ceilings.policy is not Ceilings.STATIC or ceilings.ceiling_max < 1:
        return None
    if not isinstance(detector, Concurrency) or detector.tokens_max is not None:
        return None
    assert detector.requests_max is not None, "limits requests or tokens"
    return Slots(detector.requests_max, config.picker is not Picker.OFF)


class _Entry(NamedTuple):
    key: FlowKey
    arrived_ns: int
    subset: Subset | None


@final
class SafetyAccounts:
    """Takes in every fact before the engine, and every decision after it.

    O(1), and O(endpoints) for a turn. The head of a flow is unknown here, so a flow may wait while
    a slot is free that any of its requests cannot have. Turns in which that is so cost O(flows).

    Args:
        slots: what may be in flight; None: the engine has another rule, which is not checked.
    """

    def __init__(self, slots: Slots | None) -> None:
        self._slots = slots
        self._priorities: dict[str, int] = {}
        self._endpoints: tuple[str, ...] = ()
        self._undecided: dict[int, _Entry] = {}
        self._waiting: dict[FlowKey, Counter[Subset | None]] = {}
        """Their number by flow and subset."""
        self._left: dict[int, None] = {}
        """Undecided requests whose stream has ended."""
        self._in_flight: dict[int, str | None] = {}
        self._at: Counter[str | None] = Counter()
        self._reclaimed: set[int] = set()
        self._last_id = -1

    @property
    def undecided_count(self) -> int:
        """Requests that wait for a decision."""
        return len(self._undecided)

    def open_ids(self) -> str:
        """Return some ids of requests that are not over, for an error message."""
        ids = [*self._undecided, *self._in_flight]
        named = ", ".join(map(str, ids[:_SHOWN_MAX]))
        return named + (f" and {len(ids) - _SHOWN_MAX} more" if len(ids) > _SHOWN_MAX else "")

    def handle(self, fact: Fact, now_ns: int) -> None:
        """Take in a fact before the engine does; `now_ns` is the engine's time."""
        match fact:
            case Arrived(request):
                assert request.request_id > self._last_id, "ids are counted up"
                self._last_id = request.request_id
                objective = request.objective
                priority = DEFAULT_PRIORITY
                if objective is not None:
                    priority = self._priorities.get(objective, DEFAULT_PRIORITY)
                key = FlowKey(priority, request.flow_id)
                entry = _Entry(key, now_ns, request.subset)
                self._undecided[request.request_id] = entry
                self._waiting.setdefault(key, Counter())[entry.subset] += 1
            case Left(request_id):
                if request_id in self._undecided:
                    self._left[request_id] = None
                elif request_id in self._in_flight:
                    self._at[self._in_flight.pop(request_id)] -= 1
                    self._reclaimed.discard(request_id)
            case ObjectivesChanged(priorities):
                self._priorities = dict(priorities)
            case EndpointsChanged(addresses):
                self._endpoints = addresses
            case _:
                pass

    def decided(self, decision: Decision, now_ns: int) -> None:
        """Check a decision against the accounts.

        Raises:
            SafetyError: it is not the only decision of a request, or takes a slot that is not free.
        """
        request_id = decision.request_id
        if decision.outcome is Outcome.RECLAIMED:
            self._reclaim(decision)
            return
        entry = self._undecided.pop(request_id, None)
        _demand(entry is not None, "is not waiting: decided twice, or never arrived", decision)
        assert entry is not None
        self._forget(entry)
        key = FlowKey(decision.priority, decision.flow_id)
        _demand(key == entry.key, "came for another band or flow", decision)
        waited_ns = now_ns - entry.arrived_ns
        _demand(waited_ns == decision.waited_ns, "waited another time", decision)
        has_left = request_id in self._left
        self._left.pop(request_id, None)
        if decision.outcome is Outcome.DISPATCHED:
            _demand(not has_left, "has left before", decision)
            self._take_slot(decision, entry.subset)
        elif decision.outcome is Outcome.EVICTED_CANCELLED:
            _demand(has_left, "has not left", decision)

    def turn_ended(self) -> None:
        """Check what must hold between turns.

        Raises:
            SafetyError: a request that left is undecided, or one waits while a slot is free.
        """
        if self._left:
            message = f"request {next(iter(self._left))} has left and was not decided"
            raise SafetyError(message)
        if self._slots is None or not self._undecided or self._taken() >= self._most():
            return
        for key, subsets in self._waiting.items():
            if all(map(self._has_slot, subsets)):
                first = next(i for i, entry in self._undecided.items() if entry.key == key)
                message = (
                    f"request {first} waits while {self._taken()} of {self._most()} slots are taken"
                )
                raise SafetyError(message)

    def check_over(self) -> None:
        """Check that no request is left when all calls are over.

        Raises:
            SafetyError: a request is left.
        """
        if self._undecided or self._in_flight:
            message = f"all calls are over, but not {self.open_ids()}"
            raise SafetyError(message)

    def _reclaim(self, decision: Decision) -> None:
        request_id = decision.request_id
        _demand(request_id in self._in_flight, "is not in flight", decision)
        _demand(request_id not in self._reclaimed, "was reclaimed before", decision)
        self._reclaimed.add(request_id)

    def _forget(self, entry: _Entry) -> None:
        waiting = self._waiting[entry.key]
        waiting[entry.subset] -= 1
        if not waiting[entry.subset]:
            del waiting[entry.subset]
            if not waiting:
                del self._waiting[entry.key]

    def _has_slot(self, subset: Subset | None) -> bool:
        """Whether a request may have one of the free slots, while there are any."""
        assert self._slots is not None
        if subset is None or not self._slots.is_picked:
            return True
        return any(
            address in self._endpoints and self._at[address] < self._slots.each
            for address in subset
        )

    def _take_slot(self, decision: Decision, subset: Subset | None) -> None:
        address = decision.endpoint
        if self._slots is not None:
            _demand(self._taken() < self._most(), "finds no free slot", decision)
            if self._slots.is_picked:
                _demand(address in self._endpoints, "goes to no endpoint of the pool", decision)
                _demand(self._at[address] < self._slots.each, "goes to a full endpoint", decision)
                is_allowed = subset is None or address in subset
                _demand(is_allowed, "goes where it may not", decision)
        self._in_flight[decision.request_id] = address
        self._at[address] += 1

    def _taken(self) -> int:
        """Count requests in flight; if the engine picks, only those at endpoints of the pool."""
        if self._slots is not None and self._slots.is_picked:
            return sum(self._at[address] for address in self._endpoints)
        return len(self._in_flight)

    def _most(self) -> int:
        assert self._slots is not None
        return self._slots.each * len(self._endpoints)


def _demand(is_so: bool, otherwise: str, decision: Decision) -> None:  # noqa: FBT001 - an assertion
    if not is_so:
        message = f"request {decision.request_id} {otherwise}: {decision}"
        raise SafetyError(message)

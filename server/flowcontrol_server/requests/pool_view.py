"""Pure. What was last said of the endpoints, seen as it passes on its way to the engine."""

from typing import Final, final

from flowcontrol.events import EndpointsChanged, Fact, LoadObserved
from flowcontrol.tally import make_room
from flowcontrol.views.snapshot import Snapshot

_FRESH_NS: Final = 30_000_000_000
"""A load that old says nothing of now."""


@final
class PoolView:
    """Knows the endpoints and what each last said of its own load."""

    def __init__(self) -> None:
        self._addresses: tuple[str, ...] = ()
        self._turn = 0
        self._loads: dict[str, tuple[int, int]] = {}
        """Requests each endpoint says it has, and when it said so."""
        self.answers: dict[str, list[int]] = {}
        """Of each endpoint, how often it did its part, and how often it failed; of those that have
        left the pool, because they failed perhaps, only so many."""

    def notice(self, fact: Fact, now_ns: int) -> None:
        """Take note of a fact, if it is about endpoints."""
        match fact:
            case EndpointsChanged():
                self._addresses = fact.addresses
                kept = set(fact.addresses)
                self._loads = {a: load for a, load in self._loads.items() if a in kept}
                for address in fact.addresses:
                    if address not in self.answers:
                        make_room(self.answers, kept.__contains__)
                        self.answers[address] = [0, 0]
            case LoadObserved():
                if fact.address in self._addresses and fact.running is not None:
                    self._loads[fact.address] = fact.running + fact.waiting, now_ns
            case _:
                pass

    def answered(self, address: str, is_failure: bool) -> None:  # noqa: FBT001 - its callers pass it by position
        """Count an answer of an endpoint that is, or was, in the pool."""
        counts = self.answers.get(address)
        if counts is not None:
            counts[is_failure] += 1

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return the endpoints of the pool."""
        return self._addresses

    def anywhere(self) -> str | None:
        """Return an endpoint, each in turn; None if there is none."""
        if not self._addresses:
            return None
        self._turn += 1
        return self._addresses[self._turn % len(self._addresses)]

    def engine_requests(self, now_ns: int) -> dict[str, int]:
        """Return the requests, running and waiting, that endpoints have said they have of late."""
        return {a: n for a, (n, at_ns) in self._loads.items() if now_ns - at_ns < _FRESH_NS}

    def drift(self, snapshot: Snapshot, now_ns: int) -> int | None:
        """Return how many more requests the endpoints have than we have in flight there.

        Above zero: traffic passes by the gate. Below: requests end at the endpoint but not here.
        None when too little is known: of no endpoint, or while Envoy picks of not every one.
        """
        said = self.engine_requests(now_ns)
        if not said:
            return None
        ours = 0
        for endpoint in snapshot.endpoints:
            if endpoint.in_flight is None:
                is_whole = all(each.address in said for each in snapshot.endpoints)
                ours = snapshot.in_flight + snapshot.recovered
                return sum(said.values()) - ours if is_whole else None
            if endpoint.address in said:
                ours += endpoint.in_flight
        return sum(said.values()) - ours

"""Pure. The latest facts about endpoints, noted on their way to the engine."""

from typing import Final, final

from flowcontrol.events import EndpointsChanged, Fact, LoadObserved
from flowcontrol.tally import make_room
from flowcontrol.views.snapshot import Snapshot

_FRESH_NS: Final = 30_000_000_000
"""Older loads are ignored."""


@final
class PoolView:
    """The endpoints of the pool, and the load that each last reported."""

    def __init__(self) -> None:
        self._addresses: tuple[str, ...] = ()
        self._turn = 0
        self._loads: dict[str, tuple[int, int]] = {}
        """By endpoint: requests that it reported, and when."""
        self.answers: dict[str, list[int]] = {}
        """By endpoint: how many answers were good, and how many were failures; bounded for
        endpoints that have left the pool."""

    def notice(self, fact: Fact, now_ns: int) -> None:
        """Note a fact, if it is about endpoints."""
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
        """Return an endpoint, each in turn; None: there is none."""
        if not self._addresses:
            return None
        self._turn += 1
        return self._addresses[self._turn % len(self._addresses)]

    def engine_requests(self, now_ns: int) -> dict[str, int]:
        """Return the requests, running and waiting, that each endpoint has reported recently."""
        return {a: n for a, (n, at_ns) in self._loads.items() if now_ns - at_ns < _FRESH_NS}

    def drift(self, snapshot: Snapshot, now_ns: int) -> int | None:
        """Return how many more requests the endpoints report than are in flight there.

        Above zero: traffic bypasses the gate. Below: requests have ended at the endpoint but not
        here. None: no endpoint reports, or Envoy picks and not every endpoint does.
        """
        theirs = self.engine_requests(now_ns)
        if not theirs:
            return None
        ours = 0
        for endpoint in snapshot.endpoints:
            if endpoint.in_flight is None:
                is_whole = all(each.address in theirs for each in snapshot.endpoints)
                ours = snapshot.in_flight + snapshot.recovered
                return sum(theirs.values()) - ours if is_whole else None
            if endpoint.address in theirs:
                ours += endpoint.in_flight
        return sum(theirs.values()) - ours

"""Pure. How full is the pool, and where is there room?"""

from typing import final

from flowcontrol.buckets import Buckets
from flowcontrol.config import Picker

FULL = 1.0
"""The saturation at which a pool takes no more."""


@final
class ConcurrencyDetector:
    """Counts requests in flight, exactly: each from its dispatch to the end of its stream.

    Saturation is what is in flight over what may be, `in_flight_max` at each endpoint; a pool
    without endpoints is full. When the engine is the picker, requests at endpoints that have left
    the pool no longer count against those that remain. O(1).
    """

    def __init__(self, in_flight_max: int, picker: Picker) -> None:
        self.in_flight_max = in_flight_max
        self._picker = picker
        self._loads: Buckets[str] = Buckets()
        self._in_flight = 0
        """In flight in the pool; with a picker only at present endpoints."""
        self._departed: dict[str, int] = {}
        """In flight at endpoints that have left the pool, while there is any."""

    @property
    def is_empty(self) -> bool:
        """Whether the pool has no endpoint."""
        return len(self._loads) == 0

    def saturation(self) -> float:
        """Return the load of the pool; 1.0 or more is full."""
        capacity = len(self._loads) * self.in_flight_max
        return self._in_flight / capacity if capacity else FULL

    def set_endpoints(self, addresses: tuple[str, ...]) -> None:
        """Replace the pool; an endpoint keeps its count, across an absence too. O(endpoints)."""
        counts = {address: self._loads.count(address) for address in self._loads}
        counts |= self._departed
        self._loads = Buckets()
        for address in dict.fromkeys(addresses):
            self._loads.add(address, counts.pop(address, 0))
        self._departed = {address: count for address, count in counts.items() if count}
        if self._picker is Picker.LEAST_LOADED:
            self._in_flight = sum(self._loads.count(address) for address in self._loads)

    def charge(self) -> str | None:
        """Count a dispatch; return the endpoint it goes to, None when Envoy chooses."""
        self._in_flight += 1
        if self._picker is Picker.OFF:
            return None
        address = self._loads.fewest()
        self._loads.increment(address)
        return address

    def release(self, address: str | None) -> None:
        """Give back the slot of a request that has ended."""
        if address is not None and address in self._departed:
            self._departed[address] -= 1
            if not self._departed[address]:
                del self._departed[address]
            return
        assert self._in_flight > 0, "released more than was charged"
        self._in_flight -= 1
        if address is not None:
            self._loads.decrement(address)

    def in_flight(self) -> dict[str, int | None]:
        """Return the count at each present endpoint, None where only the pool's is known."""
        known = self._picker is Picker.LEAST_LOADED
        return {a: self._loads.count(a) if known else None for a in self._loads}

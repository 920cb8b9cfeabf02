"""Pure. The endpoints that the engine chooses from, and its choice.

The least loaded endpoint is picked first; among equals, the one whose last pick is longest ago.
Endpoints that read a prompt can be ranked behind those that read none. With affinity, an endpoint
that served the beginning of the prompt is preferred while its load is below a bound (consistent
hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam, SODA 2018): BOUND times the mean
load, or LIGHT if that is larger. So affinity takes an endpoint at most one request beyond the
bound. The numbers were chosen by simulation on one trace and judged on another
(tests/benchmarks/prefix_affinity.py): with more imbalance, the queues inside the engines cost more
than the cache saves.
"""

from collections.abc import Iterator, Sequence
from heapq import nsmallest
from math import nextafter
from typing import Final, final

from flowcontrol.affinity import PrefixAffinity
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.lines import Subset
from flowcontrol.request import Request

FULL: Final = 1.0
"""The saturation at which a pool, or an endpoint, is full."""
_ALMOST_FULL: Final = nextafter(FULL, 0)
BOUND: Final = 1.5
"""Affinity ends at so many times the mean load."""
LIGHT: Final = 0.1
"""Below this load affinity applies whatever the mean is."""

_NO_ROOM: Final = 2 * FULL
"""Rank of an endpoint that must not be sent a request. Others rank by their load, or by FULL plus
their load while they read a prompt."""


@final
class EndpointPicker:
    """Picks endpoints by the loads it is given. O(log endpoints) for each that changes."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}
        """When each endpoint was last picked, counted in picks."""
        self._turn = 0
        self._order: KeyedHeap[str, tuple[float, int]] = KeyedHeap()
        """Endpoints to pick from, by rank."""
        self._ranks: dict[str, tuple[float, int]] = {}
        """Rank of each, and when it was last picked."""
        self._loads: dict[str, float] = {}
        """Load of each, 1 at most, whether or not it is held back."""
        self._load_sum = 0.0
        """Sum of these loads."""
        self._affinity: PrefixAffinity | None = None
        """Where prompts were served; None: no affinity."""

    def set_endpoints(self, addresses: Sequence[str]) -> None:
        """Replace the endpoints of the pool; those that stay keep their turn. O(endpoints)."""
        self._turns = {address: self._turns.get(address, 0) for address in addresses}

    def set_affinity(self, *, is_on: bool) -> None:
        """Turn affinity on or off."""
        if is_on is (self._affinity is None):
            self._affinity = PrefixAffinity() if is_on else None

    def clear(self) -> None:
        """Remove all endpoints to pick from."""
        self._order = KeyedHeap()
        self._ranks.clear()
        self._loads.clear()
        self._load_sum = 0.0

    def put(
        self, address: str, load: float, *, is_held: bool = False, is_reading: bool = False
    ) -> None:
        """Note the load of an endpoint to pick from.

        Args:
            address: which.
            load: 1 is full.
            is_held: whether it must not be sent a request now.
            is_reading: whether to rank it behind all that are not reading.
        """
        order = _NO_ROOM if is_held or load >= FULL else FULL + load if is_reading else load
        rank = self._ranks[address] = (order, self._turns[address])
        self._order.put(address, rank)
        if load > FULL:
            load = FULL
        self._load_sum += load - self._loads.get(address, 0.0)
        self._loads[address] = load

    def __contains__(self, address: str) -> bool:
        return address in self._loads

    def __len__(self) -> int:
        return len(self._loads)

    def saturation(self) -> float:
        """Return the mean load, kept below 1 while any endpoint has room; 1 if none has."""
        if self.best() is None:
            return FULL
        load = self.mean()
        return load if load < _ALMOST_FULL else _ALMOST_FULL  # the sum may be off by rounding

    def mean(self) -> float:
        """Return the mean load, whether or not endpoints are held back; there must be endpoints."""
        return self._load_sum / len(self._loads)

    def best(self) -> str | None:
        """Return the endpoint to pick; None: none has room."""
        first = self._order.first()
        return first[1] if first is not None and first[0][0] < _NO_ROOM else None

    def best_of(self, subset: Subset) -> str | None:
        """Return the endpoint to pick among some. O(subset)."""
        (order, _), address = min(self._places(subset), default=((_NO_ROOM, 0), ""))
        return address if order < _NO_ROOM else None

    def cached_at(self, request: Request) -> str | None:
        """Return the endpoint that affinity prefers for a request; None: no preference.

        O(blocks of the prompt).
        """
        if self._affinity is None or not request.prefix:
            return None
        bound = min(FULL, max(LIGHT, BOUND * self.mean()))
        subset = request.subset
        for address in self._affinity.endpoints(request.prefix):
            is_allowed = subset is None or address in subset
            if is_allowed and self._has_room(address) and self._loads[address] < bound:
                return address
        return None

    def has_room_in(self, subset: Subset) -> bool:
        """Whether any of these endpoints has room. O(subset)."""
        return any(self._has_room(address) for address in subset)

    def _has_room(self, address: str) -> bool:
        rank = self._ranks.get(address)
        return rank is not None and rank[0] < _NO_ROOM

    def fallbacks(self, subset: Subset | None, picked: str, count: int) -> tuple[str, ...]:
        """Return where else to send a request if its endpoint is unreachable. O(endpoints)."""
        places = nsmallest(count + 1, self._places(subset))
        return tuple([address for _, address in places if address != picked][:count])

    def picked(self, address: str, request: Request) -> None:
        """Note that an endpoint was picked for a request."""
        self._turn += 1
        self._turns[address] = self._turn
        if self._affinity is not None and request.prefix:
            self._affinity.served(request.prefix, address)

    def _places(self, subset: Subset | None) -> Iterator[tuple[tuple[float, int], str]]:
        for address in self._ranks if subset is None else subset:
            if address in self._ranks:
                yield self._ranks[address], address

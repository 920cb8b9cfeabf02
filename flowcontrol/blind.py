"""Pure. The limit of a stage where departures are the only evidence: a part of `auto`.

Departures allow two measurements. Each alone misleads.

The shortest times. How long the shortest sixth of a cohort was in flight (`evidence.Residences`).
If requests wait inside the engine, that wait is part of every time, and shows most in the shortest.
This costs nothing and is known soon, so it is what usually moves the limit. But a token takes
longer the more requests are generated together, so the shortest times also grow where no request
waits: at a large engine with 64 in flight they are three times as long as with 8.

The gain. Half of the endpoints are sent more for a while and half less, then the other way round,
so that neither the traffic of the moment nor unequal endpoints matter. If X requests leave per
second at n in flight, and X' at n', the gain is

    e = ln (X'/X) / ln (n'/n)

It is 1 if requests do not slow each other, 0 if more in flight only waits longer, and negative if
caches overflow and work is done twice. A comparison costs time and some output. With N departures
from each half each time, its error is 1 / (sqrt(N) ln (n'/n)). One endpoint, or a stage that Envoy
picks from, is compared with itself: first with more, then with less.

So the shortest times decide. The gain is measured before a first fall, and when the shortest times
have been undecided for a while. If the gain is large, requests were only slower, and their present
times become the least. If it is small, an edge is found. Near an edge, the shortest times are
believed once three cohorts in a row agree: one in four or five is wrong by chance.

What it does not see: prompts, caches, and changes of the traffic within one comparison.
"""

from collections.abc import Mapping
from math import exp, log, sqrt
from typing import Final, final

from flowcontrol.config import Role
from flowcontrol.evidence import Residences
from flowcontrol.memory import PlaceMemory, StageMemory
from flowcontrol.place import Moved, Place, step_after

_START: Final = 1.5
"""Growth before the first fall."""
_REACHED: Final = 0.85
"""Part of a limit that must have been in flight on average, for it to rise."""
_FALL_MOST, _FALL = 0.5, 2.0
"""One fall is to this part at most, and by so many times the excess of requests that wait."""
_UNDECIDED, _UNDECIDED_NEAR = 4, 16
"""Undecided cohorts in a row before the gain is measured; and the same near an edge."""
_MANY: Final = 3
"""Cohorts in a row of which too many wait, before a limit near an edge falls."""
_NEAR: Final = 1.5
"""A limit is near an edge if they differ by less than this factor."""
_MORE: Final = 1.3
"""In a comparison one half has the limit times this, the other the limit divided by it."""
_DEPARTURES: Final = 32
"""Departures to wait for, from each half each time."""
_COMPARED_LEAST: Final = 0.15
"""Least logarithm of n'/n from which a gain is computed."""
_GAIN: Final = 0.35
"""A smaller gain is not worth it: two thirds of the requests added only wait."""
_CERTAIN, _PAIRS = 0.2, 3
"""Error at which a gain is certain enough; and the most pairs of turns spent on it."""
_BY_GAIN, _RISE_MOST, _FALL_MOST_BY_GAIN = 2.0, log(1.5), log(0.75)
"""The logarithm of a limit moves by so many times the excess of the gain over `_GAIN`, within these
bounds."""


@final
class _Cohort:
    """The first requests dispatched once the limit is reached.

    Args:
        shortest: the shortest times of earlier cohorts; learns from this one.
        might: how many may be in flight.
        in_flight: how many are.
        now_ns: the time.
    """

    def __init__(self, shortest: Residences, might: int, in_flight: int, now_ns: int) -> None:
        self._shortest = shortest
        self._might = might
        self._in_flight = in_flight
        self._filling = max(0, might - in_flight)
        """Dispatches still to come that fill empty places."""
        self._members: dict[int, int] = {}
        """Requests of the cohort in flight: id to time of dispatch."""
        self._joined = self._over = self._dispatched = 0
        self._area = 0.0
        """Requests in flight x ns."""
        self._since_ns = self._looked_ns = self._full_ns = now_ns
        self.most = in_flight
        shortest.begin()

    def _look(self, now_ns: int) -> None:
        self._area += self._in_flight * (now_ns - self._looked_ns)
        self._looked_ns = now_ns

    def charged(self, request_id: int, now_ns: int) -> None:
        """Count a dispatch."""
        self._look(now_ns)
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        if self._filling > 0:
            self._filling -= 1
            return
        if not self._dispatched:
            self._area, self._since_ns = 0.0, now_ns
        self._dispatched += 1
        if self._joined < self._shortest.cohort:
            self._joined += 1
            self._full_ns = now_ns
            self._members[request_id] = now_ns

    def released(self, request_id: int, now_ns: int) -> bool:
        """Count a departure; return whether the cohort can be judged now."""
        self._look(now_ns)
        self._in_flight -= 1
        since_ns = self._members.pop(request_id, None)
        if since_ns is None:
            return False
        self._shortest.released(now_ns - since_ns)
        self._over += 1
        cohort = self._shortest.cohort
        full_ns = now_ns - self._full_ns if self._joined == cohort else 0
        return self._shortest.is_enough(self._over, cohort, full_ns)

    def share(self) -> float:
        """Return the share of the requests in flight that waits inside."""
        wait_ns = self._shortest.wait_ns()
        return wait_ns * self._dispatched / max(1.0, self._area)

    def is_reached(self) -> bool:
        """Whether the limit was reached, on average."""
        return self._area >= _REACHED * self._might * (self._looked_ns - self._since_ns)


@final
class _Half:
    """Half of the endpoints: what was in flight and how many left, with less [0] and more [1]."""

    def __init__(self) -> None:
        self.endpoints: list[int] = []
        """Endpoints at each place."""
        self.in_flight = 0
        self.area = [0.0, 0.0]
        """Requests in flight x ns."""
        self.lasted_ns = [0, 0]
        self.left = [0, 0]
        self.settling = 0
        """Departures until everything in flight was sent under the present limit."""

    def might(self, limit: float) -> int:
        """Return how many may be in flight with that limit at each endpoint, in whole requests."""
        return sum([int(limit * count) for count in self.endpoints])


@final
class _Comparison:
    """Half of the endpoints with more in flight, half with less, and then the other way round."""

    def __init__(self, halves: list[_Half], limit: float, now_ns: int) -> None:
        self._halves = halves
        self._limit = limit
        self._looked_ns = now_ns
        self._has_more = 0
        """Number of the half that has more."""
        self.pairs = 0
        """How often each half has had more."""
        self._settle()

    def limit_of(self, half: int) -> float:
        """Return the limit at each endpoint of a half. The two differ by at least one request."""
        less = max(1.0, self._limit / _MORE)
        return max(int(less) + 1.0, self._limit * _MORE) if half == self._has_more else less

    def _settle(self) -> None:
        for number, half in enumerate(self._halves):
            might = half.might(self.limit_of(number))
            half.settling = 1 + min(half.in_flight, might)

    def _is_settled(self) -> bool:
        return max([half.settling for half in self._halves]) <= 0

    def _look(self, now_ns: int) -> None:
        lasted_ns = now_ns - self._looked_ns
        self._looked_ns = now_ns
        if self._is_settled():
            for number, half in enumerate(self._halves):
                turn = int(number == self._has_more)
                half.area[turn] += half.in_flight * lasted_ns
                half.lasted_ns[turn] += lasted_ns

    def charged(self, half: int, now_ns: int) -> None:
        """Count a dispatch."""
        self._look(now_ns)
        self._halves[half].in_flight += 1

    def released(self, half: int, now_ns: int) -> bool:
        """Count a departure; return whether the halves should change turns."""
        self._look(now_ns)
        own = self._halves[half]
        own.in_flight -= 1
        if not self._is_settled():
            own.settling -= 1
            return False
        own.left[int(half == self._has_more)] += 1
        turns = [int(number == self._has_more) for number in range(len(self._halves))]
        known = [each.left[turn] for each, turn in zip(self._halves, turns, strict=True)]
        return min(known) >= _DEPARTURES * (self.pairs + 1)

    def turn(self) -> bool:
        """Give the other half more; return whether both have now had it equally often."""
        self._has_more = 1 - self._has_more
        self.pairs += not self._has_more
        self._settle()
        return not self._has_more

    def gain(self) -> tuple[float, float] | None:
        """Return the gain and its standard error; None: too little differed."""
        left, in_flight, variance = 0.0, 0.0, 0.0
        for half in self._halves:
            if min(half.area) <= 0:
                return None  # all left at once
            slower = log(half.lasted_ns[1] / half.lasted_ns[0])
            left += log(half.left[1] / half.left[0]) - slower
            in_flight += log(half.area[1] / half.area[0]) - slower
            variance += 1 / half.left[0] + 1 / half.left[1]
        if in_flight < _COMPARED_LEAST * len(self._halves):
            return None
        return left / in_flight, sqrt(variance) / in_flight

    def is_reached(self) -> bool:
        """Whether the larger limit was reached, on average."""
        most = self.limit_of(self._has_more)
        might = [half.might(most) for half in self._halves]
        were = [half.area[1] / half.lasted_ns[1] for half in self._halves]
        return sum(were) >= _REACHED * sum(might)


@final
class BlindLimit:
    """One limit for all endpoints of a stage. O(log cohort) an event, O(endpoints) a move.

    Args:
        places: by address, or one for all endpoints.
        limit: the first limit on requests at each endpoint.
        moved: called with every move, once the places have their limits.
        is_starting: whether the limit has never fallen.
        now_ns: the time.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        limit: float,
        moved: Moved,
        *,
        is_starting: bool,
        now_ns: int,
    ) -> None:
        self._limit = limit
        self._moved = moved
        self._is_starting = is_starting
        self._shortest = Residences()
        self._comparison: _Comparison | None = None
        self._edge = 0.0
        """The limit at which the gain was last found too small; 0: never."""
        self._rises = self._undecided = self._many = 0
        """Cohorts in a row: of rises, undecided, with too many waiting."""
        self.watch(places, now_ns)

    def watch(self, places: Mapping[str, Place], now_ns: int) -> None:
        """Start again with these places."""
        self._places = places
        self._endpoints = sum([place.endpoints for place in places.values()])
        self._half_of = {address: number % 2 for number, address in enumerate(sorted(places))}
        self._begin(now_ns)

    def end(self, now_ns: int) -> None:
        """Give every place the same limit, and stop comparing."""
        self._begin(now_ns)

    def remember(self, role: Role) -> StageMemory:
        """Return what was learnt about the endpoints of this role."""
        each = PlaceMemory(requests=self._limit, calm=0.0, is_starting=self._is_starting)
        shortest_ns = self._shortest.least_ns or 0.0
        return StageMemory(role, dict.fromkeys(self._places, each), shortest_ns, self._edge)

    def resume(self, shortest_ns: float, edge: float) -> None:
        """Go on with what was learnt before; 0: nothing."""
        self._shortest.least_ns = shortest_ns or None
        self._edge = edge

    def charged(self, address: str, request_id: int, now_ns: int) -> None:
        """Count a dispatch."""
        if self._comparison is None:
            self._cohort.charged(request_id, now_ns)
        else:
            self._comparison.charged(self._half_of[address], now_ns)

    def released(self, address: str, request_id: int, now_ns: int) -> bool:
        """Count a departure, judge if enough is known; return whether limits may have moved."""
        half = self._half_of.get(address)
        if half is None:  # its endpoint has left
            return False
        if self._comparison is None:
            is_known = self._cohort.released(request_id, now_ns)
            if is_known:
                self._judge(now_ns)
        else:
            is_known = self._comparison.released(half, now_ns)
            if is_known:
                self._turn(self._comparison, now_ns)
        return is_known

    def _begin(self, now_ns: int) -> None:
        """Start a cohort, with the same limit at every endpoint."""
        self._comparison = None
        for place in self._places.values():
            place.allow(self._limit, now_ns)
        in_flight = sum([place.load.requests for place in self._places.values()])
        might = sum([int(place.requests_max) for place in self._places.values()])
        self._cohort = _Cohort(self._shortest, might, in_flight, now_ns)

    def _compare(self, now_ns: int) -> None:
        """Start to measure the gain."""
        self._rises = self._undecided = self._many = 0
        halves = [_Half() for _ in set(self._half_of.values())]
        for address, place in self._places.items():
            half = halves[self._half_of[address]]
            half.endpoints.append(place.endpoints)
            half.in_flight += place.load.requests
        self._comparison = _Comparison(halves, self._limit, now_ns)
        self._allow(self._comparison, now_ns)

    def _allow(self, comparison: _Comparison, now_ns: int) -> None:
        for address, place in self._places.items():
            place.allow(comparison.limit_of(self._half_of[address]), now_ns)

    def _judge(self, now_ns: int) -> None:
        """Move the limit by the shortest times, or start to measure the gain."""
        cohort, limit, after = self._cohort, self._limit, self._limit
        share, is_reached = cohort.share(), cohort.is_reached()
        is_near = limit / _NEAR < self._edge < limit * _NEAR
        reason = f"{share:.0%} of those in flight wait inside, by departures"
        self._many = 0 if share < self._shortest.many else self._many + 1
        if share < self._shortest.few:
            self._undecided = 0
            if is_reached:
                self._rises += 1
                after = limit * (_START if self._is_starting else step_after(self._rises))
        elif share < self._shortest.many:
            self._rises = 0
            self._undecided += is_reached
        elif is_near and self._many < _MANY:
            self._rises = 0
        elif is_near:
            self._rises = self._undecided = self._many = 0
            by = _FALL * (share - self._shortest.aim)
            after = min(limit, cohort.most / self._endpoints) * max(_FALL_MOST, 1 - by)
        elif is_reached:
            self._undecided = _UNDECIDED_NEAR
        if self._undecided >= (_UNDECIDED_NEAR if is_near else _UNDECIDED):
            self._compare(now_ns)
        else:
            self._move(after, reason, now_ns)

    def _turn(self, comparison: _Comparison, now_ns: int) -> None:
        """Give the other half more, or move the limit by the gain."""
        if not comparison.turn():
            self._allow(comparison, now_ns)
            return
        found = comparison.gain()
        if found is None:
            self._begin(now_ns)
            return
        gain, error = found
        beyond, is_known = gain - _GAIN, error < _CERTAIN or comparison.pairs == _PAIRS
        if abs(beyond) < error and not is_known:
            self._allow(comparison, now_ns)
            return
        after = self._limit
        if beyond <= 0:
            self._is_starting = False
            self._edge = after
            after *= exp(max(_FALL_MOST_BY_GAIN, _BY_GAIN * beyond))
        else:
            self._shortest.relearn()
            if comparison.is_reached():
                after *= exp(min(_RISE_MOST, _BY_GAIN * beyond))
        reason = f"10 % more in flight gives {gain / 10:.1%} more output, by departures"
        self._move(after, reason, now_ns)

    def _move(self, limit: float, reason: str, now_ns: int) -> None:
        """Continue with this limit, which may be the present one."""
        before, self._limit = self._limit, max(1.0, limit)
        self._begin(now_ns)
        if self._limit != before:
            self._moved("requests", before, self._limit, reason, now_ns)

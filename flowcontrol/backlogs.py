"""Pure. How long are the backlogs of a band's flows?

Two questions. Both are asked while a request is handled, so neither may look at every flow.

Which backlog is the longest? It loses a request when one must be displaced. A backlog grows and
shrinks by one, so flows are kept in one bucket for each length. When the top bucket empties because
its flow became shorter, the bucket below now holds that flow, so the top moves by one step. LFU
caches use the same idea: Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU cache
eviction scheme", 2010. The buckets are ordered dictionaries, because the first key of a plain one
costs O(keys deleted before it).

How many requests have fewer than x of their own flow before them? So many are dispatched while
every flow has x turns (`forecast`). Requests are counted by that place, in classes that double in
width (0, 1, 2-3, 4-7, ...); within a class they are taken to be evenly spread.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, final

from flowcontrol.flow import Flow

_CLASSES: Final = 64
"""More than the bits of any count."""
_MEMORY: Final = 512
"""After so many dispatches, earlier arrivals and dispatches count half."""
_REMAINING: Final = 1 / 3
"""Part of its turns during which others can still overtake a request."""
_OVERTAKING_MAX: Final = 0.9
"""Upper bound of the part that overtakes: a forecast then is ten times as long."""


@final
class Backlogs:
    """Flows by the length of their backlogs. O(1), except for the questions about places."""

    __slots__ = ("_buckets", "_came", "_longest", "_places", "_went")

    def __init__(self) -> None:
        self._buckets: dict[int, OrderedDict[Flow, None]] = {}
        """Flows by length; within one, in the order in which they reached it."""
        self._longest = 0
        self._places = [0] * _CLASSES
        """Waiting requests by the class of their place."""
        self._came: list[float] = [0.0] * _CLASSES
        """Recent arrivals by the class of their place, faded."""
        self._went = 0.0
        """Dispatches in the same time, faded alike."""

    def grew(self, flow: Flow) -> None:
        """Note that the backlog of a flow is longer by one."""
        length = flow.capacity.requests
        place = (length - 1).bit_length()
        self._places[place] += 1
        self._came[place] += 1.0
        self.shift(flow, length - 1, length)

    def shrank(self, flow: Flow) -> None:
        """Note that the backlog of a flow is shorter by one."""
        length = flow.capacity.requests
        place = length.bit_length()
        assert self._places[place] > 0, "no request has such a place"
        self._places[place] -= 1
        self.shift(flow, length + 1, length)

    def shift(self, flow: Flow, length: int, to: int) -> None:
        """Move a flow to the bucket of a length that differs by one; length 0 has no bucket."""
        buckets = self._buckets
        if length:
            bucket = buckets[length]
            if len(bucket) > 1:
                del bucket[flow]
            else:
                del buckets[length]
                if length == self._longest:
                    self._longest = to
                if to and to not in buckets:
                    buckets[to] = bucket  # the bucket moves: it holds no other flow
                    return
        if to:
            if to > self._longest:
                self._longest = to
            found = buckets.get(to)
            if found is None:
                found = buckets[to] = OrderedDict()
            found[flow] = None

    def longest(self) -> tuple[Flow | None, int]:
        """Return the flow with the longest backlog, and its length; the first to reach that."""
        if not self._longest:
            return None, 0
        return next(iter(self._buckets[self._longest])), self._longest

    def dispatched(self) -> None:
        """Count a dispatch. O(1) amortised."""
        self._went += 1.0
        if self._went >= _MEMORY:
            self._went /= 2
            self._came = [came / 2 for came in self._came]

    def before(self, turns: float) -> float:
        """Return about how many are dispatched while every flow has so many turns. O(log turns)."""
        return _below(self._places, turns)

    def overtaking(self, turns: float) -> float:
        """Return the part of dispatches that serves later arrivals, within so many turns."""
        if not self._went:
            return 0.0
        return min(_below(self._came, turns * _REMAINING) / self._went, _OVERTAKING_MAX)

    def lengths(self) -> dict[Flow, int]:
        """Return the backlog of every flow that has one; O(flows)."""
        return {flow: length for length, bucket in self._buckets.items() for flow in bucket}


def _below(counts: Sequence[float], turns: float) -> float:
    total = 0.0
    low = 0
    for count in counts:
        high = 2 * low or 1
        if turns < high:
            return total + count * (turns - low) / (high - low)
        total += count
        low = high
    return total

"""Pure. Something that only going over it can find: where it was found is believed for a while.

To try again whether an edge is still there makes the requests sent over it wait. So it is tried
after a minute, and after twice as long each time it is found at the same place, as with the probes
of TCP's persist timer (RFC 9293), up to 16 minutes. Found elsewhere, it is new.
"""

from math import inf
from typing import Final, final

_FIRST_NS: Final = 60_000_000_000
_MOST_NS: Final = 960_000_000_000


@final
class Belief:
    """An edge, and until when it is believed. O(1).

    Args:
        same: part of it by which it may be off and still be the same.
    """

    __slots__ = ("_same", "_until_ns", "for_ns", "value")

    def __init__(self, same: float) -> None:
        self._same = same
        self.value = inf
        """Where it was found, be it believed or not; inf: nowhere."""
        self.for_ns = 0
        """How long it is believed."""
        self._until_ns = 0

    def found(self, value: float, now_ns: int) -> None:
        """Take note that the edge is there."""
        is_again = abs(value - self.value) <= self._same * value
        self.for_ns = min(2 * self.for_ns, _MOST_NS) if is_again else _FIRST_NS
        self.value = value
        self._until_ns = now_ns + self.for_ns

    def resume(self, value: float, for_ns: int, now_ns: int) -> None:
        """Take over what another has found."""
        self.value, self.for_ns = value, for_ns
        self._until_ns = now_ns + self.for_ns

    def scale(self, factor: float) -> None:
        """Follow a change of what it is of."""
        self.value *= factor

    def edge(self, now_ns: int) -> float:
        """Return the edge; inf: none is known, or it may be tried again."""
        return self.value if now_ns < self._until_ns else inf

"""Pure. An edge that can only be found by going over it, and how long the finding is believed.

To look whether an edge is still there makes the requests sent over it wait. So it is tried again
after a minute, and after twice as long each time it is found at the same place, up to 16 minutes,
like the probes of TCP's persist timer (RFC 9293). If it is found elsewhere, the time starts again
at a minute.
"""

from math import inf
from typing import Final, final

_FIRST_NS: Final = 60_000_000_000
_MOST_NS: Final = 960_000_000_000


@final
class Belief:
    """An edge, and until when it is believed. O(1).

    Args:
        same: two findings are the same if they differ by no more than this part.
    """

    __slots__ = ("_same", "_until_ns", "for_ns", "value")

    def __init__(self, same: float) -> None:
        self._same = same
        self.value = inf
        """Where it was last found, whether or not that is still believed; inf: never."""
        self.for_ns = 0
        """How long the finding is believed, in ns."""
        self._until_ns = 0

    def found(self, value: float, now_ns: int) -> None:
        """Note that the edge was found at `value`."""
        is_again = abs(value - self.value) <= self._same * value
        self.for_ns = min(2 * self.for_ns, _MOST_NS) if is_again else _FIRST_NS
        self.value = value
        self._until_ns = now_ns + self.for_ns

    def resume(self, value: float, for_ns: int, now_ns: int) -> None:
        """Take over a finding of another."""
        self.value, self.for_ns = value, for_ns
        self._until_ns = now_ns + self.for_ns

    def scale(self, factor: float) -> None:
        """Scale the edge, as when the number of endpoints changes."""
        self.value *= factor

    def edge(self, now_ns: int) -> float:
        """Return the edge; inf: none is known, or it is time to try again."""
        return self.value if now_ns < self._until_ns else inf

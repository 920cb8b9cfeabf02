"""Pure. Time that passes only from one event to the next."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import final

Action = Callable[[], None]
"""What is to happen at a moment; it may plan more, at that moment too."""


@final
class VirtualClock:
    """The present, and what is to happen at which moment, in integer nanoseconds from 0.

    What is planned for the same moment happens in the order in which it was planned, whatever it
    is: ties are broken by a number, so that nothing depends on hashes or addresses.
    """

    __slots__ = ("_heap", "_number", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Action]] = []
        self._number = 0

    def at(self, when_ns: int, action: Action) -> None:
        """Plan an action; O(log planned). A moment that has passed is a mistake of the caller."""
        assert when_ns >= self.now_ns, "the past cannot be planned"
        self._number += 1
        heappush(self._heap, (when_ns, self._number, action))

    def after(self, delay_ns: int, action: Action) -> None:
        """Plan an action for so long from now."""
        self.at(self.now_ns + delay_ns, action)

    @property
    def next_ns(self) -> int | None:
        """The moment of the next action, None when none is planned."""
        return self._heap[0][0] if self._heap else None

    def advance(self, to_ns: int) -> None:
        """Let time pass to a moment, and everything happen that is due by then."""
        heap = self._heap
        while heap and heap[0][0] <= to_ns:
            self.now_ns, _, action = heappop(heap)
            action()
        assert to_ns >= self.now_ns, "time must not go back"
        self.now_ns = to_ns

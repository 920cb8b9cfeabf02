"""Pure. A virtual clock: time jumps from one event to the next."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import final

Action = Callable[[], None]
"""Called at its time; it may schedule more actions, at the same time, too."""


@final
class VirtualClock:
    """The present time and the scheduled actions, in integer nanoseconds from 0.

    Actions at the same time run in the order in which they were scheduled: a number breaks ties, so
    that nothing depends on hashes or addresses.
    """

    __slots__ = ("_heap", "_number", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Action]] = []
        self._number = 0

    def at(self, when_ns: int, action: Action) -> None:
        """Schedule an action, not in the past. O(log scheduled)."""
        assert when_ns >= self.now_ns, "an action must not be scheduled in the past"
        self._number += 1
        heappush(self._heap, (when_ns, self._number, action))

    def after(self, delay_ns: int, action: Action) -> None:
        """Schedule an action so long from now."""
        self.at(self.now_ns + delay_ns, action)

    @property
    def next_ns(self) -> int | None:
        """Time of the next action; None: none is scheduled."""
        return self._heap[0][0] if self._heap else None

    def advance(self, to_ns: int) -> None:
        """Let time pass, and run every action that is due by then."""
        heap = self._heap
        while heap and heap[0][0] <= to_ns:
            self.now_ns, _, action = heappop(heap)
            action()
        assert to_ns >= self.now_ns, "time must not go back"
        self.now_ns = to_ns

"""Pure. Whose turn is it? How a band chooses between the flows that have something waiting."""

from collections import OrderedDict
from typing import Protocol, assert_never, final

from flowcontrol.config import Fairness
from flowcontrol.flow import Flow
from flowcontrol.keyedheap import KeyedHeap


class FairnessPolicy(Protocol):
    """Chooses a flow. One instance belongs to one band and keeps its own account of the flows.

    It hears of every change that can matter and is asked with `pick`; it never looks at a flow that
    has nothing waiting, and nothing here costs more than O(log flows).
    """

    def enter(self, flow: Flow) -> None:
        """Take up a flow whose first request has begun to wait."""

    def head_moved(self, flow: Flow) -> None:
        """Notice that another request now stands at the head of a flow."""

    def leave(self, flow: Flow) -> None:
        """Let go of a flow of which nothing waits any more."""

    def pick(self) -> Flow:
        """Return the flow that is next; at least one must have entered."""

    def charge(self, flow: Flow) -> None:
        """Account for the dispatch of a flow's head, which is about to be removed."""


@final
class RoundRobin:
    """Equal turns: who was served goes to the end of the line.

    With F flows waiting, a flow's head is served within F dispatches of its band, however long the
    backlogs of the others. O(1).
    """

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line: OrderedDict[Flow, None] = OrderedDict()

    def enter(self, flow: Flow) -> None:
        """Put the flow at the end of the line."""
        self._line[flow] = None

    def head_moved(self, flow: Flow) -> None:
        """Turns do not depend on who is at the head."""

    def leave(self, flow: Flow) -> None:
        """Take the flow out of the line."""
        del self._line[flow]

    def pick(self) -> Flow:
        """Return the flow that has waited longest for its turn."""
        return next(iter(self._line))

    def charge(self, flow: Flow) -> None:
        """Send the flow to the end of the line."""
        self._line.move_to_end(flow)


@final
class GlobalStrict:
    """One queue: who came first goes first, whichever flow it belongs to. O(log flows)."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: KeyedHeap[Flow] = KeyedHeap()

    def enter(self, flow: Flow) -> None:
        """Take up the flow by the arrival of its head."""
        self._heads.put(flow, flow.head.arrival_index)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow to the arrival of its new head."""
        self._heads.put(flow, flow.head.arrival_index)

    def leave(self, flow: Flow) -> None:
        """Let go of the flow."""
        self._heads.discard(flow)

    def pick(self) -> Flow:
        """Return the flow whose head came first."""
        first = self._heads.first()
        assert first is not None, "pick needs a flow with something waiting"
        return first[1]

    def charge(self, flow: Flow) -> None:
        """Keep no account: order of arrival is all there is."""


def make_fairness(fairness: Fairness) -> FairnessPolicy:
    """Return a new policy of the configured kind."""
    match fairness:
        case Fairness.ROUND_ROBIN:
            return RoundRobin()
        case Fairness.GLOBAL_STRICT:
            return GlobalStrict()
        case _:
            assert_never(fairness)

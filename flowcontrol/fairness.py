"""Pure. Whose turn is it? How a band chooses between the flows that have something waiting.

Round-robin and global-strict keep no account. The others do, by flow id, and the account of a flow
outlives the flow for as long as it can still make a difference. Weighted tokens, the default, has a
module of its own.

Least attained service (Nuyens and Wierman, 2008, survey it) serves first the flow that got least
lately: attained cost, halved every half-life. No lift: a new flow goes before all others until it
has caught up, which is the point of it, and old flows can be starved by an endless stream of new
ones. Its bound: a flow that is served had attained no more than any that waits and could go, so
while two wait without pause, with heads that may go to the same endpoints and right estimates, the
one ahead is ahead by at most the largest cost of one request, or by less than it was.

Whichever the policy: a flow whose head may only go to endpoints without room is passed over, and
keeps what it has, its number, its place or its account (`lines`).
"""

from collections.abc import Mapping
from heapq import nlargest
from math import inf
from typing import Final, Protocol, assert_never, final

from flowcontrol.config import BandSettings, ControllerConfig, Fairness
from flowcontrol.flow import Flow, Lease
from flowcontrol.lines import HasRoom, Lines, Subset
from flowcontrol.weighted_tokens import ACCOUNTS_MAX, WeightedTokens

_HALF_LIVES_KEPT: Final = 16


class FairnessPolicy(Protocol):
    """Chooses a flow. One instance belongs to one band and keeps its own account of the flows.

    It hears of every change that can matter and is asked with `pick`; it never looks at a flow that
    has nothing waiting, and nothing here costs more than O(log flows).
    """

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Take up a flow whose first request has begun to wait."""

    def head_moved(self, flow: Flow) -> None:
        """Notice that another request may now stand at the head of a flow."""

    def leave(self, flow: Flow) -> None:
        """Drop a flow of which nothing waits any more."""

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow that is next, of those whose heads have room; None if none has."""

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Account for the dispatch of a request that waits in the flow no more.

        Stands for `head_moved`, or for `leave` where nothing of the flow waits now.
        """

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Add to what a flow was charged, or take from it, now that the true cost is known."""

    def accounts(self) -> Mapping[str, float]:
        """Return what a new policy must `correct` to go on as this one; O(accounts)."""

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return about how many turns every other flow has before a waiting request.

        Args:
            lease: the request.
            place: how many of its own flow go before it, and cost about as much as it does.
            cost_each: what a request of the others costs.
        """

    def tied(self, flow: Flow) -> list[Flow]:
        """Return the flows with the same account as a waiting flow that go before it; O(flows)."""

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Take other weights or times from now on; every account stands. O(accounts)."""


@final
class RoundRobin:
    """Equal turns: who was served goes to the end of the line.

    With F flows waiting, a flow's head that has room is served within F dispatches of its band,
    however long the backlogs of the others. O(log flows).
    """

    __slots__ = ("_lines", "_turn")

    def __init__(self) -> None:
        self._lines: Lines[Flow, float] = Lines()
        """By the number each drew when it came to the end of the line."""
        self._turn = 0

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Put the flow at the end of the line."""
        self._turn += 1
        flow.counter = float(self._turn)
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Put the flow, with the number it has, where its head may go."""
        self._lines.put(flow, flow.counter, flow.head.request.subset)

    def leave(self, flow: Flow) -> None:
        """Take the flow out of the line."""
        self._lines.discard(flow)

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow that has waited longest for its turn."""
        first = self._lines.first(has_room)
        return None if first is None else first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - nor does cost
        """Send the flow to the end of the line, or out of it."""
        if flow.waiting:
            self.enter(flow, now_ns)
        else:
            self.leave(flow)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Ignored: this policy keeps no account."""

    def accounts(self) -> Mapping[str, float]:
        """Return none: this policy keeps no account."""
        return {}

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:  # noqa: ARG002 - nor here
        """Return a turn for each before it, and the part of the line that stands before its flow.

        Numbers are missing where flows have moved on, about as many anywhere in the line.
        """
        first = self._lines.first(_everywhere)
        assert first is not None, "who asks is waiting"
        return place + (lease.flow.counter - first[0]) / (self._turn - first[0] + 1)

    def tied(self, flow: Flow) -> list[Flow]:  # noqa: ARG002 - no two have the same number
        """Return none: no two have the same number."""
        return []

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Ignored: this policy has no settings."""


@final
class GlobalStrict:
    """One queue: the head that is first in the band's order goes first, whichever flow it is of.

    O(log flows).
    """

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: Lines[Flow, tuple[int, int]] = Lines()
        """By their heads."""

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Take up the flow by its head."""
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow to where its new head belongs."""
        head = flow.head
        self._lines.put(flow, flow.order_of(head), head.request.subset)

    def leave(self, flow: Flow) -> None:
        """Drop the flow."""
        self._lines.discard(flow)

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow whose head is first."""
        first = self._lines.first(has_room)
        return None if first is None else first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - the order is all
        """Move the flow to where its new head belongs, or drop it."""
        if flow.waiting:
            self.head_moved(flow)
        else:
            self.leave(flow)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Ignored: this policy keeps no account."""

    def accounts(self) -> Mapping[str, float]:
        """Return none: this policy keeps no account."""
        return {}

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:  # noqa: ARG002 - see served
        """Return that there are no turns: all others go before the last in the line."""
        return inf

    def tied(self, flow: Flow) -> list[Flow]:  # noqa: ARG002 - see turns
        """Return none: requests have an order of their own."""
        return []

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Ignored: this policy has no settings."""


@final
class LeastAttainedService:
    """The flow that got least lately; the module's text says what that is. O(log flows) amortised.

    Costs grow with time instead of accounts shrinking (forward decay, Cormode et al., ICDE 2009):
    all accounts keep their order while nothing is served, so none has to be touched.

    Args:
        half_life_ns: time after which what was attained counts half, above zero.
        now_ns: the time.
    """

    __slots__ = ("_attained", "_flows", "_growth", "_half_life_ns", "_lines", "_since_ns")

    def __init__(self, half_life_ns: int, now_ns: int) -> None:
        self._half_life_ns = half_life_ns
        self._since_ns = now_ns
        self._growth = 1.0
        """What a cost counted at the last charge, seen from `_since_ns`."""
        self._attained: dict[str, float] = {}
        """Cost attained by each flow, as seen from `_since_ns`."""
        self._flows: dict[str, Flow] = {}
        """Those with something waiting."""
        self._lines: Lines[Flow, float] = Lines()
        """The same, by what they attained."""

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Take the flow up with what it attained."""
        self._restart(now_ns)
        self._flows[flow.key.flow_id] = flow
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Put the flow, with what it attained, where its head may go."""
        attained = self._attained.get(flow.key.flow_id, 0.0)
        self._lines.put(flow, attained, flow.head.request.subset)

    def leave(self, flow: Flow) -> None:
        """Keep the account; it fades by itself."""
        del self._flows[flow.key.flow_id]
        self._lines.discard(flow)

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow that attained least."""
        first = self._lines.first(has_room)
        return None if first is None else first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Add to what the flow attained."""
        if not flow.waiting:
            self.leave(flow)
        self.correct(flow.key.flow_id, cost, now_ns)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Add to, or take from, what the flow attained; a refund leaves no less than nothing."""
        self._restart(now_ns)
        self._growth = 2.0 ** ((now_ns - self._since_ns) / self._half_life_ns)
        grown = cost * self._growth
        self._attained[flow_id] = max(0.0, self._attained.get(flow_id, 0.0) + grown)
        flow = self._flows.get(flow_id)
        if flow is not None:
            self.head_moved(flow)

    def accounts(self) -> Mapping[str, float]:
        """Return what flows attained, as of the last charge."""
        return {flow_id: cost / self._growth for flow_id, cost in self._attained.items()}

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return how much more it will have attained than the least, in requests of others."""
        flow_id = lease.flow.key.flow_id
        least = self._lines.first(_everywhere)
        assert least is not None, "who asks is waiting"
        lead = (self._attained.get(flow_id, 0.0) - least[0]) / self._growth
        return (lead + place * lease.cost) / cost_each

    def tied(self, flow: Flow) -> list[Flow]:
        """Return those that attained as much and came first."""
        return self._lines.tied_before(flow)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Take another half-life: for what fades from now on."""
        self._count_anew(now_ns)
        self._half_life_ns = config.attained_half_life_ns

    def _restart(self, now_ns: int) -> None:
        """Scale the accounts down before numbers or accounts become too many; O(accounts) then."""
        half_lives = (now_ns - self._since_ns) / self._half_life_ns
        if half_lives >= _HALF_LIVES_KEPT or len(self._attained) > 2 * ACCOUNTS_MAX:
            self._count_anew(now_ns)

    def _count_anew(self, now_ns: int) -> None:
        half_lives = (now_ns - self._since_ns) / self._half_life_ns
        self._since_ns = now_ns
        self._growth = 1.0
        faded = {flow_id: cost * 2.0**-half_lives for flow_id, cost in self._attained.items()}
        largest = nlargest(ACCOUNTS_MAX, faded.items(), key=lambda account: account[1])
        self._attained = {flow_id: cost for flow_id, cost in largest if cost >= 1.0}
        for flow in self._flows.values():
            self.head_moved(flow)


def make_fairness(settings: BandSettings, config: ControllerConfig, now_ns: int) -> FairnessPolicy:
    """Return a new policy of the configured kind."""
    match settings.fairness:
        case Fairness.WEIGHTED_TOKENS:
            return WeightedTokens(config.weights)
        case Fairness.ROUND_ROBIN:
            return RoundRobin()
        case Fairness.GLOBAL_STRICT:
            return GlobalStrict()
        case Fairness.LEAST_ATTAINED_SERVICE:
            return LeastAttainedService(config.attained_half_life_ns, now_ns)
        case _:
            assert_never(settings.fairness)


def _everywhere(_subset: Subset) -> bool:
    """Say that there is room: for questions about the order alone."""
    return True

"""Pure. Which flow is next? How a band chooses between its flows with requests waiting.

Round-robin and global-strict keep no accounts. The others keep one for each flow id. An account
outlives its flow for as long as it can still make a difference. Weighted tokens, the default, has a
module of its own.

Least attained service (survey: Nuyens and Wierman, 2008) serves the flow that got least lately. It
counts attained cost, which is halved every half-life. New flows are not lifted: a new flow goes
before all others until it has caught up. This is intended, but an endless stream of new flows can
starve the old ones. Its bound: a flow that is served had attained no more than any other flow that
could have been served. So while two flows wait without pause, with heads that may go to the same
endpoints and with right estimates, the one ahead is ahead by at most the largest cost of one
request, or by less than before.

With every policy, a flow whose head may only go to endpoints without room is passed over, and keeps
its turn or its account (`lines`).
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
    """Chooses a flow. One instance belongs to one band, and keeps its own accounts of the flows.

    It is called with every change that can matter, and `pick` returns its choice. It never looks at
    a flow with nothing waiting. No call costs more than O(log flows), unless it says so.
    """

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Add a flow: its first request has begun to wait."""

    def head_moved(self, flow: Flow) -> None:
        """Note that the head of a flow may have changed."""

    def leave(self, flow: Flow) -> None:
        """Remove a flow: none of its requests waits any more."""

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the next flow, of those whose heads have room; None: none has."""

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Account for a dispatched request, which has already left the flow.

        Includes `head_moved`; or `leave`, if nothing of the flow waits now.
        """

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Add `cost`, which may be negative, to what a flow was charged: the true cost is known."""

    def accounts(self) -> Mapping[str, float]:
        """Return what a new policy must `correct` to continue this one. O(accounts)."""

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return an estimate of the turns that every other flow has before a waiting request.

        Args:
            lease: the request.
            place: requests of its own flow that go before it, taken to cost as much as it.
            cost_each: mean cost of a request of other flows.
        """

    def tied(self, flow: Flow) -> list[Flow]:
        """Return the flows that go before a waiting flow with the same account. O(flows)."""

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Apply other weights or times from now on; accounts stay. O(accounts)."""


@final
class RoundRobin:
    """Equal turns: a flow that was served goes to the end of the line.

    With F flows waiting, the head of a flow is served within F dispatches of its band, if it has
    room, however long the backlogs of the others are. O(log flows).
    """

    __slots__ = ("_lines", "_turn")

    def __init__(self) -> None:
        self._lines: Lines[Flow, float] = Lines()
        """By the number of their turn, taken at the end of the line."""
        self._turn = 0

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Put the flow at the end of the line."""
        self._turn += 1
        flow.counter = float(self._turn)
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow, with its number, to the line of its head's subset."""
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
        """Return a turn for each request before it, plus the part of the line before its flow.

        Numbers are missing in the line where flows have moved on, evenly in all of it.
        """
        first = self._lines.first(_everywhere)
        assert first is not None, "its flow is waiting"
        return place + (lease.flow.counter - first[0]) / (self._turn - first[0] + 1)

    def tied(self, flow: Flow) -> list[Flow]:  # noqa: ARG002 - no two have the same number
        """Return none: no two have the same number."""
        return []

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Ignored: this policy has no settings."""


@final
class GlobalStrict:
    """One queue: the head that is first in the band's ordering goes first, whatever its flow.

    O(log flows).
    """

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: Lines[Flow, tuple[int, int]] = Lines()
        """By the sort key of their heads."""

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Add the flow."""
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow to the place of its new head."""
        head = flow.head
        self._lines.put(flow, flow.order_of(head), head.request.subset)

    def leave(self, flow: Flow) -> None:
        """Remove the flow."""
        self._lines.discard(flow)

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow whose head is first."""
        first = self._lines.first(has_room)
        return None if first is None else first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - the order is all
        """Move the flow to the place of its new head, or remove it."""
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
        """Return infinity: there are no turns, and all others go before the last in the line."""
        return inf

    def tied(self, flow: Flow) -> list[Flow]:  # noqa: ARG002 - see turns
        """Return none: requests are ordered, not flows."""
        return []

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Ignored: this policy has no settings."""


@final
class LeastAttainedService:
    """The flow that got least lately; theory in the module's docstring. O(log flows) amortised.

    Costs grow with time instead of accounts shrinking (forward decay, Cormode et al., ICDE 2009):
    accounts keep their order while nothing is served, so none has to be updated.

    Args:
        half_life_ns: time after which attained cost counts half, above zero.
        now_ns: the time.
    """

    __slots__ = ("_attained", "_flows", "_growth", "_half_life_ns", "_lines", "_since_ns")

    def __init__(self, half_life_ns: int, now_ns: int) -> None:
        self._half_life_ns = half_life_ns
        self._since_ns = now_ns
        self._growth = 1.0
        """Factor on costs at the last charge, relative to `_since_ns`."""
        self._attained: dict[str, float] = {}
        """Cost attained by each flow, as of `_since_ns`."""
        self._flows: dict[str, Flow] = {}
        """Flows with something waiting, by id."""
        self._lines: Lines[Flow, float] = Lines()
        """The same flows by attained cost."""

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Add the flow, with the cost it attained."""
        self._restart(now_ns)
        self._flows[flow.key.flow_id] = flow
        self.head_moved(flow)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow, with its cost, to the line of its head's subset."""
        attained = self._attained.get(flow.key.flow_id, 0.0)
        self._lines.put(flow, attained, flow.head.request.subset)

    def leave(self, flow: Flow) -> None:
        """Keep the account; it fades by itself."""
        del self._flows[flow.key.flow_id]
        self._lines.discard(flow)

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow with the least attained cost."""
        first = self._lines.first(has_room)
        return None if first is None else first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Add to the flow's attained cost."""
        if not flow.waiting:
            self.leave(flow)
        self.correct(flow.key.flow_id, cost, now_ns)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Add to the flow's attained cost, which never falls below 0."""
        self._restart(now_ns)
        self._growth = 2.0 ** ((now_ns - self._since_ns) / self._half_life_ns)
        grown = cost * self._growth
        self._attained[flow_id] = max(0.0, self._attained.get(flow_id, 0.0) + grown)
        flow = self._flows.get(flow_id)
        if flow is not None:
            self.head_moved(flow)

    def accounts(self) -> Mapping[str, float]:
        """Return the attained costs, as of the last charge."""
        return {flow_id: cost / self._growth for flow_id, cost in self._attained.items()}

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return by how much its cost will exceed the least, in requests of other flows."""
        flow_id = lease.flow.key.flow_id
        least = self._lines.first(_everywhere)
        assert least is not None, "its flow is waiting"
        lead = (self._attained.get(flow_id, 0.0) - least[0]) / self._growth
        return (lead + place * lease.cost) / cost_each

    def tied(self, flow: Flow) -> list[Flow]:
        """Return the flows that attained as much and reached that first."""
        return self._lines.tied_before(flow)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Apply another half-life from now on."""
        self._rebase(now_ns)
        self._half_life_ns = config.attained_half_life_ns

    def _restart(self, now_ns: int) -> None:
        """Rebase the accounts before they become too large or too many; O(accounts) then."""
        half_lives = (now_ns - self._since_ns) / self._half_life_ns
        if half_lives >= _HALF_LIVES_KEPT or len(self._attained) > 2 * ACCOUNTS_MAX:
            self._rebase(now_ns)

    def _rebase(self, now_ns: int) -> None:
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
    """Return True: for questions about the order alone."""
    return True

"""Pure. Whose turn is it? How a band chooses between the flows that have something waiting.

Round-robin and global-strict keep no account. The other two do, by flow id, and the account of a
flow outlives the flow for as long as it can still make a difference.

Weighted tokens is virtual-time fair queueing on the cost of tokens. Every flow has a counter: the
cost of what it was served over its weight. The lowest counter goes next. A flow that was away is
lifted to the level of those being served, so absence earns no credit; one that left in debt returns
with its debt. This is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), which the
virtual token counter (Sheng et al., OSDI 2024) brought to language models, with two changes: a
dispatch is charged at once by estimate, so that a burst is paid for while it is in flight, and a
settlement corrects the counter by what the estimate was wrong.

Its bound. For a flow f of weight w let E be the error in the estimates of what it has in flight or
unsettled (estimated minus true cost, summed; 0 with nothing unsettled), R how far E ranges over
time, and A the largest true cost of one request. Let x be f's counter less E/w: what it would be
had every estimate been right. Corrections leave x alone, since they move the counter and E alike;
only true service and lifts raise it. Let L be the level, which never falls. It is raised to what
the lowest waiting counter is, so a waiting f has had c_f >= L when L was last raised, or f lifted:
x_f >= L - E_f/w_f of that moment. A flow g is in turn only as the lowest, so its last service left
x_g <= L - E_g/w_g + A_g/w_g, with E_g of just before it. Now take any interval in which both wait
without pause. At the last dispatch of f in it c_f <= c_g, that is x_f + E_f/w_f <= x_g + E_g/w_g;
put together, and with the other direction by symmetry, for the true service S in that interval

    |S_f/w_f - S_g/w_g|  <=  (A_f + R_f) / w_f + (A_g + R_g) / w_g

whatever its length and whatever others do. With right estimates R is 0, and this is the bound of
start-time fair queueing. Two things are outside of it: requests that go out of turn (`across`),
which are charged all the same, and debts forgotten when more than ACCOUNTS_MAX flows are in debt.

Least attained service (Nuyens and Wierman, 2008, survey it) serves first whoever got least lately:
attained cost, halved every half-life. No lift: a newcomer goes before everybody until it has caught
up, which is the point of it, and old flows can be starved by an endless stream of new ones. Its
bound: who is served had attained no more than whoever waits, so while two flows wait without pause
and the estimates are right, the one ahead is ahead by at most the largest cost of one request, or
by less than it was.
"""

from collections import OrderedDict
from collections.abc import Mapping
from heapq import nlargest
from math import inf
from typing import Protocol, assert_never, final

from flowcontrol.config import BandSettings, ControllerConfig, Fairness
from flowcontrol.flow import Flow, Lease
from flowcontrol.keyedheap import KeyedHeap

ACCOUNTS_MAX = 65_536
"""Accounts kept of flows that have nothing waiting; flow ids are the clients' to invent."""
_HALF_LIVES_KEPT = 16


class FairnessPolicy(Protocol):
    """Chooses a flow. One instance belongs to one band and keeps its own account of the flows.

    It hears of every change that can matter and is asked with `pick`; it never looks at a flow that
    has nothing waiting, and nothing here costs more than O(log flows).
    """

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Take up a flow whose first request has begun to wait."""

    def take_back(self, flow: Flow, now_ns: int) -> None:
        """Take up again a flow that was left in this very turn, as if it had not been.

        Those left first are taken back last.
        """

    def head_moved(self, flow: Flow) -> None:
        """Notice that another request may now stand at the head of a flow."""

    def leave(self, flow: Flow) -> None:
        """Let go of a flow of which nothing waits any more."""

    def pick(self) -> Flow:
        """Return the flow that is next; at least one must have entered."""

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Account for the dispatch of a request that waits in the flow no more.

        Stands for `head_moved`, or for `leave` where nothing of the flow waits now.
        """

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Add to what a flow was charged, or take from it, now that the true cost is known."""

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return about how many turns every other flow has before a waiting request.

        Args:
            lease: the request.
            place: how many of its own flow go before it, and cost about as much as it does.
            cost_each: what a request of the others costs.
        """

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Take other weights or times from now on; every account stands. O(accounts)."""


@final
class RoundRobin:
    """Equal turns: who was served goes to the end of the line.

    With F flows waiting, a flow's head is served within F dispatches of its band, however long the
    backlogs of the others. O(1).
    """

    __slots__ = ("_line", "_turn")

    def __init__(self) -> None:
        self._line: OrderedDict[Flow, int] = OrderedDict()
        """In order, each with the number it drew when it came to the end of the line."""
        self._turn = 0

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Put the flow at the end of the line."""
        self._turn += 1
        self._line[flow] = self._turn

    def take_back(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Put the flow at the front of the line, where it was when it was left."""
        first = next(iter(self._line.values()), self._turn + 1)
        self._line[flow] = first - 1
        self._line.move_to_end(flow, last=False)

    def head_moved(self, flow: Flow) -> None:
        """Turns do not depend on who is at the head."""

    def leave(self, flow: Flow) -> None:
        """Take the flow out of the line."""
        del self._line[flow]

    def pick(self) -> Flow:
        """Return the flow that has waited longest for its turn."""
        return next(iter(self._line))

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - nor does cost
        """Send the flow to the end of the line, or out of it."""
        self._turn += 1
        if flow.waiting:
            self._line[flow] = self._turn
            self._line.move_to_end(flow)
        else:
            del self._line[flow]

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Keep no account."""

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:  # noqa: ARG002 - nor here
        """Return a turn for each before it, and the part of the line that stands before its flow.

        Numbers are missing where flows have moved on, about as many anywhere in the line.
        """
        first = next(iter(self._line.values()))
        return place + (self._line[lease.flow] - first) / (self._turn - first + 1)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Depend on no setting."""


@final
class GlobalStrict:
    """One queue: the head that is first in the band's order goes first, whichever flow it is of.

    O(log flows).
    """

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: KeyedHeap[Flow, tuple[int, int]] = KeyedHeap()

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - time makes no difference
        """Take up the flow by its head."""
        self._heads.put(flow, flow.order_of(flow.head))

    def take_back(self, flow: Flow, now_ns: int) -> None:
        """Take up the flow by its head, which has not moved."""
        self.enter(flow, now_ns)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow to where its new head belongs."""
        self._heads.put(flow, flow.order_of(flow.head))

    def leave(self, flow: Flow) -> None:
        """Let go of the flow."""
        self._heads.discard(flow)

    def pick(self) -> Flow:
        """Return the flow whose head is first."""
        first = self._heads.first()
        assert first is not None, "pick needs a flow with something waiting"
        return first[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - the order is all
        """Move the flow to where its new head belongs, or let go of it."""
        if flow.waiting:
            self.head_moved(flow)
        else:
            self.leave(flow)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Keep no account."""

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:  # noqa: ARG002 - see charge
        """Return that there are no turns: the others all go before whoever is last in the line."""
        return inf

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Depend on no setting."""


@final
class WeightedTokens:
    """Equal token cost, by weight; the module's text derives it. O(log flows).

    Args:
        weights: of flows by id, above zero; 1.0 for those not named.
    """

    __slots__ = ("_away", "_counters", "_flows", "_level", "_ready", "_weights")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._flows: dict[str, Flow] = {}
        """Those with something waiting."""
        self._counters: dict[str, float] = {}
        """Of the same."""
        self._ready: KeyedHeap[str, float] = KeyedHeap()
        """The same, by counter."""
        self._away: OrderedDict[str, float] = OrderedDict()
        """Counters of flows with nothing waiting, whoever was looked at longest ago first."""
        self._level = 0.0
        """Virtual time: the highest that the lowest waiting counter has been. Never goes back."""

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - virtual time is all it needs
        """Take the flow up, lifted to the level of those being served."""
        lowest = self._ready.first()
        if lowest is not None and lowest[0] > self._level:
            self._level = lowest[0]
        self._enter(flow, self._level)

    def take_back(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Take the flow up below the level, but by no more than what its head costs.

        So it is next, and has not saved up what it could not use.
        """
        credit = flow.head.cost / self._weights.get(flow.key.flow_id, 1.0)
        self._enter(flow, self._level - credit)

    def head_moved(self, flow: Flow) -> None:
        """Counters do not depend on who is at the head."""

    def leave(self, flow: Flow) -> None:
        """Keep the flow's account while it is above the level: while it is a debt."""
        flow_id = flow.key.flow_id
        counter = self._counters.pop(flow_id)
        del self._flows[flow_id]
        self._ready.discard(flow_id)
        if not self._flows:
            # The busy period ends, and with it the last flow's advantage over the next to come.
            self._level = max(self._level, counter)
        if counter > self._level:
            self._away[flow_id] = counter
        self._forget_paid()

    def pick(self) -> Flow:
        """Return the flow with the lowest counter."""
        first = self._ready.first()
        assert first is not None, "pick needs a flow with something waiting"
        return self._flows[first[1]]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Advance the level to the lowest counter, then the flow's counter by what it is served."""
        flow_id = flow.key.flow_id
        lowest = self._ready.first()
        assert lowest is not None, "who is served was waiting"
        if lowest[0] > self._level:
            self._level = lowest[0]
        counter = self._counters[flow_id] + cost / self._weights.get(flow_id, 1.0)
        self._counters[flow_id] = counter
        if flow.waiting:
            self._ready.put(flow_id, counter)
        else:
            self.leave(flow)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Move the flow's counter; one not known any more stands at the level."""
        change = cost / self._weights.get(flow_id, 1.0)
        if flow_id in self._flows:
            self._counters[flow_id] += change
            self._ready.put(flow_id, self._counters[flow_id])
        else:
            counter = max(self._away.get(flow_id, 0.0), self._level) + change
            self._away[flow_id] = counter
            self._forget_paid()

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return how far the counter will have run ahead of the lowest, in requests of others."""
        flow_id = lease.flow.key.flow_id
        lowest = self._ready.first()
        assert lowest is not None, "who asks is waiting"
        lead = self._counters[flow_id] - lowest[0]
        return (lead + place * lease.cost / self._weights.get(flow_id, 1.0)) / cost_each

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:  # noqa: ARG002 - as above
        """Take other weights: for what is served from now on."""
        self._weights = config.weights

    def _enter(self, flow: Flow, least: float) -> None:
        flow_id = flow.key.flow_id
        counter = self._away.pop(flow_id, least)
        if counter < least:
            counter = least
        self._flows[flow_id] = flow
        self._counters[flow_id] = counter
        self._ready.put(flow_id, counter)

    def _forget_paid(self) -> None:
        """Drop accounts that the level has reached; they make no difference any more.

        From the front up to the first that is still in debt, which goes to the end. So with D in
        debt D calls go round once, and at most 2 D accounts are kept: O(1) amortised, unsorted.
        """
        away = self._away
        if len(away) > ACCOUNTS_MAX:  # all perhaps in debt: of two, the larger debt stays
            one, other = away.popitem(last=False), away.popitem(last=False)
            flow_id, counter = one if one[1] > other[1] else other
            away[flow_id] = counter
        while away:
            flow_id, counter = away.popitem(last=False)
            if counter > self._level:
                away[flow_id] = counter
                return


@final
class LeastAttainedService:
    """Whoever got least lately; the module's text says what that is. O(log flows) amortised.

    Costs grow with time instead of accounts shrinking (forward decay, Cormode et al., ICDE 2009):
    all accounts keep their order while nobody is served, so none has to be touched.

    Args:
        half_life_ns: time after which what was attained counts half, above zero.
        now_ns: the time.
    """

    __slots__ = ("_attained", "_flows", "_growth", "_half_life_ns", "_ready", "_since_ns")

    def __init__(self, half_life_ns: int, now_ns: int) -> None:
        self._half_life_ns = half_life_ns
        self._since_ns = now_ns
        self._growth = 1.0
        """What a cost counted at the last charge, seen from `_since_ns`."""
        self._attained: dict[str, float] = {}
        """Cost attained by each flow, as seen from `_since_ns`."""
        self._flows: dict[str, Flow] = {}
        self._ready: KeyedHeap[str, float] = KeyedHeap()

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Take the flow up with what it attained."""
        self._restart(now_ns)
        flow_id = flow.key.flow_id
        self._flows[flow_id] = flow
        self._ready.put(flow_id, self._attained.get(flow_id, 0.0))

    def take_back(self, flow: Flow, now_ns: int) -> None:
        """Take the flow up with what it attained."""
        self.enter(flow, now_ns)

    def head_moved(self, flow: Flow) -> None:
        """Accounts do not depend on who is at the head."""

    def leave(self, flow: Flow) -> None:
        """Keep the account; it fades by itself."""
        del self._flows[flow.key.flow_id]
        self._ready.discard(flow.key.flow_id)

    def pick(self) -> Flow:
        """Return the flow that attained least."""
        first = self._ready.first()
        assert first is not None, "pick needs a flow with something waiting"
        return self._flows[first[1]]

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
        if flow_id in self._flows:
            self._ready.put(flow_id, self._attained[flow_id])

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return how much more it will have attained than the least, in requests of others."""
        flow_id = lease.flow.key.flow_id
        least = self._ready.first()
        assert least is not None, "who asks is waiting"
        lead = (self._attained.get(flow_id, 0.0) - least[0]) / self._growth
        return (lead + place * lease.cost) / cost_each

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Take another half-life: for what fades from now on."""
        self._count_anew(now_ns)
        self._half_life_ns = config.attained_half_life_ns

    def _restart(self, now_ns: int) -> None:
        """Count anew before numbers or accounts become too many; O(accounts) then."""
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
        for flow_id in self._flows:
            self._ready.put(flow_id, self._attained.get(flow_id, 0.0))


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

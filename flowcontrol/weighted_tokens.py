"""Pure. Weighted tokens: virtual-time fair queueing on the cost of tokens.

Every flow has a counter: the cost that it was served, over its weight. The flow with the lowest
counter is next. A flow that was away is lifted to the level of those being served, so that absence
earns no credit; a flow that left in debt returns with its debt. This is start-time fair queueing
(Goyal, Vin and Cheng, SIGCOMM 1996), which the virtual token counter (Sheng et al., OSDI 2024)
brought to language models, with three changes. A dispatch is charged at once, by estimate, so that
a burst is paid for while it is in flight. A settlement corrects the counter by the error of the
estimate. And a flow whose head may only go to endpoints without room is passed over, together with
all others of the same subset: its line.

The level is raised by estimates. If these were too high, settlements move the counters of all
waiting flows below it, and a flow that arrived then would wait until they have caught up: for
thousands of requests, with 128 tokens expected of answers of 10, and hundreds in flight. So before
a flow is lifted, the level is lowered to the highest counter of the waiting flows, if that is below
it.

A line that has room again is lifted as a whole, if its lowest counter is further below the level
than the cost of its head. So it does not save up what it could not use, it is next all the same,
and the differences between its flows stay. A flow that joins a line that is passed over finds it
lifted.

The bound. For a flow f of weight w let E be the error in the estimates of what it has in flight or
unsettled (estimated minus true cost, summed; 0 with nothing unsettled), R how far E ranges over
time, and A the largest true cost of one request. Let x be f's counter less E/w: what it would be
had every estimate been right. Corrections do not change x, since they move the counter and E alike;
only true service and lifts raise it. Let L be the level, which falls only as above. It is raised to
the lowest waiting counter, so a waiting f had c_f >= L when L was last raised, or f lifted:
x_f >= L - E_f/w_f at that moment. A flow g is served only as the lowest, so its last service left
x_g <= L - E_g/w_g + A_g/w_g, with E_g of just before it. Now take any interval in which both wait
without pause. At the last dispatch of f in it c_f <= c_g, that is x_f + E_f/w_f <= x_g + E_g/w_g.
Together, and with the other direction by symmetry, this gives for the true service S in that
interval (a lowered level is still no lower than the counter of any waiting flow, so a flow lifted
to it then is no better off than any of them, and worse off by less than before)

    |S_f/w_f - S_g/w_g|  <=  (A_f + R_f) / w_f + (A_g + R_g) / w_g

whatever its length and whatever other flows do. With right estimates R is 0, and this is the bound
of start-time fair queueing. With subsets, for an interval in which both wait in one line, it holds
with one more term: a line may be lifted to K below L, K being the largest estimated cost over
weight of a head in it. Lifts of the line move both alike. Between lines nothing is guaranteed while
one is passed over. Two more things are excluded: requests that go out of turn (`across`), which are
charged all the same, and debts dropped when more than ACCOUNTS_MAX flows are in debt.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import final

from flowcontrol.config import ControllerConfig
from flowcontrol.flow import Flow, Lease
from flowcontrol.lines import HasRoom, Lines, Subset

ACCOUNTS_MAX = 65_536
"""Accounts kept of flows with nothing waiting: clients can invent any number of flow ids."""


@final
class WeightedTokens:
    """Equal token cost, by weight; theory in the module's docstring. O(log flows + subsets).

    Args:
        weights: of flows by id, above zero; 1.0 for flows not named.
    """

    __slots__ = (
        *("_away", "_flows", "_level", "_lifts", "_lines", "_passed_over", "_weights"),
        "_witness",
    )

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._flows: dict[str, Flow] = {}
        """Flows with something waiting, by id."""
        self._lines: Lines[Flow, float] = Lines()
        """The same flows, by counter minus the lift of their line."""
        self._lifts: dict[Subset, float] = {}
        """Lifts of lines that were lifted."""
        self._passed_over: set[Subset] = set()
        """Lines without room at the last choice."""
        self._away: OrderedDict[str, float] = OrderedDict()
        """Counters of flows with nothing waiting, the one examined longest ago first."""
        self._level = 0.0
        """Virtual time: the highest that the lowest waiting counter has been, lowered if all
        counters are below it."""
        self._witness: Flow | None = None
        """A waiting flow that was last seen at the level or above."""

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - virtual time is all it needs
        """Add the flow, lifted to the level of those being served.

        O(flows) if settlements have moved all waiting flows below the level, else O(log flows).
        """
        self._raise_level()
        self._lower_level()
        flow_id = flow.key.flow_id
        counter = self._away.pop(flow_id, self._level)
        if counter < self._level:
            counter = self._level
        self._flows[flow_id] = flow
        self._stand(flow, counter)

    def head_moved(self, flow: Flow) -> None:
        """Move the flow, with its counter, to the line of its head's subset."""
        if self._lines.subset_of(flow) != flow.head.request.subset:
            self._stand(flow, self._step_out(flow))

    def leave(self, flow: Flow) -> None:
        """Keep the flow's account while it is in debt: above the level."""
        self._leave(flow, self._step_out(flow))

    def pick(self, has_room: HasRoom) -> Flow | None:
        """Return the flow with the lowest counter."""
        for subset in self._lines.bound:
            if not has_room(subset):
                self._passed_over.add(subset)
            elif subset in self._passed_over:
                self._lift(subset)
                self._passed_over.discard(subset)
        front = self._front()
        return None if front is None else front[1]

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Advance the level to the lowest counter, then the flow's counter by what it is served."""
        self._raise_level()
        before = self._step_out(flow) if self._lines.bound else flow.counter
        counter = before + cost / self._weights.get(flow.key.flow_id, 1.0)
        if flow.waiting:
            self._stand(flow, counter)
        else:
            self._lines.discard(flow)
            self._leave(flow, counter)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:  # noqa: ARG002 - see enter
        """Move the flow's counter; a flow without an account starts at the level."""
        change = cost / self._weights.get(flow_id, 1.0)
        flow = self._flows.get(flow_id)
        if flow is not None:
            flow.counter += change
            self._lines.put(flow, flow.counter, self._lines.subset_of(flow))
        else:
            counter = max(self._away.get(flow_id, 0.0), self._level) + change
            self._away[flow_id] = counter
            self._forget_paid()

    def accounts(self) -> Mapping[str, float]:
        """Return the cost by which each flow is above the level."""
        counters = {flow_id: self._counter(flow) for flow_id, flow in self._flows.items()}
        return {
            flow_id: (counter - self._level) * self._weights.get(flow_id, 1.0)
            for flow_id, counter in {**self._away, **counters}.items()
            if counter > self._level
        }

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:
        """Return by how much the counter will exceed the lowest, in requests of other flows."""
        flow = lease.flow
        front = self._front()
        lead = self._counter(flow) - front[0] if front is not None else 0.0
        more = place * lease.cost / self._weights.get(flow.key.flow_id, 1.0)
        return max(0.0, lead + more) / cost_each

    def tied(self, flow: Flow) -> list[Flow]:
        """Return the flows with the same counter that reached it first."""
        return self._lines.tied_before(flow)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:  # noqa: ARG002 - as above
        """Apply other weights from now on."""
        self._weights = config.weights

    def _raise_level(self) -> None:
        front = self._front()
        if front is not None and front[0] > self._level:
            self._level = front[0]

    def _lower_level(self) -> None:
        """Lower the level to the highest counter of the waiting flows, if that is below it.

        A flow at the level or above is remembered; while it is there, no search is needed.
        """
        front = self._front()
        if front is None or front[0] >= self._level:
            return
        witness = self._witness
        if witness is not None and self._flows.get(witness.key.flow_id) is witness:
            if self._counter(witness) >= self._level:
                return
            self._witness = None
        highest = front[0]
        for flow in self._flows.values():
            counter = self._counter(flow)
            if counter >= highest:
                highest, self._witness = counter, flow
                if counter >= self._level:
                    return
        self._level = highest

    def _front(self) -> tuple[float, Flow] | None:
        """Return the lowest counter in the lines that are not passed over, with its flow."""
        front: tuple[float, Flow] | None = None
        if self._lines.bound:
            for subset, counter, flow in self._lines.firsts():
                lifted = counter + self._lifts.get(subset, 0.0)
                if subset not in self._passed_over and (front is None or lifted < front[0]):
                    front = lifted, flow
        free = self._lines.anywhere.first()
        return free if front is None or (free is not None and free[0] < front[0]) else front

    def _counter(self, flow: Flow) -> float:
        subset = self._lines.subset_of(flow)
        return flow.counter if subset is None else flow.counter + self._lifts.get(subset, 0.0)

    def _stand(self, flow: Flow, counter: float) -> None:
        """Put a flow, with this counter, into the line of its head's subset."""
        subset = flow.head.request.subset
        if subset is not None:
            if subset in self._passed_over:
                self._lift(subset)
            counter -= self._lifts.get(subset, 0.0)
        flow.counter = counter
        self._lines.put(flow, counter, subset)

    def _step_out(self, flow: Flow) -> float:
        """Take a flow out of its line and return its counter; an empty line is removed."""
        counter, subset = self._counter(flow), self._lines.subset_of(flow)
        self._lines.discard(flow)
        if subset is not None and subset not in self._lines.bound:
            self._lifts.pop(subset, None)
            self._passed_over.discard(subset)
        return counter

    def _lift(self, subset: Subset) -> None:
        """Lift a line, if it is further below the level than the cost of its head."""
        first = self._lines.bound[subset].first()
        assert first is not None, "no line is empty"
        counter, flow = first
        least = self._level - flow.head.cost / self._weights.get(flow.key.flow_id, 1.0)
        if counter + self._lifts.get(subset, 0.0) < least:
            self._lifts[subset] = least - counter

    def _leave(self, flow: Flow, counter: float) -> None:
        """Record the counter of a flow that has left its line."""
        flow_id = flow.key.flow_id
        del self._flows[flow_id]
        if not self._flows:
            # The busy period ends, and with it the last flow's advantage over the next to come.
            self._level = max(self._level, counter)
        if counter > self._level:
            self._away[flow_id] = counter
        self._forget_paid()

    def _forget_paid(self) -> None:
        """Drop accounts that the level has reached, because they make no difference any more.

        Examines accounts from the front up to the first in debt, which moves to the end. So with D
        in debt, D calls go round once, and at most 2 D accounts are kept. O(1) amortised.
        """
        away = self._away
        if len(away) > ACCOUNTS_MAX:  # all may be in debt: of two, keep the larger
            one, other = away.popitem(last=False), away.popitem(last=False)
            flow_id, counter = one if one[1] > other[1] else other
            away[flow_id] = counter
        while away:
            flow_id, counter = away.popitem(last=False)
            if counter > self._level:
                away[flow_id] = counter
                return

"""Pure. One priority level: its flows, its account and its choice."""

from collections import Counter
from math import inf
from typing import final

from flowcontrol.backlogs import Backlogs
from flowcontrol.capacity import Capacity
from flowcontrol.config import BandSettings, ControllerConfig, Fairness
from flowcontrol.fairness import FairnessPolicy, make_fairness
from flowcontrol.flow import Flow, Lease
from flowcontrol.forecast import Ahead, Calibration
from flowcontrol.lines import HasRoom, Subset
from flowcontrol.request import FlowKey
from flowcontrol.retry import DrainRate
from flowcontrol.shares import Shares


@final
class Band:
    """All flows of one priority. It knows which request is next, not whether that may go.

    `waiting` includes newcomers, `capacity` counts admitted requests only. An operation costs what
    the fairness policy costs: at most O(log flows + subsets).

    Args:
        priority: of all its requests.
        config: where its settings come from.
        everything: the account of all bands together.
        now_ns: the time.
    """

    def __init__(
        self, priority: int, config: ControllerConfig, everything: Capacity, now_ns: int
    ) -> None:
        self.priority = priority
        self.settings: BandSettings = config.settings_for(priority)
        self.is_declared = True
        self.capacity = Capacity(self.settings.limits, everything)
        self.drain_rate = DrainRate(now_ns)
        self.shares = Shares(now_ns)
        self.calibration = Calibration()
        """Calibrates the forecasts of this band."""
        self.flows: dict[str, Flow] = {}
        self.waiting = 0
        self.bound: dict[Subset, int] = {}
        """Waiting requests that may go to some endpoints only, by subset."""
        self.in_flight = 0
        self.fairness: FairnessPolicy = make_fairness(self.settings, config, now_ns)
        self.backlogs = Backlogs()
        """Of admitted requests."""
        self._cost = 0.0
        """Sum of their costs."""

    def flow(self, flow_id: str) -> Flow:
        """Return the flow of that id, created if it does not exist."""
        flow = self.flows.get(flow_id)
        if flow is None:
            key = FlowKey(self.priority, flow_id)
            settings = self.settings
            flow = Flow(key, settings.ordering, settings.flow_limits, self.capacity)
            self.flows[flow_id] = flow
        return flow

    def queue(self, lease: Lease, now_ns: int) -> None:
        """Put a newcomer into its flow."""
        flow = lease.flow
        is_head = flow.push(lease)
        self.waiting += 1
        subset = lease.request.subset
        if subset is not None:
            self.bound[subset] = self.bound.get(subset, 0) + 1
        if flow.waiting == 1:
            self.fairness.enter(flow, now_ns)
        elif is_head:
            self.fairness.head_moved(flow)

    def remove(self, lease: Lease, now_ns: int) -> None:
        """Remove a waiting request undispatched, and its flow if nothing of it is left."""
        flow = lease.flow
        self._take_out(lease, now_ns)
        if flow.waiting:
            self.fairness.head_moved(flow)
        else:
            self.fairness.leave(flow)
            self._forget(flow)

    def move(self, lease: Lease) -> None:
        """Move a waiting request to its place in its flow, after its deadline has changed."""
        lease.flow.move(lease)
        self.fairness.head_moved(lease.flow)

    def admit(self, lease: Lease, now_ns: int) -> None:
        """Count a newcomer against the limits from now on."""
        flow = lease.flow
        flow.admit(lease)
        self.backlogs.grew(flow)
        self._cost += lease.cost
        if self.capacity.requests == 1:
            self.drain_rate.began(now_ns)

    def next(self, has_room: HasRoom) -> Lease | None:
        """Return the request whose turn it is, of those that have room; None: none has."""
        flow = self.fairness.pick(has_room)
        return None if flow is None else flow.head

    def heads(self) -> list[Lease]:
        """Return the head of every flow with something waiting; O(flows)."""
        return [flow.head for flow in self.flows.values() if flow]

    def newest_of_longest(self) -> Lease:
        """Return the newest request of the longest backlog."""
        longest, _ = self.backlogs.longest()
        assert longest is not None, "nothing was admitted here"
        return next(longest.newest_first())

    def ahead(self, lease: Lease, place: int) -> Ahead:
        """Return an estimate of what goes before an admitted request. O(log waiting).

        `place` requests of its own flow go before it. With global-strict, it must be the last.
        """
        mine = lease.flow.capacity.requests
        others = self.capacity.requests - mine
        cost_each = self._cost / self.capacity.requests
        if cost_each <= 0:  # lost to rounding beside larger costs
            cost_each = lease.cost
        turns = self.fairness.turns(lease, place, cost_each)
        if turns == inf:
            return Ahead(place + others)
        others = min(others, max(0, round(self.backlogs.before(turns) - min(mine, turns))))
        return Ahead(place + others, self._overtaking(place, others, turns))

    def _overtaking(self, place: int, others: int, turns: float) -> float:
        """Return the part of dispatches that serves requests which arrive later and overtake.

        Bounded, because no other flow has more than `turns` turns; except with
        least-attained-service, where a flow that got little before has more.
        """
        overtaking = self.backlogs.overtaking(turns)
        if self.settings.fairness is Fairness.LEAST_ATTAINED_SERVICE:
            return overtaking
        most = place + turns * (len(self.flows) - 1)
        return min(overtaking, max(0.0, 1 - (place + others + 1) / (most + 1)))

    def ahead_now(self, lease: Lease) -> Ahead:
        """Return what goes before any admitted request. O(waiting).

        Among flows with equal accounts, those that came first have one more turn before it.
        """
        if self.settings.fairness is not Fairness.GLOBAL_STRICT:
            place = lease.flow.place(lease)
            ahead = self.ahead(lease, place)
            tied = sum(flow.capacity.requests > place for flow in self.fairness.tied(lease.flow))
            tied = min(tied, max(0, self.capacity.requests - 1 - ahead.requests))
            return Ahead(ahead.requests, ahead.overtaking, tied)
        mine = lease.flow.order_of(lease)
        leases = (each for flow in self.flows.values() for each in flow.leases())
        return Ahead(sum(each.flow.order_of(each) < mine for each in leases))

    def dispatch(self, lease: Lease, now_ns: int) -> None:
        """Move a request from waiting to in flight."""
        flow = lease.flow
        self.drain_rate.dispatched(now_ns)
        self.backlogs.dispatched()
        self._take_out(lease, now_ns)
        lease.is_in_flight = True
        flow.in_flight += 1
        self.in_flight += 1
        self.fairness.served(flow, lease.cost, now_ns)
        self.shares.dispatched(flow.key.flow_id, lease.cost, now_ns)

    def complete(self, lease: Lease) -> None:
        """Count the end of a request that was in flight."""
        lease.flow.in_flight -= 1
        self.in_flight -= 1
        self._forget(lease.flow)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Apply other settings; requests keep their places and accounts. O(waiting)."""
        old, self.settings = self.settings, config.settings_for(self.priority)
        self.capacity.limits = self.settings.limits
        for flow in self.flows.values():
            flow.capacity.limits = self.settings.flow_limits
            if flow.ordering is not self.settings.ordering:
                flow.reorder(self.settings.ordering)
                if flow:
                    self.fairness.head_moved(flow)
        if old.fairness is self.settings.fairness:
            self.fairness.reconfigure(config, now_ns)
        else:
            self._change_fairness(config, now_ns)

    def _change_fairness(self, config: ControllerConfig, now_ns: int) -> None:
        self.fairness = make_fairness(self.settings, config, now_ns)
        for flow in sorted((f for f in self.flows.values() if f), key=_arrival_of_oldest):
            self.fairness.enter(flow, now_ns)

    @property
    def is_idle(self) -> bool:
        """Whether none of its requests waits or is in flight."""
        return not self.flows

    def check_invariants(self) -> None:
        """Recount everything and compare it with the accounts. O(waiting). For tests."""
        flows = self.flows.values()
        assert self.waiting == self.capacity.requests == sum(map(len, flows))
        assert self.capacity.bytes == sum(flow.capacity.bytes for flow in flows)
        subsets = [lease.request.subset for flow in flows for lease in flow.leases()]
        assert self.bound == Counter(subset for subset in subsets if subset is not None)
        assert self.in_flight == sum(flow.in_flight for flow in flows)
        assert self.backlogs.lengths() == {flow: len(flow) for flow in flows if flow}
        for flow in flows:
            leases = flow.leases()
            assert flow.capacity.requests == flow.waiting == len(leases)
            assert flow.capacity.bytes == sum(lease.request.byte_size for lease in leases)
            assert flow or flow.in_flight, "an idle flow is forgotten"

    def _take_out(self, lease: Lease, now_ns: int) -> None:
        flow = lease.flow
        flow.remove(lease)
        self.waiting -= 1
        subset = lease.request.subset
        if subset is not None:
            self.bound[subset] -= 1
            if not self.bound[subset]:
                del self.bound[subset]
        if lease.is_admitted:
            self.backlogs.shrank(flow)
            self._cost -= lease.cost
            if not self.capacity.requests:
                self._cost = 0.0
                self.drain_rate.ended(now_ns)

    def _forget(self, flow: Flow) -> None:
        if not flow.waiting and not flow.in_flight:
            del self.flows[flow.key.flow_id]


def _arrival_of_oldest(flow: Flow) -> int:
    return flow.oldest.arrival_index

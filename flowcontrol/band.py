"""Pure. One priority level: its flows, its account and its choice."""

from typing import final

from flowcontrol.buckets import Buckets
from flowcontrol.capacity import Capacity
from flowcontrol.config import BandSettings
from flowcontrol.fairness import make_fairness
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import FlowKey
from flowcontrol.retry import DrainRate


@final
class Band:
    """All flows of one priority. Knows who is next and who gives way, never whether it may.

    `waiting` counts newcomers too, `capacity` only what has been admitted.
    Every operation costs what the fairness policy costs: O(log flows) at worst.
    """

    def __init__(self, priority: int, settings: BandSettings, now_ns: int) -> None:
        self.priority = priority
        self.settings = settings
        self.is_declared = True
        self.capacity = Capacity(settings.limits)
        self.drain_rate = DrainRate(now_ns)
        self.flows: dict[str, Flow] = {}
        self.waiting = 0
        self.in_flight = 0
        self._fairness = make_fairness(settings.fairness)
        self._backlogs: Buckets[Flow] = Buckets()

    def flow(self, flow_id: str) -> Flow:
        """Return the flow of that name; it begins to exist with its first request."""
        flow = self.flows.get(flow_id)
        if flow is None:
            flow = self.flows[flow_id] = Flow(FlowKey(self.priority, flow_id))
        return flow

    def queue(self, lease: Lease) -> None:
        """Let a request wait in its flow."""
        flow = lease.flow
        flow.push(lease)
        self.waiting += 1
        if len(flow) == 1:
            self._backlogs.add(flow, 1)
            self._fairness.enter(flow)
        else:
            self._backlogs.increment(flow)

    def remove(self, lease: Lease) -> None:
        """Take a waiting request out, and its flow when it was the flow's last."""
        flow = lease.flow
        was_head = flow.head is lease
        flow.remove(lease)
        self.waiting -= 1
        if lease.is_admitted:
            self.capacity.give_back(lease.request.byte_size)
        if not flow:
            self._backlogs.remove(flow)
            self._fairness.leave(flow)
            self._forget(flow)
            return
        self._backlogs.decrement(flow)
        if was_head:
            self._fairness.head_moved(flow)

    def next(self) -> Lease:
        """Return the request whose turn it is; one must wait."""
        return self._fairness.pick().head

    def first_to_give_way(self) -> Lease:
        """Return the request to displace first: the newest of the flow with the longest backlog."""
        return self._backlogs.most().newest

    def dispatch(self, lease: Lease) -> None:
        """Move a request from waiting to in flight."""
        self._fairness.charge(lease.flow)
        lease.flow.in_flight += 1
        self.in_flight += 1
        lease.is_in_flight = True
        self.remove(lease)

    def complete(self, lease: Lease) -> None:
        """Let go of a request that was in flight."""
        lease.flow.in_flight -= 1
        self.in_flight -= 1
        self._forget(lease.flow)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits here and nothing of it is in flight."""
        return not self.flows

    def _forget(self, flow: Flow) -> None:
        if not flow and not flow.in_flight:
            del self.flows[flow.key.flow_id]

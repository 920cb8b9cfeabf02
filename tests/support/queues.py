"""A band's flows under a fairness policy, without the band, and naive policies for comparison.

The queue calls a policy as a band does. The naive policies examine every flow for every choice, so
they cannot have the errors of heaps and lazily kept accounts. Each can be given a flaw, which the
checks in the tests must find.
"""

from collections.abc import Iterable, Mapping

from flowcontrol.config import ControllerConfig, Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.fairness import FairnessPolicy
from flowcontrol.flow import Flow, Lease
from flowcontrol.lines import HasRoom, Subset
from flowcontrol.request import FlowKey, Request

FLOW_IDS = "abcde"
Step = tuple[str, int, int, int]
"""Action, flow, and the announced and the real size of the request, or the time that passes."""


def everywhere(subset: Subset) -> bool:
    """Whether there is room: always."""
    del subset
    return True


class Queue:
    """Flows under a policy.

    Args:
        policy: the policy that chooses.
        ordering: order of each flow's requests.
        weights: weights of flows, as in the policy.
    """

    def __init__(
        self,
        policy: FairnessPolicy,
        ordering: Ordering = Ordering.FCFS,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.policy = policy
        self.weights = weights or {}
        self.flows = {each: Flow(FlowKey(0, each), ordering, Limits()) for each in FLOW_IDS}
        self.now_ns = 0
        self.arrived_count = 0
        self.unsettled: list[Lease] = []
        """Dispatched leases that are not settled, in order."""
        self.has_room: HasRoom = everywhere

    @property
    def waiting(self) -> list[Lease]:
        """All waiting requests, flow by flow."""
        return [lease for flow in self.flows.values() for lease in flow.leases()]

    def arrive(
        self, flow_id: str, cost: float = 1, true_cost: float = 1, subset: Subset | None = None
    ) -> Lease:
        """Queue a request with an estimated and a real cost."""
        self.arrived_count += 1
        flow = self.flows[flow_id]
        lease = Lease(
            Request(self.arrived_count, flow_id, ttft_slo_ns=round(true_cost), subset=subset),
            flow,
            self.arrived_count,
            self.now_ns,
            Tokens(true_cost, 0),
            cost,
        )
        flow.push(lease)
        if len(flow) == 1:
            self.policy.enter(flow, self.now_ns)
        elif flow.head is lease:
            self.policy.head_moved(flow)
        return lease

    def leave(self, lease: Lease) -> None:
        """Remove a request that was not dispatched."""
        was_head = lease.flow.head is lease
        lease.flow.remove(lease)
        if not lease.flow:
            self.policy.leave(lease.flow)
        elif was_head:
            self.policy.head_moved(lease.flow)

    def dispatch(self) -> Lease:
        """Dispatch the head of the flow that the policy chooses."""
        flow = self.policy.pick(self.has_room)
        assert flow is not None, "somebody waits"
        return self.send(flow.head)

    def send(self, lease: Lease) -> Lease:
        """Dispatch a request, in its turn or not."""
        lease.flow.remove(lease)
        self.policy.served(lease.flow, lease.cost, self.now_ns)
        self.unsettled.append(lease)
        return lease

    def settle(self, index: int) -> Lease:
        """Settle one dispatched request with its real cost."""
        lease = self.unsettled.pop(index % len(self.unsettled))
        error = lease.tokens.input - lease.cost
        self.policy.correct(lease.flow.key.flow_id, error, self.now_ns)
        return lease

    def take(self, step: Step) -> Lease | None:
        """Take a step if it is possible; return the request that it dispatched or settled."""
        what, number, cost, true_cost = step
        if what == "arrive":
            self.arrive(FLOW_IDS[number % len(FLOW_IDS)], cost, true_cost)
        elif what == "pass":
            self.now_ns += cost
        elif what == "settle" and self.unsettled:
            return self.settle(number)
        elif what == "dispatch" and self.waiting:
            return self.dispatch()
        elif what == "cancel" and self.waiting:
            self.leave(self.waiting[number % len(self.waiting)])
        return None

    def run(self, steps: Iterable[Step]) -> list[Lease]:
        """Take steps; return the dispatched leases."""
        return [lease for step in steps if (lease := self.take(step)) and step[0] == "dispatch"]


class NaivePolicy:
    """Keeps the waiting requests and chooses by examining all of them."""

    def __init__(self) -> None:
        self.flows: dict[Flow, None] = {}

    def enter(self, flow: Flow, now_ns: int) -> None:  # noqa: ARG002 - for those below
        """Add the flow."""
        self.flows[flow] = None

    def head_moved(self, flow: Flow) -> None:
        """Do nothing."""

    def leave(self, flow: Flow) -> None:
        """Remove the flow."""
        del self.flows[flow]

    def pick(self, has_room: HasRoom = everywhere) -> Flow:
        """Return the flow with the longest backlog, so the one that asks for most gets most."""
        del has_room
        return max(self.flows, key=len)

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:  # noqa: ARG002 - for those below
        """Do nothing: there are no accounts."""
        if not flow.waiting:
            self.leave(flow)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Do nothing: there are no accounts."""

    def accounts(self) -> Mapping[str, float]:
        """Return nothing: there are no accounts."""
        return {}

    def turns(self, lease: Lease, place: int, cost_each: float) -> float:  # noqa: ARG002 - no idea
        """Return no useful value."""
        return 0.0

    def tied(self, flow: Flow) -> list[Flow]:  # noqa: ARG002 - no idea
        """Return no useful value."""
        return []

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Do nothing."""


class NaiveTokens(NaivePolicy):
    """Virtual counters without heaps.

    Args:
        weights: weights of flows.
        flaw: "no lift", "no correction", "no weights" or "charged late"; "": none.
    """

    def __init__(self, weights: Mapping[str, float], flaw: str) -> None:
        super().__init__()
        self.weights = weights
        self.flaw = flaw
        self.counters: dict[str, float] = {}
        self.owed: dict[str, float] = {}
        """Charges deferred until something is settled."""
        self.level = 0.0

    def enter(self, flow: Flow, now_ns: int) -> None:
        """Lift a flow that was away."""
        self._raise_level()
        waiting = [self.counters[each.key.flow_id] for each in self.flows]
        self.level = min(self.level, max(waiting, default=self.level))
        level = 0.0 if self.flaw == "no lift" else self.level
        flow_id = flow.key.flow_id
        self.counters[flow_id] = max(self.counters.get(flow_id, 0.0), level)
        super().enter(flow, now_ns)

    def pick(self, has_room: HasRoom = everywhere) -> Flow:
        """Return the flow with the lowest counter."""
        del has_room
        return min(self.flows, key=lambda flow: self.counters[flow.key.flow_id])

    def served(self, flow: Flow, cost: float, now_ns: int) -> None:
        """Charge by the estimate."""
        self._raise_level()
        flow_id = flow.key.flow_id
        if self.flaw == "charged late":
            self.owed[flow_id] = self.owed.get(flow_id, 0.0) + cost
        else:
            self._add(flow_id, cost)
        super().served(flow, cost, now_ns)

    def correct(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Charge by the real cost."""
        if self.flaw != "no correction":
            self._add(flow_id, cost + self.owed.pop(flow_id, 0.0))
        del now_ns

    def _add(self, flow_id: str, cost: float) -> None:
        weight = 1.0 if self.flaw == "no weights" else self.weights.get(flow_id, 1.0)
        self.counters[flow_id] += cost / weight

    def _raise_level(self) -> None:
        waiting = [self.counters[flow.key.flow_id] for flow in self.flows]
        self.level = max(self.level, min(waiting, default=self.level))

"""Flows and leases."""

import pytest

from flowcontrol.config import Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import FlowKey, Request


@pytest.fixture(name="flow")
def _flow() -> Flow:
    """Return an empty flow."""
    return Flow(FlowKey(10, "tenant-a"), Ordering.FCFS, Limits())


def queued(flow: Flow, *sizes: int) -> list[Lease]:
    """Queue requests of these sizes and return their leases."""
    leases = [
        Lease(Request(index, byte_size=size), flow, index, index, Tokens(1, 1), 3.0)
        for index, size in enumerate(sizes)
    ]
    for lease in leases:
        flow.push(lease)
    for lease in leases:
        flow.admit(lease)
    return leases


class TestFlow:
    """A queue in order of arrival that can be left anywhere."""

    def test_first_come_is_head_and_last_is_newest(self, flow: Flow) -> None:
        """The head goes next, the newest is displaced first."""
        first, second, third = queued(flow, 1, 2, 3)

        assert flow.head is first
        assert next(flow.newest_first()) is third
        assert flow.leases() == [first, second, third]

    def test_only_one_is_both_head_and_newest(self, flow: Flow) -> None:
        """A flow of one request has one end."""
        (only,) = queued(flow, 5)

        assert flow.head is flow.oldest is next(flow.newest_first()) is only

    @pytest.mark.parametrize("gone", [0, 1, 2])
    def test_whoever_leaves_leaves_no_gap(self, flow: Flow, gone: int) -> None:
        """Head, middle or newest: the others stay in order."""
        leases = queued(flow, 1, 2, 3)
        flow.remove(leases[gone])

        expected = leases[:gone] + leases[gone + 1 :]

        assert flow.leases() == expected
        assert (flow.head, next(flow.newest_first())) == (expected[0], expected[-1])

    def test_counts_requests(self, flow: Flow) -> None:
        """As many as wait."""
        leases = queued(flow, 10, 0, 32)

        assert len(flow) == 3

        flow.remove(leases[2])

        assert len(flow) == 2

    def test_empty_flow_is_false(self, flow: Flow) -> None:
        """A flow is true while something waits in it, in flight or not."""
        assert not flow

        (lease,) = queued(flow, 1)

        assert flow

        flow.remove(lease)
        flow.in_flight += 1

        assert not flow

    def test_request_waits_once(self, flow: Flow) -> None:
        """The same request cannot be queued again."""
        (lease,) = queued(flow, 1)

        with pytest.raises(AssertionError, match="a request waits once"):
            flow.push(lease)

    def test_whoever_is_not_there_cannot_leave(self, flow: Flow) -> None:
        """Nor leave twice."""
        (lease,) = queued(flow, 1)
        flow.remove(lease)

        with pytest.raises(AssertionError, match="it does not wait here"):
            flow.remove(lease)


class TestLease:
    """A live request."""

    def test_is_compared_by_identity(self, flow: Flow) -> None:
        """Two leases are never equal, however alike: one of them is in the queue."""
        one, other = (Lease(Request(1), flow, 1, 0, Tokens(1, 1), 3.0) for _ in range(2))

        assert one != other
        assert len({one, other}) == 2

    def test_begins_as_a_newcomer(self, flow: Flow) -> None:
        """Neither admitted nor in flight nor sent anywhere."""
        lease = Lease(Request(1), flow, 1, 0, Tokens(1, 1), 3.0)

        assert (lease.is_admitted, lease.is_in_flight, lease.endpoint) == (False, False, None)

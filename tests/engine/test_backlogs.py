"""Backlogs against counting, and the order of ties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.backlogs import Backlogs
from flowcontrol.config import Limits, Ordering
from flowcontrol.flow import Flow
from flowcontrol.request import FlowKey

FLOW_IDS = "abcdef"


class Flows:
    """Flows whose backlogs are kept, without anything in them.

    Args:
        lengths: of their backlogs, to begin with.
    """

    def __init__(self, lengths: dict[str, int]) -> None:
        self.backlogs = Backlogs()
        self._flows: dict[str, Flow] = {}
        for flow_id, length in lengths.items():
            for _ in range(length):
                self.grow(flow_id)

    def grow(self, flow_id: str) -> None:
        """Add one request."""
        if flow_id not in self._flows:
            self._flows[flow_id] = Flow(FlowKey(0, flow_id), Ordering.FCFS, Limits())
        flow = self._flows[flow_id]
        flow.capacity.take(1)
        self.backlogs.grew(flow)

    def shrink(self, flow_id: str) -> None:
        """Take one request."""
        flow = self._flows[flow_id]
        flow.capacity.give_back(1)
        self.backlogs.shrank(flow)

    @property
    def lengths(self) -> dict[str, int]:
        """What is kept, by flow id."""
        return {flow.key.flow_id: length for flow, length in self.backlogs.lengths().items()}

    @property
    def longest(self) -> tuple[str, int]:
        """The longest backlog: whose it is, and how long."""
        flow, length = self.backlogs.longest()
        return ("" if flow is None else flow.key.flow_id), length


class TestLongest:
    """Which flow loses a request when one must be displaced."""

    @pytest.mark.slow
    @given(steps=st.lists(st.tuples(st.booleans(), st.sampled_from(FLOW_IDS)), max_size=80))
    @settings(max_examples=150)
    def test_agrees_with_a_dict(self, steps: list[tuple[bool, str]]) -> None:
        """Whatever grows and shrinks, lengths and the longest are those of a dict."""
        flows, oracle = Flows({}), dict.fromkeys(FLOW_IDS, 0)
        for is_growth, flow_id in steps:
            if is_growth:
                flows.grow(flow_id)
                oracle[flow_id] += 1
            elif oracle[flow_id]:
                flows.shrink(flow_id)
                oracle[flow_id] -= 1

            assert flows.lengths == {each: length for each, length in oracle.items() if length}
            longest, length = flows.longest
            assert length == max(oracle.values())
            assert not length or oracle[longest] == length

    def test_ties_go_to_whoever_was_there_first(self) -> None:
        """Of flows with the same backlog, the one that reached it first."""
        flows = Flows({"a": 2, "b": 1, "c": 2})
        assert flows.longest == ("a", 2)

        flows.grow("a")
        flows.shrink("a")
        assert flows.longest == ("c", 2)

        flows.grow("b")
        assert flows.longest == ("c", 2)

    def test_nobody_is_longest_when_nothing_waits(self) -> None:
        """After the last has gone, nothing remembers it."""
        flows = Flows({"a": 2, "b": 1})
        for flow_id in "aba":
            flows.shrink(flow_id)

        assert flows.longest == ("", 0)

        flows.grow("b")

        assert flows.longest == ("b", 1)

    def test_shift_is_what_would_be(self) -> None:
        """Who would pay next, if one of the longest went: asked without anything going."""
        flows = Flows({"a": 3, "b": 2})
        flow, length = flows.backlogs.longest()
        assert flow is not None
        flows.backlogs.shift(flow, length, length - 1)

        assert flows.longest == ("b", 2)

        flows.backlogs.shift(flow, length - 1, length)

        assert flows.longest == ("a", 3)
        assert flows.lengths == {"a": 3, "b": 2}

    def test_unknown_flow_is_an_error(self) -> None:
        """A flow with nothing waiting does not shrink."""
        flows = Flows({"a": 1})
        with pytest.raises(KeyError):
            flows.shrink("z")


class TestPlaces:
    """Requests by how many of their own flow stand before them."""

    @staticmethod
    def of(lengths: list[int]) -> Backlogs:
        """Return the backlogs of flows of these lengths."""
        return Flows({str(index): length for index, length in enumerate(lengths)}).backlogs

    @given(lengths=st.lists(st.integers(0, 200), max_size=12), turns=st.integers(0, 300))
    @settings(max_examples=100)
    def test_agrees_with_counting(self, lengths: list[int], turns: int) -> None:
        """Exactly at powers of two; between, off by less than what is in that class."""
        expected = sum(min(length, turns) for length in lengths)
        found = self.of(lengths).before(turns)
        low = 1 << max(0, turns.bit_length() - 1)
        in_class = sum(min(max(length - low, 0), low) for length in lengths)

        assert found <= expected + 1e-9
        assert found >= expected - in_class
        if turns in {0, 1, 2, 4, 8, 16, 32, 64, 128, 256}:
            assert found == expected

    @given(lengths=st.lists(st.integers(0, 20), max_size=12), data=st.data())
    @settings(max_examples=50)
    def test_flows_become_shorter(self, lengths: list[int], data: st.DataObject) -> None:
        """Whichever request of a flow leaves, its last place is gone."""
        flows = Flows({str(index): length for index, length in enumerate(lengths)})
        shorter = [data.draw(st.integers(0, length)) for length in lengths]
        for index, (length, short) in enumerate(zip(lengths, shorter, strict=True)):
            for _ in range(short, length):
                flows.shrink(str(index))

        assert [flows.backlogs.before(each) for each in range(30)] == [
            self.of(shorter).before(each) for each in range(30)
        ]

    def test_unending_turns_are_for_all(self) -> None:
        """A line, not turns."""
        assert self.of([3, 9, 0, 1]).before(float("inf")) == 13

    def test_overtaking_is_what_came_at_lower_places(self) -> None:
        """Of a hundred that went, 14 had fewer than ten of their own before them."""
        flows = Flows({"a": 50, "b": 1, "c": 1, "d": 1, "e": 1})
        assert flows.backlogs.overtaking(30) == 0.0

        flows.backlogs.dispatched()
        assert flows.backlogs.overtaking(30) == 0.9

        for _ in range(99):
            flows.backlogs.dispatched()
        assert flows.backlogs.overtaking(30) == pytest.approx(0.14)
        assert flows.backlogs.overtaking(0) == 0.0

    def test_old_crowd_overtakes_nobody(self) -> None:
        """Those that came at low places are forgotten after some thousand dispatches."""
        flows = Flows({"a": 50, "b": 1})
        for _ in range(10_000):
            flows.grow("a")
            flows.shrink("a")
            flows.backlogs.dispatched()

        assert flows.backlogs.overtaking(30) < 0.001

"""What refused clients are told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.retry import DrainRate

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
MOST = 30 * SECOND


def busy(dispatches: int, now_ns: int = 0) -> DrainRate:
    """Return a rate that has seen so many dispatches at one moment."""
    rate = DrainRate(now_ns)
    for _ in range(dispatches):
        rate.dispatched(now_ns)
    return rate


class TestDrainRate:
    """How fast work leaves by dispatch."""

    def test_knows_nothing_at_first(self) -> None:
        """Without a dispatch there is no rate."""
        assert DrainRate(0).per_second(0) == 0.0

    def test_second_under_way_counts_at_once(self) -> None:
        """A burst is believed before its second is over."""
        assert busy(8).per_second(SECOND - 1) == 8.0

    def test_folded_second_weighs_three_tenths(self) -> None:
        """Afterwards it enters the average, which then fades by three tenths a second."""
        rate = busy(10)

        assert rate.per_second(SECOND) == pytest.approx(3.0)
        assert rate.per_second(2 * SECOND) == pytest.approx(2.1)
        assert rate.per_second(4 * SECOND) == pytest.approx(2.1 * 0.7**2)

    @pytest.mark.parametrize("gaps", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
    def test_how_often_it_is_asked_does_not_matter(self, gaps: list[int]) -> None:
        """Five seconds of silence are five, folded at once or one by one."""
        rate, now_ns = busy(10), 0
        for gap in gaps:
            now_ns += gap * SECOND
            rate.per_second(now_ns)

        assert rate.per_second(now_ns) == pytest.approx(3.0 * 0.7**4)

    @pytest.mark.parametrize("per_second", [1, 7, 100])
    def test_steady_rate_is_found(self, per_second: int) -> None:
        """After some seconds of the same rate the average is within a tenth of a percent."""
        rate = DrainRate(0)
        for index in range(30 * per_second):
            rate.dispatched(index * SECOND // per_second)

        assert rate.per_second(30 * SECOND) == pytest.approx(per_second, rel=0.001)

    def test_a_long_silence_is_forgotten(self) -> None:
        """What was true then says nothing now: 300 a second have faded to 0.001 after 36 s."""
        assert busy(1000).per_second(36 * SECOND) > 0
        assert busy(1000).per_second(37 * SECOND) == 0.0

    def test_silence_is_forgotten_although_it_is_asked_about(self) -> None:
        """Clients that are refused meanwhile do not keep the memory alive."""
        rate = busy(1000)
        for second in range(1, 120):
            rate.per_second(second * SECOND)

        assert rate.per_second(120 * SECOND) == 0.0

    def test_windows_begin_where_it_began(self) -> None:
        """Seconds are counted from its own beginning, whatever the clock then said."""
        rate = busy(10, now_ns=123_456_789)

        assert rate.per_second(SECOND) == 10.0
        assert rate.per_second(123_456_789 + SECOND) == pytest.approx(3.0)


class TestPromise:
    """The schedule of returns."""

    def test_unknown_rate_promises_nothing(self) -> None:
        """None, rather than a guess."""
        assert DrainRate(0).promise(0, MOST) is None

    def test_crowd_is_told_different_times(self) -> None:
        """At four a second, the first is told a quarter of a second, each next a quarter more."""
        rate = busy(4)

        promises = [rate.promise(0, MOST) for _ in range(4)]

        assert promises == [SECOND // 4, SECOND // 2, 3 * SECOND // 4, SECOND]

    def test_schedule_goes_on_while_time_passes(self) -> None:
        """A place is a moment: told later, it is that much nearer."""
        rate = busy(4)
        rate.promise(0, MOST)
        rate.promise(0, MOST)

        assert rate.promise(SECOND // 10, MOST) == 3 * SECOND // 4 - SECOND // 10

    def test_past_places_are_not_given_away(self) -> None:
        """When the schedule was overtaken by time it goes on from now."""
        rate = busy(4)
        rate.promise(0, MOST)

        assert rate.promise(SECOND * 9 // 10, MOST) == SECOND // 4

    def test_schedule_stands_still_at_its_end(self) -> None:
        """Nobody is told more than the most, and the schedule does not run away meanwhile."""
        rate = busy(1)
        promises = [rate.promise(0, 3 * SECOND) for _ in range(5)]

        assert promises == [SECOND, 2 * SECOND, 3 * SECOND, 3 * SECOND, 3 * SECOND]
        assert rate.promise(SECOND // 2, 3 * SECOND) == 3 * SECOND

    def test_rate_that_rises_brings_places_closer(self) -> None:
        """Each step is taken at the rate of its moment."""
        rate = busy(1)
        rate.promise(0, MOST)
        for _ in range(9):
            rate.dispatched(0)

        assert rate.promise(0, MOST) == SECOND + SECOND // 10

    @pytest.mark.parametrize("gap_ns", [SECOND, 20 * SECOND, 50 * SECOND])
    def test_hours_without_a_dispatch_end_in_no_promise(self, gap_ns: int) -> None:
        """A band that starves while its clients come back all the time is not a fault."""
        rate = busy(1)
        for now_ns in range(gap_ns, HOUR, gap_ns):
            rate.promise(now_ns, MOST)

        assert rate.promise(HOUR, MOST) is None

    @pytest.mark.slow
    @given(
        steps=st.lists(
            st.tuples(st.integers(0, 3 * SECOND), st.sampled_from(["dispatched", "promise"])),
            max_size=60,
        ),
        most_ns=st.integers(0, MOST),
    )
    @settings(max_examples=150)
    def test_promises_never_go_back(self, steps: list[tuple[int, str]], most_ns: int) -> None:
        """Nobody refused later is sent back earlier, and nobody beyond the most."""
        rate, now_ns, latest_ns = DrainRate(0), 0, 0
        for passed_ns, step in steps:
            now_ns += passed_ns
            if step == "dispatched":
                rate.dispatched(now_ns)
                continue
            promise_ns = rate.promise(now_ns, most_ns)
            if promise_ns is not None:
                assert 0 <= promise_ns <= most_ns
                assert now_ns + promise_ns >= latest_ns
                latest_ns = now_ns + promise_ns

"""How fast a queue drains, and Retry-After of refused clients."""

from math import ceil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import RETRY_AFTER_MAX_NS
from flowcontrol.retry import DrainRate, retry_after_s

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
MOST = RETRY_AFTER_MAX_NS


def dispatched(count: int, now_ns: int = 0) -> DrainRate:
    """Return a rate that has seen so many dispatches at one moment, none of them after a wait."""
    rate = DrainRate(now_ns)
    for _ in range(count):
        rate.dispatched(now_ns)
    return rate


def drained(rate: DrainRate, per_second: float, from_ns: int, seconds: int) -> int:
    """Let something wait while so many are dispatched; return the time when nothing waits again."""
    rate.began(from_ns)
    step_ns = round(SECOND / per_second)
    for now_ns in range(from_ns + step_ns, from_ns + seconds * SECOND + 1, step_ns):
        rate.dispatched(now_ns)
    rate.ended(from_ns + seconds * SECOND)
    return from_ns + seconds * SECOND


class TestDrainRate:
    """How fast work leaves by dispatch."""

    def test_knows_nothing_at_first(self) -> None:
        """Without a dispatch there is no rate, nor by one that nothing waited for."""
        assert DrainRate(0).per_second(0) == 0.0
        assert dispatched(64).per_second(0) == 0.0

    def test_knows_once_something_that_waited_has_gone(self) -> None:
        """What went before it, to free slots, is not drained and does not count."""
        rate = dispatched(64)
        rate.began(0)
        assert rate.per_second(2 * SECOND) == 0.0

        rate.dispatched(2 * SECOND)
        assert rate.per_second(2 * SECOND) == 0.5

    @pytest.mark.parametrize("per_second", [0.5, 1, 7, 100])
    @pytest.mark.parametrize("seconds", [5, 10, 100])
    def test_steady_rate_is_found(self, per_second: float, seconds: int) -> None:
        """Soon, and without a bias: within a dispatch or two of what is remembered."""
        rate = DrainRate(0)
        end_ns = drained(rate, per_second, 0, seconds)

        remembered = per_second * min(seconds, 15)
        assert rate.per_second(end_ns) == pytest.approx(per_second, rel=1.5 / remembered)

    def test_quiet_hour_changes_nothing(self) -> None:
        """Time in which nothing waits does not count, nor does what is dispatched then."""
        rate = DrainRate(0)
        end_ns = drained(rate, 10, 0, 60)
        for second in range(3600):
            rate.dispatched(end_ns + second * SECOND)

        assert rate.per_second(end_ns + HOUR) == pytest.approx(10, rel=0.02)

        rate.began(end_ns + HOUR)
        assert rate.per_second(end_ns + HOUR) == pytest.approx(10, rel=0.02)

    def test_many_short_waits_are_as_good_as_a_long_one(self) -> None:
        """Half a second of waiting, half a second of none, a hundred times."""
        rate, now_ns = DrainRate(0), 0
        for _ in range(100):
            rate.began(now_ns)
            for _ in range(5):
                now_ns += SECOND // 10
                rate.dispatched(now_ns)
            rate.ended(now_ns)
            now_ns += SECOND // 2

        assert rate.per_second(now_ns) == pytest.approx(10, rel=0.05)

    def test_short_waits_are_forgotten_too(self) -> None:
        """Waits of a tenth of a second, one in each busy time, become four times as long."""
        rate, now_ns = DrainRate(0), 0
        for wait_ns in [SECOND // 10] * 1000 + [SECOND * 4 // 10] * 100:
            rate.began(now_ns)
            now_ns += wait_ns
            rate.dispatched(now_ns)
            rate.ended(now_ns)

        assert rate.per_second(now_ns) == pytest.approx(2.5 + 7.5 / 14.4, rel=0.05)

    def test_change_is_followed(self) -> None:
        """Half of the pool is gone: two memories later the old rate weighs an eighth."""
        rate = DrainRate(0)
        now_ns = drained(rate, 20, 0, 120)
        now_ns = drained(rate, 10, now_ns, 30)

        assert rate.per_second(now_ns) == pytest.approx(10 + 10 / 7.4, rel=0.05)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_departures_are_averaged(self, seed: int) -> None:
        """A Poisson stream of 8 a second: the mean is right, and no reading is far off."""
        chance, rate, now_ns = Random(seed), DrainRate(0), 0
        rate.began(0)
        readings = []
        for _ in range(4000):
            now_ns += round(chance.expovariate(8) * SECOND)
            rate.dispatched(now_ns)
            readings.append(rate.per_second(now_ns))
        later = readings[400:]

        assert sum(later) / len(later) == pytest.approx(8, rel=0.03)
        assert min(later) > 8 / 2
        assert max(later) < 8 * 2

    def test_long_silence_while_something_waits_is_forgotten(self) -> None:
        """What was true then says nothing now."""
        rate = DrainRate(0)
        rate.began(0)
        for _ in range(100):
            rate.dispatched(0)

        assert rate.per_second(2 * MINUTE) > 0
        assert rate.per_second(3 * MINUTE) == 0.0

    def test_silence_is_forgotten_although_it_is_asked_about(self) -> None:
        """Clients that are refused meanwhile do not keep the memory alive."""
        rate = DrainRate(0)
        rate.began(0)
        for _ in range(100):
            rate.dispatched(0)
        for second in range(1, 180):
            rate.per_second(second * SECOND)

        assert rate.per_second(3 * MINUTE) == 0.0

    @given(gaps=st.lists(st.integers(1, 20 * SECOND), max_size=30))
    @settings(max_examples=50)
    def test_how_often_it_is_asked_hardly_matters(self, gaps: list[int]) -> None:
        """It is read, not changed."""
        asked, quiet, now_ns = DrainRate(0), DrainRate(0), 0
        for rate in (asked, quiet):
            rate.began(0)
            for _ in range(50):
                rate.dispatched(SECOND)
        for gap_ns in gaps:
            now_ns += gap_ns
            asked.per_second(SECOND + now_ns)

        assert asked.per_second(SECOND + now_ns) == pytest.approx(
            quiet.per_second(SECOND + now_ns), rel=0.08
        )


class TestPromise:
    """The schedule of returns."""

    def test_unknown_rate_promises_nothing(self) -> None:
        """None, rather than a guess."""
        assert DrainRate(0).promise(0, MOST) is None

    def test_crowd_is_told_different_times(self) -> None:
        """At four a second, the first gets a quarter of a second, each next a quarter more."""
        rate = dispatched(4)

        promises = [rate.promise(0, MOST) for _ in range(4)]

        assert promises == [SECOND // 4, SECOND // 2, 3 * SECOND // 4, SECOND]

    def test_schedule_goes_on_while_time_passes(self) -> None:
        """A place is a moment: told later, it is that much nearer."""
        rate = dispatched(4)
        rate.promise(0, MOST)
        rate.promise(0, MOST)

        assert rate.promise(SECOND // 10, MOST) == 3 * SECOND // 4 - SECOND // 10

    def test_past_places_are_not_given_away(self) -> None:
        """When the schedule was overtaken by time it goes on from now."""
        rate = dispatched(4)
        rate.promise(0, MOST)

        assert rate.promise(SECOND * 9 // 10, MOST) == SECOND // 4

    def test_schedule_stands_still_at_its_end(self) -> None:
        """No client gets more than the most, and the schedule does not run away meanwhile."""
        rate = dispatched(1)
        promises = [rate.promise(0, 3 * SECOND) for _ in range(5)]

        assert promises == [SECOND, 2 * SECOND, 3 * SECOND, 3 * SECOND, 3 * SECOND]
        assert rate.promise(SECOND // 2, 3 * SECOND) == 3 * SECOND

    def test_rate_that_rises_brings_places_closer(self) -> None:
        """Each step is taken at the rate of its moment."""
        rate = dispatched(1)
        rate.promise(0, MOST)
        for _ in range(9):
            rate.dispatched(0)

        assert rate.promise(0, MOST) == SECOND + SECOND // 10

    def test_measured_rate_counts_before_all_else(self) -> None:
        """64 found free slots at once; but what waits leaves at 2 a second."""
        rate = dispatched(64)
        end_ns = drained(rate, 2, 0, 60)

        assert rate.promise(end_ns, MOST) == pytest.approx(SECOND / 2, rel=0.05)

    def test_where_nothing_may_wait_all_dispatches_count(self) -> None:
        """There, nothing ever drains, and slots become free all the same."""
        rate = DrainRate(0)
        for index in range(100):
            rate.dispatched(index * SECOND // 2)

        assert rate.promise(50 * SECOND, MOST) == pytest.approx(SECOND / 2, rel=0.05)

    @pytest.mark.parametrize("gap_ns", [SECOND, 20 * SECOND, 50 * SECOND])
    def test_hours_without_a_dispatch_end_in_no_promise(self, gap_ns: int) -> None:
        """A band that starves while its clients come back all the time is not a fault."""
        rate = dispatched(1)
        for now_ns in range(gap_ns, HOUR, gap_ns):
            rate.promise(now_ns, MOST)

        assert rate.promise(HOUR, MOST) is None

    @pytest.mark.parametrize(("per_second", "clients"), [(2, 40), (10, 200), (50, 1000)])
    def test_returning_crowd_comes_at_the_rate_the_queue_can_take(
        self, per_second: int, clients: int
    ) -> None:
        """Refused in one moment, they return spread: no second sees more than can be taken."""
        rate = DrainRate(0)
        now_ns = drained(rate, per_second, 0, 120)
        returns = [rate.promise(now_ns, MOST) or 0 for _ in range(clients)]
        most = max(
            sum(start <= each < start + SECOND for each in returns)
            for start in range(0, MOST, SECOND)
        )

        assert most <= per_second * 1.1 + 1

    def test_all_told_the_same_would_not(self) -> None:
        """The check above fails where every client gets 1/rate."""
        returns = [SECOND // 10] * 200

        assert sum(each < SECOND for each in returns) > 10 * 1.1 + 1

    @given(
        steps=st.lists(
            st.tuples(
                st.integers(0, 3 * SECOND),
                st.sampled_from(["dispatched", "promise", "promise", "began", "ended"]),
            ),
            max_size=60,
        ),
        most_ns=st.integers(0, MOST),
    )
    @settings(max_examples=100)
    def test_promises_never_go_back(self, steps: list[tuple[int, str]], most_ns: int) -> None:
        """No client refused later returns earlier, and none later than the most."""
        rate, now_ns, latest_ns = DrainRate(0), 0, 0
        for passed_ns, step in steps:
            now_ns += passed_ns
            if step != "promise":
                getattr(rate, step)(now_ns)
                continue
            promise_ns = rate.promise(now_ns, most_ns)
            if promise_ns is not None:
                assert 0 <= promise_ns <= most_ns
                assert now_ns + promise_ns >= latest_ns
                latest_ns = now_ns + promise_ns


class TestRetryAfter:
    """Whole seconds, rounded up, spread and capped."""

    @pytest.mark.parametrize(
        ("expected_ns", "chance", "seconds"),
        [
            (None, 0.0, None),
            (0, 0.0, 1),
            (SECOND - 1, 1.0, 1),
            (SECOND, 0.0, 1),
            (SECOND, 1.0, 2),
            (SECOND + 1, 0.0, 2),
            (4 * SECOND, 0.0, 4),
            (4 * SECOND, 0.5, 5),
            (4 * SECOND, 1.0, 5),
            (24 * SECOND, 1.0, 30),
            (25 * SECOND, 0.99, 30),
            (28 * SECOND, 0.5, 29),
            (30 * SECOND, 0.0, 30),
            (30 * SECOND, 1.0, 30),
            (10**6 * SECOND, 0.5, 30),
        ],
    )
    def test_table(self, expected_ns: int | None, chance: float, seconds: int | None) -> None:
        """At least a second; the spread ends where the cap does."""
        assert seconds == retry_after_s(expected_ns, chance)

    @given(st.integers(SECOND, 10**6 * SECOND), st.floats(0, 1))
    def test_bounds(self, expected_ns: int, chance: float) -> None:
        """Never over 30 s, never a quarter too late, and too early only because of the cap."""
        seconds = retry_after_s(expected_ns, chance)

        assert seconds is not None
        expected_s = expected_ns / SECOND
        assert min(expected_s, 30) <= seconds <= min(30, ceil(1.25 * expected_s))

    def test_spread_up_to_the_cap(self) -> None:
        """A crowd with a place near the cap is not called back as one at the cap."""
        told = [retry_after_s(25 * SECOND, number / 1000) for number in range(1001)]

        assert [told.count(seconds) for seconds in (25, 26, 27, 28, 29, 30)] == [1] + [200] * 5

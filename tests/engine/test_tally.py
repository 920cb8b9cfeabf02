"""Counts of what became of requests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.request import Outcome
from flowcontrol.tally import Tally
from flowcontrol.views.snapshot import WAIT_BOUNDS_S

SECOND = 1_000_000_000


class TestTally:
    """The counts of one priority."""

    def test_begins_with_nothing(self) -> None:
        """An outcome that never came is not there at all."""
        totals = Tally().totals()

        assert (totals.outcomes, totals.wait_counts, totals.wait_sum_ns) == ({}, {}, {})
        assert totals.completed == 0

    def test_counts_by_outcome(self) -> None:
        """Each outcome has its own count, sum and histogram."""
        tally = Tally()
        tally.count(Outcome.DISPATCHED, 2 * SECOND)
        tally.count(Outcome.DISPATCHED, 0)
        tally.count(Outcome.EVICTED_TTL, 5 * SECOND)
        tally.completed += 1
        totals = tally.totals()

        assert totals.outcomes == {Outcome.DISPATCHED: 2, Outcome.EVICTED_TTL: 1}
        assert totals.wait_sum_ns == {
            Outcome.DISPATCHED: 2 * SECOND,
            Outcome.EVICTED_TTL: 5 * SECOND,
        }
        assert totals.completed == 1

    @pytest.mark.parametrize(
        ("waited_ns", "expected"),
        [
            (0, 0),
            (1_000_000, 0),
            (1_000_001, 1),
            (SECOND, WAIT_BOUNDS_S.index(1)),
            (SECOND + 1, WAIT_BOUNDS_S.index(2.5)),
            (600 * SECOND, len(WAIT_BOUNDS_S) - 1),
            (600 * SECOND + 1, len(WAIT_BOUNDS_S)),
        ],
    )
    def test_bounds_include_themselves(self, waited_ns: int, expected: int) -> None:
        """A wait of exactly a bound is within it; beyond the last there is one place more."""
        tally = Tally()
        tally.count(Outcome.DISPATCHED, waited_ns)
        counts = tally.totals().wait_counts[Outcome.DISPATCHED]

        assert counts == tuple(int(index == expected) for index in range(len(WAIT_BOUNDS_S) + 1))

    @pytest.mark.slow
    @given(waits=st.lists(st.integers(0, 700 * SECOND), max_size=40))
    @settings(max_examples=100)
    def test_histogram_agrees_with_counting(self, waits: list[int]) -> None:
        """Added up to any bound, the counts say how many waited no longer than that."""
        tally = Tally()
        for waited_ns in waits:
            tally.count(Outcome.DISPATCHED, waited_ns)
        counts = tally.totals().wait_counts.get(Outcome.DISPATCHED, (0,) * 18)

        for index, bound_s in enumerate(WAIT_BOUNDS_S):
            expected = sum(waited_ns <= round(bound_s * SECOND) for waited_ns in waits)
            assert sum(counts[: index + 1]) == expected
        assert sum(counts) == len(waits)

    def test_totals_are_a_copy(self) -> None:
        """A snapshot stays as it was."""
        tally = Tally()
        tally.count(Outcome.DISPATCHED, 0)
        before = tally.totals()
        tally.count(Outcome.DISPATCHED, 0)
        tally.completed += 1

        assert before.outcomes == {Outcome.DISPATCHED: 1}
        assert before.wait_counts[Outcome.DISPATCHED][0] == 1
        assert before.completed == 0

    def test_bounds_grow(self) -> None:
        """The histogram is one that Prometheus can read."""
        assert list(WAIT_BOUNDS_S) == sorted(set(WAIT_BOUNDS_S))

    def test_forecasts(self) -> None:
        """Only what was dispatched and predicted shows how true a prediction was."""
        tally = Tally()
        tally.count(Outcome.DISPATCHED, 900, 1000)
        tally.count(Outcome.DISPATCHED, 5000, 1000)
        tally.count(Outcome.DISPATCHED, 900)
        tally.count(Outcome.DISPATCHED, 0, 0)
        tally.count(Outcome.EVICTED_TTL, 5000, 1000)

        forecasts = tally.totals().forecasts
        assert forecasts is not None
        assert forecasts.counts == (0, 0, 0, 1, 0, 0, 1)
        assert forecasts.sum_ns == 5_900_000_000

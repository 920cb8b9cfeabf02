"""At which saturation a band is gated, against the formulas and against what they promise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.ceilings import ceilings_for
from flowcontrol.config import Ceilings, CeilingSettings

HOLDBACKS = (Ceilings.HOLDBACK_BY_RANK, Ceilings.HOLDBACK_BY_VALUE)
priority_sets = st.sets(st.integers(-100, 100), min_size=1, max_size=9).map(
    lambda priorities: sorted(priorities, reverse=True)
)
saturations = st.floats(0, 1.5)


def ceilings(
    policy: Ceilings,
    *priorities: int,
    saturation: float = 0.0,
    turn_count: int = 0,
    high: float = 1.0,
    low: float = 0.5,
) -> list[float]:
    """Return the ceilings of these bands."""
    made = CeilingSettings(policy=policy, ceiling_max=high, ceiling_min=low)
    return ceilings_for(made, priorities, saturation, turn_count)


class TestStatic:
    """One ceiling for all."""

    @given(priorities=priority_sets, saturation=saturations)
    @settings(max_examples=25)
    def test_is_the_same_for_all_always(self, priorities: list[int], saturation: float) -> None:
        """Whichever bands there are and however full the pool is."""
        found = ceilings(Ceilings.STATIC, *priorities, saturation=saturation, high=0.9)

        assert found == [0.9] * len(priorities)


class TestHoldback:
    """A part of the pool that only higher bands may use."""

    def test_by_rank_goes_down_in_even_steps(self) -> None:
        """Whatever the priorities are."""
        assert ceilings(Ceilings.HOLDBACK_BY_RANK, 100, 10, 0) == [1.0, 0.75, 0.5]

    def test_by_value_follows_the_priorities(self) -> None:
        """A tenth of the way down is a tenth of the step."""
        assert ceilings(Ceilings.HOLDBACK_BY_VALUE, 100, 90, 0) == [1.0, 0.95, 0.5]

    @pytest.mark.parametrize("policy", HOLDBACKS)
    @given(priorities=priority_sets)
    @settings(max_examples=50)
    def test_ends_are_the_settings_and_order_is_that_of_priority(
        self, policy: Ceilings, priorities: list[int]
    ) -> None:
        """The highest band has the highest ceiling, the lowest the lowest."""
        found = ceilings(policy, *priorities, high=0.95, low=0.4)

        assert found[0] == 0.95
        assert found == sorted(found, reverse=True)
        if len(found) > 1:
            assert found[-1] == pytest.approx(0.4)
            assert len(set(found)) == len(found)

    @given(priorities=priority_sets, newcomer=st.integers(-100, 100))
    @settings(max_examples=50)
    def test_by_value_another_band_between_moves_nobody(
        self, priorities: list[int], newcomer: int
    ) -> None:
        """Declaring an objective is no reason to gate another one's traffic."""
        between = min(max(newcomer, priorities[-1]), priorities[0])
        more = sorted({*priorities, between}, reverse=True)
        before = dict(
            zip(priorities, ceilings(Ceilings.HOLDBACK_BY_VALUE, *priorities), strict=True)
        )
        after = dict(zip(more, ceilings(Ceilings.HOLDBACK_BY_VALUE, *more), strict=True))

        assert {each: after[each] for each in priorities} == before

    def test_by_rank_another_band_between_moves_others(self) -> None:
        """The check above can fail: this is what the other policy is for."""
        assert ceilings(Ceilings.HOLDBACK_BY_RANK, 9, 5, 0)[1] == 0.75
        assert ceilings(Ceilings.HOLDBACK_BY_RANK, 9, 7, 5, 0)[2] != 0.75


class TestSoftReflective:
    """Lower bands fade out as the pool fills."""

    @given(priorities=priority_sets, saturation=saturations, turn_count=st.integers(0, 999))
    @settings(max_examples=50)
    def test_top_band_is_never_gated_below_its_ceiling(
        self, priorities: list[int], saturation: float, turn_count: int
    ) -> None:
        """And all other bands are open or closed, nothing between."""
        found = ceilings(
            Ceilings.SOFT_REFLECTIVE, *priorities, saturation=saturation, turn_count=turn_count
        )

        assert found[0] == 1.0
        assert set(found) <= {0.0, 1.0}

    @pytest.mark.parametrize(
        ("saturation", "open_bands"),
        [(0.0, 3), (0.49, 3), (0.59, 3), (0.61, 2), (0.66, 2), (0.67, 1), (0.99, 1), (1.0, 1)],
    )
    def test_opens_below_the_soft_threshold(self, saturation: float, open_bands: int) -> None:
        """1 - i s / (N - 1): of three bands, the lowest at s < 1/2, the middle one at s < 2/3.

        On a turn that is open to none of those between; but up to 0.6 one turn in 1 is every turn.
        """
        found = ceilings(Ceilings.SOFT_REFLECTIVE, 2, 1, 0, saturation=saturation, turn_count=1)

        assert found == [1.0] * open_bands + [0.0] * (3 - open_bands)

    @pytest.mark.parametrize(("saturation", "period"), [(0.75, 3), (0.9, 9), (0.99, 99)])
    def test_above_it_is_open_one_turn_in_a_period(self, saturation: float, period: int) -> None:
        """Round(s / (1 - s)): the fuller, the rarer."""
        turns = [
            ceilings(Ceilings.SOFT_REFLECTIVE, 1, 0, saturation=saturation, turn_count=count)[1]
            for count in range(10 * period)
        ]

        assert turns == [1.0, *[0.0] * (period - 1)] * 10

    def test_full_pool_is_closed_to_all_but_the_top(self) -> None:
        """Whatever the turn."""
        turns = [
            ceilings(Ceilings.SOFT_REFLECTIVE, 2, 1, 0, saturation=1.0, turn_count=count)
            for count in range(50)
        ]

        assert turns == [[1.0, 0.0, 0.0]] * 50


@pytest.mark.parametrize("policy", Ceilings)
@pytest.mark.parametrize("saturation", [0.0, 0.8, 1.0, 1.3])
def test_one_band_alone_has_the_highest_ceiling(policy: Ceilings, saturation: float) -> None:
    """Nothing is held back where no band needs it."""
    assert ceilings(policy, -7, saturation=saturation, high=0.9) == [0.9]

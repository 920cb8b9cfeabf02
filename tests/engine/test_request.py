"""The ways a request can end, and what they are counted as."""

import pytest

from flowcontrol.request import Group, Outcome, by_group

GROUPS = {
    "dispatched": Group.DISPATCHED,
    "rejected": Group.REFUSED,
    "evicted": Group.EVICTED,
    "reclaimed": Group.EVICTED,
    "internal": Group.REFUSED,
}


class TestGroup:
    """Every outcome is in one."""

    @pytest.mark.parametrize("outcome", Outcome)
    def test_each(self, outcome: Outcome) -> None:
        """As the first of its words says."""
        assert outcome.group is GROUPS[outcome.value.partition("-")[0]]

    def test_counts(self) -> None:
        """What is in a group is added up."""
        counts = {Outcome.RECLAIMED: 2, Outcome.EVICTED_TTL: 3, Outcome.INTERNAL: 1}

        assert by_group(counts) == {Group.EVICTED: 5, Group.REFUSED: 1}

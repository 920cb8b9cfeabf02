"""For how long an edge that was found is believed."""

from math import inf

import pytest

from flowcontrol.belief import Belief

SECOND = 1_000_000_000


class TestBelief:
    """An edge is tried again after a minute, and later each time it is found to be there still."""

    def test_again(self) -> None:
        """Twice as long each time it is found at the same place, up to 16 minutes."""
        belief = Belief(0.1)
        lasted = []
        now_ns = 0
        for value in (100, 105, 100, 104, 100, 103):
            belief.found(value, now_ns)
            for_s = next(s for s in range(0, 2000, 30) if belief.edge(now_ns + s * SECOND) == inf)
            lasted.append(for_s)
            assert belief.edge(now_ns) == value
            now_ns += for_s * SECOND

        assert lasted == [60, 120, 240, 480, 960, 960]

    @pytest.mark.parametrize("value", [80, 125])
    def test_elsewhere(self, value: float) -> None:
        """Found elsewhere, it is a new one."""
        belief = Belief(0.1)
        belief.found(100, 0)
        belief.found(100, 0)
        belief.found(value, 0)

        assert belief.edge(59 * SECOND) == value
        assert belief.edge(60 * SECOND) == inf

    def test_of_another(self) -> None:
        """What another has found is believed for as long as it is there."""
        own, other = Belief(0.1), Belief(0.1)
        other.found(100, 0)
        other.found(100, 0)
        own.resume(300, other.for_ns, 5 * SECOND)
        own.scale(0.5)

        assert own.edge(124 * SECOND) == 150
        assert own.edge(125 * SECOND) == inf

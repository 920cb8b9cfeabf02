"""Flows of equal weight get equal tokens although their answers are not as long as estimated."""

import pytest

from tests.support.wrong_estimates import CASES, run


@pytest.mark.slow
class TestWrongEstimates:
    """Answers of four times as many tokens as expected, or of a fourth."""

    @pytest.mark.parametrize(
        ("name", "minutes"),
        [("never seen before", 1), ("changing every minute", 2), ("by chance", 1)],
    )
    def test_corrected(self, name: str, minutes: float) -> None:
        """What was charged is corrected by what was used, so no flow gets more for a low guess."""
        results = run(CASES[name], minutes)
        served = [figures.tokens_served for figures in results.tenants.values()]

        jain = results.jain(0)
        assert jain is not None
        assert jain > 0.99
        assert min(served) > 0.85 * sum(served) / len(served)

    def test_never_corrected(self) -> None:
        """Without an access log the shares are as fair as the guess: so far off can they be."""
        jain = run(CASES["never seen, no access log"], 1).jain(0)

        assert jain is not None
        assert jain < 0.8

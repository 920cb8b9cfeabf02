"""What all tests share: the profiles of Hypothesis, and `--rewrite` for the scenarios."""

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci")  # `--hypothesis-profile nightly` looks where no run has looked before


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites the scenarios."""
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the engine decides now into tests/scenarios/*.txt; read the diff as prose",
    )

"""What all tests share: the profiles of Hypothesis, and `--rewrite` for the scenarios."""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci")  # `--hypothesis-profile nightly` looks where no run has looked before

# Where a proxy is set, what listens on this machine is still reached without it.
_others = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
os.environ["no_proxy"] = f"localhost,127.0.0.1,::1,{_others}".rstrip(",")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites the scenarios."""
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the engine decides now into tests/scenarios/*.txt; read the diff as prose",
    )

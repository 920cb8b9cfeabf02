"""Every parser of what others wrote: tests/fuzz/parsers.py, shortly and from fixed seeds."""

import re
import time
from collections import deque
from functools import partial

import pytest
import structlog

from flowcontrol_server.sources import dns
from tests.fuzz.parsers import TARGETS, Target, attempt

SECONDS = 3.0
"""For each target; at least the first inputs are read however long they take."""
LEAST, MOST = 5, 400
"""Inputs."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is logged, and no name server waited for."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    monkeypatch.setattr(dns, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(dns, "TRIES", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    """It raises nothing but its own errors, and takes time in proportion to what it reads."""
    over_s = time.monotonic() + SECONDS
    for seed in range(MOST):
        if seed >= LEAST and time.monotonic() > over_s:
            break
        attempt(TARGETS[name], seed)


@pytest.mark.slow
class TestTheFuzzer:
    """It finds what it looks for."""

    def test_quadratic_time(self) -> None:
        """A pattern that is quadratic is found, and its input named."""
        pattern = re.compile(rb'([a-z]+)="')
        target = Target(pattern.findall, (b"a",), 1 << 13)

        with pytest.raises(AssertionError, match=r"seed \d+: .* took"):
            deque(map(partial(attempt, target), range(20)))

    def test_another_error(self) -> None:
        """An error that is no parser's own is raised, with its input."""

        def read(data: bytes) -> None:
            """Fail at what is no number."""
            int(data)

        with pytest.raises(ValueError, match="invalid literal") as caught:
            attempt(Target(read, (b"x",)), 1)
        assert caught.value.__notes__[0].startswith("seed 1: ")

"""How long prompts take to be read, learnt from times to first token."""

import pytest

from flowcontrol.config import Limits, Ordering
from flowcontrol.estimates import Tokens
from flowcontrol.events import Settled
from flowcontrol.flow import Flow, Lease
from flowcontrol.prefill import FirstTokenTimes
from flowcontrol.request import FlowKey, Request

BASE_NS, TOKEN_NS = 15_000_000, 40_000
FLOW = Flow(FlowKey(0, "a"), Ordering.FCFS, Limits())


def _learn(times: FirstTokenTimes, prompt: int, ttft_ns: int, cached: int = 0) -> float | None:
    lease = Lease(Request(1), FLOW, 1, 0, Tokens(prompt, 10), 1.0)
    settled = Settled(1, input_tokens=prompt, cached_tokens=cached, ttft_ns=ttft_ns)
    return times.learn(lease, settled)


class TestSpeed:
    """The time that one more token of a prompt takes."""

    @pytest.mark.parametrize("longest", [1720, 2048, 2420])
    def test_exact(self, longest: int) -> None:
        """It is that of the prompt that took the least, wherever in its class of length it lies."""
        times = FirstTokenTimes()
        for prompt in (100, longest) * 4:
            _learn(times, prompt, BASE_NS + TOKEN_NS * prompt)

        assert times.token_ns == pytest.approx(TOKEN_NS, rel=1e-3)

    def test_lost_in_steps(self) -> None:
        """Prompts so short that most take hardly longer than the shortest tell none."""
        times = FirstTokenTimes()
        for prompt in (20, 30, 40, 160) * 8:
            ran_beside_ns = 10_000_000 if prompt > 100 else 0
            _learn(times, prompt, BASE_NS + TOKEN_NS * prompt + ran_beside_ns)

        assert times.token_ns == 0

    def test_one_length(self) -> None:
        """Prompts all of one length tell none."""
        times = FirstTokenTimes()
        for _ in range(8):
            _learn(times, 500, BASE_NS)

        assert times.token_ns == 0

    @pytest.mark.parametrize(("prompt", "cached"), [(0, 0), (500, 500), (5, 9)])
    def test_nothing_to_read(self, prompt: int, cached: int) -> None:
        """Prompts that were empty, or all in the cache, tell none."""
        times = FirstTokenTimes()
        for _ in range(8):
            _learn(times, prompt, BASE_NS, cached)

        assert times.token_ns == 0

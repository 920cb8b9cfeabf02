"""The demo's parts that need no processes."""

from itertools import pairwise

import pytest

from server.demo.report import summarize
from server.demo.stack import Ports
from server.demo.traffic import Load, Planned, Sample, plan


class TestPlan:
    """What is sent."""

    def test_same_seed_sends_the_same(self) -> None:
        """Both phases, and every run of a seed, get the same requests at the same times."""
        assert plan(Load(), 7) == plan(Load(), 7)
        assert plan(Load(), 7) != plan(Load(), 8)

    def test_in_order_of_time(self) -> None:
        """People all along, the batch job at once."""
        requests = plan(Load(seconds=10.0), 7)
        batch = [request for request in requests if request.kind == "batch"]

        assert all(before.at_s <= after.at_s for before, after in pairwise(requests))
        assert {request.at_s for request in batch} == {1.0}
        assert len(batch) == 160
        assert {request.flow_id for request in batch} == {"nightly-job"}
        assert len(requests) - len(batch) == pytest.approx(60, abs=25)


class TestSummarize:
    """What is counted."""

    def test_figures_of_one_class(self) -> None:
        """Percentiles of the first tokens there were, failures and refusals apart."""
        person = Planned(1.0, "interactive", "person-0", 4)
        samples = [
            Sample(person, first_token_s=2.0, end_s=3.0, tokens=4),
            Sample(person, first_token_s=4.0, end_s=5.0, tokens=4, refusals=2),
            Sample(person, end_s=10.0, failure="HTTP 503"),
            Sample(Planned(0.0, "batch", "nightly-job", 8), first_token_s=9.0, end_s=9.5, tokens=8),
        ]

        figures = summarize(samples, "interactive")

        assert figures.ttft_s == pytest.approx((2.0, 2.9, 2.98))
        assert (figures.completed, figures.failed, figures.refusals) == (2, 1, 2)
        assert figures.tokens_per_second == pytest.approx(0.8)

    def test_of_nobody(self) -> None:
        """No sample, no figure, no fault."""
        assert summarize([], "batch").ttft_s == (0.0, 0.0, 0.0)


class TestPorts:
    """Where the demo listens."""

    def test_shifted(self) -> None:
        """An offset moves every port."""
        moved = Ports().shifted(100).all()

        assert moved == tuple(port + 100 for port in Ports().all())
        assert len(set(moved)) == 10

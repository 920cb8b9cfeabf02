"""The demo's parts that need no processes."""

from itertools import pairwise

import pytest

from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol_server.tools.demo.report import WITH, WITHOUT, caveat, summarize
from flowcontrol_server.tools.demo.stack import Ports
from flowcontrol_server.tools.demo.traffic import DemoLoad, DemoSample, Planned, plan


class TestPlan:
    """What is sent."""

    def test_same_seed_sends_the_same(self) -> None:
        """Both phases, and every run of a seed, get the same requests at the same times."""
        assert plan(DemoLoad(), 7) == plan(DemoLoad(), 7)
        assert plan(DemoLoad(), 7) != plan(DemoLoad(), 8)

    def test_in_order_of_time(self) -> None:
        """People all along, the batch job at once."""
        requests = plan(DemoLoad(seconds=20.0), 7)
        batch = [request for request in requests if request.kind == "batch"]

        assert all(before.at_s <= after.at_s for before, after in pairwise(requests))
        assert {request.at_s for request in batch} == {2.0}
        assert len(batch) == 320
        assert {request.flow_id for request in batch} == {"nightly-job"}
        assert len(requests) - len(batch) == pytest.approx(120, abs=45)

    @pytest.mark.parametrize("seconds", [1.0, 3.0, 10.0])
    def test_short_ones_queue_too(self, seconds: float) -> None:
        """The batch job is several times what the servers run at once."""
        slots = ModelServerConfig().sequences_max * len(Ports().servers)

        assert DemoLoad(seconds=seconds).batch_requests >= 3 * slots


class TestSummarize:
    """What is counted."""

    def test_figures_of_one_class(self) -> None:
        """Percentiles of the first tokens there were, failures and refusals apart."""
        person = Planned(1.0, "interactive", "person-0", 4)
        samples = [
            DemoSample(person, first_token_s=2.0, end_s=3.0, tokens=4),
            DemoSample(person, first_token_s=4.0, end_s=5.0, tokens=4, refusals=2),
            DemoSample(person, end_s=10.0, failure="HTTP 503"),
            DemoSample(
                Planned(0.0, "batch", "nightly-job", 8), first_token_s=9.0, end_s=9.5, tokens=8
            ),
        ]

        figures = summarize(samples, "interactive")

        assert figures.ttft_s == pytest.approx((2.0, 2.9, 2.98))
        assert (figures.completed, figures.failed, figures.refusals) == (2, 1, 2)
        assert figures.tokens_per_second == pytest.approx(0.8)
        assert figures.done_s == 10.0
        assert summarize(samples, "batch").done_s == 9.5

    def test_of_nobody(self) -> None:
        """No sample, no figure, no fault."""
        assert summarize([], "batch").ttft_s == (0.0, 0.0, 0.0)


class TestCaveat:
    """What is said where the figures do not show what flow control does."""

    @pytest.mark.parametrize(("with_s", "is_said"), [(2.0, False), (4.0, True), (5.0, True)])
    def test_people_wait_no_less(self, with_s: float, *, is_said: bool) -> None:
        """It is said if people waited as long or longer; a batch job that waits is no reason."""
        person = Planned(0.0, "interactive", "person-0", 4)
        batch = Planned(0.0, "batch", "nightly-job", 8)
        results = {
            name: [
                *(
                    DemoSample(person, first_token_s=person_s, end_s=9.0, tokens=4)
                    for _ in range(3)
                ),
                *(DemoSample(batch, first_token_s=batch_s, end_s=9.0, tokens=8) for _ in range(3)),
            ]
            for name, person_s, batch_s in ((WITHOUT, 4.0, 1.0), (WITH, with_s, 8.0))
        }

        said = caveat(results)

        assert (said is not None) == is_said
        assert said is None or "--seconds" in said


class TestPorts:
    """Where the demo listens."""

    def test_shifted(self) -> None:
        """An offset moves every port."""
        moved = Ports().shifted(100).all()

        assert moved == tuple(port + 100 for port in Ports().all())
        assert len(set(moved)) == 9

"""What a run was like: percentiles, fairness, and what counts as what."""

import pytest

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Attempt, ClientCall, Ending
from flowcontrol.simulation.results import (
    Results,
    TenantFigures,
    jain_index,
    max_min_shares,
    percentile,
)
from flowcontrol.simulation.workload import AtOnce, ClosedLoop
from tests.support.simulated import SECOND, workload


def ended_call(
    tenant: str = "a",
    *,
    priority: int = 0,
    tokens: int = 100,
    ttft_ns: int = SECOND,
    ended_ns: int = 5 * SECOND,
    ending: Ending = Ending.ANSWERED,
) -> ClientCall:
    """Return a call asked at 1 s."""
    kind = workload(AtOnce(1), ttft_slo_ns=2 * SECOND)
    call = ClientCall(kind, tenant, tokens, tokens, None, SECOND, priority=priority)
    call.first_token_ns = SECOND + ttft_ns
    call.ended_ns = ended_ns
    call.ending = ending
    return call


def results_of(*calls: ClientCall) -> Results:
    """Return results that have seen these calls, of ten seconds."""
    results = Results(10 * SECOND)
    for call in calls:
        results.begun(call)
        results.ended(call)
    return results


class TestPercentile:
    """The smallest value that so many percent do not exceed."""

    @pytest.mark.parametrize(
        ("percent", "expected"), [(0, 1), (50, 2), (51, 3), (75, 3), (99, 4), (100, 4)]
    )
    def test_of_four(self, percent: float, expected: int) -> None:
        """Nearest rank: always one of the values."""
        assert expected == percentile([4, 1, 3, 2], percent)

    def test_of_none(self) -> None:
        """Nothing has no percentile."""
        assert percentile([], 50) is None


class TestFairness:
    """Jain's index, and what would have been fair."""

    @pytest.mark.parametrize(
        ("shares", "expected"),
        [([1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([3, 1], 0.8), ([0, 0], 1.0)],
    )
    def test_jain_index(self, shares: list[float], expected: float) -> None:
        """1 when equal, 1/n when one has everything."""
        assert expected == pytest.approx(jain_index(shares))

    @pytest.mark.parametrize(
        ("wanted", "supply", "expected"),
        [
            ([10, 10], 10, [5, 5]),
            ([2, 10], 10, [2, 8]),
            ([8, 1, 8], 9, [4, 1, 4]),
            ([float("inf"), 3, float("inf")], 13, [5, 3, 5]),
            ([1, 2], 10, [1, 2]),
        ],
    )
    def test_max_min(self, wanted: list[float], supply: float, expected: list[float]) -> None:
        """No tenant gets more than it wanted, and what it leaves is for the others."""
        assert expected == max_min_shares(wanted, supply)

    def test_jain_of_a_band(self) -> None:
        """Who wanted little and got it is no victim; who wanted as much and got half is."""
        modest = ended_call("modest", tokens=10)
        results = results_of(modest, ended_call("hog"), ended_call("hog"))
        assert results.jain(0) == 1.0
        starved = ended_call("starved", ending=Ending.REFUSED)
        results = results_of(starved, ended_call("starved"), *(ended_call("hog"),) * 3)
        assert results.jain(0) == pytest.approx(0.8)

    def test_insatiable(self) -> None:
        """Users who ask again at once want without end, however little they could ask."""
        few = ended_call("few")
        few.workload = workload(ClosedLoop(1))
        results = results_of(few, *(ended_call("hog"),) * 3)
        assert results.jain(0) == pytest.approx(0.8)

    def test_nobody_to_share_with(self) -> None:
        """One tenant, or nothing served, is neither fair nor unfair."""
        assert results_of(ended_call()).jain(0) is None
        nothing = [ended_call(name, ending=Ending.FAILED) for name in "ab"]
        assert results_of(*nothing).jain(0) is None


class TestFigures:
    """What is counted of calls and decisions."""

    def test_calls(self) -> None:
        """Goodput is of all who had something to meet; late answers bring no tokens."""
        late = ended_call(ttft_ns=3 * SECOND, ended_ns=11 * SECOND)
        refused = ended_call("b", priority=10, ending=Ending.REFUSED)
        results = results_of(ended_call(), late, refused)

        assert results.priorities == (10, 0)
        band = results.band(0)
        assert (band.call_count, band.goodput, band.tokens_served) == (2, 0.5, 200)
        assert results.tokens_per_second(band) == 20
        assert (band.ttft_ns(50), band.ttft_ns(100)) == (SECOND, 3 * SECOND)
        assert results.band(10).goodput == 0
        assert results.band(10).ttft_ns(50) is None
        assert TenantFigures().goodput is None

    def test_decisions(self) -> None:
        """Waits are of the dispatched; a client who left was not refused."""
        results = Results(10 * SECOND)
        attempt = Attempt(7, ended_call(), 2 * SECOND)
        outcomes = (
            *(Outcome.DISPATCHED, Outcome.EVICTED_TTL, Outcome.EVICTED_CANCELLED),
            *(Outcome.REJECTED_CAPACITY, Outcome.RECLAIMED),
        )
        for outcome in outcomes:
            decision = Decision(7, outcome, 0, "a", SECOND, retry_after_ns=5)
            results.decided(decision, attempt, 3 * SECOND)

        assert results.band(0).waits_ns == [SECOND]
        assert results.band(0).refused_attempts == 3
        assert results.transcript[0] == "3000000000 7 dispatched 0 a 1000000000 - 5"
        assert results.waited == []

    def test_together(self) -> None:
        """A band is the sum of its tenants."""
        results = results_of(ended_call("a"), ended_call("b"), ended_call("b"))
        band = results.band(0)
        assert band.call_count == 3
        assert band.endings == {Ending.ANSWERED: 3}
        assert band.tokens_wanted == band.tokens_served == 600
        assert len(band.ttfts) == band.slo_met_count == 3

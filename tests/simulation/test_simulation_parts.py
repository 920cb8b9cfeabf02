"""The small parts of the simulation: clock, chance, arrivals, traces, conditions."""

from functools import partial
from random import Random

import pytest

from flowcontrol.events import LoadObserved
from flowcontrol.simulation.clock import VirtualClock
from flowcontrol.simulation.distributions import (
    Distribution,
    Exponential,
    Fixed,
    Lognormal,
    Uniform,
    WeightedNames,
)
from flowcontrol.simulation.faults import (
    Conditions,
    DecisionsSlow,
    MetricsLie,
    MetricsStale,
    SettlementsLost,
    SettlementsSlow,
)
from flowcontrol.simulation.traces import AZURE_HEADER, TraceError, TraceRow, per_second, read_trace
from flowcontrol.simulation.workload import Poisson, Recorded, Window

SECOND = 1_000_000_000


class TestClock:
    """Time passes from event to event; ties in the order of planning."""

    def test_order(self) -> None:
        """By time; at one time in the order planned, what is planned meanwhile included."""
        clock = VirtualClock()
        seen: list[tuple[int, str]] = []

        def note(name: str) -> None:
            seen.append((clock.now_ns, name))

        def first() -> None:
            note("first")
            clock.after(0, partial(note, "third"))

        clock.at(20, partial(note, "late"))
        clock.at(10, first)
        clock.at(10, partial(note, "second"))
        assert clock.next_ns == 10
        clock.advance(15)

        assert seen == [(10, "first"), (10, "second"), (10, "third")]
        assert (clock.now_ns, clock.next_ns) == (15, 20)

    def test_no_past(self) -> None:
        """The past can neither be planned nor returned to."""
        clock = VirtualClock()
        clock.advance(10)
        assert clock.next_ns is None
        with pytest.raises(AssertionError, match="must not be scheduled in the past"):
            clock.at(9, lambda: None)
        with pytest.raises(AssertionError, match="time must not go back"):
            clock.advance(9)


class TestDistributions:
    """The same seed draws the same; the middle is where it should be."""

    @pytest.mark.parametrize(
        ("distribution", "least", "mean", "most"),
        [
            (Fixed(7), 7, 7, 7),
            (Uniform(3, 9), 3, 6, 9),
            (Exponential(1000), 0, 1000, 20_000),
            (Lognormal(100, 0.5, 400), 1, 112, 400),
        ],
    )
    def test_draw(self, distribution: Distribution, least: int, mean: int, most: int) -> None:
        """The mean of 20,000 is within 3 % of what it should be; nothing is out of range."""
        chance, again = Random(1), Random(1)
        drawn = [distribution.draw(chance) for _ in range(20_000)]

        assert least <= min(drawn) <= max(drawn) <= most
        assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.03)
        assert drawn[:50] == [distribution.draw(again) for _ in range(50)]

    def test_shares(self) -> None:
        """A name is drawn as often as its share says."""
        chance = Random(1)
        shares = WeightedNames({"a": 3, "b": 1})
        drawn = [shares.draw(chance) for _ in range(10_000)]

        assert shares.names == ("a", "b")
        assert drawn.count("a") == pytest.approx(7500, rel=0.03)

    def test_recorded(self) -> None:
        """Lengths are drawn in the pairs in which they were recorded."""
        lengths = Recorded((TraceRow(0, 1, 10), TraceRow(5, 2, 20)))
        chance = Random(1)
        assert {lengths.draw(chance) for _ in range(50)} == {(1, 10), (2, 20)}


class TestPoisson:
    """Arrivals at a rate that changes."""

    @staticmethod
    def counts(arrivals: Poisson, seconds: int) -> list[int]:
        """Return how many come in each second."""
        times = list(arrivals.times(0, seconds * SECOND, Random(1)))
        assert times == sorted(times)
        return [sum(at // SECOND == second for at in times) for second in range(seconds)]

    def test_rate(self) -> None:
        """A thousand a second are a thousand a second, independently of one another."""
        counts = self.counts(Poisson(1000), 20)
        mean = sum(counts) / 20
        assert mean == pytest.approx(1000, rel=0.03)
        assert 200 < sum((count - mean) ** 2 for count in counts) / 20 < 3000

    def test_windows(self) -> None:
        """A window multiplies the rate, zero stops it, and windows that overlap multiply."""
        windows = (Window(SECOND, 3 * SECOND, 2), Window(2 * SECOND, 5 * SECOND, 0.5))
        counts = self.counts(Poisson(1000, (*windows, Window(6 * SECOND, 7 * SECOND, 0))), 8)
        expected = [1000, 2000, 1000, 500, 500, 1000, 0, 1000]
        assert counts == [pytest.approx(count, rel=0.12) for count in expected]

    def test_on_and_off(self) -> None:
        """They come for a second, and stay away for two."""
        counts = self.counts(Poisson(1000, on_ns=SECOND, off_ns=2 * SECOND), 7)
        expected = [1000, 0, 0, 1000, 0, 0, 1000]
        assert counts == [pytest.approx(count, rel=0.12) for count in expected]

    def test_from(self) -> None:
        """No call comes before the beginning, and turns begin there."""
        arrivals = Poisson(100, on_ns=SECOND, off_ns=SECOND)
        times = list(arrivals.times(5 * SECOND, 7 * SECOND, Random(1)))
        assert times
        assert 5 * SECOND <= min(times) <= max(times) < 6 * SECOND


AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9799600,4808,10
2023-11-17 00:00:00.0319601,3180,8

2023-11-17 00:01:00.0319600,110,27
"""
A_TIME = "TIMESTAMP must be a time such as 2023-11-16 18:15:46.6805900"
MOONCAKE = """\
{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26}
"""


class TestTraces:
    """Two formats, one kind of row; errors name the line."""

    def test_azure(self) -> None:
        """Times count from the first request, to 100 ns, over midnight."""
        assert read_trace(AZURE.splitlines()) == [
            TraceRow(0, 4808, 10),
            TraceRow(52_000_100, 3180, 8),
            TraceRow(60_052_000_000, 110, 27),
        ]

    def test_mooncake(self) -> None:
        """Times are milliseconds; the blocks of a prompt are named, or not."""
        assert read_trace(MOONCAKE.splitlines(keepends=True)) == [
            TraceRow(0, 6955, 52, (46, 47)),
            TraceRow(3_053_000_000, 6472, 26),
        ]

    def test_windows_line_ends(self) -> None:
        """The published files end their lines in both ways."""
        lines = AZURE.replace("\n", "\r\n").splitlines(keepends=True)
        assert read_trace(lines) == read_trace(AZURE.splitlines())

    def test_limit_and_scale(self) -> None:
        """Twice the rate halves the times; a limit reads no further."""
        rows = read_trace(AZURE.splitlines(), limit=2, scale=2)
        assert rows == [TraceRow(0, 4808, 10), TraceRow(26_000_050, 3180, 8)]
        bad_after = [*AZURE.splitlines()[:2], "nonsense"]
        assert read_trace(bad_after, limit=1) == [TraceRow(0, 4808, 10)]
        assert read_trace(AZURE.splitlines(), limit=0) == []

    def test_per_second(self) -> None:
        """The rate is that of the gaps; nothing has none."""
        assert per_second(read_trace(AZURE.splitlines())) == pytest.approx(2 / 60.052)
        assert per_second([]) == per_second([TraceRow(0, 1, 1)]) == 0.0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1: must be a request or a header, the trace is empty"),
            (
                "time,in,out\n",
                f"line 1: must be {AZURE_HEADER} or a JSON object, got 'time,in,out'",
            ),
            (AZURE[:40], "line 1: must be followed by a request, the trace has none"),
            (AZURE + "2023-11-17 00:02:00,1\n", "line 6: must have 3 fields, got 2"),
            (
                AZURE + "2023-11-17 00:02,1,1\n",
                f"line 6: {A_TIME}, got '2023-11-17 00:02'",
            ),
            (
                AZURE + "2023-11-31 00:02:00,1,1\n",
                f"line 6: {A_TIME}, got '2023-11-31 00:02:00'",
            ),
            (
                AZURE + "2023-11-17 00:02:00,0,1\n",
                "line 6: ContextTokens must be a whole number >= 1, got '0'",
            ),
            (
                AZURE + "2023-11-17 00:02:00,1,-5\n",
                "line 6: GeneratedTokens must be a whole number >= 1, got '-5'",
            ),
            (
                AZURE + "2023-11-17 00:00:59,1,1\n",
                "line 6: must not be earlier than the line before",
            ),
            (MOONCAKE + "{", "line 3: must be JSON, got '{'"),
            (MOONCAKE + '{"a":' * 20_000, f"""line 3: must be JSON, got '{'{"a":' * 12}'"""),
            (
                f'{{"timestamp": 0, "input_length": {10**15 + 1}, "output_length": 1}}',
                "line 1: input_length must be at most 1000000000000000, got 1000000000000001",
            ),
            (MOONCAKE + "[]", "line 3: must be a JSON object, got '[]'"),
            (
                MOONCAKE + '{"timestamp": 30536, "input_length": 1}',
                "line 3: output_length must be a whole number >= 1, got None",
            ),
            (
                MOONCAKE + '{"timestamp": true, "input_length": 1, "output_length": 1}',
                "line 3: timestamp must be a whole number >= 0, got True",
            ),
            (
                MOONCAKE
                + '{"timestamp": 30536, "input_length": 1, "output_length": 1, "hash_ids": 3}',
                "line 3: hash_ids must be a list of whole numbers, got 3",
            ),
        ],
    )
    def test_errors(self, text: str, message: str) -> None:
        """Each mistake is named with its line."""
        with pytest.raises(TraceError) as caught:
            read_trace(text.splitlines())
        assert message == str(caught.value)


class TestConditions:
    """A fault holds from its beginning until just before its end; the last named counts."""

    TRUTH = LoadObserved("a", 1, 2, 0.5)

    def test_metrics(self) -> None:
        """Stale metrics say nothing, lies say what they say, of the servers meant."""
        lie = MetricsLie(from_ns=15, until_ns=30, addresses=("a",), waiting=9, kv_usage=1.0)
        conditions = Conditions((MetricsStale(from_ns=10, until_ns=20), lie))
        assert conditions.observed(self.TRUTH, 9) is self.TRUTH
        assert conditions.observed(self.TRUTH, 10) is None
        assert conditions.observed(self.TRUTH, 15) == LoadObserved("a", 9, 0, 1.0)
        assert conditions.observed(LoadObserved("b", 0, 0, 0), 15) is None
        assert conditions.observed(self.TRUTH, 30) is self.TRUTH

    def test_settlement(self) -> None:
        """Slow is late, lost is never, else as usual."""
        conditions = Conditions(
            (
                SettlementsSlow(from_ns=10, until_ns=20, delay_ns=7),
                SettlementsLost(from_ns=20, until_ns=30),
            )
        )
        delays = [conditions.settlement_delay_ns(1, now_ns) for now_ns in (9, 10, 19, 20, 30)]
        assert delays == [1, 7, 7, None, 1]

    def test_decisions(self) -> None:
        """Decisions take their delay."""
        conditions = Conditions((DecisionsSlow(from_ns=10, until_ns=20, delay_ns=7),))
        assert [conditions.decision_delay_ns(now_ns) for now_ns in (9, 10, 20)] == [0, 7, 0]

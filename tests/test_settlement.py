"""Each dispatched request is settled once, or counted as lost."""

from typing import Any, final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowcontrol.events import Settled
from server import settlement as module
from server.codec import INSTANCE
from server.log_codec import LogEntry
from server.settlement import Account, Counts, Result, Settlement

SECOND = 1_000_000_000
LOST_AFTER = 10 * SECOND


def entry(request_id: int, **said: Any) -> LogEntry:
    """An entry about one of our requests."""
    plain = LogEntry(f"{INSTANCE}.{request_id}", status=200, is_success=True)
    return plain._replace(**said)


@final
class House:
    """A settlement, requests in flight, and what it tells the others."""

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}
        """Priority by request id."""
        self.settled: list[Settled] = []
        self.answers: list[tuple[str, bool]] = []
        self.reports: list[tuple[object, ...]] = []
        self.settlement = Settlement(
            LOST_AFTER,
            self.in_flight.get,
            self.settled.append,
            answered=lambda endpoint, is_failure: self.answers.append((endpoint, is_failure)),
            load_reported=lambda *report: self.reports.append(report),
        )

    def end(self, request_id: int, now_ns: int = 0, *, is_reported: bool = True) -> None:
        """End a request in flight."""
        priority = self.in_flight.pop(request_id)
        self.settlement.request_ended(request_id, priority, now_ns, is_reported=is_reported)


@pytest.fixture(name="house")
def _house() -> House:
    """One request in flight, and a log."""
    house = House()
    house.in_flight[7] = 10
    house.settlement.stream_opened()
    return house


class TestTake:
    """What becomes of an entry."""

    def test_after_the_end(self, house: House) -> None:
        """The usual way: the request has ended a moment ago."""
        house.end(7)

        assert house.settlement.awaited == 1
        assert house.settlement.take(entry(7)) is Result.SETTLED
        assert house.settlement.awaited == 0
        assert [each.request_id for each in house.settled] == [7]

    def test_before_the_end(self, house: House) -> None:
        """The log may be faster than the stream."""
        assert house.settlement.take(entry(7)) is Result.SETTLED
        house.end(7)

        assert house.settlement.awaited == 0
        assert len(house.settled) == 1

    def test_what_the_engine_is_told(self, house: House) -> None:
        """Tokens as they are, times in nanoseconds, and what is not known as None."""
        said = {"input_tokens": 11, "output_tokens": 7, "ttft_us": 171_979}
        said |= {"is_success": False, "was_turned_away": True}
        house.settlement.take(entry(7, **said))

        expected = Settled(
            7,
            input_tokens=11,
            output_tokens=7,
            ttft_ns=171_979_000,
            is_success=False,
            was_turned_away=True,
        )
        assert [expected] == house.settled

    def test_twice(self, house: House) -> None:
        """A second entry settles nothing, before the end or after it."""
        first = house.settlement.take(entry(7)), house.settlement.take(entry(7))
        house.end(7)
        third = house.settlement.take(entry(7))

        assert (*first, third) == (Result.SETTLED, Result.UNKNOWN, Result.UNKNOWN)
        assert len(house.settled) == 1

    @pytest.mark.parametrize(
        ("ticket", "expected"),
        [
            (f"{INSTANCE}.8", Result.UNKNOWN),
            ("0badc0de.7", Result.FOREIGN),
            (".7", Result.FOREIGN),
            (f"{INSTANCE}.", Result.MALFORMED),
            (f"{INSTANCE}", Result.MALFORMED),
            ("7", Result.MALFORMED),
            (f"{INSTANCE}.-7", Result.MALFORMED),
            (f"{INSTANCE}.7.0", Result.MALFORMED),
            (f"{INSTANCE}.²", Result.MALFORMED),
            (f"{INSTANCE}.{'7' * 5000}", Result.MALFORMED),
        ],
        ids=lambda value: str(value).replace(INSTANCE, "ours")[:20],
    )
    def test_strange_tickets(self, house: House, ticket: str, expected: Result) -> None:
        """What is not a live request of ours is counted, and settles nothing."""
        assert house.settlement.take(entry(7, ticket=ticket)) is expected
        assert house.settlement.results[expected] == 1
        assert house.settled == []
        assert house.settlement.accounts == {}

    def test_endpoint(self, house: House) -> None:
        """Who was asked, and what it said of its load, is passed on."""
        report = {"endpoint-load-metrics": "JSON {}"}
        house.settlement.take(entry(7, endpoint="10.0.0.5:80", load_report=report))

        assert house.answers == [("10.0.0.5:80", False)]
        assert house.reports == [("10.0.0.5:80", report)]

    def test_abandoned(self, house: House) -> None:
        """A request that its client abandoned says nothing of the endpoint."""
        house.settlement.take(entry(7, endpoint="10.0.0.5:80", was_abandoned=True))

        assert house.answers == []


class TestLoss:
    """The log may be late, or silent."""

    def test_too_late(self, house: House) -> None:
        """After the time to wait a request is lost; an entry about it comes too late."""
        house.end(7, now_ns=SECOND)
        house.settlement.give_up(SECOND + LOST_AFTER - 1)
        before = house.settlement.lost
        house.settlement.give_up(SECOND + LOST_AFTER)

        assert (before, house.settlement.lost) == (0, 1)
        assert house.settlement.take(entry(7)) is Result.UNKNOWN

    def test_counts(self, house: House) -> None:
        """Who looks after a quiet hour sees what has been lost since, though nothing else did."""
        house.in_flight[8] = 0
        house.end(7, now_ns=SECOND)
        house.end(8, now_ns=SECOND)
        house.settlement.take(entry(8))

        assert house.settlement.counts(2 * SECOND) == Counts(received=1, lost=0, awaited=1)
        assert house.settlement.counts(SECOND + LOST_AFTER) == Counts(1, 1, 0)

    def test_no_log(self) -> None:
        """Where there never was a log nothing is lost, and nothing is kept."""
        house = House()
        house.in_flight[7] = 10
        house.end(7)
        house.settlement.give_up(LOST_AFTER)

        assert (house.settlement.lost, house.settlement.awaited) == (0, 0)

    def test_no_report_wanted(self, house: House) -> None:
        """A request nobody will report is neither waited for nor lost; what came early goes."""
        house.in_flight[8] = 0
        assert house.settlement.take(entry(7)) is Result.SETTLED
        early = house.settlement.early
        for request_id in (7, 8):
            house.end(request_id, is_reported=False)
        house.settlement.give_up(LOST_AFTER)

        assert (early, house.settlement.early) == (1, 0)
        assert (house.settlement.lost, house.settlement.awaited) == (0, 0)
        assert house.settlement.take(entry(8)) is Result.UNKNOWN

    def test_first_entry_opens_the_log(self) -> None:
        """Envoy opens its stream with the first entry: that request has ended before."""
        house = House()
        house.in_flight[7] = 10
        house.end(7)
        house.settlement.stream_opened()

        assert house.settlement.take(entry(7)) is Result.SETTLED

    def test_bounded(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only so many are waited for; the oldest is lost first."""
        monkeypatch.setattr(module, "AWAITED_MAX", 2)
        house.in_flight |= {8: 0, 9: 0}
        for request_id in (7, 8, 9):
            house.end(request_id)

        assert (house.settlement.lost, house.settlement.awaited) == (1, 2)
        assert house.settlement.take(entry(7)) is Result.UNKNOWN
        assert house.settlement.take(entry(8)) is Result.SETTLED


class TestAccount:
    """What is added up, by priority."""

    def test_adds_up(self, house: House) -> None:
        """Tokens, bytes, statuses and times to first token of each priority."""
        house.in_flight |= {8: 10, 9: -1}
        tokens = {"input_tokens": 11, "cached_tokens": 3, "output_tokens": 7}
        house.settlement.take(entry(7, **tokens, ttft_us=20_000, request_bytes=5, response_bytes=6))
        house.settlement.take(entry(8, ttft_us=200_000_000))
        house.settlement.take(entry(9, status=0, is_success=False, ttft_us=1))

        high, low = house.settlement.accounts[10], house.settlement.accounts[-1]
        assert high.tokens == {"input": 11, "cached": 3, "output": 7}
        assert high.bytes == {"request": 5, "response": 6}
        assert high.statuses == {"2xx": 2}
        assert high.unmetered == 1
        assert (high.ttft_counts[1], high.ttft_counts[-1], sum(high.ttft_counts)) == (1, 1, 2)
        assert high.ttft_sum_us == 200_020_000
        assert low.statuses == {"none": 1}
        assert (low.unmetered, sum(low.ttft_counts)) == (0, 0)

    def test_bound_is_included(self) -> None:
        """A time that is just a bound counts up to it, as Prometheus has it."""
        account = Account()
        account.add(entry(1, ttft_us=10_000))

        assert account.ttft_counts[0] == 1


@final
class Ledger(RuleBasedStateMachine):
    """Requests that end, entries that come early, late, twice or never: all are accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.house = House()
        self.house.settlement.stream_opened()
        self.now_ns = 0
        self.count = 0
        self.ended = 0
        self.settled: set[int] = set()

    @rule(priority=st.sampled_from([10, 0, -1]))
    def dispatch(self, priority: int) -> None:
        """One more request is in flight."""
        self.count += 1
        self.house.in_flight[self.count] = priority

    @precondition(lambda self: self.house.in_flight)
    @rule(data=st.data(), is_reported=st.booleans())
    def end(self, data: st.DataObject, *, is_reported: bool) -> None:
        """A request in flight ends, and a report of it is awaited or not."""
        request_id = data.draw(st.sampled_from(sorted(self.house.in_flight)))
        self.house.end(request_id, self.now_ns, is_reported=is_reported)
        self.ended += is_reported or request_id in self.settled

    @rule(request_id=st.integers(1, 12))
    def report(self, request_id: int) -> None:
        """The log speaks of any request."""
        if self.house.settlement.take(entry(request_id)) is Result.SETTLED:
            assert request_id not in self.settled, "settled twice"
            self.settled.add(request_id)

    @rule(seconds=st.integers(1, 12))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now_ns += seconds * SECOND
        self.house.settlement.give_up(self.now_ns)

    @invariant()
    def adds_up(self) -> None:
        """Every ended request to be reported is settled, awaited or lost; no more is kept."""
        settled_and_ended = len(self.settled - self.house.in_flight.keys())
        book = self.house.settlement

        assert self.ended == settled_and_ended + book.awaited + book.lost
        assert len(self.settled & self.house.in_flight.keys()) == book.early
        assert {each.request_id for each in self.house.settled} == self.settled
        assert len(self.house.settled) == len(self.settled)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""Each dispatched request is settled once, or counted as lost."""

from dataclasses import replace
from typing import Any, final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flowcontrol.events import Settled, SettlementLost
from flowcontrol.tally import COUNTED_MAX
from flowcontrol_server.requests import log_join as module
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.log_join import Account, Claim, Counts, EntryResult, LogJoin, claim
from flowcontrol_server.requests.tickets import TICKETS

SECOND = 1_000_000_000
HOUR = 3_600 * SECOND
LOST_AFTER = 10 * SECOND


def ticket(request_id: int) -> str:
    """The ticket of one of our requests."""
    return TICKETS.issue(request_id).decode()


def entry(request_id: int, **said: Any) -> LogEntry:
    """An entry about one of our requests."""
    plain = LogEntry(ticket(request_id), status=200, is_success=True)
    return replace(plain, **said)


@final
class House:
    """A settlement, requests in flight, and what it tells the others."""

    def __init__(self) -> None:
        self.in_flight: dict[int, Claim] = {}
        """Bounds by request id."""
        self.settled: list[Settled] = []
        self.lost: list[int] = []
        """Requests whose settlement will not come."""
        self.recovered = {"0badc0de.9"}
        """Tickets of another process that are counted as in flight."""
        self.answers: list[tuple[str, bool]] = []
        self.refusals: list[str] = []
        self.reports: list[tuple[object, ...]] = []
        self.settlement = LogJoin(
            LOST_AFTER,
            self.in_flight.get,
            self._told,
            recovered_ended=self._recovered_ended,
            answered=lambda endpoint, is_failure: self.answers.append((endpoint, is_failure)),
            refused=self.refusals.append,
            load_reported=lambda *report: self.reports.append(report),
        )

    def _told(self, fact: Settled | SettlementLost) -> None:
        if isinstance(fact, Settled):
            self.settled.append(fact)
        else:
            self.lost.append(fact.request_id)

    def _recovered_ended(self, ticket: str) -> Claim | None:
        is_known = ticket in self.recovered
        self.recovered.discard(ticket)
        return Claim(10) if is_known else None

    def take(self, said: LogEntry, now_ns: int = HOUR) -> EntryResult:
        """Take an entry of the log, by default an hour after the dispatch."""
        return self.settlement.take(said, now_ns)

    def end(self, request_id: int, now_ns: int = 0, *, is_reported: bool = True) -> None:
        """End a request in flight."""
        claim = self.in_flight.pop(request_id)
        self.settlement.request_ended(request_id, claim, now_ns, is_reported=is_reported)


@pytest.fixture(name="house")
def _house() -> House:
    """One request in flight, and a log."""
    house = House()
    house.in_flight[7] = Claim(10)
    house.settlement.stream_opened()
    return house


class TestTake:
    """What becomes of an entry."""

    def test_after_the_end(self, house: House) -> None:
        """The usual way: the request has ended a moment ago."""
        house.end(7)

        assert house.settlement.awaited == 1
        assert house.take(entry(7)) is EntryResult.SETTLED
        assert house.settlement.awaited == 0
        assert [each.request_id for each in house.settled] == [7]

    def test_before_the_end(self, house: House) -> None:
        """The log may be faster than the stream."""
        assert house.take(entry(7)) is EntryResult.SETTLED
        house.end(7)

        assert house.settlement.awaited == 0
        assert len(house.settled) == 1

    def test_what_the_engine_is_told(self, house: House) -> None:
        """Tokens as they are, times in nanoseconds, and what is not known as None."""
        said = {"input_tokens": 11, "output_tokens": 7, "ttft_us": 171_979}
        said |= {"is_success": False, "was_turned_away": True}
        house.take(entry(7, **said))

        expected = Settled(
            7,
            input_tokens=11,
            output_tokens=7,
            ttft_ns=171_979_000,
            is_success=False,
            was_turned_away=True,
        )
        assert [expected] == house.settled

    def test_a_recovered_request_ends_once(self, house: House) -> None:
        """Its slot is free from the first report on; a second one is of nobody."""
        first = house.take(replace(entry(7), ticket="0badc0de.9"))
        second = house.take(replace(entry(7), ticket="0badc0de.9"))

        assert (first, second) == (EntryResult.RECOVERED, EntryResult.FOREIGN)
        assert house.settled == []
        assert house.settlement.accounts[10].statuses["2xx"] == 1

    def test_the_engine_is_told_what_is_lost(self, house: House) -> None:
        """Else it keeps what was charged for it until 65,536 others are kept."""
        house.end(7)
        house.settlement.give_up(LOST_AFTER)

        assert house.lost == [7]
        assert house.settlement.lost == 1

    def test_twice(self, house: House) -> None:
        """A second entry settles nothing, before the end or after it."""
        first = house.take(entry(7)), house.take(entry(7))
        house.end(7)
        third = house.take(entry(7))

        assert (*first, third) == (EntryResult.SETTLED, EntryResult.UNKNOWN, EntryResult.UNKNOWN)
        assert len(house.settled) == 1

    @pytest.mark.parametrize(
        ("ticket", "expected"),
        [
            (ticket(8), EntryResult.UNKNOWN),
            ("0badc0de.7.0123456789abcdef", EntryResult.FOREIGN),
            (".7", EntryResult.FOREIGN),
            (f"{TICKETS.instance}.", EntryResult.MALFORMED),
            (f"{TICKETS.instance}", EntryResult.MALFORMED),
            ("7", EntryResult.MALFORMED),
            (ticket(-7), EntryResult.MALFORMED),
            (f"{TICKETS.instance}.²", EntryResult.MALFORMED),
            (f"{TICKETS.instance}.{'7' * 5000}", EntryResult.MALFORMED),
            (f"{TICKETS.instance}.7", EntryResult.FORGED),
            (f"{TICKETS.instance}.7.0123456789abcdef", EntryResult.FORGED),
            (ticket(7) + "0", EntryResult.FORGED),
            (ticket(8).replace(".8.", ".7."), EntryResult.FORGED),
            (f"{TICKETS.instance}.7.é", EntryResult.FORGED),
        ],
        ids=map(str, range(14)),  # keys differ in each process of the tests
    )
    def test_strange_tickets(self, house: House, ticket: str, expected: EntryResult) -> None:
        """What is not a live request of ours is counted, and settles nothing."""
        assert house.take(entry(7, ticket=ticket)) is expected
        assert house.settlement.results[expected] == 1
        assert house.settled == []
        assert house.settlement.accounts == {}

    def test_endpoint(self, house: House) -> None:
        """Who was asked, and what it said of its load, is passed on."""
        report = {"endpoint-load-metrics": "JSON {}"}
        house.take(entry(7, endpoint="10.0.0.5:80", load_report=report))

        assert house.answers == [("10.0.0.5:80", False)]
        assert house.reports == [("10.0.0.5:80", report)]

    @pytest.mark.parametrize(
        ("picked", "said", "refused", "answers"),
        [
            ((), {"endpoint": "a:1"}, [], [("a:1", False)]),
            (("a:1", "b:1"), {"endpoint": "a:1"}, [], [("a:1", False)]),
            (("a:1", "b:1"), {"endpoint": "b:1"}, ["a:1"], [("b:1", False)]),
            (("a:1",), {"endpoint": "a:1", "is_unreachable": True}, ["a:1"], []),
            (("a:1",), {"endpoint": "", "is_unreachable": True}, ["a:1"], []),
            (("a:1", "b:1"), {"endpoint": "b:1", "is_unreachable": True}, ["a:1", "b:1"], []),
            ((), {"endpoint": "a:1", "is_unreachable": True}, ["a:1"], []),
            (("a:1",), {"endpoint": "elsewhere:1"}, [], []),
        ],
    )
    def test_refused(
        self,
        house: House,
        picked: tuple[str, ...],
        said: dict[str, object],
        refused: list[str],
        answers: list[tuple[str, bool]],
    ) -> None:
        """One picked and another served: the first could not be connected to."""
        house.in_flight[8] = Claim(10, endpoints=picked)
        house.take(entry(8, **said))

        assert (house.refusals, house.answers) == (refused, answers)

    def test_abandoned(self, house: House) -> None:
        """A request that its client abandoned says nothing of the endpoint."""
        house.take(entry(7, endpoint="10.0.0.5:80", was_abandoned=True))

        assert house.answers == []


class TestBounds:
    """What one settlement may change is bounded by the request it belongs to."""

    CLAIM = claim(
        10, dispatched_ns=SECOND, byte_size=400, output_tokens_max=7, endpoints=("a:1", "b:1")
    )

    def settle(self, house: House, **said: Any) -> None:
        """Settle the request in flight, a second after its dispatch."""
        house.in_flight[7] = self.CLAIM
        assert house.take(entry(7, **said), now_ns=2 * SECOND) is EntryResult.SETTLED

    def test_tokens(self, house: House) -> None:
        """A bill of 1e15 tokens is cut to what a request of that size can take."""
        said = dict.fromkeys(("input_tokens", "cached_tokens", "output_tokens"), 10**15)
        self.settle(house, **said)

        (settled,) = house.settled
        assert (settled.input_tokens, settled.cached_tokens) == (1_000_400, 1_000_400)
        assert settled.output_tokens == 7 * 128
        assert house.settlement.accounts[10].tokens["output"] == 7 * 128
        assert house.settlement.bounded == 1

    def test_output_of_unsaid_length(self, house: House) -> None:
        """Where the client has named no maximum, a response is of a million tokens at most."""
        house.in_flight[7] = claim(10, 0, 0, None, ())
        house.take(entry(7, output_tokens=10**15))

        assert house.settled[0].output_tokens == 1_000_000

    def test_times(self, house: House) -> None:
        """No time is longer than the time since the dispatch."""
        self.settle(house, ttft_us=10**15, generation_us=10**15)

        assert (house.settled[0].ttft_ns, house.settled[0].generation_ns) == (SECOND, SECOND)

    def test_endpoint(self, house: House) -> None:
        """A request that was sent elsewhere says nothing of an endpoint."""
        report = {"endpoint-load-metrics": "JSON {}"}
        failed = {"status": 503, "is_success": False, "is_failure": True}
        self.settle(house, endpoint="c:1", load_report=report, **failed)

        assert (house.answers, house.reports) == ([], [])
        assert house.settlement.bounded == 1

    @pytest.mark.parametrize("endpoint", ["a:1", "b:1"])
    def test_within(self, house: House, endpoint: str) -> None:
        """What a request can take is passed on as it is, of the endpoint and of its fallback."""
        said = {"input_tokens": 100, "cached_tokens": 50, "output_tokens": 9, "ttft_us": 999_999}
        self.settle(house, endpoint=endpoint, **said)

        assert house.settled[0].input_tokens == 100
        assert house.settled[0].output_tokens == 9
        assert house.settled[0].ttft_ns == 999_999_000
        assert house.answers == [(endpoint, False)]
        assert house.settlement.bounded == 0


class TestLoss:
    """The log may be late, or silent."""

    def test_too_late(self, house: House) -> None:
        """After the time to wait a request is lost; an entry about it comes too late."""
        house.end(7, now_ns=SECOND)
        house.settlement.give_up(SECOND + LOST_AFTER - 1)
        before = house.settlement.lost
        house.settlement.give_up(SECOND + LOST_AFTER)

        assert (before, house.settlement.lost) == (0, 1)
        assert house.take(entry(7)) is EntryResult.UNKNOWN

    def test_counts(self, house: House) -> None:
        """Who looks after a quiet hour sees what has been lost since, though nothing else did."""
        house.in_flight[8] = Claim(0)
        house.end(7, now_ns=SECOND)
        house.end(8, now_ns=SECOND)
        house.take(entry(8))

        assert house.settlement.counts(2 * SECOND) == Counts(received=1, lost=0, awaited=1)
        assert house.settlement.counts(SECOND + LOST_AFTER) == Counts(1, 1, 0)

    def test_no_log(self) -> None:
        """Where there never was a log nothing is lost, and nothing is kept."""
        house = House()
        house.in_flight[7] = Claim(10)
        house.end(7)
        house.settlement.give_up(LOST_AFTER)

        assert (house.settlement.lost, house.settlement.awaited) == (0, 0)

    def test_no_report_wanted(self, house: House) -> None:
        """A request nobody will report is neither waited for nor lost; what came early goes."""
        house.in_flight[8] = Claim(0)
        assert house.take(entry(7)) is EntryResult.SETTLED
        early = house.settlement.early
        for request_id in (7, 8):
            house.end(request_id, is_reported=False)
        house.settlement.give_up(LOST_AFTER)

        assert (early, house.settlement.early) == (1, 0)
        assert (house.settlement.lost, house.settlement.awaited) == (0, 0)
        assert house.take(entry(8)) is EntryResult.UNKNOWN

    def test_first_entry_opens_the_log(self) -> None:
        """Envoy opens its stream with the first entry: that request has ended before."""
        house = House()
        house.in_flight[7] = Claim(10)
        house.end(7)
        house.settlement.stream_opened()

        assert house.take(entry(7)) is EntryResult.SETTLED

    def test_bounded(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only so many are waited for; the oldest is lost first."""
        monkeypatch.setattr(module, "AWAITED_MAX", 2)
        house.in_flight |= {8: Claim(0), 9: Claim(0)}
        for request_id in (7, 8, 9):
            house.end(request_id)

        assert (house.settlement.lost, house.settlement.awaited) == (1, 2)
        assert house.take(entry(7)) is EntryResult.UNKNOWN
        assert house.take(entry(8)) is EntryResult.SETTLED


class TestAccount:
    """What is added up, by priority."""

    def test_adds_up(self, house: House) -> None:
        """Tokens, bytes, statuses and times to first token of each priority."""
        house.in_flight |= {8: Claim(10), 9: Claim(-1)}
        tokens = {"input_tokens": 11, "cached_tokens": 3, "output_tokens": 7}
        house.take(entry(7, **tokens, ttft_us=20_000, request_bytes=5, response_bytes=6))
        house.take(entry(8, ttft_us=200_000_000))
        house.take(entry(9, status=0, is_success=False, ttft_us=1))

        high, low = house.settlement.accounts[10], house.settlement.accounts[-1]
        assert high.tokens == {"input": 11, "cached": 3, "output": 7}
        assert high.bytes == {"request": 5, "response": 6}
        assert high.statuses == {"2xx": 2, "3xx": 0, "4xx": 0, "5xx": 0, "none": 0}
        assert high.unmetered == 1
        assert (high.ttft_counts[1], high.ttft_counts[-1], sum(high.ttft_counts)) == (1, 1, 2)
        assert high.ttft_sum_us == 200_020_000
        assert low.statuses["none"] == sum(low.statuses.values()) == 1
        assert (low.unmetered, sum(low.ttft_counts)) == (0, 0)

    def test_a_client_that_left(self, house: House) -> None:
        """What the model server would have said of its tokens is unknown; so is its result.

        Before a response had begun there is nothing good about it.
        """
        house.in_flight |= {8: Claim(10), 9: Claim(10)}
        house.take(entry(8, was_abandoned=True))
        house.take(entry(9, status=0, was_abandoned=True))

        assert house.settlement.accounts[10].unmetered == 0
        assert [each.was_answered for each in house.settled] == [True, False]

    def test_priorities_are_bounded(self, house: House) -> None:
        """Of more priorities than can be kept, the one that was reported on longest ago goes."""
        house.in_flight |= {number: Claim(number) for number in range(10, COUNTED_MAX + 10)}
        for number in range(10, COUNTED_MAX + 10):
            house.take(entry(number))
        house.in_flight |= {5_000: Claim(10), 5_001: Claim(-1)}
        house.take(entry(5_000))
        house.take(entry(5_001))

        assert len(house.settlement.accounts) == COUNTED_MAX
        assert house.settlement.accounts[10].statuses["2xx"] == 2
        assert 11 not in house.settlement.accounts

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
        self.house.in_flight[self.count] = Claim(priority)

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
        if self.house.take(entry(request_id)) is EntryResult.SETTLED:
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
        assert len(self.house.lost) == book.lost
        assert len(self.settled & self.house.in_flight.keys()) == book.early
        assert {each.request_id for each in self.house.settled} == self.settled
        assert len(self.house.settled) == len(self.settled)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""Joins the entries of Envoy's access log with their requests. Owner: the event loop's thread.

Entries come after the fact, in batches, perhaps twice, perhaps never. Each dispatched request is
settled at most once. A request without an entry some time after its end is counted as lost, and its
usage stays an estimate; nothing else depends on the log.

The effect of a settlement is bounded by the request it belongs to (`Claim`): a model server that
reports false usage, or a client that writes to the log in place of Envoy, can change no more than a
request of that size can.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, NamedTuple, final

from flowcontrol.events import Settled, SettlementLost
from flowcontrol.tally import COUNTED_MAX
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.tickets import TICKETS, Flaw, Tickets

AWAITED_MAX = 65_536
"""Ended requests that await their entry; beyond that the oldest one is counted as lost."""
TTFT_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120),
)
_US_NS: Final = 1_000
_INPUT_ADDED_MAX: Final = 1_000_000
"""Tokens that a model server may add to a prompt: a stored conversation, a template, pictures that
the request only refers to."""
_OUTPUT_TOKENS_MAX: Final = 1_000_000
"""Output tokens of one response."""
_STATUSES: Final = ("2xx", "3xx", "4xx", "5xx", "none")
"""Classes reported from the start: a rate misses the first step of a new counter."""
_CHOICES_MAX: Final = 128
"""Responses to one request, each of up to `max_tokens`: OpenAI's bound of `n`."""


class EntryResult(Enum):
    """The result of an entry of the log."""

    SETTLED = "settled"
    UNKNOWN = "unknown"
    """A ticket of this process whose request is settled already, or given up."""
    FOREIGN = "foreign"
    """The ticket of another replica, or of this one before a restart."""
    RECOVERED = "recovered"
    """The ticket of another process, whose request was counted as in flight here until now."""
    FORGED = "forged"
    """A ticket that names this process, which has not issued it."""
    MALFORMED = "malformed"
    """No ticket, or a message that cannot be read."""

    __hash__ = object.__hash__  # as in Outcome


@final
class Claim:
    """The fields of a dispatched request that bound its settlement."""

    __slots__ = (
        *("dispatched_ns", "endpoints", "input_tokens_max", "output_tokens_max", "priority"),
    )

    def __init__(
        self,
        priority: int,
        dispatched_ns: int = 0,
        input_tokens_max: int = _INPUT_ADDED_MAX,
        output_tokens_max: int = _OUTPUT_TOKENS_MAX,
        endpoints: tuple[str, ...] = (),
    ) -> None:
        self.priority = priority
        self.dispatched_ns = dispatched_ns
        self.input_tokens_max = input_tokens_max
        self.output_tokens_max = output_tokens_max
        self.endpoints = endpoints
        """Where it was sent; empty: Envoy picks."""

    def bounded(self, entry: LogEntry, now_ns: int) -> LogEntry:
        """Return the entry, with values reduced to what is possible for the request."""
        input_tokens = _at_most(entry.input_tokens, self.input_tokens_max)
        output_tokens = _at_most(entry.output_tokens, self.output_tokens_max)
        cached_tokens = _at_most(entry.cached_tokens, input_tokens or 0)
        elapsed_us = (now_ns - self.dispatched_ns) // _US_NS
        ttft_us = _at_most(entry.ttft_us, elapsed_us)
        generation_us = _at_most(entry.generation_us, elapsed_us)
        endpoint = entry.endpoint
        if self.endpoints and endpoint not in self.endpoints:
            endpoint = ""
        if (
            input_tokens == entry.input_tokens
            and cached_tokens == entry.cached_tokens
            and output_tokens == entry.output_tokens
            and ttft_us == entry.ttft_us
            and generation_us == entry.generation_us
            and endpoint == entry.endpoint
        ):
            return entry
        return replace(
            entry,
            input_tokens=input_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            ttft_us=ttft_us,
            generation_us=generation_us,
            endpoint=endpoint,
        )


def claim(
    priority: int,
    dispatched_ns: int,
    byte_size: int,
    output_tokens_max: int | None,
    endpoints: tuple[str, ...],
) -> Claim:
    """Return the bounds of a request's settlement.

    Args:
        priority: of the request.
        dispatched_ns: when it was dispatched.
        byte_size: announced size of its body; a token takes at least a byte.
        output_tokens_max: the most tokens that its client asked for; None: unknown.
        endpoints: where it was sent; empty: Envoy picks.
    """
    output_max = _OUTPUT_TOKENS_MAX
    if output_tokens_max is not None:
        output_max = min(output_max, _CHOICES_MAX * max(1, output_tokens_max))
    return Claim(priority, dispatched_ns, byte_size + _INPUT_ADDED_MAX, output_max, endpoints)


def _at_most(value: int | None, bound: int) -> int | None:
    return value if value is None or value <= bound else bound


class Counts(NamedTuple):
    """Numbers of requests that the log has reported, has not, and may still report."""

    received: int
    lost: int
    awaited: int


@final
@dataclass(slots=True)
class Account:
    """Usage of the requests of one priority, as far as it was reported."""

    statuses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_STATUSES, 0))
    """Responses by the class of their status, as in 2xx; none: no response."""
    tokens: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("input", "cached", "output"), 0)
    )
    """Tokens by kind."""
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("request", "response"), 0))
    """Bytes by direction."""
    unmetered: int = 0
    """Complete successful responses without token usage."""
    ttft_counts: list[int] = field(default_factory=lambda: [0] * (len(TTFT_BOUNDS_S) + 1))
    """Responses per interval of `TTFT_BOUNDS_S`, and last those beyond it; not cumulated."""
    ttft_sum_us: int = 0

    def add(self, entry: LogEntry) -> None:
        """Count one request."""
        statuses = self.statuses
        kind = f"{entry.status // 100}xx" if entry.status else "none"
        statuses[kind] = statuses.get(kind, 0) + 1
        tokens = self.tokens
        tokens["input"] += entry.input_tokens or 0
        tokens["cached"] += entry.cached_tokens or 0
        tokens["output"] += entry.output_tokens or 0
        is_whole = entry.is_success and not entry.was_abandoned
        self.unmetered += is_whole and entry.output_tokens is None
        self.bytes["request"] += entry.request_bytes
        self.bytes["response"] += entry.response_bytes
        if entry.ttft_us is not None and entry.is_success:
            self.ttft_counts[bisect_left(TTFT_BOUNDS_S, entry.ttft_us / 1e6)] += 1
            self.ttft_sum_us += entry.ttft_us


@final
class LogJoin:
    """Settles requests, each once.

    Args:
        lost_after_ns: time after its end from which a request counts as lost.
        claim_in_flight: returns the bounds of a request in flight; None: there is no such request.
        settled: called for each settlement, and for each that will not come; for the engine.
        recovered_ended: called with the ticket of a request that another process dispatched;
            returns the bounds of its settlement. None: it was not counted as in flight.
        answered: called with each endpoint that answered or failed, and whether it failed.
        refused: called with each endpoint that Envoy could not connect to. That includes a picked
            endpoint if another one served: Envoy retries only requests that were not sent.
        load_reported: called with each endpoint's report of its load, as headers.
        tickets: reads the tickets in the log.
    """

    def __init__(  # noqa: PLR0913 - each is one wire of the shell
        self,
        lost_after_ns: int,
        claim_in_flight: Callable[[int], Claim | None],
        settled: Callable[[Settled | SettlementLost], None],
        *,
        recovered_ended: Callable[[str], Claim | None] = lambda _ticket: None,
        answered: Callable[[str, bool], None] = lambda _endpoint, _is_failure: None,
        refused: Callable[[str], None] = lambda _endpoint: None,
        load_reported: Callable[[str, Mapping[str, str]], None] = lambda _endpoint, _headers: None,
        tickets: Tickets = TICKETS,
    ) -> None:
        self.lost_after_ns = lost_after_ns
        self._claim_in_flight = claim_in_flight
        self._settled = settled
        self._recovered_ended = recovered_ended
        self._answered = answered
        self._refused = refused
        self._load_reported = load_reported
        self._tickets = tickets
        self._awaited: OrderedDict[int, tuple[int, Claim]] = OrderedDict()
        """Ended requests that await their entry: time of their end, and bounds; oldest first."""
        self._early: set[int] = set()
        """Requests in flight that are settled already."""
        self.streams = 0
        """Log streams that are open."""
        self.streams_opened = 0
        """Log streams opened so far: one for each of Envoy's workers, more when they break."""
        self.streams_refused = 0
        """Log streams refused because they did not present Envoy's secret."""
        self.results: Counter[EntryResult] = Counter()
        self.bounded = 0
        """Settlements that reported more than is possible for the request, or another endpoint."""
        self.lost = 0
        """Dispatched requests that ended without an entry, since the first log stream."""
        self.accounts: OrderedDict[int, Account] = OrderedDict()
        """By priority; if there are too many, those with the latest entries are kept."""

    def counts(self, now_ns: int) -> Counts:
        """Return the counts for dashboard, metrics and API."""
        self.give_up(now_ns)
        return Counts(self.results[EntryResult.SETTLED], self.lost, self.awaited)

    @property
    def awaited(self) -> int:
        """Ended requests that still await their entry."""
        return len(self._awaited)

    def stream_opened(self) -> None:
        """Note that Envoy has opened a log stream."""
        self.streams += 1
        self.streams_opened += 1

    def stream_refused(self) -> None:
        """Note that a log stream was opened without the secret."""
        self.streams_refused += 1

    def stream_closed(self) -> None:
        """Note that a log stream has ended."""
        self.streams -= 1

    @property
    def early(self) -> int:
        """Requests in flight that are settled already."""
        return len(self._early)

    def request_ended(
        self,
        request_id: int,
        claim: Claim,
        now_ns: int,
        *,
        is_reported: bool = True,
        report: LogEntry | None = None,
    ) -> None:
        """Note the end of a dispatched request; each must be noted, once.

        Args:
            request_id: of the request.
            claim: bounds of its settlement.
            now_ns: when it ended.
            is_reported: whether the log will report it; if not, no entry is awaited.
            report: read from its response as it passed through here; settles the request if no log
                stream is open, which would report more.
        """
        if request_id in self._early:
            self._early.discard(request_id)
        elif report is not None and not self.streams:
            self._apply(request_id, claim, report, now_ns)
            self.results[EntryResult.SETTLED] += 1
        elif is_reported:
            self._awaited[request_id] = now_ns, claim
            if len(self._awaited) > AWAITED_MAX:
                self._lose(next(iter(self._awaited)))
        self.give_up(now_ns)

    def give_up(self, now_ns: int) -> None:
        """Count requests as lost that have waited too long for their entry. O(1) for each."""
        while self._awaited:
            request_id, (ended_ns, _claim) = next(iter(self._awaited.items()))
            if now_ns - ended_ns < self.lost_after_ns:
                return
            self._lose(request_id)

    def take(self, entry: LogEntry, now_ns: int) -> EntryResult:
        """Settle the request of an entry, if it is one of this process and not settled yet."""
        result = self._take(entry, now_ns)
        self.results[result] += 1
        return result

    def malformed(self) -> None:
        """Note a message of the log that could not be read."""
        self.results[EntryResult.MALFORMED] += 1

    def _lose(self, request_id: int) -> None:
        del self._awaited[request_id]
        self._settled(SettlementLost(request_id))
        if self.streams_opened:  # else there is no log: Envoy opens it with its first entry
            self.lost += 1

    def _take(self, entry: LogEntry, now_ns: int) -> EntryResult:
        request_id = self._tickets.read(entry.ticket)
        recovered = self._recovered_ended(entry.ticket) if request_id is Flaw.FOREIGN else None
        if recovered is not None:
            self._apply(None, recovered, entry, now_ns)
            return EntryResult.RECOVERED
        if isinstance(request_id, Flaw):
            return EntryResult(request_id.value)
        awaited = self._awaited.pop(request_id, None)
        if awaited is not None:
            claim: Claim | None = awaited[1]
        else:
            claim = self._claim_in_flight(request_id)
            if claim is None or request_id in self._early:
                return EntryResult.UNKNOWN
            self._early.add(request_id)
        assert claim is not None
        self._apply(request_id, claim, entry, now_ns)
        return EntryResult.SETTLED

    def _apply(self, request_id: int | None, claim: Claim, entry: LogEntry, now_ns: int) -> None:
        """Settle a request with its entry, within the bounds of the request.

        A request without an id was dispatched by another process: it enters the accounts, but not
        the engine, which has charged no flow for it.
        """
        bounded = claim.bounded(entry, now_ns)
        self.bounded += bounded is not entry
        picked = claim.endpoints[0] if claim.endpoints else ""
        if picked and (bounded.endpoint or entry.is_unreachable) and bounded.endpoint != picked:
            self._refused(picked)
        self._account_for(claim.priority, bounded)
        if request_id is not None:
            self._settle(request_id, bounded)

    def _account_for(self, priority: int, entry: LogEntry) -> None:
        account = self.accounts.get(priority)
        if account is None:
            account = self.accounts[priority] = Account()
            if len(self.accounts) > COUNTED_MAX:
                self.accounts.popitem(last=False)
        self.accounts.move_to_end(priority)
        account.add(entry)
        if entry.endpoint:
            if entry.is_unreachable:
                self._refused(entry.endpoint)
            elif not entry.was_abandoned:
                self._answered(entry.endpoint, entry.is_failure)
            if entry.load_report is not None:
                self._load_reported(entry.endpoint, entry.load_report)

    def _settle(self, request_id: int, entry: LogEntry) -> None:
        self._settled(
            Settled(
                request_id,
                entry.input_tokens,
                entry.cached_tokens,
                entry.output_tokens,
                None if entry.ttft_us is None else entry.ttft_us * _US_NS,
                None if entry.generation_us is None else entry.generation_us * _US_NS,
                entry.is_success,
                entry.was_turned_away,
                entry.status != 0,
            )
        )

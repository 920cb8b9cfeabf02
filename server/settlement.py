"""Joins Envoy's access log with the requests it is about. Belongs to the event loop's thread.

The log comes after the fact, in batches, perhaps twice, perhaps never: each dispatched request is
settled at most once, and one that ended a while ago without is counted as lost. What it took then
stays an estimate; nothing else depends on the log.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, final

from flowcontrol.events import Settled
from server.codec import INSTANCE
from server.log_codec import LogEntry

AWAITED_MAX = 65_536
"""Ended requests waited for at once; the oldest is lost to a newer one."""
TTFT_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120),
)
_US_NS = 1_000


class Result(Enum):
    """What became of an entry of the log."""

    SETTLED = "settled"
    UNKNOWN = "unknown"
    """A ticket of ours that is settled already, or given up."""
    FOREIGN = "foreign"
    """The ticket of another replica, or of this one before it was restarted."""
    MALFORMED = "malformed"
    """No ticket, or a message that cannot be read."""

    __hash__ = object.__hash__  # as in Outcome


class Counts(NamedTuple):
    """How many requests the log has told of, and of how many it has not."""

    received: int
    lost: int
    awaited: int


@final
@dataclass(slots=True)
class Account:
    """What the requests of one priority took, as far as it was reported."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by their class, as in 2xx; none: no answer."""
    tokens: Counter[str] = field(default_factory=Counter)
    """By kind: input, cached, output."""
    bytes: Counter[str] = field(default_factory=Counter)
    """By direction: request, response."""
    unmetered: int = 0
    """Good answers in which Envoy found no token usage."""
    ttft_counts: list[int] = field(default_factory=lambda: [0] * (len(TTFT_BOUNDS_S) + 1))
    """How many took up to each of `TTFT_BOUNDS_S`, and last how many longer; not cumulated."""
    ttft_sum_us: int = 0

    def add(self, entry: LogEntry) -> None:
        """Count one request."""
        self.statuses[f"{entry.status // 100}xx" if entry.status else "none"] += 1
        tokens = self.tokens
        tokens["input"] += entry.input_tokens or 0
        tokens["cached"] += entry.cached_tokens or 0
        tokens["output"] += entry.output_tokens or 0
        self.unmetered += entry.is_success and entry.output_tokens is None
        self.bytes["request"] += entry.request_bytes
        self.bytes["response"] += entry.response_bytes
        if entry.ttft_us is not None and entry.is_success:
            self.ttft_counts[bisect_left(TTFT_BOUNDS_S, entry.ttft_us / 1e6)] += 1
            self.ttft_sum_us += entry.ttft_us


@final
class Settlement:
    """Settles requests, each once.

    Args:
        lost_after_ns: how long after its end a request is waited for.
        priority_in_flight: says the priority of a request that was dispatched and has not ended;
            None if there is no such request.
        settled: told of each settlement, for the engine.
        answered: told of each endpoint that answered, or failed to, and whether it failed.
        load_reported: told of each endpoint's report of its load, as headers.
    """

    def __init__(
        self,
        lost_after_ns: int,
        priority_in_flight: Callable[[int], int | None],
        settled: Callable[[Settled], None],
        *,
        answered: Callable[[str, bool], None] = lambda _endpoint, _is_failure: None,
        load_reported: Callable[[str, Mapping[str, str]], None] = lambda _endpoint, _headers: None,
    ) -> None:
        self.lost_after_ns = lost_after_ns
        self._priority_in_flight = priority_in_flight
        self._settled = settled
        self._answered = answered
        self._load_reported = load_reported
        self._awaited: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Ended requests to be settled: when each ended, and its priority; oldest first."""
        self._early: set[int] = set()
        """Requests in flight that are settled already."""
        self.streams = 0
        """Log streams that are open."""
        self.streams_opened = 0
        """Log streams there ever were: one for each of Envoy's workers, more when they break."""
        self.results: Counter[Result] = Counter()
        self.lost = 0
        """Dispatched requests that ended and were never reported, since there is a log."""
        self.accounts: dict[int, Account] = {}
        """By priority."""

    def counts(self, now_ns: int) -> Counts:
        """Return what whoever looks is shown, wherever."""
        self.give_up(now_ns)
        return Counts(self.results[Result.SETTLED], self.lost, self.awaited)

    @property
    def awaited(self) -> int:
        """Ended requests that are still waited for."""
        return len(self._awaited)

    def stream_opened(self) -> None:
        """Note that Envoy has begun to report."""
        self.streams += 1
        self.streams_opened += 1

    def stream_closed(self) -> None:
        """Note that a log stream has ended."""
        self.streams -= 1

    @property
    def early(self) -> int:
        """Requests in flight that are settled already."""
        return len(self._early)

    def request_ended(
        self, request_id: int, priority: int, now_ns: int, *, is_reported: bool = True
    ) -> None:
        """Note the end of a dispatched request; each must be noted, once.

        Args:
            request_id: of the request.
            priority: of the request.
            now_ns: when it ended.
            is_reported: whether there is a log that will tell of it; else it is not waited for.
        """
        if request_id in self._early:
            self._early.discard(request_id)
        elif is_reported:
            self._awaited[request_id] = now_ns, priority
            if len(self._awaited) > AWAITED_MAX:
                self._lose(next(iter(self._awaited)))
        self.give_up(now_ns)

    def give_up(self, now_ns: int) -> None:
        """Count as lost what has been waited for too long. O(1) for each."""
        while self._awaited:
            request_id, (ended_ns, _priority) = next(iter(self._awaited.items()))
            if now_ns - ended_ns < self.lost_after_ns:
                return
            self._lose(request_id)

    def take(self, entry: LogEntry) -> Result:
        """Settle the request of an entry, if it is one of ours and not settled yet."""
        result = self._take(entry)
        self.results[result] += 1
        return result

    def malformed(self) -> None:
        """Note a message of the log that could not be read."""
        self.results[Result.MALFORMED] += 1

    def _lose(self, request_id: int) -> None:
        del self._awaited[request_id]
        if self.streams_opened:  # else there is no log; Envoy opens it with its first entry
            self.lost += 1

    def _take(self, entry: LogEntry) -> Result:
        instance, _, number = entry.ticket.partition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 20):  # noqa: PLR2004 - 64 bits
            return Result.MALFORMED
        if instance != INSTANCE:
            return Result.FOREIGN
        request_id = int(number)
        awaited = self._awaited.pop(request_id, None)
        if awaited is not None:
            priority: int | None = awaited[1]
        else:
            priority = self._priority_in_flight(request_id)
            if priority is None or request_id in self._early:
                return Result.UNKNOWN
            self._early.add(request_id)
        assert priority is not None
        account = self.accounts.get(priority)
        if account is None:
            account = self.accounts[priority] = Account()
        account.add(entry)
        if entry.endpoint:
            if not entry.was_abandoned:
                self._answered(entry.endpoint, entry.is_failure)
            if entry.load_report is not None:
                self._load_reported(entry.endpoint, entry.load_report)
        self._settled(
            Settled(
                request_id,
                input_tokens=entry.input_tokens,
                cached_tokens=entry.cached_tokens,
                output_tokens=entry.output_tokens,
                ttft_ns=None if entry.ttft_us is None else entry.ttft_us * _US_NS,
                generation_ns=None if entry.generation_us is None else entry.generation_us * _US_NS,
                is_success=entry.is_success,
                was_turned_away=entry.was_turned_away,
            )
        )
        return Result.SETTLED

"""Pure. Which endpoints are down, from whether they can be reached and what became of requests.

Two reasons, kept apart because each ends in its own way:

unreachable   nobody listens at its address, several attempts in a row; ends with the first answer,
              whatever it says. A slow or senseless answer is an answer: it costs the endpoint the
              freshness of its metrics, not its place in the pool.
failing       it answers, and several requests in a row came back with 5xx or broke off; ends after
              a while, twice as long each time, and with one more failure begins again. A server
              that fails at once looks idle, and would be sent everything. At most half of the
              endpoints are taken out for this: where all fail, the fault is not theirs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import final

FAILURES_MAX = 5
"""Failed requests in a row that make an endpoint failing; Envoy's outlier detection counts as
far."""
REST_FIRST_S = 10.0
REST_LONGEST_S = 160.0


@final
@dataclass(slots=True)
class _Record:
    misses: int = 0
    """Attempts in a row at which nobody listened."""
    failures: int = 0
    """Requests in a row that failed."""
    rests: int = 0
    """How often it has been taken out for failing since it last worked."""
    is_down: bool = False


@final
class Health:
    """Judges endpoints. Owner: the loop. Times are monotonic seconds.

    Args:
        misses_max: attempts in a row at which nobody listens that make an endpoint unreachable.
        changed: told the address of an endpoint that went down (False) or came up (True).
    """

    def __init__(self, misses_max: int, changed: Callable[[str, bool], None]) -> None:
        self.misses_max = misses_max
        self._changed = changed
        self._records: dict[str, _Record] = {}
        self._rests: dict[str, float] = {}
        """Who is out for failing, and until when."""

    @property
    def next_s(self) -> float | None:
        """When the first of those out for failing may try again, if anybody is: `advance` then."""
        return min(self._rests.values(), default=None)

    def watch(self, addresses: Iterable[str]) -> None:
        """Replace the endpoints judged; those that stay keep their record."""
        self._records = {a: self._records.get(a) or _Record() for a in addresses}
        self._rests = {a: until_s for a, until_s in self._rests.items() if a in self._records}

    def reached(self, address: str, now_s: float) -> None:
        """Note that somebody answered there."""
        record = self._records.get(address)
        if record is not None:
            record.misses = 0
            self._judge(address, record, now_s)

    def missed(self, address: str, now_s: float) -> None:
        """Note that nobody listened there."""
        record = self._records.get(address)
        if record is not None:
            record.misses += 1
            self._judge(address, record, now_s)

    def forget_misses(self, now_s: float) -> None:
        """Nobody looks any more whether somebody listens: take it that everybody does."""
        for address, record in tuple(self._records.items()):
            record.misses = 0
            self._judge(address, record, now_s)

    def outcome(self, address: str, now_s: float, *, is_failure: bool) -> None:
        """Note what became of a request: whether it ended in 5xx or broke off at the server."""
        record = self._records.get(address)
        if record is None:
            return
        if not is_failure:
            record.failures = record.rests = 0
        elif address not in self._rests:
            record.failures += 1
            if record.failures >= (1 if record.rests else FAILURES_MAX) and self._may_rest():
                rest_s = min(REST_FIRST_S * 2**record.rests, REST_LONGEST_S)
                record.rests += 1
                record.failures = 0
                self._rests[address] = now_s + rest_s
        self._judge(address, record, now_s)

    def advance(self, now_s: float) -> None:
        """Let time pass: whoever has rested long enough may try again."""
        for address in tuple(self._rests):
            self._judge(address, self._records[address], now_s)

    def _may_rest(self) -> bool:
        return (len(self._rests) + 1) * 2 <= len(self._records)

    def _judge(self, address: str, record: _Record, now_s: float) -> None:
        if self._rests.get(address, inf) <= now_s:
            del self._rests[address]
        is_down = record.misses >= self.misses_max or address in self._rests
        if is_down != record.is_down:
            record.is_down = is_down
            self._changed(address, not is_down)

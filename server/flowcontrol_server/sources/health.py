"""Pure. Which endpoints are down, from whether they can be reached and what became of requests.

Three reasons, kept apart because each ends in its own way:

unreachable   nothing listens at its address, several scrapes in a row; ends with the first answer,
              whatever it is. A slow or invalid answer costs the endpoint the freshness of its
              metrics, not its place in the pool.
refusing      Envoy could not connect to it for several requests in a row; ends after a second,
              twice as long each time, and with one more refusal begins again. However many
              endpoints that are: where none can be reached, requests wait instead of failing.
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
REFUSALS_MAX = 3
"""Requests in a row that could not be sent."""
REFUSED_FIRST_S = 1.0
REFUSED_LONGEST_S = 16.0
REST_FIRST_S = 10.0
REST_LONGEST_S = 160.0


@final
@dataclass(slots=True)
class _Record:
    misses: int = 0
    """Refused connections in a row."""
    failures: int = 0
    """Requests in a row that failed."""
    refusals: int = 0
    """Requests in a row for which no connection could be made."""
    rests: int = 0
    """How often it has been taken out for failing since it last worked."""
    is_down: bool = False


@final
class EndpointHealth:
    """Judges endpoints. Owner: the loop. Times are monotonic seconds.

    Args:
        misses_max: refused connections in a row that make an endpoint unreachable.
        changed: called with the address of an endpoint that went down (False) or came up (True).
    """

    def __init__(self, misses_max: int, changed: Callable[[str, bool], None]) -> None:
        self.misses_max = misses_max
        self._changed = changed
        self._records: dict[str, _Record] = {}
        self._rests: dict[str, float] = {}
        """Who is out for failing, and until when."""
        self._causes: dict[str, str] = {}
        """Why, of those."""

    @property
    def next_s(self) -> float | None:
        """When the first of those out for failing may try again, if any: `advance` then."""
        return min(self._rests.values(), default=None)

    def why_down(self, address: str) -> str:
        """Return why an endpoint is down; empty if it is not."""
        record = self._records.get(address)
        if record is None or not record.is_down:
            return ""
        if record.misses >= self.misses_max:
            return f"nothing listens there, {record.misses} scrapes in a row"
        return self._causes.get(address, "")

    def watch(self, addresses: Iterable[str]) -> None:
        """Replace the endpoints judged; those that stay keep their record."""
        self._records = {a: self._records.get(a) or _Record() for a in addresses}
        self._rests = {a: until_s for a, until_s in self._rests.items() if a in self._records}
        self._causes = {a: cause for a, cause in self._causes.items() if a in self._rests}

    def reached(self, address: str, now_s: float) -> None:
        """Note that a connection was accepted."""
        record = self._records.get(address)
        if record is not None:
            record.misses = 0
            self._judge(address, record, now_s)

    def missed(self, address: str, now_s: float) -> None:
        """Note that a connection was refused."""
        record = self._records.get(address)
        if record is not None:
            record.misses += 1
            self._judge(address, record, now_s)

    def forget_misses(self, now_s: float) -> None:
        """Endpoints are not probed any more: count all as reachable."""
        for address, record in tuple(self._records.items()):
            record.misses = 0
            self._judge(address, record, now_s)

    def outcome(self, address: str, now_s: float, *, is_failure: bool) -> None:
        """Note what became of a request: whether it ended in 5xx or broke off at the server."""
        record = self._records.get(address)
        if record is None:
            return
        if not is_failure:
            record.failures = record.refusals = record.rests = 0
        elif address not in self._rests:
            record.failures += 1
            if record.failures >= (1 if record.rests else FAILURES_MAX) and self._may_rest():
                rest_s = min(REST_FIRST_S * 2**record.rests, REST_LONGEST_S)
                record.rests += 1
                record.failures = 0
                self._rests[address] = now_s + rest_s
                self._causes[address] = f"requests fail there, it is tried again after {rest_s:g} s"
        self._judge(address, record, now_s)

    def refused(self, address: str, now_s: float) -> None:
        """Note that no connection could be made for a request."""
        record = self._records.get(address)
        if record is None or address in self._rests:
            return
        record.refusals += 1
        if record.refusals >= (1 if record.rests else REFUSALS_MAX):
            rest_s = min(REFUSED_FIRST_S * 2**record.rests, REFUSED_LONGEST_S)
            record.rests += 1
            record.refusals = 0
            self._rests[address] = now_s + rest_s
            self._causes[address] = f"refuses connections, it is tried again after {rest_s:g} s"
        self._judge(address, record, now_s)

    def advance(self, now_s: float) -> None:
        """Let time pass: endpoints that have been out long enough may try again."""
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

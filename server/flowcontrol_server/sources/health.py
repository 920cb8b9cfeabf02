"""Pure. Decides which endpoints are down, by their scrapes and the outcomes of requests.

There are three reasons, each with its own end:

unreachable   Nothing listened at its address in several scrapes in a row. Ends with the first
              answer of any kind. A slow or invalid answer costs the endpoint the freshness of its
              metrics, not its place in the pool.
refusing      Envoy could not connect to it for several requests in a row. Ends after a second,
              doubled each time; one more refusal begins it again. There is no limit on the number
              of endpoints: if none can be reached, requests wait instead of failing.
failing       It answers, but several requests in a row ended in 5xx or broke off. Ends after ten
              seconds, doubled each time; one more failure begins it again. A server that fails at
              once looks idle, and would get every request. An endpoint is ejected for failing
              only if no more than half of them are then ejected, for either reason: if all fail,
              the endpoints are not the cause.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import final

FAILURES_MAX = 5
"""Failed requests in a row that eject an endpoint; the default of Envoy's outlier detection."""
REFUSALS_MAX = 3
"""Requests in a row that could not be sent, which eject an endpoint."""
REFUSED_FIRST_S = 1.0
REFUSED_LONGEST_S = 16.0
EJECTED_FIRST_S = 10.0
EJECTED_LONGEST_S = 160.0


@final
@dataclass(slots=True)
class _Record:
    misses: int = 0
    """Refused connections in a row."""
    failures: int = 0
    """Requests in a row that failed."""
    refusals: int = 0
    """Requests in a row for which no connection could be made."""
    ejections: int = 0
    """Number of ejections since its last success."""
    is_down: bool = False


@final
class EndpointHealth:
    """Decides which endpoints are down. Owner: the loop. Times are monotonic seconds.

    Args:
        misses_max: refused connections in a row that make an endpoint unreachable.
        changed: called with the address of an endpoint that went down (False) or came up (True).
    """

    def __init__(self, misses_max: int, changed: Callable[[str, bool], None]) -> None:
        self.misses_max = misses_max
        self._changed = changed
        self._records: dict[str, _Record] = {}
        self._ejected: dict[str, float] = {}
        """Ejected endpoints, and until when."""
        self._causes: dict[str, str] = {}
        """Why they are ejected."""

    @property
    def next_s(self) -> float | None:
        """When the first ejection ends: call `advance` then; None: no endpoint is ejected."""
        return min(self._ejected.values(), default=None)

    def why_down(self, address: str) -> str:
        """Return why an endpoint is down; empty if it is not."""
        record = self._records.get(address)
        if record is None or not record.is_down:
            return ""
        if record.misses >= self.misses_max:
            return f"nothing listens there, {record.misses} scrapes in a row"
        return self._causes.get(address, "")

    def watch(self, addresses: Iterable[str]) -> None:
        """Replace the endpoints; those that stay keep their records."""
        self._records = {a: self._records.get(a) or _Record() for a in addresses}
        self._ejected = {a: until_s for a, until_s in self._ejected.items() if a in self._records}
        self._causes = {a: cause for a, cause in self._causes.items() if a in self._ejected}

    def reached(self, address: str, now_s: float) -> None:
        """Record that a connection was accepted."""
        record = self._records.get(address)
        if record is not None:
            record.misses = 0
            self._judge(address, record, now_s)

    def missed(self, address: str, now_s: float) -> None:
        """Record that a connection was refused."""
        record = self._records.get(address)
        if record is not None:
            record.misses += 1
            self._judge(address, record, now_s)

    def forget_misses(self, now_s: float) -> None:
        """Count all endpoints as reachable, because they are no longer scraped."""
        for address, record in tuple(self._records.items()):
            record.misses = 0
            self._judge(address, record, now_s)

    def outcome(self, address: str, now_s: float, *, is_failure: bool) -> None:
        """Record the outcome of a request; a failure is a 5xx, or a break-off at the server."""
        record = self._records.get(address)
        if record is None:
            return
        if not is_failure:
            record.failures = record.refusals = record.ejections = 0
        elif address not in self._ejected:
            record.failures += 1
            if record.failures >= (1 if record.ejections else FAILURES_MAX) and self._may_eject():
                ejected_s = min(EJECTED_FIRST_S * 2**record.ejections, EJECTED_LONGEST_S)
                record.ejections += 1
                record.failures = 0
                self._ejected[address] = now_s + ejected_s
                self._causes[address] = (
                    f"requests to it fail; it is tried again after {ejected_s:g} s"
                )
        self._judge(address, record, now_s)

    def refused(self, address: str, now_s: float) -> None:
        """Record that no connection could be made for a request."""
        record = self._records.get(address)
        if record is None or address in self._ejected:
            return
        record.refusals += 1
        if record.refusals >= (1 if record.ejections else REFUSALS_MAX):
            ejected_s = min(REFUSED_FIRST_S * 2**record.ejections, REFUSED_LONGEST_S)
            record.ejections += 1
            record.refusals = 0
            self._ejected[address] = now_s + ejected_s
            self._causes[address] = f"refuses connections; it is tried again after {ejected_s:g} s"
        self._judge(address, record, now_s)

    def advance(self, now_s: float) -> None:
        """End the ejections whose time is over."""
        for address in tuple(self._ejected):
            self._judge(address, self._records[address], now_s)

    def _may_eject(self) -> bool:
        return (len(self._ejected) + 1) * 2 <= len(self._records)

    def _judge(self, address: str, record: _Record, now_s: float) -> None:
        if self._ejected.get(address, inf) <= now_s:
            del self._ejected[address]
        is_down = record.misses >= self.misses_max or address in self._ejected
        if is_down != record.is_down:
            record.is_down = is_down
            self._changed(address, not is_down)

"""Pure. How full is the pool? The detectors that count, or believe what they are told.

concurrency: requests in flight over how many may be, or tokens, or whichever is fuller. Exact.

utilization: what the endpoints say of themselves, the mean over them of

    max(waiting / waiting_max, kv_usage / kv_usage_max)

A scrape is old when it comes and older until the next: whatever was dispatched since is not in it.
So every dispatch counts as one waiting request until a scrape of the endpoint it went to shows it
(a full part of it, while Envoy picks and nobody knows which that is): at most `waiting_max`
dispatches an endpoint and scrape, however late the scrape (the failure of llm-d-router#2066).
Absence is never zero: an endpoint never heard of, or not for `stale_after_ns`, counts as its
staleness setting says.
"""

from collections.abc import Sequence
from typing import assert_never, final

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.config import Adaptive, Concurrency, Staleness, Utilization
from flowcontrol.config import Detector as DetectorSettings
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.pool import FULL, Detector, DetectorFactory, Load, StageLoad


@final
class ConcurrencyDetector:
    """Requests or tokens in flight over their limit at one endpoint, times the endpoints."""

    def __init__(self, settings: Concurrency, stage: StageLoad) -> None:
        self._settings = settings
        self._stage = stage

    def saturation(self) -> float:
        """Return the load of the stage."""
        return self._of(self._stage.pool(), len(self._stage.addresses))

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint; the stage's while only that is known."""
        load = self._stage.at(address)
        return self.saturation() if load is None else self._of(load, 1)

    def _of(self, load: Load, endpoints: int) -> float:
        by_requests = by_tokens = 0.0
        if self._settings.requests_max is not None:
            by_requests = load.requests / (endpoints * self._settings.requests_max)
        if self._settings.tokens_max is not None:
            by_tokens = load.tokens / (endpoints * self._settings.tokens_max)
        return max(by_requests, by_tokens)

    def endpoints_changed(self, now_ns: int) -> None:
        """Need no account of its own."""

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Need no account of its own."""

    def released(self, lease: Lease, now_ns: int) -> None:
        """Need no account of its own."""

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Believe nobody but the count."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Need no account of its own."""

    def advance(self, now_ns: int) -> None:
        """Not depend on time."""

    def next_change_ns(self) -> int | None:
        """Not depend on time."""
        return None


@final
class _Reading:
    """What one endpoint last said, and what has happened since."""

    __slots__ = ("base", "dispatched", "is_stale", "seen_total")

    def __init__(self, base: float, seen_total: int, *, is_stale: bool) -> None:
        self.base = base
        """Its own load, in parts of full."""
        self.is_stale = is_stale
        self.dispatched = 0
        """To this endpoint since."""
        self.seen_total = seen_total
        """Dispatches to the stage when it spoke."""


@final
class UtilizationDetector:
    """Mean load of the endpoints as scraped, with what was dispatched since.

    O(1) to ask; O(endpoints) when one of them speaks or falls silent.
    """

    def __init__(self, settings: Utilization, stage: StageLoad) -> None:
        self._settings = settings
        self._stage = stage
        self._readings: dict[str, _Reading] = {}
        self._silent_at: KeyedHeap[str, int] = KeyedHeap()
        """When each endpoint becomes stale, or staler."""
        self._total = 0
        """Dispatches to the stage, ever."""
        self._base_sum = 0.0
        self._fallback_count = 0
        self._seen_sum = 0
        """Over the endpoints whose dispatches count, of the total when they spoke."""
        self._counting = 0
        """How many endpoints that are."""

    def saturation(self) -> float:
        """Return the mean load of the endpoints."""
        count = len(self._readings)
        since = self._counting * self._total - self._seen_sum
        pending = since / count / self._settings.waiting_max
        in_flight = self._stage.pool().requests / (count * self._settings.requests_max)
        return (self._base_sum + pending + self._fallback_count * in_flight) / count

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint; the stage's while Envoy picks."""
        load = self._stage.at(address)
        if load is None:
            return self.saturation()
        reading = self._readings[address]
        if reading.is_stale and self._settings.staleness is Staleness.FALLBACK:
            return load.requests / self._settings.requests_max
        if reading.is_stale and self._settings.staleness is Staleness.CLOSED:
            return FULL
        return reading.base + reading.dispatched / self._settings.waiting_max

    def endpoints_changed(self, now_ns: int) -> None:  # noqa: ARG002 - silence begins with a word
        """Keep the readings of those that stay; who is new has not been heard of."""
        addresses = self._stage.addresses
        self._readings = {
            address: self._readings.get(address) or _Reading(FULL, self._total, is_stale=True)
            for address in addresses
        }
        for address in set(self._silent_at) - set(addresses):
            self._silent_at.discard(address)
        self._sum_up()

    def charged(self, lease: Lease, now_ns: int) -> None:  # noqa: ARG002 - counted, not timed
        """Count the dispatch until a scrape shows it."""
        self._total += 1
        if lease.endpoint in self._readings:
            self._readings[lease.endpoint].dispatched += 1

    def released(self, lease: Lease, now_ns: int) -> None:
        """Wait for the scrape that shows it: an end frees a place only when the engine says so."""

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in a scrape."""
        if load.address not in self._readings:
            return
        settings = self._settings
        base = max(load.waiting / settings.waiting_max, load.kv_usage / settings.kv_usage_max)
        self._readings[load.address] = _Reading(base, self._total, is_stale=False)
        self._silent_at.put(load.address, now_ns + settings.stale_after_ns)
        self._sum_up()

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Not be about single requests."""

    def advance(self, now_ns: int) -> None:
        """Let readings become stale, and stale ones fade where that is the setting."""
        while (first := self._silent_at.first()) is not None and first[0] <= now_ns:
            due_ns, address = first
            reading = self._readings[address]
            if self._settings.staleness is Staleness.DECAY and reading.is_stale:
                reading.base /= 2
                reading.dispatched //= 2
            reading.is_stale = True
            if self._settings.staleness is Staleness.DECAY and reading.base > _FADED:
                self._silent_at.put(address, due_ns + self._settings.stale_after_ns)
            else:
                self._silent_at.discard(address)
            self._sum_up()

    def next_change_ns(self) -> int | None:
        """Return when the next endpoint becomes stale, or staler."""
        first = self._silent_at.first()
        return None if first is None else first[0]

    def _sum_up(self) -> None:
        self._base_sum = 0.0
        self._fallback_count = self._seen_sum = self._counting = 0
        for reading in self._readings.values():
            staleness = self._settings.staleness if reading.is_stale else Staleness.HOLD
            if staleness is Staleness.CLOSED:
                self._base_sum += FULL
            elif staleness is Staleness.FALLBACK:
                self._fallback_count += 1
            else:
                self._base_sum += reading.base
                self._counting += 1
                self._seen_sum += reading.seen_total


_FADED = 0.01


def make_detectors(settings: Sequence[DetectorSettings]) -> DetectorFactory:
    """Return what makes, for each stage of a pool, a new detector of every configured kind."""

    def make(stage: StageLoad, now_ns: int) -> list[Detector]:
        return [_make_detector(each, stage, now_ns) for each in settings]

    return make


def _make_detector(settings: DetectorSettings, stage: StageLoad, now_ns: int) -> Detector:
    match settings:
        case Concurrency():
            return ConcurrencyDetector(settings, stage)
        case Utilization():
            return UtilizationDetector(settings, stage)
        case Adaptive():
            return AdaptiveDetector(settings, stage, now_ns)
        case _:
            assert_never(settings)

"""Pure. How full is the pool? The detectors `concurrency` and `utilization`, and the choice of all.

concurrency: requests in flight over their limit, or tokens over theirs; the fuller counts. Exact.

utilization: what the endpoints report, as the mean over them of

    max(waiting / waiting_max, kv_usage / kv_usage_max)        the second if it is reported

A scrape does not show what was dispatched after it. So every dispatch counts as one waiting request
until it ends, or until a scrape of its endpoint shows it (where Envoy picks, the endpoint is
unknown, and each counts a part). So between two scrapes, however late the second, an endpoint has
at most `waiting_max` new requests in flight (the failure of llm-d-router#2066). Missing data never
counts as zero: an endpoint without a scrape, or without one for `stale_after_ns`, counts according
to the staleness setting.
"""

from collections.abc import Sequence
from math import inf
from typing import assert_never, final

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.auto import AutoDetector
from flowcontrol.config import Adaptive, Auto, Concurrency, Staleness, Utilization
from flowcontrol.config import Detector as DetectorSettings
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.picker import FULL
from flowcontrol.pool import Detector, DetectorFactory, InFlight, StageLoad, WithoutPace


@final
class ConcurrencyDetector(WithoutPace):
    """Requests or tokens in flight, over the limit per endpoint times the endpoints. O(1)."""

    counts_dispatches = False
    has_timer = False
    revision = 0

    def __init__(self, settings: Concurrency, stage: StageLoad) -> None:
        self.settings = settings
        self._stage = stage
        self._load = stage.pool()
        self._requests_each = float(settings.requests_max or inf)
        self._tokens_each = float(settings.tokens_max or inf)
        self._requests_max = self._requests_each
        self._tokens_max = self._tokens_each

    def saturation(self) -> float:
        """Return the load of the stage."""
        return _fuller(self._load, self._requests_max, self._tokens_max)

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint; that of the stage if no other is known."""
        load = self._stage.at(address)
        if load is None:
            return self.saturation()
        return _fuller(load, self._requests_each, self._tokens_each)

    def endpoints_changed(self, now_ns: int) -> None:  # noqa: ARG002 - at once
        """Scale the limits to the number of endpoints."""
        endpoints = len(self._stage.addresses)
        self._requests_max = endpoints * self._requests_each
        self._tokens_max = endpoints * self._tokens_each

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Ignored: the stage counts what is in flight."""

    def released(self, lease: Lease, now_ns: int) -> None:
        """Ignored: the stage counts what is in flight."""

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Ignored: this detector only counts."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Ignored: the stage counts what is in flight."""

    def advance(self, now_ns: int) -> list[str]:  # noqa: ARG002 - at no time
        """Time has no effect."""
        return []

    def next_change_ns(self) -> int | None:
        """Time has no effect."""
        return None


def _fuller(load: InFlight, requests_max: float, tokens_max: float) -> float:
    by_requests = load.requests / requests_max
    by_tokens = load.tokens / tokens_max
    return by_requests if by_requests > by_tokens else by_tokens


@final
class _Reading:
    """The last scrape of one endpoint, and what was dispatched since."""

    __slots__ = ("base", "is_stale", "pending", "seen", "spread")

    def __init__(self, base: float | None, seen: int, *, is_stale: bool) -> None:
        self.base = base
        """Load of the endpoint by its scrape, 1.0 is full; None: never scraped."""
        self.is_stale = is_stale
        self.pending = 0.0
        """Requests dispatched to it since, and not ended."""
        self.spread = 0.0
        """Requests dispatched since to an endpoint of Envoy's choice, and not ended."""
        self.seen = seen
        """Number of the latest dispatch at the time of the scrape."""

    def copy(self) -> "_Reading":
        """Return another with the same content."""
        other = _Reading(self.base, self.seen, is_stale=self.is_stale)
        other.pending, other.spread = self.pending, self.spread
        return other


@final
class UtilizationDetector(WithoutPace):
    """Mean load of the endpoints as scraped, with what was dispatched since.

    O(1) where the engine picks, else O(endpoints).
    """

    counts_dispatches = True
    has_timer = True

    def __init__(self, settings: Utilization, stage: StageLoad) -> None:
        self.settings = settings
        self.revision = 0
        self._stage = stage
        self._readings: dict[str, _Reading] = {}
        self._share = 1.0
        """Share of each endpoint in what Envoy distributes."""
        self._silent_at: KeyedHeap[str, int] = KeyedHeap()
        """When each endpoint becomes stale, or its reading decays again."""
        self._dispatched = 0
        """Dispatches so far."""
        self._numbers: dict[int, int] = {}
        """Number of each dispatch in flight, by request id."""

    def saturation(self) -> float:
        """Return the mean load of the endpoints."""
        in_flight = self._stage.pool().requests * self._share
        return sum(self._of(each, in_flight) for each in self._readings.values()) * self._share

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint; that of the stage while Envoy picks."""
        load = self._stage.at(address)
        if load is None:
            return self.saturation()
        return self._of(self._readings[address], load.requests)

    def _of(self, reading: _Reading, in_flight: float) -> float:
        """Return the load of an endpoint, with `in_flight` requests if it is stale."""
        staleness = self.settings.staleness
        if reading.is_stale and staleness is Staleness.FALLBACK:
            return in_flight / self.settings.requests_max
        if reading.is_stale and (staleness is Staleness.CLOSED or reading.base is None):
            return FULL
        assert reading.base is not None, "an endpoint without a scrape is stale"
        pending = reading.pending + reading.spread * self._share
        return reading.base + pending / self.settings.waiting_max

    def endpoints_changed(self, now_ns: int) -> None:  # noqa: ARG002 - staleness counts from a scrape
        """Keep the readings of endpoints that stay; a new one has none."""
        addresses = self._stage.addresses
        self._readings = {
            address: self._readings.get(address) or _Reading(None, self._dispatched, is_stale=True)
            for address in addresses
        }
        self._share = 1 / len(addresses)
        for address in set(self._silent_at) - set(addresses):
            self._silent_at.discard(address)

    def charged(self, lease: Lease, now_ns: int) -> None:  # noqa: ARG002 - counted, not timed
        """Count the dispatch until it ends or a scrape shows it."""
        self._dispatched += 1
        self._numbers[lease.request.request_id] = self._dispatched
        address = self._stage.picked_for(lease)
        if address is None:
            for reading in self._readings.values():
                reading.spread += 1
        else:
            self._readings[address].pending += 1

    def released(self, lease: Lease, now_ns: int) -> None:  # noqa: ARG002 - counted, not timed
        """Stop counting a dispatch that no scrape has shown."""
        number = self._numbers.pop(lease.request.request_id, 0)
        address = self._stage.picked_for(lease)
        if address is None:
            for reading in self._readings.values():
                if number > reading.seen:  # never below 0: what is left may have decayed
                    reading.spread = reading.spread - 1 if reading.spread > 1 else 0.0
            return
        picked = self._readings.get(address)
        if picked is not None and number > picked.seen:
            picked.pending = picked.pending - 1 if picked.pending > 1 else 0.0

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in a scrape."""
        if load.address not in self._readings:
            return
        settings = self.settings
        by_cache = 0.0 if load.kv_usage is None else load.kv_usage / settings.kv_usage_max
        base = max(load.waiting / settings.waiting_max, by_cache)
        self._readings[load.address] = _Reading(base, self._dispatched, is_stale=False)
        self._silent_at.put(load.address, now_ns + settings.stale_after_ns)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Ignored: a single request does not show the load of an endpoint."""

    def advance(self, now_ns: int) -> list[str]:
        """Let readings become stale, and stale ones decay if that is the setting."""
        changed: list[str] = []
        while (first := self._silent_at.first()) is not None and first[0] <= now_ns:
            due_ns, address = first
            changed.append(address)
            reading = self._readings[address]
            if self.settings.staleness is not Staleness.DECAY:
                reading.is_stale = True
                self._silent_at.discard(address)
                continue
            passed, rest_ns = divmod(now_ns - due_ns, self.settings.stale_after_ns)
            halved = 0.5 ** (passed + reading.is_stale)
            reading.is_stale = True
            assert reading.base is not None, "it was scraped once"
            reading.base *= halved
            reading.pending *= halved
            reading.spread *= halved
            self._silent_at.put(address, now_ns - rest_ns + self.settings.stale_after_ns)
        return changed

    def next_change_ns(self) -> int | None:
        """Return when the next endpoint becomes stale, or its reading decays again."""
        first = self._silent_at.first()
        return None if first is None else first[0]

    def inherit(self, before: "UtilizationDetector") -> None:
        """Copy what a detector with other settings has learnt; several may copy from one."""
        readings, silent_at = before._readings, before._silent_at  # noqa: SLF001 - same class
        self._readings = {address: reading.copy() for address, reading in readings.items()}
        self._silent_at = silent_at.copy()
        self._dispatched = before._dispatched  # noqa: SLF001 - as above
        self._numbers = dict(before._numbers)  # noqa: SLF001 - as above


def make_detectors(settings: Sequence[DetectorSettings]) -> DetectorFactory:
    """Return a factory that makes the configured detectors for a stage of a pool.

    A detector whose settings are unchanged is kept. A new one inherits from a detector of its kind
    that is not kept.
    """

    def make(stage: StageLoad, now_ns: int, before: Sequence[Detector]) -> list[Detector]:
        kept = {each.settings: each for each in before}
        gone = [each for each in before if each.settings not in settings]
        made: list[Detector] = []
        for each in settings:
            if each in kept:
                made.append(kept.pop(each))
                continue
            made.append(_make_detector(each, stage, now_ns))
            for other in gone:
                _inherit(made[-1], other, now_ns)
        return made

    return make


def _inherit(detector: Detector, other: Detector, now_ns: int) -> None:
    match detector, other:
        case UtilizationDetector(), UtilizationDetector():
            detector.inherit(other)
        case AdaptiveDetector(), AdaptiveDetector():
            detector.inherit(other, now_ns)
        case _:
            pass


def _make_detector(settings: DetectorSettings, stage: StageLoad, now_ns: int) -> Detector:
    match settings:
        case Concurrency():
            return ConcurrencyDetector(settings, stage)
        case Utilization():
            return UtilizationDetector(settings, stage)
        case Adaptive():
            return AdaptiveDetector(settings, stage, now_ns)
        case Auto():
            return AutoDetector(settings, stage, now_ns)
        case _:
            assert_never(settings)

"""Prometheus metrics, rendered from a snapshot: nothing is counted on the way of a request."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from flowcontrol.snapshot import WAIT_BOUNDS_S, BandSnapshot, Snapshot


@final
class SnapshotCollector(Collector):
    """Turns one snapshot into metric families; labels are priorities, outcomes and endpoints.

    Args:
        snapshot: of the engine.
        inbox_refusals: requests the engine never saw.
        objective_errors: mistakes met where objectives come from.
        more: families of other parts of the service.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        inbox_refusals: int,
        objective_errors: int,
        more: Iterable[Metric] = (),
    ) -> None:
        self._snapshot = snapshot
        self._inbox_refusals = inbox_refusals
        self._objective_errors = objective_errors
        self._more = tuple(more)

    def registry(self) -> CollectorRegistry:
        """Return a registry that holds this collector alone."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._pool()
        yield from self._detectors()
        yield from self._bands()
        yield from self._totals()
        yield from self._more

    def _pool(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        for name, text, value in (
            ("saturation", "Load of the pool; 1.0 is full.", snapshot.saturation),
            ("draining", "1 while the service drains.", float(snapshot.is_draining)),
            ("endpoints", "Endpoints in the pool.", len(snapshot.endpoints)),
            ("objectives", "InferenceObjectives in force.", len(snapshot.objectives)),
        ):
            yield GaugeMetricFamily(f"flowcontrol_{name}", text, value)
        for name, text, value in (
            (
                "inbox_refusals",
                "Requests refused because the processor was too far behind.",
                self._inbox_refusals,
            ),
            (
                "unknown_objectives",
                "Requests that named an objective nobody declared.",
                snapshot.unknown_objectives,
            ),
            ("objective_errors", "Mistakes met in objectives.", self._objective_errors),
        ):
            yield CounterMetricFamily(f"flowcontrol_{name}", text, value)
        in_flight = GaugeMetricFamily(
            "flowcontrol_endpoint_in_flight_requests",
            "Requests in flight at an endpoint; only with the picker on.",
            labels=["endpoint"],
        )
        for endpoint in snapshot.endpoints:
            if endpoint.in_flight is not None:
                in_flight.add_metric([endpoint.address], endpoint.in_flight)
        yield in_flight

    def _detectors(self) -> Iterator[Metric]:
        labels = ["stage", "detector"]
        load = GaugeMetricFamily(
            "flowcontrol_detector_saturation", "Load of a stage; 1.0 is full.", labels=labels
        )
        limit = GaugeMetricFamily(
            "flowcontrol_detector_requests_limit",
            "Requests in flight at which a stage is full; with adaptive, as found so far.",
            labels=labels,
        )
        for each in self._snapshot.detectors:
            load.add_metric([each.stage, each.kind], each.saturation)
            if each.requests_limit is not None:
                limit.add_metric([each.stage, each.kind], each.requests_limit)
        wait = GaugeMetricFamily(
            "flowcontrol_expected_wait_seconds",
            "What one more request would wait; not there while that is unknown.",
            labels=["priority"],
        )
        for band in self._snapshot.bands:
            if band.expected_wait_ns is not None:
                wait.add_metric([str(band.priority)], band.expected_wait_ns / 1e9)
        yield from (load, limit, wait)

    def _bands(self) -> Iterator[Metric]:
        gauges: tuple[tuple[str, str, Callable[[BandSnapshot], float]], ...] = (
            ("waiting_requests", "Requests waiting.", lambda band: band.waiting),
            ("waiting_bytes", "Announced bytes waiting.", lambda band: band.waiting_bytes),
            ("in_flight_requests", "Requests in flight.", lambda band: band.in_flight),
            ("flows", "Flows with requests waiting or in flight.", lambda band: band.flow_count),
            ("band_ceiling", "Saturation at which the band is gated.", lambda band: band.ceiling),
            (
                "oldest_wait_seconds",
                "How long the request that waits longest has waited.",
                lambda band: (band.oldest_wait_ns or 0) / 1e9,
            ),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(f"flowcontrol_{name}", text, labels=["priority"])
            for band in self._snapshot.bands:
                family.add_metric([str(band.priority)], value(band))
            yield family

    def _totals(self) -> Iterator[Metric]:
        decided = CounterMetricFamily(
            "flowcontrol_requests", "Requests decided.", labels=["priority", "outcome"]
        )
        completed = CounterMetricFamily(
            "flowcontrol_completed_requests", "Dispatched requests ended.", labels=["priority"]
        )
        waits = HistogramMetricFamily(
            "flowcontrol_wait_seconds",
            "From arrival to decision.",
            labels=["priority", "outcome"],
        )
        bounds = [*(str(float(bound)) for bound in WAIT_BOUNDS_S), "+Inf"]
        for priority, totals in self._snapshot.totals.items():
            completed.add_metric([str(priority)], totals.completed)
            for outcome, count in totals.outcomes.items():
                labels = [str(priority), outcome.value]
                decided.add_metric(labels, count)
                counts = accumulate(totals.wait_counts[outcome])
                waits.add_metric(
                    labels,
                    buckets=list(zip(bounds, counts, strict=True)),
                    sum_value=totals.wait_sum_ns[outcome] / 1e9,
                )
        yield from (decided, completed, waits)

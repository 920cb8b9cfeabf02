"""The metric names of llm-d-router's flow control, for dashboards and triggers that use them.

They are opt-in, because flow ids, which come from clients, become labels. At most 1000 flows are
named, those with the longest backlog; the others are summed up as `other`. Metrics without a
counterpart are left out; docs/metrics.md lists them. Model labels are empty, because a flow may use
any model.
"""

from collections.abc import Iterator
from itertools import islice
from typing import final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import WAIT_BOUNDS_S, BandSnapshot, Snapshot
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.telemetry.metrics import buckets_of

FLOWS_MAX = 1000
PREFIX = "llm_d_epp_flow_control_"
_FLOW_LABELS = ("fairness_id", "priority", "inference_pool", "model_name", "target_model_name")
_WAIT_LABELS = ("fairness_id", "priority", "outcome", *_FLOW_LABELS[2:])
_FLOW_ID_LENGTH_MAX = 128
OUTCOMES = {
    Outcome.DISPATCHED: "Dispatched",
    Outcome.REJECTED_CAPACITY: "RejectedCapacity",
    Outcome.REJECTED_NO_ENDPOINTS: "RejectedNoEndpoints",
    Outcome.REJECTED_DRAINING: "RejectedOther",
    Outcome.EVICTED_TTL: "EvictedTTL",
    Outcome.EVICTED_NO_ENDPOINTS: "EvictedNoEndpoints",
    Outcome.EVICTED_DISPLACED: "EvictedOther",
    Outcome.EVICTED_CANCELLED: "EvictedContextCancelled",
    Outcome.EVICTED_DRAINED: "EvictedOther",
    Outcome.EVICTED_OPERATOR: "EvictedOther",
    Outcome.EVICTED_STOOD_DOWN: "EvictedOther",
    Outcome.EVICTED_MOVED: "EvictedOther",
    Outcome.RECLAIMED: "EvictedOther",
    Outcome.INTERNAL: "RejectedOther",
}
"""The reference's name of each outcome; several outcomes may share one."""


@final
class ReferenceCollector(Collector):
    """Turns one snapshot into the reference's metric families.

    Args:
        snapshot: of the engine.
        pool: the label inference_pool.
    """

    def __init__(self, snapshot: Snapshot, pool: str) -> None:
        self._snapshot = snapshot
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._queues()
        yield from self._utilization()
        yield from self._totals()
        saturation = GaugeMetricFamily(
            f"{PREFIX}pool_saturation",
            "Load of the pool; 1.0 is full.",
            labels=["inference_pool", "stage"],
        )
        saturation.add_metric([self._pool, "effective"], self._snapshot.saturation)
        yield saturation
        if self._snapshot.pace is not None:
            turns = self._snapshot.pace.turns
            cycles = HistogramMetricFamily(
                f"{PREFIX}dispatch_cycle_duration_seconds", "Duration of one turn of the processor."
            )
            cycles.add_metric([], buckets_of(turns.bounds_s, turns.counts), turns.sum_ns / 1e9)
            yield cycles

    def _queues(self) -> Iterator[Metric]:
        sizes = GaugeMetricFamily(
            f"{PREFIX}queue_size", "Waiting requests of a flow.", labels=_FLOW_LABELS
        )
        sizes_bytes = GaugeMetricFamily(
            f"{PREFIX}queue_bytes",
            "Bytes of waiting requests of a flow, as the byte limits count them.",
            labels=_FLOW_LABELS,
        )
        left = FLOWS_MAX
        for band in self._snapshot.bands:
            requests, announced = _by_flow(band, left)
            left = max(0, left - len(requests))
            for flow_id, count in requests.items():
                labels = [flow_id, str(band.priority), self._pool, "", ""]
                sizes.add_metric(labels, count)
                sizes_bytes.add_metric(labels, announced[flow_id])
        yield from (sizes, sizes_bytes)

    def _utilization(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        for unit, total, total_max in (
            ("requests", snapshot.waiting, snapshot.limits.requests_max),
            ("bytes", snapshot.waiting_bytes, snapshot.limits.bytes_max),
        ):
            text = f"Waiting {unit} of a band as a share of its limit; absent where unlimited."
            family = GaugeMetricFamily(
                f"{PREFIX}capacity_utilization_{unit}", text, labels=["priority", "inference_pool"]
            )
            for band in snapshot.bands:
                waiting, band_max = (
                    (band.waiting, band.limits.requests_max)
                    if unit == "requests"
                    else (band.waiting_bytes, band.limits.bytes_max)
                )
                if band_max:
                    family.add_metric([str(band.priority), self._pool], waiting / band_max)
            yield family
            text = f"Waiting {unit} as a share of the limit of all bands; absent where unlimited."
            family = GaugeMetricFamily(
                f"{PREFIX}global_capacity_utilization_{unit}", text, labels=["inference_pool"]
            )
            if total_max:
                family.add_metric([self._pool], total / total_max)
            yield family

    def _totals(self) -> Iterator[Metric]:
        decided = CounterMetricFamily(
            f"{PREFIX}requests",
            "Requests decided.",
            labels=["outcome", "priority", "inference_pool"],
        )
        waits = HistogramMetricFamily(
            f"{PREFIX}request_queue_duration_seconds",
            "Time from arrival to decision, of all flows together.",
            labels=_WAIT_LABELS,
        )
        for priority, totals in self._snapshot.totals.items():
            summed: dict[str, tuple[list[int], int]] = {}
            for outcome, counts in totals.wait_counts.items():
                word = OUTCOMES[outcome]
                so_far, sum_ns = summed.get(word, ([0] * len(counts), 0))
                added = [a + b for a, b in zip(so_far, counts, strict=True)]
                summed[word] = (added, sum_ns + totals.wait_sum_ns[outcome])
            for word, (counts_of_word, sum_ns) in summed.items():
                decided.add_metric([word, str(priority), self._pool], sum(counts_of_word))
                labels = ["", str(priority), word, self._pool, "", ""]
                waits.add_metric(labels, buckets_of(WAIT_BOUNDS_S, counts_of_word), sum_ns / 1e9)
        yield from (decided, waits)


def _by_flow(band: BandSnapshot, named_max: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return waiting requests and bytes by flow id; `other` has the flows that are not named."""
    requests: dict[str, int] = {}
    announced: dict[str, int] = {}
    for flow in islice(band.flows, named_max):
        flow_id = plain(flow.flow_id[:_FLOW_ID_LENGTH_MAX])
        requests[flow_id] = requests.get(flow_id, 0) + flow.waiting
        announced[flow_id] = announced.get(flow_id, 0) + flow.waiting_bytes
    rest = band.waiting - sum(requests.values())
    if rest or band.flow_count > named_max:
        rest_bytes = band.waiting_bytes - sum(announced.values())
        requests["other"] = requests.get("other", 0) + rest
        announced["other"] = announced.get("other", 0) + rest_bytes
    return requests, announced

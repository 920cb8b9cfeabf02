"""Prometheus metrics, rendered from a snapshot, so that requests do not pay for them.

No label has a value from a client: priorities come from objectives, endpoints from the pool, and
all others are fixed. So operators' declarations bound the number of series.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from flowcontrol.config import LIMITED
from flowcontrol.goodput import ResponseResult
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import DEFAULT_PRIORITY, Outcome
from flowcontrol.views.snapshot import (
    WAIT_BOUNDS_S,
    BandSnapshot,
    GoodputSnapshot,
    Snapshot,
    Totals,
)

_NO_GOODPUT = GoodputSnapshot({result.value: 0 for result in ResponseResult}, 0)
_NO_TOTALS = Totals(outcomes={}, completed=0, wait_counts={}, wait_sum_ns={})


def registry_of(collectors: Iterable[Collector]) -> CollectorRegistry:
    """Return a registry for one scrape."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    return registry


def buckets_of(bounds_s: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets, as Prometheus expects them; the last has no bound."""
    bounds = [*(str(float(bound)) for bound in bounds_s), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))


@final
class ShellCollector(Collector):
    """Counters of faults around the engine.

    Args:
        log_lines_lost: log lines dropped.
        library_faults: failed callbacks of libraries.
        unread_bodies: requests whose body Envoy could not parse.
        body_refusals: parked requests refused because held bodies reached a limit.
        ledger_turns: turns written to the ledger, and lost; None: no ledger.
    """

    def __init__(
        self,
        log_lines_lost: int,
        library_faults: int,
        unread_bodies: int,
        body_refusals: int,
        ledger_turns: tuple[int, int] | None = None,
    ) -> None:
        self._log_lines_lost = log_lines_lost
        self._library_faults = library_faults
        self._unread_bodies = unread_bodies
        self._body_refusals = body_refusals
        self._ledger_turns = ledger_turns

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield CounterMetricFamily(
            "flowcontrol_log_lines_lost",
            "Log lines dropped: the reader of standard error is too slow, or writing failed.",
            self._log_lines_lost,
        )
        yield CounterMetricFamily(
            "flowcontrol_library_faults",
            "Library callbacks that failed on the event loop; one of our own ends the service.",
            self._library_faults,
        )
        yield CounterMetricFamily(
            "flowcontrol_unread_bodies",
            "Requests with a JSON body that Envoy could not parse; no rule on the body matched.",
            self._unread_bodies,
        )
        yield CounterMetricFamily(
            "flowcontrol_body_refusals",
            "Parked requests refused with 429: bodies held for their connection reached a limit.",
            self._body_refusals,
        )
        if self._ledger_turns is not None:
            turns = CounterMetricFamily(
                "flowcontrol_ledger_turns",
                "Turns of the engine, by result: written to the ledger, or lost.",
                labels=["result"],
            )
            for result, count in zip(("written", "lost"), self._ledger_turns, strict=True):
                turns.add_metric([result], count)
            yield turns


@final
class SnapshotCollector(Collector):
    """Turns one snapshot into metric families.

    Args:
        snapshot: of the engine.
        inbox_refusals: requests refused before they reached the engine.
        objective_errors: errors in objectives.
        loop_lag: lag of the event loop; None: not measured.
        is_reported: whether Envoy reports the outcomes of requests.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        inbox_refusals: int,
        objective_errors: int,
        loop_lag: HistogramSnapshot | None = None,
        *,
        is_reported: bool = False,
    ) -> None:
        self._snapshot = snapshot
        self._inbox_refusals = inbox_refusals
        self._objective_errors = objective_errors
        self._loop_lag = loop_lag
        self._is_reported = is_reported

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        build = GaugeMetricFamily(
            "flowcontrol_build_info", "1, with the version.", labels=["version"]
        )
        build.add_metric([version("flowcontrol")], 1)
        yield build
        yield from self._pool()
        yield from self._detectors()
        yield from self._bands()
        yield from self._totals()
        yield from self._goodput()
        yield from self._pace()

    def _pool(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        for name, text, value in (
            ("saturation", "Load of the pool; 1.0 is full.", snapshot.saturation),
            ("draining", "1 while the service drains.", float(snapshot.is_draining)),
            ("endpoints", "Endpoints in the pool.", len(snapshot.endpoints)),
            ("objectives", "InferenceObjectives in effect.", len(snapshot.objectives)),
        ):
            yield GaugeMetricFamily(f"flowcontrol_{name}", text, value)
        for name, text, value in (
            (
                "inbox_refusals",
                "Requests refused before the engine saw them: inbox full, or too many subsets.",
                self._inbox_refusals,
            ),
            (
                "unknown_objectives",
                "Requests that named an undeclared objective.",
                snapshot.unknown_objectives,
            ),
            ("objective_errors", "Errors found in objectives.", self._objective_errors),
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
            "Requests in flight at which a stage is full; for auto and adaptive, as found so far.",
            labels=labels,
        )
        moves = CounterMetricFamily(
            "flowcontrol_detector_limit_moves",
            "Changes of a limit that the detector finds (auto, adaptive), by direction.",
            labels=[*labels, "direction"],
        )
        for each in self._snapshot.detectors:
            load.add_metric([each.stage, each.kind], each.saturation)
            if each.requests_limit is not None:
                limit.add_metric([each.stage, each.kind], each.requests_limit)
            for direction, count in (("up", each.raised), ("down", each.lowered)):
                if count is not None:
                    moves.add_metric([each.stage, each.kind, direction], count)
        wait = GaugeMetricFamily(
            "flowcontrol_expected_wait_seconds",
            "Expected wait of a request that arrives now (median); absent while unknown.",
            labels=["priority"],
        )
        late = GaugeMetricFamily(
            "flowcontrol_expected_wait_p90_seconds",
            "Expected wait of a request that arrives now (90th percentile); absent while unknown.",
            labels=["priority"],
        )
        for band in self._snapshot.bands:
            if band.expected_wait_ns is not None:
                wait.add_metric([str(band.priority)], band.expected_wait_ns / 1e9)
            if band.late_wait_ns is not None:
                late.add_metric([str(band.priority)], band.late_wait_ns / 1e9)
        yield from (load, limit, moves, wait, late)

    def _bands(self) -> Iterator[Metric]:
        gauges: tuple[tuple[str, str, Callable[[BandSnapshot], float]], ...] = (
            ("waiting_requests", "Requests waiting.", lambda band: band.waiting),
            (
                "waiting_bytes",
                "Bytes of waiting requests, as the byte limits count them.",
                lambda band: band.waiting_bytes,
            ),
            ("in_flight_requests", "Requests in flight.", lambda band: band.in_flight),
            ("flows", "Flows with requests waiting or in flight.", lambda band: band.flow_count),
            ("band_ceiling", "Saturation at which the band is gated.", lambda band: band.ceiling),
            (
                "oldest_wait_seconds",
                "Wait so far of the request that has waited longest.",
                lambda band: (band.oldest_wait_ns or 0) / 1e9,
            ),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(f"flowcontrol_{name}", text, labels=["priority"])
            for band in self._snapshot.bands:
                family.add_metric([str(band.priority)], value(band))
            yield family
        for name in LIMITED:
            family = GaugeMetricFamily(
                f"flowcontrol_band_{name}_limit",
                f"Maximum of waiting {name}; absent where unlimited.",
                labels=["priority"],
            )
            for band in self._snapshot.bands:
                most = band.limits.given().get(name)
                if most is not None:
                    family.add_metric([str(band.priority)], most)
            yield family
        for name, most in self._snapshot.limits.given().items():
            text = f"{name.capitalize()} that may wait in all bands together, where limited."
            yield GaugeMetricFamily(f"flowcontrol_waiting_{name}_limit", text, most)

    def _totals(self) -> Iterator[Metric]:
        decided = CounterMetricFamily(
            "flowcontrol_requests",
            "Decisions, by outcome; a reclaimed request counts as dispatched and as reclaimed.",
            labels=["priority", "outcome"],
        )
        completed = CounterMetricFamily(
            "flowcontrol_completed_requests",
            "Dispatched requests that have ended.",
            labels=["priority"],
        )
        waits = HistogramMetricFamily(
            "flowcontrol_wait_seconds",
            "Time from arrival to decision.",
            labels=["priority", "outcome"],
        )
        ratios = HistogramMetricFamily(
            "flowcontrol_forecast_ratio",
            "Wait over the wait predicted on arrival, of sampled dispatched requests; 1 is exact.",
            labels=["priority"],
        )
        # Series are present at 0, too, because rate() misses a new counter's first step.
        priorities = (DEFAULT_PRIORITY, *(band.priority for band in self._snapshot.bands))
        totals_of = {**dict.fromkeys(priorities, _NO_TOTALS), **self._snapshot.totals}
        for priority, totals in totals_of.items():
            completed.add_metric([str(priority)], totals.completed)
            for outcome in Outcome:
                labels = [str(priority), outcome.value]
                decided.add_metric(labels, totals.outcomes.get(outcome, 0))
                if outcome not in totals.outcomes:
                    continue
                buckets = buckets_of(WAIT_BOUNDS_S, totals.wait_counts[outcome])
                waits.add_metric(labels, buckets, totals.wait_sum_ns[outcome] / 1e9)
            if (forecasts := totals.forecasts) is not None:
                buckets = buckets_of(forecasts.bounds_s, forecasts.counts)
                ratios.add_metric([str(priority)], buckets, forecasts.sum_ns / 1e9)
        yield from (decided, completed, waits, ratios)

    def _goodput(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "flowcontrol_objective_responses",
            "Dispatched requests by result: good, late for x-llm-d-slo-ttft-ms, failed, or "
            "abandoned by their client before a response had begun.",
            labels=["objective", "result"],
        )
        tokens = CounterMetricFamily(
            "flowcontrol_objective_good_tokens",
            "Tokens of good responses, as model servers report them.",
            labels=["objective"],
        )
        expected = ("", *self._snapshot.objectives) if self._is_reported else ()
        goodput_of = {**dict.fromkeys(expected, _NO_GOODPUT), **self._snapshot.goodput}
        for objective, goodput in goodput_of.items():
            for result, count in goodput.results.items():
                ended.add_metric([objective, result], count)
            tokens.add_metric([objective], goodput.good_tokens)
        yield from (ended, tokens)

    def _pace(self) -> Iterator[Metric]:
        pace = self._snapshot.pace
        for name, text, histogram in (
            (
                "processor_turn_seconds",
                "Duration of one turn of the processor, from events to decisions.",
                pace and pace.turns,
            ),
            (
                "processor_lag_seconds",
                "Time the oldest event of each turn spent in the inbox.",
                pace and pace.lags,
            ),
            (
                "loop_lag_seconds",
                "Delay of the event loop, sampled four times a second.",
                self._loop_lag,
            ),
        ):
            if histogram is not None:
                family = HistogramMetricFamily(f"flowcontrol_{name}", text)
                buckets = buckets_of(histogram.bounds_s, histogram.counts)
                family.add_metric([], buckets, histogram.sum_ns / 1e9)
                yield family

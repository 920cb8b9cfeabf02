"""Prometheus metrics of settlement, rendered at each scrape."""

from collections.abc import Callable, Iterator
from typing import final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flowcontrol.request import DEFAULT_PRIORITY
from flowcontrol.views.snapshot import Snapshot
from flowcontrol_server.common.addresses import parse_address
from flowcontrol_server.requests.log_join import TTFT_BOUNDS_S, Account, EntryResult, LogJoin
from flowcontrol_server.requests.pool_view import PoolView
from flowcontrol_server.telemetry.metrics import buckets_of


@final
class SettlementCollector(Collector):
    """Turns the accounts into metric families; labels are priorities, kinds and endpoints.

    Args:
        log_join: has the accounts.
        pool_view: has the reports of the endpoints.
        snapshot: of the engine; None: this replica does not decide, so it cannot compute the drift.
        now_ns: the time.
        is_reported: whether Envoy reports the outcomes of requests. If so, series are present at 0,
            too, because rate() misses a new counter's first step.
    """

    def __init__(
        self,
        log_join: LogJoin,
        pool_view: PoolView,
        snapshot: Snapshot | None,
        now_ns: int,
        *,
        is_reported: bool = False,
    ) -> None:
        self._log_join = log_join
        self._pool_view = pool_view
        self._snapshot = snapshot
        self._now_ns = now_ns
        self._is_reported = is_reported

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._log()
        yield from self._accounts()
        yield from self._drift()

    def _log(self) -> Iterator[Metric]:
        log_join = self._log_join
        counts = log_join.counts(self._now_ns)
        for name, text, value in (
            ("access_log_streams", "Open streams of Envoy's access log.", log_join.streams),
            (
                "awaited_settlements",
                "Ended requests with no access-log entry yet.",
                counts.awaited,
            ),
        ):
            yield GaugeMetricFamily(f"flowcontrol_{name}", text, value)
        for name, text, value in (
            (
                "access_log_streams_opened",
                "Access-log streams that Envoy opened: one for each worker, more on reconnects.",
                log_join.streams_opened,
            ),
            (
                "access_log_streams_refused",
                "Access-log streams refused for lack of the secret in listen.secretFile.",
                log_join.streams_refused,
            ),
            (
                "bounded_settlements",
                "Settlements cut to a bound: more than the request can use, or another endpoint.",
                log_join.bounded,
            ),
            (
                "lost_settlements",
                "Ended requests with no access-log entry in time; their usage stays an estimate.",
                counts.lost,
            ),
        ):
            yield CounterMetricFamily(f"flowcontrol_{name}", text, value)
        entries = CounterMetricFamily(
            "flowcontrol_access_log_entries",
            "Access-log entries, by result.",
            labels=["result"],
        )
        for result in EntryResult:
            entries.add_metric([result.value], log_join.results[result])
        yield entries

    def _accounts(self) -> Iterator[Metric]:
        expected: tuple[int, ...] = ()
        if self._is_reported and self._snapshot is not None:
            expected = (DEFAULT_PRIORITY, *(band.priority for band in self._snapshot.bands))
        accounts = {**dict.fromkeys(expected, Account()), **self._log_join.accounts}
        counters: tuple[tuple[str, str, str, Callable[[Account], dict[str, int]]], ...] = (
            ("responses", "Responses, by status class.", "status", lambda a: a.statuses),
            ("tokens", "Tokens used, as model servers report them.", "kind", lambda a: a.tokens),
            ("body_bytes", "Body bytes, by direction.", "direction", lambda a: a.bytes),
        )
        for name, text, label, counts in counters:
            family = CounterMetricFamily(f"flowcontrol_{name}", text, labels=["priority", label])
            for priority, account in accounts.items():
                for kind, count in counts(account).items():
                    family.add_metric([str(priority), kind], count)
            yield family
        unmetered = CounterMetricFamily(
            "flowcontrol_unmetered_responses",
            "Complete successful responses in which Envoy found no token usage.",
            labels=["priority"],
        )
        ttft = HistogramMetricFamily(
            "flowcontrol_ttft_seconds",
            "Time from sending the request to the model server to the first byte of its response.",
            labels=["priority"],
        )
        for priority, account in accounts.items():
            unmetered.add_metric([str(priority)], account.unmetered)
            buckets = buckets_of(TTFT_BOUNDS_S, account.ttft_counts)
            ttft.add_metric([str(priority)], buckets, account.ttft_sum_us / 1e6)
        yield from (unmetered, ttft)

    def _drift(self) -> Iterator[Metric]:
        engine = GaugeMetricFamily(
            "flowcontrol_engine_requests",
            "Requests running and waiting at an endpoint, as its metrics report.",
            labels=["endpoint"],
        )
        for address, count in self._pool_view.engine_requests(self._now_ns).items():
            engine.add_metric([address], count)
        answers = CounterMetricFamily(
            "flowcontrol_endpoint_responses",
            "Requests that an endpoint answered, or failed (5xx, or broken off); "
            "not those that their clients abandoned.",
            labels=["endpoint", "result"],
        )
        for address, counts in self._pool_view.answers.items():
            # Of one that is known by name nothing is reported: the log names the IP address.
            if not any(counts) and not (self._is_reported and parse_address(address).is_ip):
                continue
            for result, count in zip(("success", "failure"), counts, strict=True):
                answers.add_metric([address, result], count)
        yield from (engine, answers)
        snapshot = self._snapshot
        drift = None if snapshot is None else self._pool_view.drift(snapshot, self._now_ns)
        if drift is not None:
            yield GaugeMetricFamily(
                "flowcontrol_in_flight_drift_requests",
                "Requests that endpoints report, minus those in flight there by our count; "
                "absent on a standby.",
                drift,
            )

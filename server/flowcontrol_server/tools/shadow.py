"""`flowcontrol shadow`: runs a candidate configuration on the ledger of a running service."""

import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Final, final

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flowcontrol.config import ControllerConfig
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import WAIT_BOUNDS_S, Totals
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.listening import naming
from flowcontrol_server.common.signals import STOP_SIGNALS
from flowcontrol_server.ledger.follow import Follower
from flowcontrol_server.ledger.shadow import Shadow, ShadowReport
from flowcontrol_server.telemetry.metrics import buckets_of

POLL_INTERVAL_S: Final = 0.2
"""Interval at which the ledger is read; the service writes to it ten times a second at most."""
_NO_TOTALS = Totals(outcomes={}, completed=0, wait_counts={}, wait_sum_ns={})


def run(ledger: Path, config: ControllerConfig, listen: Address) -> list[str]:
    """Follow a ledger until SIGTERM or ctrl-C; return the comparison as lines of a table.

    Raises:
        LedgerError: the ledger cannot be read.
        ListenError: the address of the metrics cannot be opened.
    """
    ended = Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda _number, _frame: ended.set())
    shadow = Shadow(config)
    follower = Follower(ledger)
    shadow.play(follower.entries())
    metrics = ShadowCollector(shadow.report())
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    registry.register(ProcessCollector(registry=None))
    with naming(str(listen)):
        server, thread = start_http_server(listen.port, addr=listen.host, registry=registry)
    try:
        while not ended.wait(POLL_INTERVAL_S):
            shadow.play(follower.entries())
            metrics.report = shadow.report()
    finally:
        follower.close()
        server.shutdown()
        server.server_close()
        thread.join()
    return table(shadow.report())


@final
class ShadowCollector(Collector):
    """Exports a report as metric families.

    Args:
        report: the newest report; the thread that follows the ledger replaces it as a whole.
    """

    def __init__(self, report: ShadowReport) -> None:
        self.report = report

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        report = self.report
        for name, text, value in (
            ("waiting_requests", "Requests that would be waiting now.", report.waiting),
            ("in_flight_requests", "Requests that would be in flight now.", report.in_flight),
        ):
            yield GaugeMetricFamily(f"flowcontrol_shadow_{name}", text, float(value))
        yield CounterMetricFamily(
            "flowcontrol_shadow_restarts",
            "Times the candidate began again from a checkpoint of the ledger.",
            report.restarts,
        )
        decided = CounterMetricFamily(
            "flowcontrol_shadow_requests",
            "Requests the candidate would have decided.",
            labels=["priority", "outcome"],
        )
        waits = HistogramMetricFamily(
            "flowcontrol_shadow_wait_seconds",
            "From arrival to the candidate's decision.",
            labels=["priority", "outcome"],
        )
        for priority, totals in report.candidate.items():
            for outcome, count in totals.outcomes.items():
                labels = [str(priority), outcome.value]
                decided.add_metric(labels, count)
                buckets = buckets_of(WAIT_BOUNDS_S, totals.wait_counts[outcome])
                waits.add_metric(labels, buckets, totals.wait_sum_ns[outcome] / 1e9)
        differing = CounterMetricFamily(
            "flowcontrol_shadow_differences",
            "Requests the candidate would have decided otherwise.",
            labels=["outcome", "shadow_outcome"],
        )
        for (was, would_be), count in report.pairs.items():
            if was is not would_be:
                differing.add_metric([was.value, would_be.value], count)
        yield from (decided, waits, differing)


def table(report: ShadowReport) -> list[str]:
    """Return the decisions of both, by priority and outcome, with the mean wait of each."""
    lines = [f"{'band':>6}  {'outcome':24}{'recorded':>10}{'candidate':>11}  mean wait"]
    for priority in sorted(report.recorded.keys() | report.candidate.keys(), reverse=True):
        mine = report.recorded.get(priority, _NO_TOTALS)
        theirs = report.candidate.get(priority, _NO_TOTALS)
        for outcome in Outcome:
            was, would_be = mine.outcomes.get(outcome, 0), theirs.outcomes.get(outcome, 0)
            if was or would_be:
                waits = f"{_mean(mine, outcome)} > {_mean(theirs, outcome)}"
                lines.append(f"{priority:>6}  {outcome.value:24}{was:>10}{would_be:>11}  {waits}")
    differing = sum(n for (was, would_be), n in report.pairs.items() if was is not would_be)
    return [*lines, f"{differing} requests decided differently"]


def _mean(totals: Totals, outcome: Outcome) -> str:
    count = totals.outcomes.get(outcome, 0)
    return f"{totals.wait_sum_ns[outcome] / count / 1e6:.1f}ms" if count else "-"

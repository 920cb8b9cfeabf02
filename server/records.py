"""What is kept and tried of the engine's turns: the ledger and the shadow, if there are any."""

from collections.abc import Callable, Iterator
from typing import final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import LedgerError
from flowcontrol.snapshot import WAIT_BOUNDS_S
from server.ledger import LedgerWriter
from server.ledger_files import Claim
from server.metrics import buckets_of
from server.policies import load_policies
from server.record_settings import LedgerSection, ShadowSection
from server.recording import Recorder, TurnFeed
from server.shadow import Shadow, ShadowReport

_CLOSE_TIMEOUT_S = 5.0


@final
class Records:
    """Owns the threads that write and rerun, and the feeds to them.

    Args:
        ledger: where to write, None: nowhere.
        shadow: what to try, None: nothing.

    Raises:
        ConfigError: the shadow's configuration has mistakes.
    """

    def __init__(self, ledger: LedgerSection | None, shadow: ShadowSection | None) -> None:
        self.writer: LedgerWriter | None = None
        self.shadow: Shadow | None = None
        self._claim: Claim | None = None
        self._closers: list[Callable[[float], None]] = []
        """Of what has been started."""
        feeds = []
        ledger_feed = None
        if ledger is not None:
            ledger_feed = TurnFeed()
            feeds.append(ledger_feed)
            self._claim = Claim(ledger.file)
            self.writer = LedgerWriter(
                ledger.file,
                ledger.max_bytes,
                ledger.files,
                ledger_feed,
                hides_flows=ledger.hide_flow_ids,
            )
        if shadow is not None:
            feed = TurnFeed()
            feeds.append(feed)
            self.shadow = Shadow(load_policies(shadow.config), feed, ledger_feed)
        self.recorder = Recorder(feeds) if feeds else None

    def start(self, config: ControllerConfig, made_ns: int) -> None:
        """Begin, for an engine of that configuration made at that time.

        Raises:
            LedgerError: the ledger cannot be written, or another process writes it.
        """
        if self.writer is not None and self._claim is not None:
            try:
                self._claim.take()
                self.writer.start(config, made_ns)
            except OSError as error:
                message = f"ledger.file cannot be written: {error}"
                raise LedgerError(message) from error
            self._closers.append(self.writer.close)
        if self.shadow is not None:
            self.shadow.start(made_ns)
            self._closers.append(self.shadow.close)

    def close(self) -> None:
        """Write what there is, and end."""
        for close in reversed(self._closers):
            close(_CLOSE_TIMEOUT_S)
        if self._claim is not None:
            self._claim.release()

    def collector(self) -> "RecordCollector":
        """Return the metrics there are."""
        writer, shadow = self.writer, self.shadow
        return RecordCollector(
            None if writer is None else (writer.turns, writer.lost_turns),
            None if shadow is None else shadow.report,
        )


@final
class RecordCollector(Collector):
    """Turns what ledger and shadow report into metric families.

    Args:
        turns: how many stand in the ledger, and how many were lost; None without a ledger.
        report: of the shadow; None without one.
    """

    def __init__(self, turns: tuple[int, int] | None, report: ShadowReport | None) -> None:
        self._turns = turns
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        if self._turns is not None:
            turns = CounterMetricFamily(
                "flowcontrol_ledger_turns",
                "Turns of the engine, by whether they stand in the ledger.",
                labels=["result"],
            )
            for result, count in zip(("written", "lost"), self._turns, strict=True):
                turns.add_metric([result], count)
            yield turns
        if self._report is not None:
            yield from _shadow_families(self._report)


def _shadow_families(report: ShadowReport) -> Iterator[Metric]:
    for name, text, value in (
        ("up", "1 while the candidate decides along, 0 once it has failed.", report.is_running),
        ("waiting_requests", "Requests that would wait.", report.waiting),
        ("in_flight_requests", "Requests that would be in flight.", report.in_flight),
    ):
        yield GaugeMetricFamily(f"flowcontrol_shadow_{name}", text, float(value))
    yield CounterMetricFamily(
        "flowcontrol_shadow_restarts",
        "Times the candidate fell behind and began anew.",
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
    for priority, totals in report.totals.items():
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

"""Collects all metrics of one moment, for a scrape of /metrics."""

import time
from typing import Final, final

from prometheus_client import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from flowcontrol_server.common.status import ServiceStatus
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.ledger.ledger import Ledger
from flowcontrol_server.requests.classify import BodyReads
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import LogJoin
from flowcontrol_server.sources.feed import Feed
from flowcontrol_server.state.continuity import Continuity
from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR
from flowcontrol_server.telemetry.loop_faults import LoopFaults
from flowcontrol_server.telemetry.loop_lag import LoopLag
from flowcontrol_server.telemetry.metrics import ShellCollector, SnapshotCollector, registry_of
from flowcontrol_server.telemetry.reference_metrics import ReferenceCollector
from flowcontrol_server.telemetry.settlement_metrics import SettlementCollector
from flowcontrol_server.telemetry.source_metrics import SourceCollector, StatusCollector
from flowcontrol_server.telemetry.state_metrics import StateCollector

_PROCESS: Final = ProcessCollector(registry=None)
"""The process's own CPU time, memory and open files."""


@final
class Scrape:
    """Gathers metrics from all their sources."""

    def __init__(  # noqa: PLR0913 - each is one source
        self,
        *,
        gate: FlowGate,
        log_join: LogJoin,
        feed: Feed,
        configuration: Configuration,
        status: ServiceStatus,
        ledger: Ledger | None,
        continuity: Continuity,
        loop_lag: LoopLag,
        loop_faults: LoopFaults,
        body_reads: BodyReads,
        calls: CallContext,
    ) -> None:
        self._gate = gate
        self._log_join = log_join
        self._feed = feed
        self._configuration = configuration
        self._status = status
        self._ledger = ledger
        self._continuity = continuity
        self._loop_lag = loop_lag
        self._loop_faults = loop_faults
        self._body_reads = body_reads
        self._calls = calls

    async def collect(self) -> CollectorRegistry:
        """Return the current metrics.

        Raises:
            NotRunningError: the processor has ended.
        """
        snapshot = await self._gate.snapshot()
        settings = self._configuration.settings
        feed = self._feed.snapshot()
        is_deciding = self._continuity.may_decide()
        collectors: list[Collector] = [
            SnapshotCollector(
                snapshot,
                self._gate.inbox_refusals,
                sum(count for name, count in feed.errors.items() if name.startswith("objectives.")),
                self._loop_lag.snapshot(),
                is_reported=settings.is_reported,
            ),
            SettlementCollector(
                self._log_join,
                self._gate.pool_view,
                snapshot if is_deciding else None,
                time.monotonic_ns(),
                is_reported=settings.is_reported,
            ),
            SourceCollector(feed, self._configuration, time.monotonic()),
            StatusCollector(self._status),
            StateCollector(
                snapshot.recovered,
                is_deciding=is_deciding,
                book=self._continuity.counts(),
                election=self._continuity.election_counts(),
            ),
            ShellCollector(
                STANDARD_ERROR.lost_lines,
                self._loop_faults.library_faults,
                self._body_reads.unread,
                self._calls.body_refusals,
                None if self._ledger is None else self._ledger.turns,
            ),
        ]
        if settings.metrics.reference_names:
            collectors.append(ReferenceCollector(snapshot, settings.pool))
        return registry_of([*collectors, _PROCESS])

"""What a scrape of /metrics is answered from: every collector, about one moment."""

import time
from typing import Final, final

from prometheus_client import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from server.gate import FlowGate
from server.loop_lag import LoopLag
from server.metrics import SnapshotCollector, registry_of
from server.records import Records
from server.reference_metrics import ReferenceCollector
from server.reload import Configuration
from server.settlement import Settlement
from server.settlement_metrics import SettlementCollector
from server.sources.feed import Feed
from server.sources.measured import SourceCollector

_PROCESS: Final = ProcessCollector(registry=None)
"""The process's own CPU time, memory and open files."""


@final
class Scrape:
    """Gathers metrics from whoever has something to tell."""

    def __init__(  # noqa: PLR0913 - each is one who tells
        self,
        *,
        gate: FlowGate,
        settlement: Settlement,
        feed: Feed,
        configuration: Configuration,
        records: Records,
        loop_lag: LoopLag,
    ) -> None:
        self._gate = gate
        self._settlement = settlement
        self._feed = feed
        self._configuration = configuration
        self._records = records
        self._loop_lag = loop_lag

    async def collect(self) -> CollectorRegistry:
        """Return the metrics of now.

        Raises:
            NotRunningError: the processor has ended.
        """
        snapshot = await self._gate.snapshot()
        settings = self._configuration.settings
        feed = self._feed.snapshot()
        collectors: list[Collector] = [
            SnapshotCollector(
                snapshot,
                self._gate.inbox_refusals,
                sum(count for name, count in feed.errors.items() if name.startswith("objectives.")),
                self._loop_lag.snapshot(),
            ),
            SettlementCollector(
                self._settlement, self._gate.pool_view, snapshot, time.monotonic_ns()
            ),
            SourceCollector(feed, self._configuration, time.monotonic()),
            self._records.collector(),
        ]
        if settings.metrics.reference_names:
            limits = settings.controller_config().limits
            collectors.append(ReferenceCollector(snapshot, settings.pool, limits))
        return registry_of([*collectors, _PROCESS])

"""Every metric family of the service, from an engine that has a value for each."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from flowcontrol.config import LIMITED, Limits
from flowcontrol.events import EndpointsChanged, LoadObserved
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import (
    WAIT_BOUNDS_S,
    BandSnapshot,
    DetectorSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    GoodputSnapshot,
    Pace,
    Snapshot,
    Totals,
)
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.ledger.shadow import ShadowReport
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.log_join import Claim, LogJoin
from flowcontrol_server.requests.pool_view import PoolView
from flowcontrol_server.requests.tickets import TICKETS
from flowcontrol_server.sources.engine_metrics import EngineLoad
from flowcontrol_server.sources.feed import FeedSnapshot
from flowcontrol_server.sources.scraper import ScrapeResult, Seen
from flowcontrol_server.state.book import BookCounts
from flowcontrol_server.state.election import ElectionCounts
from flowcontrol_server.telemetry.metrics import ShellCollector, SnapshotCollector, registry_of
from flowcontrol_server.telemetry.reference_metrics import ReferenceCollector
from flowcontrol_server.telemetry.settlement_metrics import SettlementCollector
from flowcontrol_server.telemetry.source_metrics import SourceCollector, StatusCollector
from flowcontrol_server.telemetry.state_metrics import StateCollector
from tests.support.standing import standing

_ENDPOINT = "127.0.0.1:8000"
_SOME = HistogramSnapshot((0.001,), (1, 0), 1)
_LIMITS = Limits(**{f"{name}_max": 1 for name in LIMITED})
EVERYTHING = Snapshot(
    saturation=0.5,
    waiting=1,
    waiting_bytes=1,
    in_flight=1,
    is_draining=False,
    bands=(
        BandSnapshot(
            priority=0,
            is_declared=True,
            waiting=1,
            waiting_bytes=1,
            in_flight=1,
            oldest_wait_ns=1,
            ceiling=1.0,
            limits=_LIMITS,
            flow_count=1,
            flows=(FlowSnapshot("tenant", 1, 1, 1, 1),),
            expected_wait_ns=1,
            late_wait_ns=1,
        ),
    ),
    totals={
        0: Totals(
            outcomes={Outcome.DISPATCHED: 1},
            completed=1,
            wait_counts={Outcome.DISPATCHED: (1,) + (0,) * len(WAIT_BOUNDS_S)},
            wait_sum_ns={Outcome.DISPATCHED: 1},
            forecasts=_SOME,
        )
    },
    endpoints=(EndpointSnapshot(_ENDPOINT, 1, 0.5),),
    limits=_LIMITS,
    objectives={"chat": 0},
    unknown_objectives=0,
    detectors=(DetectorSnapshot("both", "adaptive", 0.5, 1, (), 1, 1),),
    goodput={"chat": GoodputSnapshot({"good": 1, "late": 1, "failed": 1}, 1)},
    pace=Pace(_SOME, _SOME),
)

_SHADOW = ShadowReport(
    candidate=EVERYTHING.totals, pairs={(Outcome.DISPATCHED, Outcome.EVICTED_TTL): 1}
)
_FEED = FeedSnapshot(
    errors={"objectives.directory": 1},
    problems=[("objectives.directory", "chat.yaml", "is not YAML")],
    down=frozenset({_ENDPOINT}),
    scrapes=Counter({ScrapeResult.OK: 1}),
    seen={_ENDPOINT: Seen(0.0, EngineLoad(waiting=1, running=1, kv_usage=0.5), ScrapeResult.OK)},
)


def own_families() -> list[Metric]:
    """Return the families under our own names."""
    view = PoolView()
    view.notice(EndpointsChanged((_ENDPOINT,)), 0)
    view.notice(LoadObserved(_ENDPOINT, waiting=1, running=1, kv_usage=0.5), 0)
    settlement = LogJoin(1, lambda _id: Claim(0), lambda _: None, answered=view.answered)
    settlement.request_ended(1, Claim(0), now_ns=0)
    settlement.take(
        LogEntry(
            TICKETS.issue(1).decode(),
            200,
            is_success=True,
            ttft_us=1,
            input_tokens=1,
            output_tokens=1,
            request_bytes=1,
            response_bytes=1,
            endpoint=_ENDPOINT,
        ),
        now_ns=1_000,
    )
    settled = SettlementCollector(settlement, view, EVERYTHING, 0)
    sources = SourceCollector(_FEED, _configuration(), now_s=1.0)
    engine = SnapshotCollector(EVERYTHING, 0, 0, _SOME)
    status = StatusCollector(standing(("source", "chat.yaml", "is not YAML")))
    state = StateCollector(
        1,
        is_deciding=True,
        book=BookCounts(1, 1, 0.01, is_up=True, writes=1, records_written=1, failures=0),
        election=ElectionCounts(is_up=True, failures=1, elections=1),
    )
    return _families([engine, settled, sources, status, state, ShellCollector(1, 1, 1, 1, (1, 0))])


def reference_families() -> list[Metric]:
    """Return the families under the reference's names."""
    return _families([ReferenceCollector(EVERYTHING, "llama")])


def sample_names(families: Iterable[Metric]) -> set[str]:
    """Return the names that a query can use."""
    return {sample.name for family in families for sample in family.samples}


def _configuration() -> Configuration:
    settings = Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"api": {}},
            "endpoints": {"static": [_ENDPOINT]},
        }
    )
    return Configuration(settings, Path("flowcontrol.yaml"), _change_nothing)


async def _change_nothing(_settings: Settings) -> None:
    pass


def _families(collectors: Iterable[Collector]) -> list[Metric]:
    return list(registry_of(collectors).collect())

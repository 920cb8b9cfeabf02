"""Every metric family the service can show, of an engine that has something to show of each."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from flowcontrol.config import Limits
from flowcontrol.events import EndpointsChanged, LoadObserved
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import Outcome
from flowcontrol.snapshot import (
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
from server.codec import INSTANCE
from server.log_codec import LogEntry
from server.metrics import SnapshotCollector, registry_of
from server.pool_view import PoolView
from server.records import RecordCollector
from server.reference_metrics import ReferenceCollector
from server.reload import Configuration
from server.settings import Settings
from server.settlement import Settlement
from server.settlement_metrics import SettlementCollector
from server.shadow import ShadowReport
from server.sources.engine_metrics import EngineLoad
from server.sources.feed import FeedSnapshot
from server.sources.measured import SourceCollector
from server.sources.scraper import Result, Seen

_ENDPOINT = "127.0.0.1:8000"
_SOME = HistogramSnapshot((0.001,), (1, 0), 1)
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
            requests_max=1,
            bytes_max=1,
            flow_count=1,
            flows=(FlowSnapshot("tenant", 1, 1, 1, 1),),
            expected_wait_ns=1,
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
    objectives={"chat": 0},
    unknown_objectives=0,
    detectors=(DetectorSnapshot("both", "adaptive", 0.5, 1, (), 1, 1),),
    goodput={"chat": GoodputSnapshot({"good": 1, "late": 1, "failed": 1}, 1)},
    pace=Pace(_SOME, _SOME),
)

_SHADOW = ShadowReport(
    totals=EVERYTHING.totals, pairs={(Outcome.DISPATCHED, Outcome.EVICTED_TTL): 1}
)
_FEED = FeedSnapshot(
    errors={"objectives.directory": 1},
    problems=[("objectives.directory", "chat.yaml", "is not YAML")],
    down=frozenset({_ENDPOINT}),
    scrapes=Counter({Result.OK: 1}),
    seen={_ENDPOINT: Seen(0.0, EngineLoad(waiting=1, running=1, kv_usage=0.5), Result.OK)},
)


def own_families() -> list[Metric]:
    """Return those under our own names."""
    view = PoolView()
    view.notice(EndpointsChanged((_ENDPOINT,)), 0)
    view.notice(LoadObserved(_ENDPOINT, waiting=1, running=1, kv_usage=0.5), 0)
    settlement = Settlement(1, lambda _id: 0, lambda _: None, answered=view.answered)
    settlement.request_ended(1, 0, now_ns=0)
    settlement.take(
        LogEntry(
            f"{INSTANCE}.1",
            200,
            is_success=True,
            ttft_us=1,
            input_tokens=1,
            output_tokens=1,
            request_bytes=1,
            response_bytes=1,
            endpoint=_ENDPOINT,
        )
    )
    settled = SettlementCollector(settlement, view, EVERYTHING, 0)
    sources = SourceCollector(_FEED, _configuration(), now_s=1.0)
    records = RecordCollector((1, 0), _SHADOW)
    return _families([SnapshotCollector(EVERYTHING, 0, 0, _SOME), settled, sources, records])


def reference_families() -> list[Metric]:
    """Return those under the reference's names."""
    limits = Limits(requests_max=1, bytes_max=1)
    return _families([ReferenceCollector(EVERYTHING, "llama", limits)])


def sample_names(families: Iterable[Metric]) -> set[str]:
    """Return the names that a query can ask for."""
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

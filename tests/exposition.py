"""Every metric family the service can show, of an engine that has something to show of each."""

from collections.abc import Iterable

from prometheus_client.core import Metric

from flowcontrol.config import Limits
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import Outcome
from flowcontrol.snapshot import (
    WAIT_BOUNDS_S,
    BandSnapshot,
    EndpointSnapshot,
    FlowSnapshot,
    Pace,
    Snapshot,
    Totals,
)
from server.metrics import SnapshotCollector, registry_of
from server.reference_metrics import ReferenceCollector

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
        ),
    ),
    totals={
        0: Totals(
            outcomes={Outcome.DISPATCHED: 1},
            completed=1,
            wait_counts={Outcome.DISPATCHED: (1,) + (0,) * len(WAIT_BOUNDS_S)},
            wait_sum_ns={Outcome.DISPATCHED: 1},
        )
    },
    endpoints=(EndpointSnapshot("127.0.0.1:8000", 1, 0.5),),
    objectives={"chat": 0},
    unknown_objectives=0,
    pace=Pace(_SOME, _SOME),
)


def own_families() -> list[Metric]:
    """Return those under our own names."""
    return _families([SnapshotCollector(EVERYTHING, 0, 0, _SOME)])


def reference_families() -> list[Metric]:
    """Return those under the reference's names."""
    limits = Limits(requests_max=1, bytes_max=1)
    return _families([ReferenceCollector(EVERYTHING, "llama", limits)])


def sample_names(families: Iterable[Metric]) -> set[str]:
    """Return the names that a query can ask for."""
    return {sample.name for family in families for sample in family.samples}


def _families(collectors: list[SnapshotCollector] | list[ReferenceCollector]) -> list[Metric]:
    return list(registry_of(collectors).collect())

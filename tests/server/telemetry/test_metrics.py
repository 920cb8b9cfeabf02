"""Every metric line of a known snapshot, and what Prometheus reads in it."""

from dataclasses import replace
from importlib.metadata import version

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flowcontrol.config import Limits
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import (
    BandSnapshot,
    DetectorSnapshot,
    EndpointSnapshot,
    GoodputSnapshot,
    Pace,
    Snapshot,
    Totals,
)
from flowcontrol_server.telemetry.metrics import SnapshotCollector, registry_of

SECOND = 1_000_000_000
CHAT = BandSnapshot(
    priority=10,
    is_declared=True,
    waiting=3,
    waiting_bytes=4096,
    in_flight=2,
    oldest_wait_ns=1_500_000_000,
    ceiling=1.0,
    limits=Limits(),
    flow_count=2,
    flows=(),
    expected_wait_ns=2_500_000_000,
    late_wait_ns=4_000_000_000,
)
BATCH = BandSnapshot(
    priority=-1,
    is_declared=False,
    waiting=0,
    waiting_bytes=0,
    in_flight=0,
    oldest_wait_ns=None,
    ceiling=0.5,
    limits=Limits(requests_max=1000, bytes_max=10**9),
    flow_count=0,
    flows=(),
)
TOTALS = Totals(
    outcomes={Outcome.DISPATCHED: 5, Outcome.EVICTED_TTL: 1},
    completed=3,
    wait_counts={
        # up to 1, 5, 10, 25, 50, 100, 250, 500 ms, then 1, 2.5, 5, ... 600 s, and longer
        Outcome.DISPATCHED: (2, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
        Outcome.EVICTED_TTL: (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
    },
    wait_sum_ns={Outcome.DISPATCHED: 3_250_000_000, Outcome.EVICTED_TTL: 900 * SECOND},
    forecasts=HistogramSnapshot((0.8, 1.25), (1, 3, 0), 3_800_000_000),
)
LAG = HistogramSnapshot((0.001, 0.5), (7, 2, 1), 1_500_000_000)
SNAPSHOT = Snapshot(
    saturation=0.75,
    waiting=3,
    waiting_bytes=4096,
    in_flight=2,
    is_draining=True,
    bands=(CHAT, BATCH),
    totals={10: TOTALS},
    endpoints=(
        EndpointSnapshot("10.0.0.5:8000", 2, 0.5),
        EndpointSnapshot("[::1]:8000", 0, 0.0),
        EndpointSnapshot("10.0.0.6:8000", None, 0.25),
    ),
    objectives={"chat": 10},
    unknown_objectives=7,
    limits=Limits(requests_max=20_000),
    detectors=(
        DetectorSnapshot("prefill", "adaptive", 0.5, 12, raised=5, lowered=2),
        DetectorSnapshot("decode", "utilization", 0.75, None),
    ),
    goodput={"chat": GoodputSnapshot({"good": 3, "late": 1, "failed": 0}, 70)},
    pace=Pace(
        turns=HistogramSnapshot((0.001,), (5, 1), 3_000_000),
        lags=HistogramSnapshot((0.001,), (4, 0), 1_000_000),
    ),
)
EMPTY = Snapshot(
    saturation=0.0,
    waiting=0,
    waiting_bytes=0,
    in_flight=0,
    is_draining=False,
    bands=(),
    totals={},
    endpoints=(),
    objectives={},
    unknown_objectives=0,
)

EXPECTED = """\
flowcontrol_saturation 0.75
flowcontrol_draining 1.0
flowcontrol_endpoints 3.0
flowcontrol_objectives 1.0
flowcontrol_inbox_refusals_total 4.0
flowcontrol_unknown_objectives_total 7.0
flowcontrol_objective_errors_total 2.0
flowcontrol_endpoint_in_flight_requests{endpoint="10.0.0.5:8000"} 2.0
flowcontrol_endpoint_in_flight_requests{endpoint="[::1]:8000"} 0.0
flowcontrol_detector_saturation{detector="adaptive",stage="prefill"} 0.5
flowcontrol_detector_saturation{detector="utilization",stage="decode"} 0.75
flowcontrol_detector_requests_limit{detector="adaptive",stage="prefill"} 12.0
flowcontrol_detector_limit_moves_total{detector="adaptive",direction="up",stage="prefill"} 5.0
flowcontrol_detector_limit_moves_total{detector="adaptive",direction="down",stage="prefill"} 2.0
flowcontrol_expected_wait_seconds{priority="10"} 2.5
flowcontrol_expected_wait_p90_seconds{priority="10"} 4.0
flowcontrol_waiting_requests{priority="10"} 3.0
flowcontrol_waiting_requests{priority="-1"} 0.0
flowcontrol_waiting_bytes{priority="10"} 4096.0
flowcontrol_waiting_bytes{priority="-1"} 0.0
flowcontrol_in_flight_requests{priority="10"} 2.0
flowcontrol_in_flight_requests{priority="-1"} 0.0
flowcontrol_flows{priority="10"} 2.0
flowcontrol_flows{priority="-1"} 0.0
flowcontrol_band_ceiling{priority="10"} 1.0
flowcontrol_band_ceiling{priority="-1"} 0.5
flowcontrol_oldest_wait_seconds{priority="10"} 1.5
flowcontrol_oldest_wait_seconds{priority="-1"} 0.0
flowcontrol_band_requests_limit{priority="-1"} 1000.0
flowcontrol_band_bytes_limit{priority="-1"} 1e+09
flowcontrol_waiting_requests_limit 20000.0
flowcontrol_requests_total{outcome="dispatched",priority="10"} 5.0
flowcontrol_requests_total{outcome="evicted-ttl",priority="10"} 1.0
flowcontrol_completed_requests_total{priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="0.001",outcome="dispatched",priority="10"} 2.0
flowcontrol_wait_seconds_bucket{le="0.005",outcome="dispatched",priority="10"} 2.0
flowcontrol_wait_seconds_bucket{le="0.01",outcome="dispatched",priority="10"} 2.0
flowcontrol_wait_seconds_bucket{le="0.025",outcome="dispatched",priority="10"} 2.0
flowcontrol_wait_seconds_bucket{le="0.05",outcome="dispatched",priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="0.1",outcome="dispatched",priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="0.25",outcome="dispatched",priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="0.5",outcome="dispatched",priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="1.0",outcome="dispatched",priority="10"} 3.0
flowcontrol_wait_seconds_bucket{le="2.5",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="5.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="10.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="30.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="60.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="120.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="300.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="600.0",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_bucket{le="+Inf",outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_count{outcome="dispatched",priority="10"} 5.0
flowcontrol_wait_seconds_sum{outcome="dispatched",priority="10"} 3.25
flowcontrol_forecast_ratio_bucket{le="0.8",priority="10"} 1.0
flowcontrol_forecast_ratio_bucket{le="1.25",priority="10"} 4.0
flowcontrol_forecast_ratio_bucket{le="+Inf",priority="10"} 4.0
flowcontrol_forecast_ratio_count{priority="10"} 4.0
flowcontrol_forecast_ratio_sum{priority="10"} 3.8
flowcontrol_objective_responses_total{objective="chat",result="good"} 3.0
flowcontrol_objective_responses_total{objective="chat",result="late"} 1.0
flowcontrol_objective_responses_total{objective="chat",result="failed"} 0.0
flowcontrol_objective_good_tokens_total{objective="chat"} 70.0
flowcontrol_processor_turn_seconds_bucket{le="0.001"} 5.0
flowcontrol_processor_turn_seconds_bucket{le="+Inf"} 6.0
flowcontrol_processor_turn_seconds_count 6.0
flowcontrol_processor_turn_seconds_sum 0.003
flowcontrol_processor_lag_seconds_bucket{le="0.001"} 4.0
flowcontrol_processor_lag_seconds_bucket{le="+Inf"} 4.0
flowcontrol_processor_lag_seconds_count 4.0
flowcontrol_processor_lag_seconds_sum 0.001
flowcontrol_loop_lag_seconds_bucket{le="0.001"} 7.0
flowcontrol_loop_lag_seconds_bucket{le="0.5"} 9.0
flowcontrol_loop_lag_seconds_bucket{le="+Inf"} 10.0
flowcontrol_loop_lag_seconds_count 10.0
flowcontrol_loop_lag_seconds_sum 1.5
"""
NEVER = ("flowcontrol_requests_total", "flowcontrol_completed_requests_total")


def rendered(snapshot: Snapshot) -> str:
    """What /metrics would say."""
    collector = SnapshotCollector(snapshot, 4, 2, LAG)
    return generate_latest(registry_of([collector])).decode()


def lines(text: str) -> list[str]:
    """The samples, one a line."""
    return [line for line in text.splitlines() if not line.startswith("#")]


class TestSnapshotCollector:
    """From a snapshot to text."""

    def test_every_line(self) -> None:
        """Every sample is there, in order; counters end in _total, buckets are cumulated."""
        everything = lines(rendered(SNAPSHOT))
        zeros = [line for line in everything if line.startswith(NEVER) and line.endswith(" 0.0")]
        got = [line for line in everything if line not in zeros]
        evicted = [line for line in got if "wait_seconds" in line and "evicted-ttl" in line]

        expected = [f'flowcontrol_build_info{{version="{version("flowcontrol")}"}} 1.0']
        expected += EXPECTED.splitlines()
        assert expected == [line for line in got if line not in evicted]
        assert len(zeros) == 3 * len(Outcome) - 2 + 2, "of band 0, too"
        labels = 'outcome="evicted-ttl",priority="10"'
        assert len(evicted) == 20
        assert all(line.endswith(" 0.0") for line in evicted[:17])
        assert evicted[17:] == [
            f'flowcontrol_wait_seconds_bucket{{le="+Inf",{labels}}} 1.0',
            f"flowcontrol_wait_seconds_count{{{labels}}} 1.0",
            f"flowcontrol_wait_seconds_sum{{{labels}}} 900.0",
        ]

    def test_prometheus_reads_it(self) -> None:
        """Prometheus' own parser reads every family, with a type and a help text."""
        families = {each.name: each for each in text_string_to_metric_families(rendered(SNAPSHOT))}

        kinds = {name.removeprefix("flowcontrol_"): each.type for name, each in families.items()}
        assert kinds == {
            "build_info": "gauge",
            "saturation": "gauge",
            "draining": "gauge",
            "endpoints": "gauge",
            "objectives": "gauge",
            "inbox_refusals": "counter",
            "unknown_objectives": "counter",
            "objective_errors": "counter",
            "endpoint_in_flight_requests": "gauge",
            "detector_saturation": "gauge",
            "detector_requests_limit": "gauge",
            "detector_limit_moves": "counter",
            "expected_wait_seconds": "gauge",
            "expected_wait_p90_seconds": "gauge",
            "waiting_requests": "gauge",
            "waiting_bytes": "gauge",
            "in_flight_requests": "gauge",
            "flows": "gauge",
            "band_ceiling": "gauge",
            "oldest_wait_seconds": "gauge",
            "band_requests_limit": "gauge",
            "band_bytes_limit": "gauge",
            "waiting_requests_limit": "gauge",
            "requests": "counter",
            "completed_requests": "counter",
            "wait_seconds": "histogram",
            "forecast_ratio": "histogram",
            "objective_responses": "counter",
            "objective_good_tokens": "counter",
            "processor_turn_seconds": "histogram",
            "processor_lag_seconds": "histogram",
            "loop_lag_seconds": "histogram",
        }
        assert all(each.documentation.endswith(".") for each in families.values())

    def test_nothing_yet(self) -> None:
        """An idle pool without bands has its pool metrics, and no series that would be stale."""
        got = [line for line in lines(rendered(EMPTY)) if "loop_lag" not in line]

        assert got[1:] == [
            "flowcontrol_saturation 0.0",
            "flowcontrol_draining 0.0",
            "flowcontrol_endpoints 0.0",
            "flowcontrol_objectives 0.0",
            "flowcontrol_inbox_refusals_total 4.0",
            "flowcontrol_unknown_objectives_total 0.0",
            "flowcontrol_objective_errors_total 2.0",
            *(
                f'flowcontrol_requests_total{{outcome="{o.value}",priority="0"}} 0.0'
                for o in Outcome
            ),
            'flowcontrol_completed_requests_total{priority="0"} 0.0',
        ]

    def test_objectives_begin_at_zero(self) -> None:
        """Where their responses will be reported: a rate misses a counter's first step."""
        snapshot = replace(EMPTY, objectives={"chat": 10})
        families = SnapshotCollector(snapshot, 0, 0, is_reported=True).collect()
        samples = [each for family in families for each in family.samples]

        counted = [
            (each.labels["objective"], each.labels["result"], each.value)
            for each in samples
            if each.name == "flowcontrol_objective_responses_total"
        ]
        words = ("good", "late", "failed", "abandoned")
        assert counted == [(name, word, 0) for name in ("", "chat") for word in words]
        silent = [line for line in lines(rendered(snapshot)) if "objective=" in line]
        assert silent == [], "but none where nothing reports them"

    def test_labels(self) -> None:
        """No label holds what a client says: only what operators declare."""
        families = text_string_to_metric_families(rendered(SNAPSHOT))

        labels = {name for each in families for sample in each.samples for name in sample.labels}
        assert labels == {
            *("priority", "outcome", "endpoint", "le", "version"),
            *("objective", "result", "stage", "detector", "direction"),
        }

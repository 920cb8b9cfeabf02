"""Every metric line of known accounts."""

from prometheus_client import CollectorRegistry, generate_latest

from flowcontrol.events import EndpointsChanged, LoadObserved
from flowcontrol.views.snapshot import EndpointSnapshot, Snapshot
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.log_join import Claim, LogJoin
from flowcontrol_server.requests.pool_view import PoolView
from flowcontrol_server.requests.tickets import TICKETS
from flowcontrol_server.telemetry.metrics import registry_of
from flowcontrol_server.telemetry.settlement_metrics import SettlementCollector

A = "10.0.0.1:80"
NOW_NS = 1_000_000_000
SNAPSHOT = Snapshot(
    saturation=0.0,
    waiting=0,
    waiting_bytes=0,
    in_flight=2,
    is_draining=False,
    bands=(),
    totals={},
    endpoints=(EndpointSnapshot(A, 2, 64),),
    objectives={},
    unknown_objectives=0,
)
EMPTY = """\
flowcontrol_access_log_streams 0.0
flowcontrol_awaited_settlements 0.0
flowcontrol_access_log_streams_opened_total 0.0
flowcontrol_access_log_streams_refused_total 0.0
flowcontrol_bounded_settlements_total 0.0
flowcontrol_lost_settlements_total 0.0
flowcontrol_access_log_entries_total{result="settled"} 0.0
flowcontrol_access_log_entries_total{result="unknown"} 0.0
flowcontrol_access_log_entries_total{result="foreign"} 0.0
flowcontrol_access_log_entries_total{result="recovered"} 0.0
flowcontrol_access_log_entries_total{result="forged"} 0.0
flowcontrol_access_log_entries_total{result="malformed"} 0.0
"""
FULL = """\
flowcontrol_access_log_streams 1.0
flowcontrol_awaited_settlements 1.0
flowcontrol_access_log_streams_opened_total 1.0
flowcontrol_access_log_streams_refused_total 0.0
flowcontrol_bounded_settlements_total 0.0
flowcontrol_lost_settlements_total 1.0
flowcontrol_access_log_entries_total{result="settled"} 2.0
flowcontrol_access_log_entries_total{result="unknown"} 1.0
flowcontrol_access_log_entries_total{result="foreign"} 0.0
flowcontrol_access_log_entries_total{result="recovered"} 0.0
flowcontrol_access_log_entries_total{result="forged"} 0.0
flowcontrol_access_log_entries_total{result="malformed"} 0.0
flowcontrol_responses_total{priority="10",status="2xx"} 1.0
flowcontrol_responses_total{priority="10",status="3xx"} 0.0
flowcontrol_responses_total{priority="10",status="4xx"} 0.0
flowcontrol_responses_total{priority="10",status="5xx"} 1.0
flowcontrol_responses_total{priority="10",status="none"} 0.0
flowcontrol_tokens_total{kind="input",priority="10"} 11.0
flowcontrol_tokens_total{kind="cached",priority="10"} 0.0
flowcontrol_tokens_total{kind="output",priority="10"} 7.0
flowcontrol_body_bytes_total{direction="request",priority="10"} 5.0
flowcontrol_body_bytes_total{direction="response",priority="10"} 6.0
flowcontrol_unmetered_responses_total{priority="10"} 0.0
flowcontrol_ttft_seconds_bucket{le="0.01",priority="10"} 0.0
flowcontrol_ttft_seconds_bucket{le="0.025",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="0.05",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="0.1",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="0.25",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="0.5",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="1.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="2.5",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="5.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="10.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="30.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="60.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="120.0",priority="10"} 1.0
flowcontrol_ttft_seconds_bucket{le="+Inf",priority="10"} 1.0
flowcontrol_ttft_seconds_count{priority="10"} 1.0
flowcontrol_ttft_seconds_sum{priority="10"} 0.02
flowcontrol_engine_requests{endpoint="10.0.0.1:80"} 5.0
flowcontrol_endpoint_responses_total{endpoint="10.0.0.1:80",result="success"} 1.0
flowcontrol_endpoint_responses_total{endpoint="10.0.0.1:80",result="failure"} 1.0
flowcontrol_in_flight_drift_requests 3.0
"""


def samples(
    settlement: LogJoin, view: PoolView, now_ns: int, snapshot: Snapshot | None = SNAPSHOT
) -> str:
    """The lines that carry values."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SettlementCollector(settlement, view, snapshot, now_ns))
    lines = generate_latest(registry).decode().splitlines()
    return "\n".join([*(line for line in lines if line[:1] != "#"), ""])


class TestCollect:
    """What is rendered."""

    def test_nothing_yet(self) -> None:
        """Counters of the log are there from the start, at zero."""
        settlement = LogJoin(10, lambda _id: None, lambda _settled: None)

        assert samples(settlement, PoolView(), 0) == EMPTY

    def test_everything(self) -> None:
        """Two settled, one lost, one awaited, and an endpoint that has more than we know of."""
        view = PoolView()
        view.notice(EndpointsChanged((A,)), 0)
        view.notice(LoadObserved(A, waiting=1, running=4, kv_usage=0.5), 0)
        settlement = LogJoin(10, lambda _id: Claim(10), lambda _: None, answered=view.answered)
        settlement.stream_opened()
        settlement.request_ended(3, Claim(10), now_ns=0)
        settlement.request_ended(4, Claim(10), now_ns=5)
        good = LogEntry(
            TICKETS.issue(1).decode(),
            200,
            is_success=True,
            ttft_us=20_000,
            input_tokens=11,
            output_tokens=7,
            request_bytes=5,
            response_bytes=6,
            endpoint=A,
        )
        settlement.take(good, NOW_NS)
        settlement.take(
            LogEntry(TICKETS.issue(2).decode(), 503, is_success=False, is_failure=True, endpoint=A),
            NOW_NS,
        )
        settlement.take(good, NOW_NS)

        assert samples(settlement, view, 10) == FULL

    def test_counters_begin_at_zero(self) -> None:
        """Where the log will report: a rate misses a counter's first step."""
        view = PoolView()
        view.notice(EndpointsChanged((A, "model-a:8000")), 0)
        settlement = LogJoin(10, lambda _id: None, lambda _settled: None)
        collector = SettlementCollector(settlement, view, SNAPSHOT, 0, is_reported=True)
        said = generate_latest(registry_of([collector])).decode()

        for series in (
            'flowcontrol_responses_total{priority="0",status="5xx"} 0.0',
            'flowcontrol_tokens_total{kind="output",priority="0"} 0.0',
            'flowcontrol_ttft_seconds_count{priority="0"} 0.0',
            f'flowcontrol_endpoint_responses_total{{endpoint="{A}",result="failure"}} 0.0',
        ):
            assert series in said.splitlines()
        assert "model-a" not in said, "the log names IP addresses alone"
        assert f'endpoint="{A}"' not in samples(settlement, view, 0), "but not where it will not"

    def test_standby(self) -> None:
        """What the leader has dispatched has not passed by the gate."""
        view = PoolView()
        view.notice(EndpointsChanged((A,)), 0)
        view.notice(LoadObserved(A, waiting=1, running=8, kv_usage=0.5), 0)
        said = samples(LogJoin(10, lambda _id: None, lambda _settled: None), view, 10, None)

        assert 'flowcontrol_engine_requests{endpoint="10.0.0.1:80"} 9.0' in said
        assert "drift" not in said

"""Spans as a collector receives them, over the real exporters."""

import logging
import time
from typing import Any

import pytest
import structlog
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from structlog.testing import capture_logs

from flowcontrol.errors import FlowControlError
from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.config.settings import Traces
from flowcontrol_server.requests.classify import classify
from flowcontrol_server.requests.parked import Parked, trace_of
from flowcontrol_server.telemetry.otel import SPAN, RequestTraces
from flowcontrol_server.telemetry.traces import open_traces
from tests.support.otlp import Collector, over_grpc, over_http, plain

MILLISECOND = 1_000_000
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of OpenTelemetry's but what the test says."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # spans come when it is closed


def parked(trace: dict[str, str] | None = None, path: str = "/v1/chat/completions") -> Parked:
    """A request of 100 bytes that was decided just now."""
    headers = {":path": path, "content-length": "100", "x-llm-d-inference-objective": "chat"}
    body = {"flowcontrol.request": {"model": "llama", "max_tokens": 64.0}}
    request = classify(headers, body)
    request.request_id = 7
    return Parked(request, path=path, decided_ns=time.monotonic_ns(), trace=trace)


def decision(outcome: Outcome, endpoint: str | None = None) -> Decision:
    """A decision after 250 ms."""
    waited_ns = 0 if outcome is Outcome.REJECTED_CAPACITY else 250 * MILLISECOND
    return Decision(7, outcome, 10, "tenant-a", waited_ns, endpoint, saturation=0.5, waiting=3)


async def reported(
    collector: Collector, *requests: tuple[Parked, Decision], continue_on_fault: bool = False
) -> list[tuple[dict[str, Any], Span]]:
    """Report some requests, close, and return what the collector has got by then."""
    traces = RequestTraces("llama")
    for each in requests:
        traces.request_ended(*each, continue_on_fault=continue_on_fault)
    await traces.close()
    return list(collector.spans())


class TestTraces:
    """One span a request."""

    async def test_dispatched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It tells when the request came, how long it waited, and where it went."""
        async with over_grpc() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            request = parked({"traceparent": TRACEPARENT})
            before_ns = time.time_ns()
            ((resource, span),) = await reported(
                collector, (request, decision(Outcome.DISPATCHED, "[::1]:8000"))
            )

        assert resource["service.name"] == "flowcontrol"
        assert span.name == SPAN
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        assert span.end_time_unix_nano - span.start_time_unix_nano == 250 * MILLISECOND
        assert abs(span.end_time_unix_nano - before_ns) < 10_000 * MILLISECOND
        assert plain(span.attributes) == {
            "flow_control.pool": "llama",
            "flow_control.request_id": 7,
            "flow_control.priority": 10,
            "flow_control.flow_id": "tenant-a",
            "flow_control.objective": "chat",
            "flow_control.outcome": "dispatched",
            "flow_control.saturation": 0.5,
            "flow_control.request_bytes": 100,
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "llama",
            "gen_ai.request.max_tokens": 64,
            "server.address": "::1",
            "server.port": 8000,
        }
        assert [(event.name, event.time_unix_nano) for event in span.events] == [
            ("queued", span.start_time_unix_nano),
            ("dispatched", span.end_time_unix_nano),
        ]
        assert plain(span.events[1].attributes) == {"flow_control.waiting": 3}
        assert span.status.code == Status.STATUS_CODE_UNSET

    @pytest.mark.parametrize(
        ("outcome", "events", "reason", "status"),
        [
            (Outcome.EVICTED_TTL, ["queued", "evicted"], "rejected-ttl-expired", 429),
            (Outcome.REJECTED_CAPACITY, ["rejected"], "rejected-saturated", 429),
            (Outcome.INTERNAL, ["queued", "internal"], "internal", 500),
            (Outcome.RECLAIMED, ["queued", "dispatched"], "evicted", 429),
        ],
    )
    async def test_refused(
        self,
        monkeypatch: pytest.MonkeyPatch,
        outcome: Outcome,
        events: list[str],
        reason: str,
        status: int,
    ) -> None:
        """A refusal is an error with its reason; without a parent it begins a trace."""
        async with over_http() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            ((_, span),) = await reported(collector, (parked(path="/"), decision(outcome)))

        assert [event.name for event in span.events] == events
        attributes = plain(span.attributes)
        assert attributes["error.type"] == reason
        assert attributes["http.response.status_code"] == status
        assert "gen_ai.operation.name" not in attributes
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert not span.parent_span_id

    async def test_moved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What another replica decides is no error: its client hears nothing of it."""
        async with over_grpc() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            moved = parked(), decision(Outcome.EVICTED_MOVED)
            ((_, span),) = await reported(collector, moved)

        assert [event.name for event in span.events] == ["queued", "evicted"]
        assert "error.type" not in plain(span.attributes)
        assert span.status.code == Status.STATUS_CODE_UNSET

    async def test_every_outcome(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has its span."""
        async with over_grpc() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            spans = await reported(collector, *((parked(), decision(each)) for each in Outcome))

        told = [plain(span.attributes)["flow_control.outcome"] for _, span in spans]
        assert told == [each.value for each in Outcome]

    async def test_let_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What went on although the engine had failed is an error, but was told no status."""
        async with over_grpc() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            fault = parked(), decision(Outcome.INTERNAL)
            ((_, span),) = await reported(collector, fault, continue_on_fault=True)

        attributes = plain(span.attributes)
        assert attributes["error.type"] == "internal"
        assert "http.response.status_code" not in attributes

    async def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Name, resource and sampler are the environment's; an unsampled parent is respected."""
        monkeypatch.setenv("OTEL_SERVICE_NAME", "gate-of-llama")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        unsampled = parked({"traceparent": TRACEPARENT[:-1] + "0"})
        async with over_grpc() as (collector, address):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
            dispatched = decision(Outcome.DISPATCHED)
            got = await reported(collector, (unsampled, dispatched), (parked(), dispatched))
            monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
            everything = await reported(collector, (parked(), dispatched))

        ((resource, _),) = got
        assert resource["service.name"] == "gate-of-llama"
        assert resource["deployment.environment.name"] == "test"
        assert everything == got

    async def test_nobody_collects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A collector that is away is complained about in the log, and holds nothing up."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        structlog.reset_defaults()
        with capture_logs() as logs:
            await reported(Collector(), (parked(), decision(Outcome.DISPATCHED)))

        assert {line["event"] for line in logs} == {"traces_not_exported"}

    async def test_complaints_are_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """What the SDK logs is one line of ours, with its traceback, and no second one."""
        logger = logging.getLogger("opentelemetry.sdk.trace.export")
        traces = RequestTraces("llama")
        with capture_logs() as logs:
            logger.warning("failed to export")
            logger.error("failed to export", exc_info=ValueError("of what was sent"))
        said = list(caplog.records)
        await traces.close()
        logger.warning("later")

        assert [line["error"] for line in logs] == ["failed to export"] * 2
        assert "of what was sent" in str(logs[1]["exc_info"])
        assert said == []
        assert [record.getMessage() for record in caplog.records] == ["later"]


class TestEnvironment:
    """What the environment asks for and cannot be had."""

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "could not convert string to float: '10s'"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip", 'Invalid value "zip"'),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "must be grpc or http/protobuf"),
        ],
    )
    def test_refused(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
    ) -> None:
        """One line says why, and which variables are set; their values may be secret."""
        monkeypatch.setenv(name, value)

        with pytest.raises(FlowControlError) as refused:
            open_traces(Traces(exporter="otlp"), "llama")

        rule = f"traces.exporter: cannot start with OTEL_BSP_SCHEDULE_DELAY, {name}: "
        assert str(refused.value).startswith(rule)
        assert reason in str(refused.value)

    def test_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A variable without a value is one that is not set."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")

        with pytest.raises(FlowControlError, match="got 'http/json'"):
            open_traces(Traces(exporter="otlp"), "llama")


class TestTraceOf:
    """Whose span the parent is."""

    FIELDS = ("traceparent", "tracestate")

    def test_envoy_first(self) -> None:
        """Envoy's own span, in the metadata of the stream, comes before the client's."""
        metadata: dict[str, str | bytes] = {"traceparent": "envoy", "user-agent": "x"}
        headers = {"traceparent": "client", "tracestate": "client"}

        assert trace_of(self.FIELDS, metadata, headers) == {"traceparent": "envoy"}

    def test_client(self) -> None:
        """Where Envoy does not trace the client's counts."""
        headers = {"traceparent": "client", ":path": "/"}

        assert trace_of(self.FIELDS, {}, headers) == {"traceparent": "client"}

    def test_nobody(self) -> None:
        """No trace is no trace."""
        assert trace_of(self.FIELDS, {}, {}) == {}

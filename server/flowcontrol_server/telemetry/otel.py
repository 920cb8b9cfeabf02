"""Traces: a span for the wait of each request, exported when the request has ended.

All variables that OpenTelemetry's SDK reads apply: OTEL_EXPORTER_OTLP_ENDPOINT and its relatives,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_PROPAGATORS, OTEL_BSP_*. The
parent of the span comes from the metadata of the ext_proc stream, if Envoy traces, and otherwise
from the headers of the client. This module is not imported while traces are off.
"""

import asyncio
import logging
import os
import time
from importlib.metadata import version
from threading import Thread
from typing import Final, final

import structlog
from opentelemetry.propagate import get_global_textmap
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from flowcontrol.events import Decision
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.replies import REFUSALS, status_of

SPAN = "flow_control.wait"
_FLUSH_S = 5.0
"""Longest time at the end for the last spans to reach the collector."""
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Path to gen_ai.operation.name, by OpenTelemetry's conventions for generative AI."""
_SDK: Final = logging.getLogger("opentelemetry")
_log = structlog.get_logger()


@final
class RequestTraces:
    """Reports spans to an OTLP collector.

    Args:
        pool: named in every span.
        exporter: used in place of the one that the environment selects.
    """

    def __init__(self, pool: str, exporter: SpanExporter | None = None) -> None:
        own = Resource({"service.name": "flowcontrol", "service.version": version("flowcontrol")})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter()))
        self._tracer = self._provider.get_tracer("flowcontrol", version("flowcontrol"))
        self._propagator = get_global_textmap()
        self._pool = pool
        self._sdk_log = _SdkLog()
        _SDK.addHandler(self._sdk_log)
        _SDK.propagate = False  # otherwise each message is logged twice

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the headers that carry a trace's context."""
        return tuple(sorted(self._propagator.fields))

    def request_ended(
        self, parked: Parked, decision: Decision, *, continue_on_fault: bool = False
    ) -> None:
        """Export the span of a request that has been decided and has ended."""
        decided_ns = parked.decided_ns + time.time_ns() - time.monotonic_ns()
        arrived_ns = decided_ns - decision.waited_ns
        span = self._tracer.start_span(
            SPAN,
            context=self._propagator.extract(parked.trace or {}),
            kind=SpanKind.INTERNAL,
            attributes=self._attributes(parked, decision),
            start_time=arrived_ns,
        )
        if span.is_recording():
            outcome = decision.outcome
            kind = "dispatched" if outcome.was_dispatched else outcome.value.partition("-")[0]
            if kind != "rejected":
                span.add_event("queued", timestamp=arrived_ns)
            span.add_event(kind, {"flow_control.waiting": decision.waiting}, decided_ns)
            refused = REFUSALS.get(outcome)  # None for a moved request: its client gets no error
            if refused is not None:
                span.set_attribute("error.type", refused.reason)
                status = status_of(outcome, continue_on_fault=continue_on_fault)
                if status is not None:
                    span.set_attribute("http.response.status_code", status)
                span.set_status(Status(StatusCode.ERROR, refused.message))
        span.end(decided_ns)

    async def close(self) -> None:
        """Export the remaining spans, within a few seconds."""
        flushing = Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        flushing.start()
        await asyncio.to_thread(flushing.join, _FLUSH_S)
        _SDK.propagate = True
        _SDK.removeHandler(self._sdk_log)

    def _attributes(self, parked: Parked, decision: Decision) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "flow_control.pool": self._pool,
            "flow_control.request_id": parked.request_id,
            "flow_control.priority": decision.priority,
            "flow_control.flow_id": decision.flow_id,
            "flow_control.outcome": decision.outcome.value,
            "flow_control.saturation": decision.saturation,
            "flow_control.request_bytes": parked.request.byte_size,
        }
        if parked.request.objective is not None:
            attributes["flow_control.objective"] = parked.request.objective
        operation = _OPERATIONS.get(parked.path)
        if operation is not None:
            attributes["gen_ai.operation.name"] = operation
        if parked.request.model:
            attributes["gen_ai.request.model"] = parked.request.model
        if parked.request.output_tokens_max is not None:
            attributes["gen_ai.request.max_tokens"] = parked.request.output_tokens_max
        if decision.endpoint is not None:
            host, _, port = decision.endpoint.rpartition(":")
            attributes["server.address"] = host.strip("[]")
            attributes["server.port"] = int(port)
        return attributes


def _exporter() -> SpanExporter:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, names)), "grpc")
    if protocol not in {"grpc", "http/protobuf"}:
        message = f"the protocol must be grpc or http/protobuf, got {protocol!r}"
        raise ValueError(message)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import (  # noqa: PLC0415 - one of two
            trace_exporter as over_http,
        )

        return over_http.OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.grpc import (  # noqa: PLC0415 - one of two
        trace_exporter as over_grpc,
    )

    return over_grpc.OTLPSpanExporter()


@final
class _SdkLog(logging.Handler):
    """Writes warnings of the SDK to our log, as JSON, such as an unreachable collector."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one warning."""
        if record.levelno >= logging.WARNING:
            error = record.getMessage()
            _log.warning("traces_not_exported", error=error, exc_info=record.exc_info)

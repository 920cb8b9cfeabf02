"""One trace from Envoy's span to ours, as a collector receives it from both."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from flowcontrol_server.telemetry.otel import SPAN
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually
from tests.support.otlp import Collector, over_grpc, plain
from tests.support.ports import HOST, free_port

pytestmark = pytest.mark.e2e

EXPORTED_S = 15.0
CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
REQUEST_ID = "6bc9fb1a-7a9d-9c2f-9f3e-0d1f7a3f5c11"
"""A UUID with a 9 where Envoy notes that the request is sampled; what is no UUID is not traced."""


class Traced(NamedTuple):
    """A gateway whose Envoy and service report to one collector."""

    gateway: Gateway
    collector: Collector


@pytest.fixture
async def traced(start: Start, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    """A gateway of one slot that traces."""
    port = free_port()

    def edit(configuration: dict[str, Any]) -> None:
        """Let Envoy report to the collector."""
        at_once = {"tracing.opentelemetry.min_flush_spans": 1}
        layers = [{"name": "static", "static_layer": at_once}]
        configuration["layered_runtime"] = {"layers": layers}
        resources = configuration["static_resources"]
        resources["clusters"].append(_collector_cluster(port))
        (chain,) = resources["listeners"][0]["filter_chains"]
        chain["filters"][0]["typed_config"]["tracing"] = {
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}},
                    "service_name": "envoy",
                },
            }
        }

    async with over_grpc(port) as (collector, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        spec = Spec(settings={"traces": {"exporter": "otlp"}}, edit_envoy=edit)
        yield Traced(await start(spec), collector)


def _collector_cluster(port: int) -> dict[str, Any]:
    options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    socket = {"socket_address": {"address": HOST, "port_value": port}}
    return {
        "name": "collector",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "collector",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket}}]}],
        },
    }


class TestTrace:
    """A request that waited for another."""

    async def test_whole(self, traced: Traced) -> None:
        """Our span is a descendant of Envoy's, that of the client's, and as long as the wait."""
        gateway, collector = traced
        _, occupying = await gateway.occupy()
        sent = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}
        caller = await gateway.call(flow_id="waiter", name=REQUEST_ID, headers=sent)
        await gateway.until(waiting=1)
        await occupying.respond()
        await (await gateway.next_call()).respond()
        await caller.reply()
        decided = await gateway.decided(REQUEST_ID)

        def whole_trace() -> dict[str, Any]:
            """Return the client's trace by span id, once ours and Envoy's are there."""
            spans = {
                span.span_id.hex(): (resource["service.name"], span)
                for resource, span in collector.spans()
                if span.trace_id.hex() == CLIENT_TRACE
            }
            names = {name for name, _ in spans.values()}
            is_whole = names == {"flowcontrol", "envoy"} and any(
                span.parent_span_id.hex() == CLIENT_SPAN for _, span in spans.values()
            )
            return spans if is_whole else {}

        spans = await eventually(whole_trace, EXPORTED_S, "the whole trace")
        (ours,) = [span for name, span in spans.values() if name == "flowcontrol"]
        line = [ours.span_id.hex()]
        while line[-1] in spans:
            line.append(spans[line[-1]][1].parent_span_id.hex())

        assert ours.name == SPAN
        assert line[-1] == CLIENT_SPAN
        assert [spans[each][0] for each in line[1:-1]] == ["envoy"] * (len(line) - 2)
        assert len(line) >= 3
        waited_ms = (ours.end_time_unix_nano - ours.start_time_unix_nano) / 1e6
        assert waited_ms == pytest.approx(decided["waited_ms"], abs=0.01)
        assert [event.name for event in ours.events] == ["queued", "dispatched"]
        assert plain(ours.attributes)["flow_control.flow_id"] == "waiter"

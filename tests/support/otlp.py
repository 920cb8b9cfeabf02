"""A collector of traces: receives the exports of an OTLP exporter over real gRPC or HTTP."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, final

import grpc
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as api
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"

_GRACE_S = 5.0
"""Time for exports in progress when the collector ends."""


@final
class Collector:
    """Keeps the spans it receives."""

    def __init__(self) -> None:
        self.batches: list[api.ExportTraceServiceRequest] = []

    def spans(self) -> Iterator[tuple[dict[str, Any], Span]]:
        """Yield each span with the attributes of its resource."""
        for batch in self.batches:
            for of_resource in batch.resource_spans:
                resource = plain(of_resource.resource.attributes)
                for of_scope in of_resource.scope_spans:
                    yield from ((resource, span) for span in of_scope.spans)

    def named(self, name: str) -> list[Span]:
        """Return the spans of a name."""
        return [span for _, span in self.spans() if span.name == name]

    def take(self, batch: bytes) -> bytes:
        """Receive an export; return the response."""
        self.batches.append(api.ExportTraceServiceRequest.FromString(batch))
        return api.ExportTraceServiceResponse().SerializeToString()


def plain(attributes: Any) -> dict[str, Any]:
    """Return attributes by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@asynccontextmanager
async def over_grpc(port: int = 0) -> AsyncIterator[tuple[Collector, str]]:
    """A collector on a port of this machine, and its address."""
    collector = Collector()

    async def export(request: bytes, _context: Any) -> bytes:
        """Receive a batch."""
        return collector.take(request)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(export)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_EXPORT, {"Export": handler}),)
    )
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(_GRACE_S)  # else exports in progress fail and are logged


@asynccontextmanager
async def over_http() -> AsyncIterator[tuple[Collector, str]]:
    """A collector on a port of this machine, and its address."""
    collector = Collector()

    async def export(request: web.Request) -> web.Response:
        """Receive a batch."""
        answer = collector.take(await request.read())
        return web.Response(body=answer, content_type="application/x-protobuf")

    application = web.Application()
    application.router.add_post("/v1/traces", export)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield collector, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()

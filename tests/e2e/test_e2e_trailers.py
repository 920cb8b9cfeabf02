"""Model servers that really send trailers: gRPC through the gateway, as Triton is spoken to."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from flowcontrol_server.common.addresses import Address
from tests.e2e.conftest import Start
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.gateway_shapes import SHAPES
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
Infer = Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]
END: object = getattr(grpc.aio, "EOF")  # noqa: B009 - its stubs do not know it


def open_channel(address: Address) -> Any:
    """Return a channel; as Any, because its stubs ask for more than it needs."""
    return grpc.aio.insecure_channel(str(address))


SPECS = {
    "ours": Spec(is_http2=True),
    "original-dst": Spec(is_http2=True, original_dst=True, picker="least-loaded"),
    **{
        shape.__name__: Spec(
            picker="least-loaded",
            is_http2=True,
            edit_envoy=shape,
            settings={"tls": {"selfSigned": True}},
        )
        for shape in SHAPES
    },
}
"""The product's own wiring, and that of each gateway."""


@contextlib.asynccontextmanager
async def serving(gateway: Gateway, infer: Infer) -> AsyncIterator[None]:
    """Put a model server that speaks gRPC in the place of the scripted one."""
    await gateway.backends[0].close()
    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(str(gateway.stack.endpoints[0]))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@pytest.fixture(params=SPECS)
async def gateway(start: Start, request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    """A gateway to a model server that speaks gRPC: it answers each request with two messages."""

    async def infer(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message + b" one"
            yield message + b" two"
        context.set_trailing_metadata((("x-tokens", "2"),))

    gateway = await start(SPECS[request.param])
    async with serving(gateway, infer):
        yield gateway


class TestGrpcThroughTheGateway:
    """One stack for the whole story: it takes seconds to start."""

    async def test_trailers_pass_and_slots_come_back(self, gateway: Gateway) -> None:
        """A stream ends with its trailers and frees its slot; a refusal is a status of gRPC.

        Envoy shows trailers to the service and holds them back until it is told to let them pass.
        """
        async with open_channel(gateway.stack.gateway) as channel:
            infer = channel.stream_stream(METHOD)
            occupant = infer(metadata=(("x-request-id", "occupant"),))
            await occupant.write(b"first")
            received = [await occupant.read(), await occupant.read()]
            held = await gateway.snapshot()
            impatient = infer(metadata=(("x-llm-d-inference-ttl", "200ms"),))
            await impatient.write(b"never")
            refused = await impatient.code()
            details = await impatient.details()
            await occupant.done_writing()
            end = await occupant.read()
            trailers = dict(await occupant.trailing_metadata())
            await gateway.until(in_flight=0, within_s=FREED_S)
            line = await gateway.decided("occupant")

        assert received == [b"first one", b"first two"]
        assert held.in_flight == 1
        assert (end, trailers["x-tokens"]) == (END, "2")
        assert await occupant.code() == grpc.StatusCode.OK
        assert refused == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "rejected-ttl-expired" in details
        assert line["outcome"] == "dispatched"


class TestErrors:
    """gRPC sends its errors in trailers, behind status 200 of HTTP."""

    @pytest.mark.parametrize(
        ("code", "has_begun", "status"),
        [
            (grpc.StatusCode.OK, True, "2xx"),
            (grpc.StatusCode.INVALID_ARGUMENT, False, "4xx"),
            (grpc.StatusCode.UNAVAILABLE, False, "5xx"),
            (grpc.StatusCode.INTERNAL, True, "5xx"),
        ],
    )
    async def test_counted(
        self, start: Start, code: grpc.StatusCode, status: str, *, has_begun: bool
    ) -> None:
        """One that the model server sends is no success, before its first message or after."""

        async def infer(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for message in messages:
                if has_begun:
                    yield message
            if code is not grpc.StatusCode.OK:
                await context.abort(code, "as the test wants")

        gateway = await start(SPECS["ours"])
        async with serving(gateway, infer), open_channel(gateway.stack.gateway) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(b"first")
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.done_writing()
                while await call.read() is not END:
                    pass
            received = await call.code()
            await gateway.until_so(lambda snapshot: snapshot.settlements.received == 1)
        counts = (await gateway.metrics()).items()
        name = "flowcontrol_responses_total"
        found = [each for each, count in counts if each.startswith(name) and count]

        assert received == code
        assert found == [f'{name}{{priority="0",status="{status}"}}']

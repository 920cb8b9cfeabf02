"""What the gRPC port reads of a caller, and what is too much."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from flowcontrol_server.doors.grpc_ports import GRPC_OPTIONS, MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from flowcontrol_server.requests.classify import NAME_LENGTH_MAX, classify, client_request_id_of

TIMEOUT_S = 20.0


@asynccontextmanager
async def call() -> AsyncIterator[Any]:
    """A call, bytes to bytes, of a server with the service's options that says how much came."""

    async def measure(request: bytes, _context: Any) -> bytes:
        """Say how long it was."""
        return str(len(request)).encode()

    server = grpc.aio.server(options=GRPC_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(measure)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Measure", {"Measure": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            anything: Any = channel
            yield anything.unary_unary("/test.Measure/Measure")
    finally:
        await server.stop(None)


class TestGrpcOptions:
    """Limits of one call."""

    async def test_message(self) -> None:
        """A message of the limit is read, a byte more is not."""
        async with call() as measure:
            most = b"x" * MESSAGE_BYTES_MAX
            assert await measure(most, timeout=TIMEOUT_S) == str(MESSAGE_BYTES_MAX).encode()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await measure(most + b"x", timeout=TIMEOUT_S)

        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_metadata(self) -> None:
        """Metadata beyond the limit ends the call, and only that call."""
        too_much = (("x-padding", "x" * METADATA_BYTES_MAX),)
        async with call() as measure:
            with pytest.raises(grpc.aio.AioRpcError):
                await measure(b"", metadata=too_much, timeout=TIMEOUT_S)
            assert await measure(b"", timeout=TIMEOUT_S) == b"0"


class TestNames:
    """Names of a client's."""

    @pytest.mark.parametrize(
        ("header", "field"),
        [
            ("x-llm-d-inference-fairness-id", "flow_id"),
            ("x-llm-d-inference-objective", "objective"),
        ],
    )
    def test_length(self, header: str, field: str) -> None:
        """They are cut to a length that logs and labels can bear."""
        facts = classify({header: "x" * 10_000})

        assert getattr(facts, field) == "x" * NAME_LENGTH_MAX

    def test_length_of_request_id(self) -> None:
        """So is the client's own id of its request."""
        assert client_request_id_of({"x-request-id": "x" * 10_000}) == "x" * NAME_LENGTH_MAX

"""A real Envoy shows its secret on every stream, and nobody without it holds a slot or settles."""

from typing import Any

import grpc
import pytest

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.requests import codec, log_codec
from tests.e2e.conftest import Start
from tests.e2e.harness import Spec, Stack, eventually

pytestmark = pytest.mark.e2e

SECRET = "known+to/envoy.alone~0_-="
"""With every sign that it may have."""


def write_secret(stack: Stack) -> None:
    """Write the file beside the service's configuration."""
    (stack.directory / "secret").write_text(f"{SECRET}\n")


SPEC = Spec(prepare=write_secret, listen={"secretFile": "secret"})


async def status_of(address: Address, path: str) -> grpc.StatusCode:
    """How a stream of somebody's ends that shows nothing."""
    async with grpc.aio.insecure_channel(str(address)) as channel:
        untyped: Any = channel  # its stubs want what has defaults
        code = await untyped.stream_stream(path)(timeout=20).code()
        assert isinstance(code, grpc.StatusCode)
        return code


async def test_secret(start: Start) -> None:
    """Envoy's request is dispatched and settled; a stranger's streams are refused at each port."""
    gateway = await start(SPEC)
    caller = await gateway.call()
    call = await gateway.next_call()
    await call.respond()
    reply = await caller.reply()

    async def is_settled() -> bool:
        name = 'flowcontrol_access_log_entries_total{result="settled"}'
        return await gateway.metric(name) == 1

    await eventually(is_settled, what="the settlement")
    process = f"/{codec.SERVICE}/Process"
    assert isinstance(gateway.stack.ext_proc, Address)
    assert reply.status == 200
    for address, path in (
        (gateway.stack.ext_proc, process),
        (gateway.stack.grpc, process),
        (gateway.stack.ext_proc, f"/{log_codec.SERVICE}/StreamAccessLogs"),
    ):
        assert await status_of(address, path) is grpc.StatusCode.UNAUTHENTICATED
    assert await gateway.metric("flowcontrol_access_log_streams_refused_total") == 1

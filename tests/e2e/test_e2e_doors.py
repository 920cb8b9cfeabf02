"""The direct door in its other shapes, and both doors open at once."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from flowcontrol_server.common import envoy_messages
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.doors.direct.calls import ProcessCall
from tests.e2e.client import fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e


async def is_healthy(gateway: Gateway) -> bool:
    """Return whether Envoy's health checks have passed at the door."""
    clusters = (await fetch(gateway.stack.admin, "/clusters")).body.decode()
    return f"ext_proc::{gateway.stack.door}::health_flags::healthy" in clusters


async def passes(gateway: Gateway) -> None:
    """Assert that requests are gated: one goes, one waits for its slot, a cancelled one is gone."""
    await eventually(lambda: is_healthy(gateway), what="Envoy finds the door healthy")
    first, serving = await gateway.occupy()
    second = await gateway.call(name="second")
    gone = await gateway.call(name="gone")
    await gateway.until(waiting=2, in_flight=1)
    gone.reset()
    await gateway.until(waiting=1, in_flight=1)
    await serving.respond(b"x" * 100_000)
    await (await gateway.next_call()).respond()

    assert (await first.reply()).body == b"x" * 100_000
    assert (await second.reply()).status == 200


class TestShapes:
    """A Unix socket; for TLS see test_e2e_tls."""

    async def test_unix_socket(self, start: Start) -> None:
        """Envoy reaches the service through a file; it is gone when the service is."""
        gateway = await start(Spec(is_socket=True))
        await passes(gateway)
        gateway.stack.service.send_signal(15)

        assert await gateway.stack.service.exited() == 0
        assert isinstance(gateway.stack.ext_proc, Path)
        assert not gateway.stack.ext_proc.exists()


class TestBoth:
    """One queue behind two doors."""

    async def test_one_queue(self, gateway: Gateway) -> None:
        """A slot taken through the one is not there for the other, and is when it is given back."""
        assert isinstance(gateway.stack.ext_proc, Address)
        message = envoy_messages.ProcessingRequest(request_headers={}).SerializeToString()
        async with grpc.aio.insecure_channel(str(gateway.stack.grpc)) as channel:
            open_stream: Any = channel.stream_stream
            process = open_stream(ProcessCall.PATH.decode())
            holding = process()
            await holding.write(message)
            await holding.read()
            waiting = await gateway.call(name="waiting")
            await gateway.until(waiting=1, in_flight=1)
            await holding.done_writing()
            call = await gateway.next_call()
            await call.respond()

            assert call.name == "waiting"
            assert (await waiting.reply()).status == 200

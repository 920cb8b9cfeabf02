"""flowcontrol as the gate, and behind it llm-d-router's endpoint picker as the picker.

Needs its binary: `go build ./cmd/epp` in a checkout of llm-d-router, named by FLOWCONTROL_TEST_EPP.
"""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from flowcontrol_server.common.addresses import Address
from tests.e2e.client import fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.gateway_shapes import with_other_picker
from tests.e2e.harness import Process, Spec, Stack, eventually
from tests.support.epp import BINARY, configuration, options
from tests.support.ports import HOST, free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not BINARY, reason="FLOWCONTROL_TEST_EPP names no binary"),
]

PROMPT = b'{"model": "llama", "messages": [{"role": "user", "content": "%s"}]}' % (
    b"Once. " * 10_000
)


@pytest.fixture
async def gateway(start: Start, tmp_path: Path) -> AsyncIterator[Gateway]:
    """Two slots in all; two endpoints, of which the other picker knows the second alone."""
    ports = [free_port() for _ in range(3)]

    def prepare(stack: Stack) -> None:
        (tmp_path / "epp.yaml").write_text(
            yaml.safe_dump(configuration(tmp_path, stack.endpoints[1:]))
        )

    gateway = await start(
        Spec(
            endpoints=2,
            prepare=prepare,
            edit_envoy=partial(with_other_picker, picker=Address(HOST, ports[0])),
        )
    )
    command = (BINARY, *options(tmp_path / "epp.yaml", *ports))
    picker = Process(command, tmp_path / "epp.log")
    try:
        metrics = Address(HOST, ports[2])
        await eventually(partial(fetch, metrics, "/metrics"), what="the other picker")
        yield gateway
    finally:
        picker.stop()


class TestGateAndPicker:
    """Each does its part."""

    async def test_picked(self, gateway: Gateway) -> None:
        """Every request goes where the picker says, its body and its response whole."""
        for _ in range(4):
            caller = await gateway.call(body=PROMPT)
            call = await gateway.next_call()
            await call.respond(b'{"choices": []}')
            reply = await caller.reply()

            assert call.endpoint == gateway.stack.endpoints[1]
            assert call.body == PROMPT
            assert (reply.status, reply.body) == (200, b'{"choices": []}')

    async def test_gated(self, gateway: Gateway) -> None:
        """A third request waits for a slot, by priority; a client cannot choose its endpoint."""
        wish = {"x-gateway-destination-endpoint": str(gateway.stack.endpoints[0])}
        for _ in range(2):
            await gateway.call(headers=wish, body=PROMPT)
        calls = [await gateway.next_call() for _ in range(2)]
        await gateway.call(objective="batch", name="batch", body=PROMPT)
        await gateway.until(waiting=1, in_flight=2)
        await gateway.call(objective="chat", name="chat", body=PROMPT)
        await gateway.until(waiting=2, in_flight=2)
        await calls[0].respond()
        calls.append(await gateway.next_call())
        await calls[1].respond()
        calls.append(await gateway.next_call())
        for call in calls[2:]:
            await call.respond()
        await gateway.until(waiting=0, in_flight=0)

        assert {call.endpoint for call in calls} == {gateway.stack.endpoints[1]}
        assert [call.name for call in calls[2:]] == ["chat", "batch"]

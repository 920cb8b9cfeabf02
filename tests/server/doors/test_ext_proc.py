"""The grpcio door: bodies that pass through it, and where another replica decides.

test_e2e_grpcio.py has the rest.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors import ext_proc
from flowcontrol_server.doors.call_context import STANDBY, CallContext
from flowcontrol_server.doors.ext_proc import ExtProcDoor
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked
from tests.support.direct import Stream, announcing, grpcio
from tests.support.gates import POOL, TIMEOUT_S, running_gate
from tests.support.gateway_clients import NginxGatewayFabric


@asynccontextmanager
async def opened(
    *, is_leader: bool = True, ended: list[tuple[Parked, Decision]] | None = None
) -> AsyncIterator[tuple[ExtProcDoor, FlowGate, grpc.aio.Channel]]:
    """A door without a pool behind it, its gate, and a channel to it."""
    async with running_gate(has_pool=False, ended=ended) as gate:
        door = ExtProcDoor(CallContext(gate=gate, may_decide=lambda: is_leader))
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((door.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpcio(port) as channel:
            yield door, gate, channel
        await server.stop(None)


async def _waiting(gate: FlowGate, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await gate.snapshot()).waiting != count:
            pass


async def test_facts() -> None:
    """What a body says is known of its request when it is parked, as at the direct door."""
    body = b'{"model": "llama", "max_tokens": 512, "messages": []}'
    message = envoy_messages.ProcessingRequest(request_body={"body": body, "end_of_stream": True})
    async with opened() as (_, gate, channel):
        stream = Stream(channel)
        await stream.say(announcing())
        await stream.say(message.SerializeToString())
        await _waiting(gate, 1)
        parked = gate.live(1)
        stream.call.cancel()
        await _waiting(gate, 0)

    assert parked is not None
    assert (parked.request.model, parked.request.output_tokens_max) == ("llama", 512)


async def test_no_body_comes() -> None:
    """A request whose body is late is parked without it, and leaves with its client."""
    async with opened() as (_, gate, channel):
        stream = Stream(channel)
        await stream.say(announcing())
        await _waiting(gate, 1)
        stream.call.cancel()
        await _waiting(gate, 0)


async def test_body_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose body is not JSON does not wait for it."""
    monkeypatch.setattr(ext_proc, "BODY_S", 10 * TIMEOUT_S)
    async with opened() as (_, gate, channel):
        stream = Stream(channel)
        await stream.say(announcing(content_type="audio/wav"))
        await _waiting(gate, 1)
        stream.call.cancel()
        await _waiting(gate, 0)


@pytest.mark.parametrize("body", [b"{}", None])
async def test_response_that_is_not_seen(body: bytes | None) -> None:
    """Its slot is kept for the time that is set, or until the door closes."""
    ended: list[tuple[Parked, Decision]] = []
    async with opened(ended=ended) as (door, gate, channel):
        gate.post(POOL)
        asking = NginxGatewayFabric(channel)
        await asking.ask(body)
        await asking.pick()
        kept = (await gate.snapshot()).in_flight
        door.close()
        async with asyncio.timeout(TIMEOUT_S):
            while (await gate.snapshot()).in_flight:
                pass

    assert kept == 1
    assert [decision.outcome for _, decision in ended] == [Outcome.DISPATCHED]


async def test_standby() -> None:
    """A client whose bodies pass through is refused; another request goes to the next replica."""
    async with opened(is_leader=False) as (_, _, channel):
        duplex, other = Stream(channel), Stream(channel)
        await duplex.say(announcing())
        response = await duplex.hear()
        await other.say(announcing("NONE"))

        assert response.immediate_response.status.code == 503
        assert await duplex.ending() == (grpc.StatusCode.OK, "")
        assert await other.ending() == (grpc.StatusCode.UNAVAILABLE, STANDBY)


async def test_stands_down() -> None:
    """The same of requests that wait when another replica takes over."""
    ended: list[tuple[Parked, Decision]] = []
    async with opened(ended=ended) as (door, gate, channel):
        duplex, other = Stream(channel), Stream(channel)
        await duplex.say(announcing())
        await other.say(announcing("NONE"))
        await _waiting(gate, 2)
        door.move_calls()
        response = await duplex.hear()

        assert response.immediate_response.status.code == 503
        assert await duplex.ending() == (grpc.StatusCode.OK, "")
        assert await other.ending() == (grpc.StatusCode.UNAVAILABLE, STANDBY)
    outcomes = {decision.outcome for _, decision in ended}
    assert outcomes == {Outcome.EVICTED_STOOD_DOWN, Outcome.EVICTED_MOVED}

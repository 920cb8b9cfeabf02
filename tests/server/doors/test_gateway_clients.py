"""Gateways that ask an endpoint picker with a client of their own, over TLS they do not verify."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from flowcontrol.config import Concurrency, ControllerConfig, Picker
from flowcontrol.events import EndpointsChanged
from flowcontrol.request import Outcome
from flowcontrol_server.doors.self_signed import self_signed_context
from flowcontrol_server.requests.codec import Encoder
from tests.support.direct import House, house
from tests.support.gateway_clients import Agentgateway, NginxGatewayFabric, unverified

SERVERS = ("10.0.0.5:8000", "10.0.0.6:8000")
CONFIG = ControllerConfig(detectors=(Concurrency(requests_max=1),), picker=Picker.LEAST_LOADED)
HOUR_NS = 3_600_000_000_000


@asynccontextmanager
async def picking(
    servers: tuple[str, ...] = SERVERS,
) -> AsyncIterator[tuple[House, grpc.aio.Channel]]:
    """A door with a slot at each of these, and a channel to it."""
    async with house(config=CONFIG, has_pool=False) as home:
        home.context.encoder = Encoder(picks=True)
        home.gate.post(EndpointsChanged(servers))
        port = await home.door.listen(("127.0.0.1", 0), self_signed_context(), takes_both=True)
        async with await unverified(port) as channel:
            yield home, channel


class TestNginxGatewayFabric:
    """It asks where to send a request, and tells nothing of the response."""

    async def test_picked(self) -> None:
        """A body that is sent whole, a request without one: each is sent somewhere."""
        async with picking() as (home, channel):
            home.context.unseen_ns = HOUR_NS
            for body in (b'{"model": "llama"}', None):
                asking = NginxGatewayFabric(channel)
                await asking.ask(body)
                assert (await asking.pick()).endpoint in SERVERS
            home.gate.release_unseen()

    @pytest.mark.parametrize("body", [b"{}", None])
    async def test_waits_for_a_slot(self, body: bytes | None) -> None:
        """A request whose response is not seen keeps its slot for the time that is set."""
        async with picking(SERVERS[:1]) as (home, channel):
            home.context.unseen_ns = HOUR_NS
            first, second = NginxGatewayFabric(channel), NginxGatewayFabric(channel)
            await first.ask(body)
            await first.pick()
            await home.until(in_flight=1)
            await second.ask(body)
            await home.until(waiting=1, in_flight=1)
            home.context.unseen_ns = 1
            home.gate.release_unseen()
            assert (await second.pick()).endpoint == SERVERS[0]
            await home.until(waiting=0, in_flight=0)

        assert home.outcomes == [Outcome.DISPATCHED] * 2

    async def test_ends_its_side_behind_the_answer(self) -> None:
        """A slot is kept as well where the answer was sent before the client ended its side."""
        async with picking(SERVERS[:1]) as (home, channel):
            home.context.unseen_ns = HOUR_NS
            asking = NginxGatewayFabric(channel)
            await asking.open(has_body=False)
            await home.until(in_flight=1)
            await asking.send(None)
            assert (await asking.pick()).endpoint == SERVERS[0]
            assert (await home.gate.snapshot()).in_flight == 1
            home.gate.release_unseen()

    async def test_body_behind_the_answer(self) -> None:
        """A slot is kept as well where the body comes after the headers have been answered."""
        async with picking(SERVERS[:1]) as (home, channel):
            home.context.unseen_ns = HOUR_NS
            first, second = NginxGatewayFabric(channel), NginxGatewayFabric(channel)
            await first.open(has_body=True)
            await home.until(in_flight=1)
            await first.send(b"{}")
            assert (await first.pick()).endpoint == SERVERS[0]
            await second.ask(b"{}")
            await home.until(waiting=1, in_flight=1)
            home.gate.release_unseen()
            assert (await second.pick()).endpoint == SERVERS[0]
            home.gate.release_unseen()

    async def test_without_a_body_waits(self) -> None:
        """One without a body waits for its turn although the gateway has ended its side."""
        async with picking(()) as (home, channel):
            asking = NginxGatewayFabric(channel)
            await asking.ask(None)
            await home.until(waiting=1)
            home.gate.post(EndpointsChanged(SERVERS))
            assert (await asking.pick()).endpoint in SERVERS

    async def test_cancelled(self) -> None:
        """A client that goes away while its request waits gives up its place."""
        async with picking(()) as (home, channel):
            asking = NginxGatewayFabric(channel)
            await asking.ask(b"{}")
            await home.until(waiting=1)
            asking.cancel()
            await home.until(waiting=0)

        assert home.outcomes == [Outcome.EVICTED_CANCELLED]

    async def test_closing(self) -> None:
        """A door that closes keeps no slot for it."""
        async with picking() as (home, channel):
            home.context.unseen_ns = HOUR_NS
            asking = NginxGatewayFabric(channel)
            await asking.ask(b"{}")
            await asking.pick()

        assert home.outcomes == [Outcome.DISPATCHED]


class TestAgentgateway:
    """It streams both bodies through, and says who served the request."""

    async def test_whole(self) -> None:
        """Both bodies come back whole, and the slot is where the request was served."""
        body, answer = [b"a" * 70_000, b"b" * 70_000, b""], [b"data: 1\n\n", b"data: 2\n\n"]
        async with picking() as (home, channel):
            asking = Agentgateway(channel)
            await asking.open()
            await asking.send(body)
            picked = await asking.picked()
            assert await asking.echoed() == b"".join(body)
            (served,) = {*SERVERS} - {picked.endpoint}
            await asking.respond(served)
            await asking.send(answer, is_request=False)
            assert await asking.echoed(is_request=False) == b"".join(answer)
            assert await asking.is_open()
            snapshot = await home.gate.snapshot()
            at = {each.address: each.in_flight for each in snapshot.endpoints}
            assert at == {served: 1, picked.endpoint: 0}
            await asking.end()
            await home.until(in_flight=0)

    async def test_headers_first(self) -> None:
        """The answer to the headers does not wait for the body."""
        async with picking() as (home, channel):
            asking = Agentgateway(channel)
            await asking.open()
            assert (await asking.picked()).endpoint in SERVERS
            await asking.send([b"late"])
            assert await asking.echoed() == b"late"
            await asking.end()
            await home.until(in_flight=0)

    async def test_client_gone(self) -> None:
        """The end of its side is the end of the request, parked or in flight."""
        async with picking(SERVERS[:1]) as (home, channel):
            first, second = Agentgateway(channel), Agentgateway(channel)
            await first.open()
            await first.picked()
            await second.open()
            await second.send([b"{}"])
            await home.until(waiting=1)
            await second.end()
            await home.until(waiting=0)
            await first.end()
            await home.until(in_flight=0)

        assert home.outcomes == [Outcome.EVICTED_CANCELLED, Outcome.DISPATCHED]

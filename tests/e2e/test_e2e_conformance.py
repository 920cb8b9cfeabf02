"""What the conformance tests of the Gateway API Inference Extension ask of an endpoint picker.

Their requests, sent through each gateway's wiring to three endpoints; docs/gateways.md has the
table of those tests, and why the others are about the gateway alone.
"""

import asyncio
from collections.abc import Mapping

import pytest

from flowcontrol_server.requests.conformance import SELECTION_HEADER, SERVED_HEADER
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.gateway_shapes import SHAPES, Shape, gke, istio, istio_with_override, kgateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

BODY = b'{"model": "conformance-fake-model", "prompt": "Write as if you were a critic: ..."}'
TELLING = (istio, istio_with_override, gke)
"""Gateways that say who served a request, of those that are Envoys."""


def conforming(shape: Shape) -> Spec:
    """Three endpoints with room for all, behind one gateway's wiring."""
    return Spec(
        picker="least-loaded",
        max_concurrency=100,
        endpoints=3,
        edit_envoy=shape,
        requests={"conformance": True},
        settings={"tls": {"selfSigned": True}},
        settlement={"accessLog": False},
    )


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.__name__)
def spec(request: pytest.FixtureRequest) -> Spec:
    """One gateway's wiring after the other."""
    return conforming(request.param)


async def served(
    gateway: Gateway, selection: str, path: str = "/"
) -> tuple[str, Mapping[str, str]]:
    """Send a request of the suite; return which endpoint got it, and the response's headers."""
    caller = await gateway.call(path, headers={SELECTION_HEADER: selection}, body=BODY)
    call = await gateway.next_call()
    await call.respond(b"{}")
    reply = await caller.reply()
    assert reply.status == 200
    assert call.body == BODY
    return str(call.endpoint), reply.headers


class TestRouting:
    """GatewayFollowingEPPRouting, with and without DataParallelism."""

    async def test_each(self, gateway: Gateway) -> None:
        """A request that names one endpoint gets that one, the right port of one address."""
        for endpoint in map(str, gateway.stack.endpoints):
            for _ in range(3):
                assert (await served(gateway, endpoint, "/primary-gateway-test"))[0] == endpoint

    async def test_lists(self, gateway: Gateway) -> None:
        """100 requests, 10 at once, that name two of three endpoints reach no third."""
        two = [str(endpoint) for endpoint in gateway.stack.endpoints[:2]]
        reached: list[str] = []
        for _ in range(10):
            headers = {SELECTION_HEADER: ",".join(two)}
            callers = [await gateway.call("/", headers=headers, body=BODY) for _ in range(10)]
            calls = [await gateway.next_call() for _ in range(10)]
            reached += [str(call.endpoint) for call in calls]
            await asyncio.gather(*(call.respond() for call in calls))
            assert {(await caller.reply()).status for caller in callers} == {200}

        assert {*reached} == {*two}

    async def test_list_of_two_pools(self, gateway: Gateway) -> None:
        """Of a list with endpoints of another pool only those of its own count."""
        endpoint = str(gateway.stack.endpoints[1])
        for _ in range(3):
            assert (await served(gateway, f"10.9.9.9:80,{endpoint},10.9.9.8"))[0] == endpoint

    async def test_none_of_the_pool(self, gateway: Gateway) -> None:
        """A request that names no endpoint of the pool gets 503."""
        caller = await gateway.call(headers={SELECTION_HEADER: "10.9.9.9:80"}, body=BODY)

        assert (await caller.reply()).status == 503

    async def test_no_body(self, gateway: Gateway) -> None:
        """A GET on any path, as the tests of pools and rules send."""
        endpoint = str(gateway.stack.endpoints[1])
        headers = {SELECTION_HEADER: endpoint}
        caller = await gateway.call("/secondary", method="GET", headers=headers, body=None)
        call = await gateway.next_call()
        await call.respond()

        assert (await caller.reply()).status == 200
        assert str(call.endpoint) == endpoint


async def test_served(gateway: Gateway, spec: Spec) -> None:
    """GatewayDestinationEndpointServed: the response names who served it, where that is known."""
    for endpoint in map(str, gateway.stack.endpoints):
        _, headers = await served(gateway, endpoint)
        expected = endpoint if spec.edit_envoy in TELLING else None
        assert headers.get(SERVED_HEADER) == expected


async def test_fails_open(start: Start) -> None:
    """EppUnAvailableFailOpen: a gateway that fails open serves on when the picker is gone."""
    gateway = await start(conforming(kgateway))
    endpoint = str(gateway.stack.endpoints[2])
    assert (await served(gateway, endpoint))[0] == endpoint
    gateway.stack.service.stop()
    caller = await gateway.call("/", body=None, method="GET")
    await (await gateway.next_call()).respond()

    assert (await caller.reply()).status == 200


async def test_off(start: Start) -> None:
    """Without the switch the header chooses nothing."""
    gateway = await start(Spec(picker="least-loaded", endpoints=2, edit_envoy=istio))
    _, occupying = await gateway.occupy()
    busy = str(occupying.endpoint)
    other, headers = await served(gateway, busy)
    await occupying.respond()

    assert other != busy
    assert SERVED_HEADER not in headers

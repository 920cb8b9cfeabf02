"""The service as the picker: it says which model server a request goes to, Envoy sends it there.

What the model server sees of that: `x-gateway-destination-endpoint` with its own address, as the
endpoint picker protocol has it, and never an address that a client wrote there.
"""

import asyncio

import pytest

from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

DESTINATION = "x-gateway-destination-endpoint"


@pytest.fixture(scope="module", params=[False, True], ids=["override_host", "ORIGINAL_DST"])
def spec(request: pytest.FixtureRequest) -> Spec:
    """Three model servers of two slots each; the least loaded is picked. Both Envoy's ways."""
    return Spec(
        max_concurrency=2, endpoints=3, picker="least-loaded", original_dst=bool(request.param)
    )


async def loads(gateway: Gateway) -> list[int]:
    """Return the requests in flight at each endpoint."""
    snapshot = await gateway.snapshot()
    by_address = {endpoint.address: endpoint.in_flight for endpoint in snapshot.endpoints}
    return [by_address[str(address)] for address in gateway.stack.endpoints]


class TestLeastLoaded:
    """Which model server gets the next request."""

    async def test_spreads_evenly(self, gateway: Gateway) -> None:
        """As many requests as there are slots fill every server to its limit; the next waits."""
        for _ in range(6):
            await gateway.call()
        calls = [await gateway.next_call() for _ in range(6)]
        await gateway.call(name="seventh")
        full = await gateway.until(waiting=1, in_flight=6)
        at_servers = [len(backend.calls) for backend in gateway.backends]
        counted = await loads(gateway)
        for call in calls:
            await call.respond()
        await (await gateway.next_call()).respond()

        assert [2, 2, 2] == at_servers == counted
        assert full.saturation == 1.0

    async def test_slot_that_is_free_is_where_the_next_goes(self, gateway: Gateway) -> None:
        """A request that had to wait goes to the server where a request has just ended."""
        for _ in range(6):
            await gateway.call()
        calls = [await gateway.next_call() for _ in range(6)]
        await gateway.call(name="waiting")
        await gateway.until(waiting=1)
        freed = calls[3]
        await freed.respond()
        following = await gateway.next_call(FREED_S)
        counted = await loads(gateway)
        for call in [*calls[:3], *calls[4:], following]:
            await call.respond()
        await gateway.until(in_flight=0)

        assert ("waiting", freed.endpoint) == (following.name, following.endpoint)
        assert counted == [2, 2, 2]
        assert await loads(gateway) == [0, 0, 0]

    async def test_server_that_does_nothing_is_preferred(self, gateway: Gateway) -> None:
        """With one busy and two idle, the idle ones come first."""
        await gateway.call()
        busy = await gateway.next_call()
        await gateway.call()
        await gateway.call()
        others = [await gateway.next_call() for _ in range(2)]
        for call in (busy, *others):
            await call.respond()

        assert set(gateway.stack.endpoints) == {busy.endpoint, *(call.endpoint for call in others)}

    async def test_log_names_the_endpoint(self, gateway: Gateway) -> None:
        """The canonical line says where a request went."""
        caller = await gateway.call(name="located")
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()
        line = await gateway.decided("located")

        assert str(call.endpoint) == line["endpoint"]


class TestDestinationHeader:
    """x-gateway-destination-endpoint."""

    async def test_server_sees_its_own_address(self, gateway: Gateway) -> None:
        """The server that was picked finds its own address in the header."""
        await gateway.call()
        call = await gateway.next_call()
        await call.respond()

        assert str(call.endpoint) == call.headers[DESTINATION]

    async def test_client_cannot_choose(self, gateway: Gateway) -> None:
        """A destination that the client names is overwritten, and steers nothing."""
        target = gateway.stack.endpoints[2]
        for _ in range(3):
            await gateway.call(headers={DESTINATION: str(target)})
        calls = [await gateway.next_call() for _ in range(3)]
        for call in calls:
            await call.respond()

        assert [str(call.endpoint) for call in calls] == [
            call.headers[DESTINATION] for call in calls
        ]
        assert set(gateway.stack.endpoints) == {call.endpoint for call in calls}

    async def test_client_cannot_choose_on_an_exempt_path(self, gateway: Gateway) -> None:
        """Where nothing is queued every server has its turn, whatever the client names."""
        target = gateway.stack.endpoints[2]
        headers = {DESTINATION: str(target)}
        for _ in range(6):
            await gateway.call("/v1/models", method="GET", body=None, headers=headers)
        calls = [await gateway.next_call() for _ in range(6)]
        for call in calls:
            await call.respond()

        assert set(gateway.stack.endpoints) == {call.endpoint for call in calls}

    async def test_forged_destination_goes_nowhere(self, gateway: Gateway) -> None:
        """A destination that a client names reaches no server, on an exempt path either."""
        headers = {DESTINATION: "192.0.2.1:80"}
        await gateway.call("/v1/models", method="GET", body=None, headers=headers)
        call = await gateway.next_call()
        await call.respond()

        assert str(call.endpoint) == call.headers[DESTINATION]

    async def test_client_hears_nothing_of_it(self, gateway: Gateway) -> None:
        """The response does not name the server."""
        caller = await gateway.call()
        await (await gateway.next_call()).respond()
        reply = await asyncio.wait_for(caller.reply(), FREED_S)

        assert DESTINATION not in reply.headers

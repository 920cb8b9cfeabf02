"""Requests that Envoy lets go to some model servers only, and where else a request may go.

The subset is metadata of the request, as the endpoint picker protocol has it; here a filter makes
it of a header. A picked endpoint that cannot be reached is left for the next one of the list.
"""

from typing import Any

import pytest

from flowcontrol_server.common.addresses import Address
from tests.e2e.conftest import Start
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

DESTINATION = "x-gateway-destination-endpoint"
SUBSET = "x-test-subset"
CODE = f"""
function envoy_on_request(handle)
  local said = handle:headers():get("{SUBSET}")
  if said then
    local subset = {{}}
    for address in said:gmatch("[^ ]+") do table.insert(subset, address) end
    local metadata = handle:streamInfo():dynamicMetadata()
    metadata:set("envoy.lb.subset_hint", "{DESTINATION}-subset", subset)
  end
end
"""


def hint_by_header(configuration: dict[str, Any]) -> None:
    """Put a filter before ext_proc that makes a subset hint of a header."""
    lua = {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": CODE},
        },
    }
    (chain,) = configuration["static_resources"]["listeners"][0]["filter_chains"]
    chain["filters"][0]["typed_config"]["http_filters"].insert(0, lua)


@pytest.fixture(scope="module", params=[False, True], ids=["override_host", "ORIGINAL_DST"])
def spec(request: pytest.FixtureRequest) -> Spec:
    """Three model servers of one slot each."""
    return Spec(
        endpoints=3,
        picker="least-loaded",
        original_dst=bool(request.param),
        edit_envoy=hint_by_header,
    )


def only(*addresses: Address) -> dict[str, str]:
    """The header that lets a request go to these alone."""
    return {SUBSET: " ".join(map(str, addresses))}


class TestSubset:
    """envoy.lb.subset_hint."""

    async def test_goes_there_alone(self, gateway: Gateway) -> None:
        """Request by request to the one server that is allowed, with others idle."""
        target = gateway.stack.endpoints[2]
        for _ in range(4):
            caller = await gateway.call(headers=only(target))
            call = await gateway.next_call()
            await call.respond()
            await caller.reply()

            assert call.endpoint == target

    async def test_waits_in_nobodys_way(self, gateway: Gateway) -> None:
        """With its servers busy it waits; others pass, lower ones too; then it is the next."""
        first, second, third = gateway.stack.endpoints
        await gateway.call(headers=only(first))
        await gateway.call(headers=only(second))
        busy = {call.endpoint: call for call in [await gateway.next_call() for _ in range(2)]}
        await gateway.call(
            headers=only(first, second), objective="chat", flow_id="tied", name="tied"
        )
        await gateway.until(waiting=1)
        await gateway.call(objective="batch", name="free")
        passing = await gateway.next_call()
        waiting = await gateway.until(waiting=1, in_flight=3)
        await busy[second].respond()
        following = await gateway.next_call(FREED_S)
        for call in (busy[first], passing, following):
            await call.respond()

        assert (passing.name, passing.endpoint) == ("free", third)
        assert (following.name, following.endpoint) == ("tied", second)
        assert waiting.saturation == 1.0

    async def test_nobody_there(self, gateway: Gateway) -> None:
        """Where no server of the subset is in the pool: 503 at once."""
        caller = await gateway.call(headers=only(Address("192.0.2.1", 80)), name="nowhere")
        reply = await caller.reply()

        assert reply.status == 503
        assert reply.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert await gateway.outcomes("nowhere") == ["rejected-no-endpoints"]


class TestFallbacks:
    """pickerFallbacks."""

    async def test_next_of_the_list(self, start: Start) -> None:
        """Envoy tries the endpoints in the order that it is told, and within the subset."""
        gateway = await start(
            Spec(
                endpoints=4,
                max_concurrency=8,
                picker="least-loaded",
                picker_fallbacks=2,
                edit_envoy=hint_by_header,
            )
        )
        dead, *others = gateway.stack.endpoints
        await gateway.backends[0].close()
        for allowed in ((dead, others[0]), (dead, others[2]), (dead, others[1])):
            caller = await gateway.call(headers=only(*allowed))
            call = await gateway.next_call()
            await call.respond()
            await caller.reply()

            assert call.endpoint == allowed[1]
            # The attempt that follows a failed one is a request for its endpoint alone.
            assert (
                str(allowed[1]) in set(call.headers[DESTINATION].split(",")) <= {*map(str, allowed)}
            )

    async def test_as_many_as_told(self, start: Start) -> None:
        """Without a subset the least loaded others follow the pick."""
        gateway = await start(Spec(endpoints=4, picker="least-loaded", picker_fallbacks=2))
        await gateway.call()
        call = await gateway.next_call()
        await call.respond()
        addresses = call.headers[DESTINATION].split(",")

        assert len(set(addresses)) == 3
        assert addresses[0] == str(call.endpoint)

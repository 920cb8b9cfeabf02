"""Who goes first, where to, and what the model server sees of it."""

import pytest

from flowcontrol_server.requests.classify import CONTROL_HEADERS
from tests.e2e.backend import Call
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

DESTINATION = "x-gateway-destination-endpoint"


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot; Envoy balances by itself; turns that no late settlement can shift."""
    return Spec(max_concurrency=1, flow_control={"bands": [{"fairness": "round-robin"}]})


async def served(gateway: Gateway, first: Call, count: int) -> list[str]:
    """End one request after the other; return the names of the next so many, as they come."""
    names = []
    call = first
    for _ in range(count):
        await call.respond()
        call = await gateway.next_call()
        names.append(call.name)
    await call.respond()
    return names


async def wait_in_line(
    gateway: Gateway, *names: str, objective: str | None = None, flow_id: str | None = None
) -> None:
    """Let requests of these names arrive, certainly in this order."""
    before = (await gateway.snapshot()).waiting
    for place, name in enumerate(names, before + 1):
        await gateway.call(name=name, objective=objective, flow_id=flow_id)
        await gateway.until(waiting=place)


class TestOrder:
    """Who goes first when not all can."""

    async def test_higher_priority_first(self, gateway: Gateway) -> None:
        """Whoever came first, the higher band goes first: chat, then the default, then batch."""
        _, occupying = await gateway.occupy()
        await wait_in_line(gateway, "lowest-1", "lowest-2", objective="batch")
        await wait_in_line(gateway, "middle")
        await wait_in_line(gateway, "highest-1", "highest-2", objective="chat")
        waiting = await gateway.snapshot()
        names = await served(gateway, occupying, 5)

        assert names == ["highest-1", "highest-2", "middle", "lowest-1", "lowest-2"]
        bands = {band.priority: (band.waiting, band.in_flight) for band in waiting.bands}
        assert bands == {10: (2, 0), 0: (1, 1), -1: (2, 0)}

    async def test_late_arrival_overtakes(self, gateway: Gateway) -> None:
        """A chat request that comes while a batch job is under way is the next to go."""
        _, occupying = await gateway.occupy()
        await wait_in_line(gateway, "job-1", "job-2", "job-3", objective="batch")
        await occupying.respond()
        job = await gateway.next_call()
        await wait_in_line(gateway, "late", objective="chat")
        names = await served(gateway, job, 3)

        assert job.name == "job-1"
        assert names == ["late", "job-2", "job-3"]

    async def test_flows_take_turns(self, gateway: Gateway) -> None:
        """A tenant with a long backlog gets every other turn when another comes."""
        _, occupying = await gateway.occupy()
        await wait_in_line(
            gateway, "greedy-1", "greedy-2", "greedy-3", "greedy-4", flow_id="greedy"
        )
        await wait_in_line(gateway, "modest-1", "modest-2", flow_id="modest")
        names = await served(gateway, occupying, 6)

        assert names == ["greedy-1", "modest-1", "greedy-2", "modest-2", "greedy-3", "greedy-4"]

    async def test_unknown_objective_counts_as_none(self, gateway: Gateway) -> None:
        """An objective that is not declared means priority 0, is counted and logged."""
        gateway.expected_complaints.add("objective_unknown")
        before = (await gateway.snapshot()).unknown_objectives
        caller = await gateway.call(objective="nobody-knows", name="unknown")
        await (await gateway.next_call()).respond()
        await caller.reply()
        line = await gateway.decided("unknown")
        after = (await gateway.snapshot()).unknown_objectives

        assert (line["priority"], line["objective"]) == (0, "nobody-knows")
        assert after - before == 1
        (told,) = gateway.stack.events("objective_unknown")
        assert told["objective"] == "nobody-knows"


class TestHeaders:
    """What the model server sees."""

    async def test_control_headers_stay_here(self, gateway: Gateway) -> None:
        """What is meant for flow control is removed; everything else arrives as it was sent."""
        control = dict.fromkeys(CONTROL_HEADERS, "chat")
        other = {
            "authorization": "Bearer secret",
            "x-custom": "kept",
            "x-llm-d-unrelated": "kept too",
            "content-type": "application/json",
        }
        caller = await gateway.call(headers=control | other, body=b'{"model": "llama"}')
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()

        assert {name: call.headers[name] for name in control if name in call.headers} == {}
        assert other == {name: call.headers[name] for name in other}
        assert call.body == b'{"model": "llama"}'
        assert DESTINATION not in call.headers

    async def test_control_headers_of_exempt_requests_stay_here_too(self, gateway: Gateway) -> None:
        """A path that passes ungated loses its control headers as well."""
        control = dict.fromkeys(CONTROL_HEADERS, "chat")
        caller = await gateway.call("/v1/models", method="GET", body=None, headers=control)
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()

        assert [name for name in control if name in call.headers] == []

    async def test_destination_is_not_our_business_here(self, gateway: Gateway) -> None:
        """A client's own choice of endpoint is removed, and steers nothing."""
        caller = await gateway.call(headers={DESTINATION: "192.0.2.1:80"})
        call = await gateway.next_call()
        await call.respond()
        reply = await caller.reply()

        assert reply.status == 200
        assert DESTINATION not in call.headers

    async def test_response_shows_no_trace(self, gateway: Gateway) -> None:
        """The model server's response passes as it is, but for how long it was held."""
        caller = await gateway.call()
        await (await gateway.next_call()).respond()
        reply = await caller.reply()

        ours = [name for name in reply.headers if name.startswith(("x-llm-d", "x-gateway"))]
        assert ours == ["x-llm-d-flow-queue-duration-ms"]

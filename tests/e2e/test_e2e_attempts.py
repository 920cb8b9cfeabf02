"""An endpoint that cannot be reached: Envoy tries another one, which must have a slot for it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.backend import Call
from tests.e2e.client import Caller
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e
LARGE = 5 * 2**20
CLOSED = 6
EVENT = b'data: {"token": 1}\n\n'
DOWN = {"endpoint_down", "endpoint_up"}


async def half_dead(gateway: Gateway) -> Call:
    """Occupy one of two endpoints and close the other; return the call at the one that lives."""
    gateway.expected_complaints = DOWN
    _caller, call = await gateway.occupy()
    for backend in gateway.backends:
        if backend.address != call.endpoint:
            await backend.close()
    return call


async def begun(gateway: Gateway, *names: str) -> list[Caller]:
    """Send requests one after the other: the first goes to the dead endpoint, all others wait."""
    callers = []
    for number, name in enumerate(names, 1):
        callers.append(await gateway.call(name=name, objective="chat", flow_id="tenant"))
        await gateway.until(waiting=number)
    return callers


async def of_first(gateway: Gateway, count: int) -> Counter[str]:
    """Return what became of the attempts at the request "first" when there are so many."""

    def outcomes() -> list[str]:
        decided = gateway.stack.events("request_decided")
        return [each["outcome"] for each in decided if each["client_request_id"] == "first"]

    await eventually(lambda: len(outcomes()) >= count, what="the last attempt")
    return Counter(outcomes())


class TestOneOfTwo:
    """One model server is gone, and flowcontrol does not know; the other one is full."""

    SPEC = Spec(max_concurrency=1, endpoints=2, picker="least-loaded")

    async def test_waits(self, start: Start) -> None:
        """The request that could not be sent waits for the other's slot, and keeps its place."""
        gateway = await start(self.SPEC)
        occupant = await half_dead(gateway)
        callers = await begun(gateway, "first", "second")
        await occupant.respond()
        calls = []
        for _ in callers:
            calls.append(await gateway.next_call())
            running = await gateway.snapshot()
            assert {e.address: e.in_flight for e in running.endpoints}[str(occupant.endpoint)] == 1
            await calls[-1].respond()
        replies = [await caller.reply() for caller in callers]

        assert [call.name for call in calls] == ["first", "second"]
        assert [reply.status for reply in replies] == [200, 200]
        assert {call.endpoint for call in calls} == {occupant.endpoint}

    async def test_account(self, start: Start) -> None:
        """It is settled once; the attempt that failed cost its flow nothing."""
        gateway = await start(self.SPEC)
        occupant = await half_dead(gateway)
        (caller,) = await begun(gateway, "first")
        await occupant.respond()
        await (await gateway.next_call()).respond()
        await caller.reply()
        settled = await gateway.until_so(lambda snapshot: snapshot.settlements.received == 2)

        def lines() -> list[dict[str, Any]]:
            decided = gateway.stack.events("request_decided")
            return [line for line in decided if line["client_request_id"] == "first"]

        unsent, sent = await eventually(lambda: lines()[1:] and lines(), what="both attempts")

        assert (unsent["outcome"], sent["outcome"]) == ("dispatched", "dispatched")
        assert (unsent["priority"], sent["priority"]) == (10, 10)
        assert unsent["endpoint"] != sent["endpoint"] == str(occupant.endpoint)
        assert (settled.settlements.awaited, settled.settlements.lost) == (0, 0)
        counts = (await gateway.metrics()).items()
        results = [(n, v) for n, v in counts if "objective_responses_total" in n and v]
        assert sum(count for _, count in results) == 2
        assert not any("failed" in name for name, _ in results)

    async def test_large_body(self, start: Start) -> None:
        """A body larger than Envoy's buffers for model servers waits with it, and comes whole."""
        gateway = await start(self.SPEC)
        occupant = await half_dead(gateway)
        caller = await gateway.call(name="first", body=b"x" * LARGE)
        await gateway.until(waiting=1, in_flight=2)
        await occupant.respond()
        call = await gateway.next_call()
        await call.respond()

        assert (await caller.reply()).status == 200
        assert (call.endpoint, len(call.body)) == (occupant.endpoint, LARGE)

    async def test_begun_response_is_left_alone(self, start: Start) -> None:
        """Of another attempt, too, it is known when the response has begun."""
        reclaims = {"reclaim": {"mode": "before-first-byte"}}
        gateway = await start(replace(self.SPEC, flow_control=reclaims))
        occupant = await half_dead(gateway)
        batch = await gateway.call(objective="batch")
        await gateway.until(waiting=1)
        await occupant.respond()
        call = await gateway.next_call()
        await call.stream(EVENT)
        assert await batch.head() == 200
        person = await gateway.call(objective="chat")
        await gateway.until(waiting=1, in_flight=2)
        await call.send(EVENT)
        await call.end()
        await (await gateway.next_call()).respond()

        assert await batch.rest() == EVENT + EVENT
        assert (await person.reply()).status == 200

    async def test_connection_is_closed(self, start: Start) -> None:
        """The server closes the connection that waits with it, again and again: it waits on.

        For none of that the endpoint of the first attempt, or the client, is to blame.
        """
        gateway = await start(self.SPEC)
        occupant = await half_dead(gateway)
        (alive,) = [each for each in gateway.backends if each.address == occupant.endpoint]
        (caller,) = await begun(gateway, "first")
        for _ in range(CLOSED):
            await eventually(alive.drop_fresh, what="a connection of the attempt")
        await gateway.until(waiting=1, in_flight=2)
        await occupant.respond()
        await (await gateway.next_call()).respond()
        status = (await caller.reply()).status
        outcomes = await of_first(gateway, CLOSED + 2)

        assert status == 200
        assert outcomes.keys() == {"evicted-moved", "dispatched"}
        assert outcomes["dispatched"] == 2
        assert gateway.stack.events("endpoint_down") == []

    async def test_client_leaves(self, start: Start) -> None:
        """A client that leaves meanwhile frees both places."""
        gateway = await start(self.SPEC)
        occupant = await half_dead(gateway)
        (caller,) = await begun(gateway, "first")
        await caller.hang_up()
        await gateway.until(waiting=0, in_flight=1)
        await occupant.respond()

        assert (await gateway.until(in_flight=0)).waiting == 0
        assert await of_first(gateway, 2) == Counter(("dispatched", "evicted-cancelled"))


class TestBothDead:
    """No model server is left."""

    async def test_all_attempts_fail(self, start: Start) -> None:
        """The client gets Envoy's 503, and nothing is held."""
        gateway = await start(Spec(max_concurrency=1, endpoints=2, picker="least-loaded"))
        gateway.expected_complaints = DOWN
        for backend in gateway.backends:
            await backend.close()
        reply = await (await gateway.call(name="lost")).reply()

        assert reply.status == 503
        await gateway.until(waiting=0, in_flight=0)

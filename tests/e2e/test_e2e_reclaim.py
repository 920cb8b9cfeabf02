"""Reclaim: a batch request in flight makes way for a person, before its first byte and after."""

import asyncio

import pytest

from tests.e2e.conftest import Start
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

EVENT = b'data: {"token": 1}\n\n'


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot, and requests that have not begun to answer may be ended."""
    return Spec(flow_control={"reclaim": {"mode": "before-first-byte"}})


class TestBeforeFirstByte:
    """The default kind of reclaim: nobody sees half an answer."""

    async def test_clean_refusal(self, gateway: Gateway) -> None:
        """The batch client gets 429, when to come back, and nothing else; the person its slot."""
        batch = await gateway.call(objective="batch", name="reclaimed")
        call = await gateway.next_call()
        person = await gateway.call(objective="chat", name="person")
        reply = await batch.reply()
        following = await gateway.next_call()
        await following.respond(b'{"for": "person"}')
        answer = await person.reply()
        await asyncio.wait_for(call.gone.wait(), FREED_S)
        line = await gateway.decided("reclaimed")

        assert (reply.status, reply.headers["x-llm-d-request-dropped-reason"]) == (429, "evicted")
        assert b'"code": "evicted"' in reply.body
        assert following.name == "person"
        assert (answer.status, answer.body) == (200, b'{"for": "person"}')
        assert (line["outcome"], line["http_status"]) == ("reclaimed", 429)
        assert line["in_flight_ms"] > 0

    async def test_begun_answer_is_left_alone(self, gateway: Gateway) -> None:
        """Once the response has begun, the person waits for its end."""
        batch = await gateway.call(objective="batch", name="begun")
        call = await gateway.next_call()
        await call.stream(EVENT)
        assert await batch.head() == 200
        person = await gateway.call(objective="chat", name="patient")
        await gateway.until(waiting=1, in_flight=1)
        await call.send(EVENT)
        await call.end()
        following = await gateway.next_call()
        await following.respond()

        assert await batch.rest() == EVENT + EVENT
        assert (await person.reply()).status == 200
        assert await gateway.outcomes("begun", "patient") == ["dispatched", "dispatched"]

    async def test_nobody_for_batch(self, gateway: Gateway) -> None:
        """Batch does not end batch, and what is not sheddable is ended by nobody."""
        await gateway.call(name="default")
        occupying = await gateway.next_call()
        person = await gateway.call(objective="chat")
        await gateway.until(waiting=1, in_flight=1)
        await occupying.respond()
        call = await gateway.next_call()
        await call.respond()

        assert (await person.reply()).status == 200
        assert await gateway.outcomes("default") == ["dispatched"]

    async def test_response_ends_as_ever(self, gateway: Gateway) -> None:
        """A watched request that nobody reclaims is answered whole, and its slot comes back."""
        batch = await gateway.call(objective="batch", name="watched")
        call = await gateway.next_call()
        await call.respond(b'{"whole": true}')
        reply = await batch.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)

        assert (reply.status, reply.body) == (200, b'{"whole": true}')
        assert await gateway.outcomes("watched") == ["dispatched"]


class TestAnyTime:
    """The other kind: an answer may be cut off."""

    async def test_cut_off(self, start: Start) -> None:
        """The batch client's answer breaks off in the middle; the person goes."""
        gateway = await start(Spec(flow_control={"reclaim": {"mode": "any-time"}}))
        batch = await gateway.call(objective="batch", name="cut")
        call = await gateway.next_call()
        await call.stream(EVENT)
        assert await batch.head() == 200
        assert await batch.piece() == EVENT
        person = await gateway.call(objective="chat")
        following = await gateway.next_call()
        await following.respond()

        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await batch.rest()
        assert (await person.reply()).status == 200
        assert await gateway.outcomes("cut") == ["reclaimed"]

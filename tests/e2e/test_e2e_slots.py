"""However a request ends, its slot comes back; and nobody who need not wait holds one.

Everything here runs twice: with Envoy as it is, where the end of a parked request shows as a
cancelled stream, and with the runtime flag under which Envoy only half-closes the stream.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import Edit, Spec, eventually

pytestmark = pytest.mark.e2e

EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(5)]
SHORT = "/short"
"""A path whose route times out after a second."""
GRACEFUL = "envoy.reloadable_features.ext_proc_graceful_grpc_close"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=[False, True], ids=["reset", "graceful-close"])
def spec(request: pytest.FixtureRequest) -> Spec:
    """One slot, a route with a timeout, and either way of Envoy's to end a stream."""
    return Spec(edit_envoy=_edit(is_graceful=request.param))


def _edit(*, is_graceful: bool) -> Edit:
    def edit(configuration: dict[str, Any]) -> None:
        listener = configuration["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        routes = manager["route_config"]["virtual_hosts"][0]["routes"]
        short = {"cluster": "model_servers", "timeout": "1s"}
        routes.insert(0, {"match": {"prefix": SHORT}, "route": short})
        if is_graceful:
            layer = {"name": "static", "static_layer": {GRACEFUL: True}}
            configuration["layered_runtime"] = {"layers": [layer]}

    return edit


class TestInFlight:
    """The ways in which a dispatched request can end."""

    async def test_response(self, gateway: Gateway) -> None:
        """A whole response ends the request."""
        caller = await gateway.call(name="whole")
        call = await gateway.next_call()
        await gateway.until(in_flight=1, waiting=0)
        await call.respond(b'{"ok": true}')
        reply = await caller.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)
        line = await gateway.decided("whole")

        assert (reply.status, reply.body) == (200, b'{"ok": true}')
        assert (line["outcome"], line["http_status"]) == ("dispatched", None)
        assert line["in_flight_ms"] > 0

    async def test_stream(self, gateway: Gateway) -> None:
        """A stream of events holds its slot until the last byte, not until the first."""
        caller = await gateway.call(name="stream")
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        await caller.head()
        received = [await caller.piece()]
        for event in EVENTS[1:]:
            held = await gateway.snapshot()
            assert held.in_flight == 1
            await call.send(event)
            received.append(await caller.piece())
        assert (await gateway.snapshot()).in_flight == 1
        await call.end()
        await gateway.until(in_flight=0, within_s=FREED_S)
        line = await gateway.decided("stream")

        assert received == EVENTS
        assert await caller.piece() == b""
        assert line["outcome"] == "dispatched"

    async def test_request_without_body(self, gateway: Gateway) -> None:
        """A GET goes through the gate like everything else."""
        caller = await gateway.call("/v1/anything", method="GET", body=None, name="get")
        call = await gateway.next_call()
        await gateway.until(in_flight=1)
        await call.respond()
        reply = await caller.reply()
        line = await gateway.decided("get")

        assert reply.status == 200
        assert (call.method, call.path) == ("GET", "/v1/anything")
        assert (line["outcome"], line["byte_size"]) == ("dispatched", 0)

    async def test_client_leaves_during_the_response(
        self, gateway: Gateway, record_property: Record
    ) -> None:
        """A client that hangs up mid-response frees the slot for the next, and stops the server."""
        leaving, call = await gateway.occupy()
        await call.stream(EVENTS[0])
        await leaving.head()
        await gateway.call(name="next")
        await gateway.until(waiting=1)
        clock = asyncio.get_running_loop().time
        before_s = clock()
        await leaving.hang_up()
        following = await gateway.next_call(FREED_S)
        freed_ms = (following.arrived_s - before_s) * 1000
        await asyncio.wait_for(call.gone.wait(), FREED_S)
        await following.respond()

        record_property("from disconnect to next request at the server, ms", round(freed_ms, 1))
        print(f"from disconnect to next request at the server: {freed_ms:.1f} ms")  # noqa: T201 - for people
        assert following.name == "next"

    async def test_client_resets_during_the_response(self, gateway: Gateway) -> None:
        """A client that breaks its connection off mid-response frees the slot likewise."""
        leaving, call = await gateway.occupy()
        await call.stream(EVENTS[0])
        await leaving.head()
        leaving.reset()
        await gateway.until(in_flight=0, within_s=FREED_S)

        await asyncio.wait_for(call.gone.wait(), FREED_S)

    async def test_server_resets_during_the_response(self, gateway: Gateway) -> None:
        """A model server that breaks off mid-response frees the slot; the client is told."""
        caller = await gateway.call(name="reset")
        call = await gateway.next_call()
        await call.stream(EVENTS[0])
        await caller.head()
        assert EVENTS[0] == await caller.piece()
        call.reset()
        await gateway.until(in_flight=0, within_s=FREED_S)
        line = await gateway.decided("reset")

        assert line["outcome"] == "dispatched"
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await caller.piece()

    async def test_server_resets_before_the_response(self, gateway: Gateway) -> None:
        """A model server that breaks off before its response frees the slot; the client gets 503.

        Envoy does not try again: the request had been sent.
        """
        caller, call = await gateway.occupy()
        call.reset()
        reply = await caller.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)

        assert reply.status == 503
        assert "x-llm-d-request-dropped-reason" not in reply.headers
        assert len(gateway.backends[0].calls) == 1

    async def test_server_refuses_the_connection(self, gateway: Gateway) -> None:
        """A model server that is not there costs the client a 503 from Envoy, and no slot."""
        await gateway.backends[0].close()
        caller = await gateway.call(name="refused")
        reply = await caller.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)
        line = await gateway.decided("refused")

        assert reply.status == 503
        assert "x-llm-d-request-dropped-reason" not in reply.headers
        assert line["outcome"] == "dispatched"

    async def test_route_times_out(self, gateway: Gateway) -> None:
        """A server that hangs until the route times out gets 504 for the client; the slot is back.

        The route's second begins when the request is let on: parked time does not count.
        """
        occupant, occupying = await gateway.occupy()
        caller = await gateway.call(SHORT, name="hanging")
        await gateway.until(waiting=1)
        parked_s = 1.2
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(caller.head(), parked_s)
        await occupying.respond()
        await occupant.reply()
        hanging = await gateway.next_call()
        clock = asyncio.get_running_loop().time
        reply = await caller.reply()
        timed_out_s = clock() - hanging.arrived_s
        await gateway.until(in_flight=0, within_s=FREED_S)
        line = await gateway.decided("hanging")

        assert reply.status == 504
        assert 0.9 < timed_out_s < 2.0
        assert line["outcome"] == "dispatched"
        assert line["waited_ms"] > parked_s * 1000

    async def test_client_gives_up_on_a_server_that_hangs(self, gateway: Gateway) -> None:
        """A client that waits in vain and leaves takes its slot with it."""
        caller, call = await gateway.occupy()
        await gateway.until(in_flight=1)
        await caller.hang_up()
        await gateway.until(in_flight=0, within_s=FREED_S)

        await asyncio.wait_for(call.gone.wait(), FREED_S)


class TestParked:
    """Clients that leave before it is their turn."""

    async def test_nobody_waits_for_a_client_that_has_left(self, gateway: Gateway) -> None:
        """A parked request whose client hangs up is evicted there and then; the next goes first."""
        occupant, occupying = await gateway.occupy()
        leaving = await gateway.call(name="leaving")
        await gateway.until(waiting=1)
        await gateway.call(name="staying")
        await gateway.until(waiting=2)
        await leaving.hang_up()
        await gateway.until(waiting=1, in_flight=1, within_s=FREED_S)
        line = await gateway.decided("leaving")
        clock = asyncio.get_running_loop().time
        freed_s = clock()
        await occupying.respond()
        await occupant.reply()
        following = await gateway.next_call(FREED_S)
        await following.respond()

        assert (line["outcome"], line["http_status"]) == ("evicted-cancelled", 499)
        assert following.name == "staying"
        assert following.arrived_s - freed_s < 0.5

    async def test_it_never_reaches_a_server(self, gateway: Gateway) -> None:
        """A parked request whose client has left is never sent on, not even in the last moment."""
        occupant, occupying = await gateway.occupy()
        leaving = await gateway.call(name="never")
        await gateway.until(waiting=1)
        leaving.reset()
        await gateway.until(waiting=0, within_s=FREED_S)
        await occupying.respond()
        await occupant.reply()
        await gateway.until(in_flight=0, within_s=FREED_S)

        def is_the_last() -> bool:  # lines are written a moment later
            lines = gateway.stack.events("request_decided")
            return bool(lines) and bool(lines[-1]["flow_id"] == "occupant")

        await eventually(is_the_last, what="the line of the occupant, and none after it")
        assert len(gateway.backends[0].calls) == 1

    async def test_crowd_that_leaves_at_once(self, gateway: Gateway) -> None:
        """However many clients leave in the same moment, each is evicted and nobody else is lost.

        Envoy ends a stream and resets it back to back: both ends of it must be taken for one.
        """
        occupant, occupying = await gateway.occupy()
        crowd = [await gateway.call(name=f"crowd-{number}") for number in range(100)]
        await gateway.call(name="left-behind")
        await gateway.until(waiting=101)
        for leaving in crowd:
            leaving.reset()
        await gateway.until(waiting=1, within_s=FREED_S)
        outcomes = await gateway.outcomes(*(f"crowd-{number}" for number in range(100)))
        await occupying.respond()
        await occupant.reply()
        following = await gateway.next_call(FREED_S)
        await following.respond()

        assert outcomes == ["evicted-cancelled"] * 100
        assert following.name == "left-behind"

    async def test_one_after_the_other(self, gateway: Gateway) -> None:
        """A hundred clients that park and leave in turn are each evicted, and the service is well.

        The end of a stream and its reset race each other in every round anew.
        """
        occupant, occupying = await gateway.occupy()
        for number in range(100):
            leaving = await gateway.call(name=f"round-{number}")
            await gateway.until(waiting=1)
            await leaving.hang_up()
            await gateway.until(waiting=0, in_flight=1, within_s=FREED_S)
        outcomes = await gateway.outcomes(*(f"round-{number}" for number in range(100)))
        await occupying.respond()
        await occupant.reply()

        assert outcomes == ["evicted-cancelled"] * 100

    async def test_large_body(self, gateway: Gateway) -> None:
        """A client that breaks off is noticed at once, also when it had sent a large prompt.

        Envoy must be able to buffer the whole prompt: else it stops reading from the client, and
        cannot see that it is gone.
        """
        occupant, occupying = await gateway.occupy()
        size = 2 * 2**20
        leaving = await gateway.call(name="large", body=b"x" * size)
        await gateway.until(waiting=1)
        leaving.reset()
        await gateway.until(waiting=0, within_s=FREED_S)
        line = await gateway.decided("large")
        await occupying.respond()
        await occupant.reply()

        assert line["outcome"] == "evicted-cancelled"
        assert 2**20 <= line["byte_size"] <= size  # what had come, and 1 MiB of what was announced

    async def test_large_body_that_stays(self, gateway: Gateway) -> None:
        """A large prompt that had to wait reaches the server whole."""
        occupant, occupying = await gateway.occupy()
        body = bytes(range(256)) * (2 * 2**20 // 256)
        caller = await gateway.call(body=body)
        await gateway.until(waiting=1)
        await occupying.respond()
        await occupant.reply()
        call = await gateway.next_call()
        await call.respond()
        reply = await caller.reply()

        assert reply.status == 200
        assert body == call.body


class TestExempt:
    """Paths that are nobody's business."""

    @pytest.mark.parametrize(
        "path",
        [
            *("/v1/models/../chat/completions", "/v1/models/..%2fchat/completions"),
            *("/v1/models/%2e%2e%2Fchat/completions", "/v1/models/..%5cchat/completions"),
        ],
    )
    async def test_way_round(self, gateway: Gateway, path: str) -> None:
        """A path that leads out of an exempt one is gated, and the server is asked what we saw."""
        occupant, occupying = await gateway.occupy()
        caller = await gateway.call(path)
        await gateway.until(waiting=1)
        await occupying.respond()
        await occupant.reply()
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()

        assert call.path == "/v1/chat/completions"

    async def test_passes_while_the_pool_is_full(self, gateway: Gateway) -> None:
        """An exempt path neither waits nor holds a slot, however full the pool."""
        occupant, occupying = await gateway.occupy()
        caller = await gateway.call("/v1/models", method="GET", body=None, name="exempt")
        call = await gateway.next_call(FREED_S)
        held = await gateway.snapshot()
        await call.respond(b'{"data": []}')
        reply = await caller.reply()
        await occupying.respond()
        await occupant.reply()
        later = await gateway.call(name="later")
        await (await gateway.next_call()).respond()
        await later.reply()
        await gateway.decided("later")
        lines = gateway.stack.events("request_decided")

        assert (held.in_flight, held.waiting) == (1, 0)
        assert (reply.status, call.path) == (200, "/v1/models")
        assert "exempt" not in {line["client_request_id"] for line in lines}

"""Bodies that pass through the direct door: windows, back-pressure, bounds, and every byte."""

import asyncio

import pytest

from flowcontrol.request import Outcome
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.direct import connection
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.limits import Http2Limits
from tests.support.direct import RESPONSE_MESSAGE, Raw, announcing, data, fields_of, house
from tests.support.direct import headers_message as plain_headers
from tests.support.duplex import Echo, begun, cut, part
from tests.support.gates import POOL, TIMEOUT_S

PING = frames.frame(frames.PING, 0, 0, b"anything")


async def answered(raw: Raw, echo: Echo, until: int) -> None:
    """Listen until so much of the request's body has come back."""
    while len(echo.request) < until:
        frame = await raw.hear_of(frames.DATA)
        echo.take(frame.payload)
        raw.say(
            frames.window_update(0, len(frame.payload)), frames.window_update(1, len(frame.payload))
        )


async def quiet(raw: Raw) -> list[tuple[int, int]]:
    """Return what the door has said until now, by kind of frame and stream."""
    raw.say(PING)
    said: list[tuple[int, int]] = []
    while True:
        frame = await raw.hear()
        if frame.kind == frames.PING and frame.payload == b"anything":
            return said
        said.append((frame.kind, frame.stream_id))


class TestWindows:
    """Who may send how much."""

    async def test_parked(self) -> None:
        """A parked request fills its window once; the rest waits in Envoy until it is let on."""
        body = bytes(range(250)) * 200
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(), cut(1, part(body, is_end=True)))
            await home.until(waiting=1)
            before = await quiet(raw)
            home.gate.post(POOL)
            echo = Echo()
            await answered(raw, echo, len(body))
            after = await quiet(raw)
            raw.say(frames.rst_stream(1, 0))

        assert (frames.WINDOW_UPDATE, 1) not in before
        assert (frames.WINDOW_UPDATE, 1) in after or echo.request == body
        assert echo.request == body
        assert echo.messages == ["request_headers", "request_body"]
        assert echo.request_ends == 1

    async def test_a_response_right_behind_the_headers(self) -> None:
        """Where Envoy itself responds in the same moment, all of its response passes."""
        body = b"r" * 50_000
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun() + data(1, framed(RESPONSE_MESSAGE)))
            raw.say(cut(1, part(body, is_request=False)))
            echo = Echo()
            allowed = 0
            while not allowed or echo.response != body:
                frame = await raw.hear()
                if (frame.kind, frame.stream_id) == (frames.DATA, 1):
                    echo.take(frame.payload)
                if (frame.kind, frame.stream_id) == (frames.WINDOW_UPDATE, 1):
                    allowed += frames.read_word(frame.payload)
            raw.say(frames.rst_stream(1, 0))

        assert echo.messages[0] == "response_headers"

    async def test_back_pressure(self) -> None:
        """What Envoy does not take back it may not send more of."""
        async with house() as home:
            raw = await home.connect(INITIAL_WINDOW_SIZE=0)
            raw.say(begun())
            await home.until(in_flight=1)
            raw.say(cut(1, part(b"x" * 50_000)))
            await asyncio.sleep(0)
            before = await quiet(raw)
            raw.say(frames.window_update(1, 1 << 20))
            echo = Echo()
            await answered(raw, echo, 50_000)
            after = await quiet(raw)
            raw.say(frames.rst_stream(1, 0))

        assert (frames.WINDOW_UPDATE, 1) not in before
        assert (frames.DATA, 1) not in before
        assert echo.request == b"x" * 50_000
        assert after is not None


class TestEcho:
    """What comes back."""

    async def test_parts_of_one_read_are_merged(self) -> None:
        """A hundred parts that come together go back as one."""
        async with house() as home:
            raw = await home.connect()
            raw.say(begun())
            await home.until(in_flight=1)
            raw.say(data(1, b"".join(part(b"%02d" % n, is_request=False) for n in range(100))))
            echo = Echo()
            while len(echo.response) < 200:
                echo.take((await raw.hear_of(frames.DATA)).payload)
            raw.say(frames.rst_stream(1, 0))

        assert echo.response == b"".join(b"%02d" % n for n in range(100))
        assert echo.messages.count("response_body") == 1

    async def test_too_much_is_held(self) -> None:
        """A parked request that finds no room for its body is refused, and the others stay."""
        limits = Http2Limits(partial_bytes_max=5000)
        async with house(limits, has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(1), cut(1, part(b"x" * 3000, is_end=True)))
            raw.say(begun(3), cut(3, part(b"x" * 3000, is_end=True)))
            echo = Echo()
            frame = await raw.hear_of(frames.DATA)
            echo.take(frame.payload)
            await home.until(waiting=1)
            refusals = home.context.body_refusals
            raw.say(frames.rst_stream(1, 0))
            await home.until(waiting=0)

        assert (frame.stream_id, echo.status) == (3, 429)
        assert refusals == 1

    async def test_counted_as_its_client_is_told(self) -> None:
        """One that waited when its body became too much was refused: its client has not left."""
        async with house(Http2Limits(partial_bytes_max=5000), has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(1))
            await home.until(waiting=1)
            raw.say(cut(1, part(b"x" * 6000, is_end=True)))
            echo = Echo()
            echo.take((await raw.hear_of(frames.DATA)).payload)
            await home.until(waiting=0)

        assert echo.status == 429
        assert home.outcomes == [Outcome.REJECTED_CAPACITY]

    async def test_large_and_no_body(self) -> None:
        """A message beyond a gRPC message's size that is no part of a body ends its stream."""
        async with house(Http2Limits(message_bytes_max=300)) as home:
            raw = await home.connect()
            raw.say(begun())
            await home.until(in_flight=1)
            headers = envoy_messages.ProcessingRequest(response_headers={})
            fields = headers.metadata_context.filter_metadata["a"].fields
            fields["b"].string_value = "x" * 400
            raw.say(data(1, framed(headers.SerializeToString())))
            ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)
            await home.until(in_flight=0)

        assert fields_of(ending)[b"grpc-status"] == b"8"

    async def test_half_close_behind_a_body(self) -> None:
        """A gateway that ends its side behind the body (NGINX Gateway Fabric) is answered all."""
        async with house(has_pool=False) as home:
            raw = await home.connect()
            body = part(b"abc", is_end=True)
            raw.say(begun(1, plain_headers()), data(1, body), data(1, b"", is_end=True))
            await home.until(waiting=1)
            home.gate.post(POOL)
            echo = Echo()
            await answered(raw, echo, 3)
            trailers = await raw.hear_of(frames.HEADERS, frames.END_STREAM)

        assert (echo.request, echo.request_ends, trailers.stream_id) == (b"abc", 1, 1)

    async def test_facts(self) -> None:
        """What a body says is known of its request when it is parked."""
        body = b'{"model": "llama", "max_tokens": 512, "messages": []}'
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(), data(1, part(body, is_end=True)))
            await home.until(waiting=1)
            parked = home.gate.live(1)
            raw.say(frames.rst_stream(1, 0))
            await home.until(waiting=0)

        assert parked is not None
        assert (parked.request.model, parked.request.output_tokens_max) == ("llama", 512)

    @pytest.mark.interpreted
    async def test_facts_behind_the_headers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So it is of a client that sends its body behind the headers, in a packet of its own."""
        monkeypatch.setattr(connection, "BODY_S", TIMEOUT_S)
        body = b'{"model": "llama", "max_tokens": 512, "messages": []}'
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun())
            await quiet(raw)
            before = home.gate.live(1)
            raw.say(data(1, part(body, is_end=True)))
            await home.until(waiting=1)
            parked = home.gate.live(1)
            raw.say(frames.rst_stream(1, 0))
            await home.until(waiting=0)

        assert before is None
        assert parked is not None
        assert (parked.request.model, parked.request.output_tokens_max) == ("llama", 512)

    @pytest.mark.interpreted
    @pytest.mark.parametrize("leaves", [True, False], ids=["reset", "half-close"])
    async def test_gone_before_its_body(
        self, monkeypatch: pytest.MonkeyPatch, *, leaves: bool
    ) -> None:
        """A client that goes before its body has come holds nothing."""
        monkeypatch.setattr(connection, "BODY_S", 0.05)
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun())
            await quiet(raw)
            raw.say(frames.rst_stream(1, 0) if leaves else data(1, b"", is_end=True))
            await home.until(waiting=0)
            echo = Echo()
            if not leaves:
                echo.take((await raw.hear_of(frames.DATA)).payload)

        assert echo.status == (0 if leaves else 499)
        assert home.outcomes == ([] if leaves else [Outcome.EVICTED_CANCELLED])

    async def test_no_body_comes(self) -> None:
        """A request whose body is late is parked without it."""
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun())
            await home.until(waiting=1)
            raw.say(frames.rst_stream(1, 0))
            await home.until(waiting=0)

        assert home.outcomes == [Outcome.EVICTED_CANCELLED]

    @pytest.mark.interpreted
    async def test_body_that_is_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request whose body is not JSON does not wait for it."""
        monkeypatch.setattr(connection, "BODY_S", 10 * TIMEOUT_S)
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(1, announcing(content_type="audio/wav")))
            await home.until(waiting=1)
            raw.say(frames.rst_stream(1, 0))
            await home.until(waiting=0)

        assert home.outcomes == [Outcome.EVICTED_CANCELLED]

    async def test_half_close_before_it_is_parked(self) -> None:
        """A client that has gone in the turn in which it came is answered, and holds nothing."""
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun() + data(1, b"", is_end=True))
            echo = Echo()
            echo.take((await raw.hear_of(frames.DATA)).payload)
            await home.until(waiting=0)

        assert echo.status == 499

    async def test_close(self) -> None:
        """A door that closes lets a body that is under way pass to its end."""
        async with house() as home:
            raw = await home.connect()
            raw.say(begun())
            await home.until(in_flight=1)
            raw.say(data(1, part(b"begin", is_request=False)))
            closing = asyncio.ensure_future(home.door.close(0, TIMEOUT_S))
            echo = await _hear(raw, b"begin")
            raw.say(data(1, part(b"end", is_end=True, is_request=False)))
            echo = await _hear(raw, b"end", echo)
            raw.say(data(1, b"", is_end=True))
            await raw.hear_of(frames.HEADERS, frames.END_STREAM)
            raw.writer.close()
            await closing

        assert (echo.response, echo.response_ends) == (b"beginend", 1)


class TestStandby:
    """Another replica decides, and Envoy cannot ask it: it has sent parts of the body here."""

    async def test_new(self) -> None:
        """A request that comes to a standby is refused, not left to Envoy's failure mode."""
        async with house() as home:
            home.context.may_decide = lambda: False
            raw = await home.connect()
            raw.say(begun())
            echo = Echo()
            echo.take((await raw.hear_of(frames.DATA)).payload)
            ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)

        assert (echo.messages, echo.status) == (["immediate_response"], 503)
        assert fields_of(ending)[b"grpc-status"] == b"0"

    async def test_parked(self) -> None:
        """A leader that stands down refuses what waits, before its body has come and after."""
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(begun(1), begun(3), cut(3, part(b"x" * 50_000)))
            await home.until(waiting=2)
            home.door.move_calls()
            echoes = {1: Echo(), 3: Echo()}
            for _ in echoes:
                frame = await raw.hear_of(frames.DATA)
                echoes[frame.stream_id].take(frame.payload)
                await raw.hear_of(frames.HEADERS, frames.END_STREAM)
            await home.until(waiting=0)

        said = [(each.messages, each.status) for each in echoes.values()]
        assert said == [(["immediate_response"], 503)] * 2
        assert home.outcomes == [Outcome.EVICTED_STOOD_DOWN] * 2

    async def test_in_flight(self) -> None:
        """It lets bodies under way pass to their end."""
        async with house() as home:
            raw = await home.connect()
            raw.say(begun())
            await home.until(in_flight=1)
            raw.say(data(1, part(b"ask", is_end=True)), data(1, part(b"begin", is_request=False)))
            echo = await _hear(raw, b"begin")
            home.door.move_calls()
            home.context.may_decide = lambda: False
            raw.say(data(1, part(b"end", is_end=True, is_request=False)))
            echo = await _hear(raw, b"end", echo)
            raw.say(data(1, b"", is_end=True))
            ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)

        assert (echo.request, echo.request_ends) == (b"ask", 1)
        assert (echo.response, echo.response_ends) == (b"beginend", 1)
        assert fields_of(ending)[b"grpc-status"] == b"0"


async def _hear(raw: Raw, body: bytes, echo: Echo | None = None) -> Echo:
    echo = echo or Echo()
    while not echo.response.endswith(body):
        echo.take((await raw.hear_of(frames.DATA)).payload)
    return echo

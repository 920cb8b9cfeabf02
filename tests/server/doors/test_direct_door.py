"""The direct door: grpcio as its client, and a client of bare frames for what grpcio never does."""

import asyncio
import itertools
import socket
import ssl
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flowcontrol.errors import ListenError
from flowcontrol.events import ObjectivesChanged
from flowcontrol.request import Outcome
from flowcontrol_server.doors import health
from flowcontrol_server.doors.call_context import STANDBY
from flowcontrol_server.doors.direct import calls as direct_calls
from flowcontrol_server.doors.direct import connection as direct_line
from flowcontrol_server.doors.direct.calls import HealthCall, WatchCall
from flowcontrol_server.doors.direct.connection import SILENT_CHECKS
from flowcontrol_server.doors.envoy_secret import EnvoySecret
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ErrorCode
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.limits import Http2Limits, Rate
from tests.support.direct import (
    BODY_MESSAGE,
    OBJECTIVE,
    PROCESS,
    RECLAIMING,
    RESPONSE_MESSAGE,
    TRAILERS_MESSAGE,
    Stream,
    announcing,
    arrival,
    data,
    fields_of,
    grpcio,
    headers_message,
    house,
    opening,
    slots,
)
from tests.support.gates import TIMEOUT_S
from tests.support.http2 import heard


class TestConversation:
    """grpcio in the place of Envoy."""

    async def test_dispatched(self) -> None:
        """A request goes on, holds its slot while its stream is open, and frees it at the end."""
        async with house() as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message())
            reply = await stream.hear()

            assert reply.WhichOneof("response") == "request_headers"
            await home.until(in_flight=1)
            await stream.say(TRAILERS_MESSAGE)
            assert (await stream.hear()).WhichOneof("response") == "response_trailers"
            await stream.end()
            assert await stream.ending() == (grpc.StatusCode.OK, "")
            await home.until(in_flight=0)
            assert home.outcomes == [Outcome.DISPATCHED]

    async def test_exempt(self) -> None:
        """An exempt path passes at once and holds nothing."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message("/health"))

            assert (await stream.hear()).WhichOneof("response") == "request_headers"
            assert await stream.ending() == (grpc.StatusCode.OK, "")
            assert home.ended == []

    async def test_refused(self) -> None:
        """A refusal is an ImmediateResponse, and ends the stream."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message(**{"x-llm-d-inference-ttl": "1ms"}))
            reply = await stream.hear()

            assert reply.immediate_response.status.code == 503
            assert reply.immediate_response.details == "rejected_no_endpoints"
            assert await stream.ending() == (grpc.StatusCode.OK, "")

    async def test_cancelled_while_parked(self) -> None:
        """A stream that is reset gives up its place."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message())
            await home.until(waiting=1)
            stream.call.cancel()
            await home.until(waiting=0)

            assert home.outcomes == [Outcome.EVICTED_CANCELLED]

    async def test_stands_down(self) -> None:
        """A request that waits goes to the next replica; its client has not left."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message())
            await home.until(waiting=1)
            home.door.move_calls()

            assert await stream.ending() == (grpc.StatusCode.UNAVAILABLE, STANDBY)
            await home.until(waiting=0)
            assert home.outcomes == [Outcome.EVICTED_MOVED]

    async def test_half_closed_while_parked(self) -> None:
        """A client that says no more while parked has gone, but is answered: never let through."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message())
            await home.until(waiting=1)
            await stream.end()
            reply = await stream.hear()

            assert reply.immediate_response.status.code == 499
            assert await stream.ending() == (grpc.StatusCode.OK, "")
            assert home.outcomes == [Outcome.EVICTED_CANCELLED]

    async def test_nothing_said(self) -> None:
        """A stream on which nothing is said asks for nothing."""
        async with house() as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.end()

            assert await stream.ending() == (grpc.StatusCode.OK, "")
            assert home.ended == []

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ([BODY_MESSAGE], "the first message must be request_headers"),
            ([announcing("NONE"), BODY_MESSAGE], "processing_mode must keep"),
            ([b"\xff\xff"], "not a ProcessingRequest"),
            ([b""], "a ProcessingRequest without a request"),
        ],
    )
    async def test_mistakes(self, said: Sequence[bytes], reason: str) -> None:
        """What must not be said ends the stream with the reason, and frees its place."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            for message in said:
                await stream.say(message)
            code, details = await stream.ending()

            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details.startswith(reason)

    async def test_many_at_once(self) -> None:
        """A thousand requests on one connection are answered, each once."""
        async with house(config=slots(10)) as home:
            async with grpcio(home.port) as channel:

                async def one(number: int) -> str | None:
                    stream = Stream(channel)
                    await stream.say(headers_message(f"/v1/{number}"))
                    kind = (await stream.hear()).WhichOneof("response")
                    await stream.end()
                    assert await stream.ending() == (grpc.StatusCode.OK, "")
                    return str(kind)

                kinds = await asyncio.gather(*map(one, range(1000)))

            assert kinds == ["request_headers"] * 1000
            assert home.outcomes == [Outcome.DISPATCHED] * 1000

    async def test_cut_anywhere(self) -> None:
        """A message may come byte by byte, in frames of a byte, and two in one frame."""
        async with house() as home:
            raw = await home.connect()
            message = framed(headers_message())
            raw.say(opening(1), *(data(1, message[at : at + 1]) for at in range(len(message))))
            answer = await raw.hear_of(frames.DATA)
            raw.say(data(1, framed(TRAILERS_MESSAGE) * 2))
            acknowledgements = [await raw.hear_of(frames.DATA) for _ in range(2)]
            raw.say(data(1, b"", is_end=True))
            await raw.hear_of(frames.HEADERS, frames.END_STREAM)

            assert answer.stream_id == 1
            assert acknowledgements[0] == acknowledgements[1]


class TestSecret:
    """Where Envoy must show a secret."""

    async def test_shown(self, tmp_path: Path) -> None:
        """Who shows it is served; who does not holds nothing, but may ask for health."""
        (tmp_path / "secret").write_text("known-to-envoy-alone")
        async with house() as home, grpcio(home.port) as channel:
            home.context.secret = EnvoySecret(tmp_path / "secret")
            await home.health.set("", is_serving=True)
            stranger = Stream(channel)
            envoy = Stream(channel, metadata=(("authorization", "Bearer known-to-envoy-alone"),))
            await envoy.say(headers_message())

            expected = "authorization must contain a secret from listen.secretFile"
            assert await stranger.ending() == (grpc.StatusCode.UNAUTHENTICATED, expected)
            assert (await envoy.hear()).WhichOneof("response") == "request_headers"
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = await check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            await envoy.end()
            await home.until(in_flight=0)
            assert home.outcomes == [Outcome.DISPATCHED]


class TestReclaim:
    """A request in flight is to end for a better one."""

    async def test_before_the_answer(self) -> None:
        """Its client is refused, its stream ends, and its slot goes to the better one."""
        async with house(config=RECLAIMING) as home, grpcio(home.port) as channel:
            home.gate.post(ObjectivesChanged({"batch": -1}))
            batch, person = Stream(channel), Stream(channel)
            await batch.say(headers_message(**{OBJECTIVE: "batch"}))
            proceed = await batch.hear()
            await person.say(headers_message())
            refusal = await batch.hear()

            assert proceed.mode_override.response_header_mode
            assert refusal.immediate_response.status.code == 429
            assert refusal.immediate_response.details == "evicted"
            assert await batch.ending() == (grpc.StatusCode.OK, "")
            assert (await person.hear()).WhichOneof("response") == "request_headers"
            assert home.outcomes == [Outcome.RECLAIMED]

    async def test_after_the_answer(self) -> None:
        """A request whose response has begun is acknowledged and let alone."""
        async with house(config=RECLAIMING) as home, grpcio(home.port) as channel:
            home.gate.post(ObjectivesChanged({"batch": -1}))
            batch, person = Stream(channel), Stream(channel)
            await batch.say(headers_message(**{OBJECTIVE: "batch"}))
            await batch.hear()
            await batch.say(RESPONSE_MESSAGE)
            assert (await batch.hear()).WhichOneof("response") == "response_headers"
            await person.say(headers_message())
            await home.until(waiting=1, in_flight=1)
            await batch.end()

            assert await batch.ending() == (grpc.StatusCode.OK, "")
            assert (await person.hear()).WhichOneof("response") == "request_headers"
            assert home.outcomes == [Outcome.DISPATCHED]

    async def test_gone(self) -> None:
        """One that leaves, reclaimed or not, leaves once."""
        async with house(config=RECLAIMING) as home, grpcio(home.port) as channel:
            home.gate.post(ObjectivesChanged({"batch": -1}))
            batch, person = Stream(channel), Stream(channel)
            await batch.say(headers_message(**{OBJECTIVE: "batch"}))
            await batch.hear()
            batch.call.cancel()
            await person.say(headers_message())

            assert (await person.hear()).WhichOneof("response") == "request_headers"
            assert len(home.ended) == 1


class TestFault:
    """Something is wrong with us."""

    @pytest.mark.interpreted
    async def test_poisonous_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bug that one request meets ends that one; what is parked beside it stays."""
        async with house(has_pool=False) as home, grpcio(home.port) as channel:
            beside = Stream(channel)
            await beside.say(headers_message())
            await home.until(waiting=1)

            def poisoned(_message: bytes) -> None:
                message = "planted"
                raise RuntimeError(message)

            with monkeypatch.context() as planted:
                planted.setattr(direct_calls, "decode", poisoned)
                stream = Stream(channel)
                await stream.say(headers_message())

                assert await stream.ending() == (grpc.StatusCode.INTERNAL, "internal error")
            await home.until(waiting=1)
            assert home.ended == []


class TestMethods:
    """What is no call we take."""

    async def test_unknown_method(self) -> None:
        """Another method is unimplemented; the message says what there is."""
        async with house() as home, grpcio(home.port) as channel:
            code, details = await Stream(channel, "/a.B/C").ending()

            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert details.startswith(f"method must be {PROCESS} or ")
            assert details.endswith("got /a.B/C")

    async def test_compressed(self) -> None:
        """A compressed message is refused, and the client learns what to send instead."""
        async with house() as home, grpcio(home.port) as channel:
            stream = Stream(channel, compression=grpc.Compression.Gzip)
            await stream.say(headers_message(x="y" * 1000))
            code, details = await stream.ending()

            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert "must not be compressed" in details

    async def test_too_large(self) -> None:
        """A message beyond the limit is refused from its prefix."""
        async with house(Http2Limits(message_bytes_max=1000)) as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message(x="y" * 1000))
            code, details = await stream.ending()

            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "at most 1000 bytes" in details

    @pytest.mark.parametrize(
        ("more", "status"), [({":method": "GET"}, b"405"), ({"content_type": "text/plain"}, b"415")]
    )
    async def test_no_grpc(self, more: dict[str, str], status: bytes) -> None:
        """A request that is no gRPC is answered in plain HTTP when it has ended."""
        async with house() as home:
            raw = await home.connect()
            raw.say(opening(1, **more), data(1, b"question", is_end=True))
            head = await raw.hear_of(frames.HEADERS)
            body = await raw.hear_of(frames.DATA, frames.END_STREAM)

            assert fields_of(head)[b":status"] == status
            assert body.payload.startswith(b"only gRPC calls are served here: /envoy.")


class TestHealth:
    """Health checks of Envoy's, at the door that it uses."""

    async def test_serving(self) -> None:
        """Known services have a status; unknown ones are not found."""
        async with house() as home, grpcio(home.port) as channel:
            await home.health.set("a", is_serving=True)
            await home.health.set("b", is_serving=False)
            stub = health_pb2_grpc.HealthStub(channel)
            replies = [await stub.Check(health_pb2.HealthCheckRequest(service=s)) for s in "ab"]
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.Check(health_pb2.HealthCheckRequest(service="c"))

            assert [reply.status for reply in replies] == [1, 2]
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND

    async def test_watch(self) -> None:
        """Who watches hears of every change, of a service that was unknown too, until it ends."""
        async with house() as home, grpcio(home.port) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="a")
            )
            statuses = [(await watch.read()).status]
            for is_serving in (True, True, False):
                await home.health.set("a", is_serving=is_serving)
                await home.health.set("b", is_serving=is_serving)
            statuses += [(await watch.read()).status for _ in range(2)]
            await home.door.close(0)

            assert statuses == [3, 1, 2]  # SERVICE_UNKNOWN, SERVING, NOT_SERVING
            assert await watch.code() is grpc.StatusCode.UNAVAILABLE

    async def test_watches_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of too many that watch the last are refused; one that goes makes room."""
        monkeypatch.setattr(health, "WATCHERS_MAX", 2)
        async with house() as home:
            raw = await home.connect()
            watch = WatchCall.PATH.decode()
            raw.say(*(opening(i, watch) + data(i, framed(b""), is_end=True) for i in (1, 3, 5)))
            refused = await raw.hear_of(frames.HEADERS, frames.END_STREAM)
            raw.say(frames.rst_stream(1, ErrorCode.CANCEL))
            raw.say(opening(7, watch), data(7, framed(b""), is_end=True))

            assert (refused.stream_id, fields_of(refused)[b"grpc-status"]) == (5, b"8")
            assert (await raw.hear_of(frames.DATA)).stream_id == 7

    @pytest.mark.parametrize("path", [HealthCall.PATH, WatchCall.PATH])
    @pytest.mark.parametrize("said", [b"", framed(b"\xff")])
    async def test_mistakes(self, said: bytes, path: bytes) -> None:
        """A check that asks nothing, or nothing readable, is refused."""
        async with house() as home:
            raw = await home.connect()
            raw.say(opening(1, path.decode()), data(1, said, is_end=True))
            ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)

            assert fields_of(ending)[b"grpc-status"] == b"3"


class TestAddresses:
    """Where the door can be."""

    async def test_unix_socket(self, tmp_path: Path) -> None:
        """A Unix socket serves like a port; a stale one is replaced, a used one is left alone."""
        path = tmp_path / "door.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        async with house() as home:
            await home.door.listen(path)
            async with grpcio(f"unix:{path}") as channel:
                stream = Stream(channel)
                await stream.say(headers_message())
                await stream.hear()
                await stream.end()
                assert await stream.ending() == (grpc.StatusCode.OK, "")
            with pytest.raises(ListenError, match=f"{path}: in use by another process"):
                await home.door.listen(path)
        assert not path.exists()

    async def test_socket_that_cannot_be(self, tmp_path: Path) -> None:
        """A socket without its folder, or where something else stands, is told so."""
        (tmp_path / "file").touch()
        async with house() as home:
            for name, reason in (
                ("nowhere/door.sock", "parent directory does not exist"),
                ("file", "the path exists and is not a socket"),
                (".", "the path exists and is not a socket"),
            ):
                with pytest.raises(ListenError) as caught:
                    await home.door.listen(tmp_path / name)

                assert str(caught.value) == f"cannot listen on {tmp_path / name}: {reason}"
        assert (tmp_path / "file").is_file()

    async def test_port_in_use(self) -> None:
        """A port that is taken is named."""
        async with house() as home:
            with pytest.raises(ListenError, match=f"127.0.0.1:{home.port}"):
                await home.door.listen(("127.0.0.1", home.port))


@pytest.fixture(name="ca", scope="module")
def _ca() -> trustme.CA:
    """An authority."""
    return trustme.CA()


class TestTls:
    """TLS with ALPN, and mutual TLS."""

    @staticmethod
    def server_context(ca: trustme.CA, *, is_mutual: bool = False) -> ssl.SSLContext:
        """What the door opens with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        ca.issue_cert("localhost").configure_cert(context)
        if is_mutual:
            ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    @pytest.mark.parametrize("is_mutual", [False, True])
    async def test_grpcio(self, ca: trustme.CA, is_mutual: bool) -> None:  # noqa: FBT001 - a table
        """Grpcio talks to it over TLS, and shows its certificate where that is asked for."""
        mine = ca.issue_cert("client")
        own = (mine.private_key_pem.bytes(), mine.cert_chain_pems[0].bytes()) if is_mutual else ()
        credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), *own)
        async with house() as home:
            context = self.server_context(ca, is_mutual=is_mutual)
            port = await home.door.listen(("127.0.0.1", 0), context)
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                stream = Stream(channel)
                await stream.say(headers_message())
                await stream.hear()
                await stream.end()

                assert await stream.ending() == (grpc.StatusCode.OK, "")

    async def test_without_certificate(self, ca: trustme.CA) -> None:
        """Who shows no certificate where one is asked for is turned away."""
        credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
        async with house() as home:
            context = self.server_context(ca, is_mutual=True)
            port = await home.door.listen(("127.0.0.1", 0), context)
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                code, _ = await Stream(channel).ending()

                assert code is grpc.StatusCode.UNAVAILABLE

    @pytest.mark.parametrize("protocols", [["http/1.1"], []])
    async def test_alpn(self, ca: trustme.CA, protocols: list[str]) -> None:
        """Who does not choose h2 is turned away."""
        async with house() as home:
            port = await home.door.listen(("127.0.0.1", 0), self.server_context(ca))
            context = ssl.create_default_context()
            ca.configure_trust(context)
            if protocols:
                context.set_alpn_protocols(protocols)
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="localhost"
                )
                said = await asyncio.wait_for(reader.read(), TIMEOUT_S)
                writer.transport.abort()
            except OSError:
                said = b""

            assert said == b""


class TestLimits:
    """Clients that ask for too much, over a socket. The core's own are in test_http2_connection."""

    async def test_connections(self) -> None:
        """One connection too many is closed; the others, which are in use, stay."""
        async with house(Http2Limits(connections_max=2), has_pool=False) as home:
            first, second = [await home.connect() for _ in range(2)]
            for raw in (first, second):
                raw.say(arrival(1))
            await home.until(waiting=2)
            third = await home.connect()

            assert await third.eof() == b""
            first.say(frames.frame(frames.PING, 0, 0, b"12345678"))
            assert (await first.hear_of(frames.PING, frames.ACK)).payload == b"12345678"

    async def test_idle_connections(self) -> None:
        """Connections that open nothing make room, the oldest first; those in use stay."""
        async with house(Http2Limits(connections_max=3), has_pool=False) as home:
            used = await home.connect()
            used.say(arrival(1))
            await home.until(waiting=1)
            idle = [await home.connect() for _ in range(2)]
            for raw in idle:
                await raw.hear_of(frames.SETTINGS, frames.ACK)
            late = await home.connect()
            late.say(arrival(1))
            await home.until(waiting=2)

            await idle[0].eof()
            for raw in (used, idle[1]):
                raw.say(frames.frame(frames.PING, 0, 0, b"12345678"))
                assert (await raw.hear_of(frames.PING, frames.ACK)).payload == b"12345678"

    async def test_silent_streams(self) -> None:
        """A stream that says nothing for two checks ends at the third; one that spoke goes on."""
        async with house(has_pool=False) as home:
            raw = await home.connect()
            raw.say(arrival(1), opening(3), opening(5, WatchCall.PATH.decode()))
            raw.say(opening(7, content_type="text/html"))  # answered when it ends
            raw.say(opening(9), data(9, b"\x00\x00"))  # a part of a message
            await home.until(waiting=1)
            (line,) = home.door.lines
            now_ns = time.monotonic_ns()
            line.check(now_ns)
            raw.say(opening(11), frames.frame(frames.PING, 0, 0, b"12345678"))
            await raw.hear_of(frames.PING, frames.ACK)
            line.check(now_ns)
            raw.say(frames.frame(frames.PING, 0, 0, b"87654321"))
            heard = [await raw.hear()]
            while heard[-1].payload != b"87654321":
                heard.append(await raw.hear())
            assert not [frame for frame in heard if frame.kind == frames.HEADERS]
            line.check(now_ns)
            ends = [await raw.hear_of(frames.HEADERS) for _ in range(4)]

            assert [end.stream_id for end in ends] == [3, 5, 7, 9]
            assert [fields_of(end).get(b"grpc-status") for end in ends] == [b"4", b"4", None, b"4"]
            await home.until(waiting=1)
            line.check(now_ns)
            assert (await raw.hear_of(frames.HEADERS)).stream_id == 11

    async def test_many_silent_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another connection is served while many end."""
        monkeypatch.setattr(direct_line, "TURN_NS", 0)
        async with house() as home:
            silent, other = [await home.connect() for _ in range(2)]
            silent.say(*(opening(2 * number + 1) for number in range(1000)))
            silent.say(frames.frame(frames.PING, 0, 0, b"12345678"))
            await silent.hear_of(frames.PING, frames.ACK)
            other.say(arrival(1))
            await other.hear_of(frames.DATA)
            for _ in range(SILENT_CHECKS + 1):
                for line in home.door.lines:
                    line.check(time.monotonic_ns())
            other.say(arrival(3))
            await other.hear_of(frames.DATA)
            silent.say(frames.frame(frames.PING, 0, 0, b"87654321"))
            ended = 0
            while (frame := await silent.hear()).kind != frames.PING:
                ended += frame.kind == frames.HEADERS

            assert ended < 1000
            for _ in range(1000 - ended):
                await silent.hear_of(frames.HEADERS, frames.END_STREAM)

    async def test_connections_of_silent_streams(self) -> None:
        """A connection whose streams say nothing makes room, too."""
        async with house(Http2Limits(connections_max=1), has_pool=False) as home:
            silent = await home.connect()
            silent.say(opening(1), opening(3, content_type="text/html"))
            silent.say(frames.frame(frames.PING, 0, 0, b"12345678"))
            await silent.hear_of(frames.PING, frames.ACK)
            envoy = await home.connect()
            envoy.say(arrival(1))
            await home.until(waiting=1)

            await silent.eof()

    async def test_watching_connections(self) -> None:
        """A connection on which only health is watched makes room: whoever connects may watch."""
        async with house(Http2Limits(connections_max=1), has_pool=False) as home:
            watching = await home.connect()
            watching.say(opening(1, WatchCall.PATH.decode()), data(1, framed(b"")))
            await watching.hear_of(frames.DATA)
            envoy = await home.connect()
            envoy.say(arrival(1))
            await home.until(waiting=1)

            await watching.eof()

    async def test_parts_of_messages(self) -> None:
        """A pile of messages that never get whole is limited; giving some up makes room again."""
        limits = Http2Limits(partial_bytes_max=1000)
        async with house(limits) as home:
            raw = await home.connect()
            part = b"\x00\x00\x00\x10\x00" + b"x" * 595
            raw.say(opening(1), data(1, part), opening(3), data(3, part))
            refused = await raw.hear_of(frames.HEADERS, frames.END_STREAM)
            raw.say(frames.rst_stream(1, ErrorCode.CANCEL))
            raw.say(opening(5), data(5, part), frames.frame(frames.PING, 0, 0, b"12345678"))
            after = await raw.hear_of(frames.PING, frames.ACK)

            assert refused.stream_id == 3
            assert after.payload == b"12345678"
            raw.say(opening(7), data(7, part))
            assert (await raw.hear_of(frames.HEADERS, frames.END_STREAM)).stream_id == 7

    async def test_parts_are_counted_once(self) -> None:
        """A message refused by its prefix when a part of it was held leaves no account behind."""
        limits = Http2Limits(partial_bytes_max=1000, message_bytes_max=500)
        async with house(limits) as home:
            raw = await home.connect()
            for number in range(50):
                stream_id = 2 * number + 1
                raw.say(opening(stream_id), data(stream_id, b"\x00\x00"))
                raw.say(data(stream_id, b"\x00\xff\xff" + b"x" * 900))
            part = b"\x00\x00\x00\x01\x00" + b"x" * 200
            for stream_id in range(201, 213, 2):
                raw.say(opening(stream_id), data(stream_id, part))
            ends = [await raw.hear_of(frames.HEADERS, frames.END_STREAM) for _ in range(52)]

            assert [end.stream_id for end in ends[-2:]] == [209, 211]

    async def test_no_window(self) -> None:
        """A client that asks and admits no answer is cut off before it costs much memory."""
        limits = Http2Limits(queued_bytes_max=100_000)
        async with house(limits, config=slots(10_000)) as home:
            raw = await home.connect(INITIAL_WINDOW_SIZE=0)
            raw.say(*(arrival(2 * number + 1) for number in range(3000)))
            await raw.eof()
            await home.until(waiting=0, in_flight=0)

            assert 100 <= home.outcomes.count(Outcome.DISPATCHED) < 3000

    @pytest.mark.interpreted
    async def test_slow_reader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that does not read what the system buffers is read no more, then cut off."""
        monkeypatch.setattr(direct_line, "WRITE_BUFFER_BYTES", 10_000)
        for name in ("TURN_NS", "SLICE_NS"):  # it reads as fast as the client writes
            monkeypatch.setattr(direct_line, name, 10**9)
        async with house(Http2Limits(pings=Rate(10**6, 0))) as home:
            raw = await home.connect()
            transport = raw.writer.transport
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()
            ping = frames.frame(frames.PING, 0, 0, b"12345678") * 1000
            async with asyncio.timeout(TIMEOUT_S):
                while not transport.get_write_buffer_size():
                    raw.say(ping)  # each is answered, until the door reads no more
                    await asyncio.sleep(0)
                (line,) = home.door.lines
                line.check(time.monotonic_ns() + Http2Limits().write_stall_ns - 1_000_000_000)
                assert home.door.lines
                line.check(time.monotonic_ns() + Http2Limits().write_stall_ns)
            await raw.eof()
            assert not home.door.lines

    async def test_garbage(self) -> None:
        """Who speaks another protocol is told, and left."""
        async with house() as home:
            reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
            writer.write(b"GET / HTTP/1.1\r\nhost: me\r\n\r\n")
            said = heard(await asyncio.wait_for(reader.read(), TIMEOUT_S))

            assert said[-1].kind == frames.GOAWAY
            writer.transport.abort()


class TestTurns:
    """One connection does not hold the loop, however much it sends at once."""

    @pytest.mark.interpreted
    async def test_others_are_served_between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A question of another connection is answered amid a flood, which is read in order."""
        monkeypatch.setattr(direct_line, "TURN_NS", 0)
        asked = itertools.count()

        def is_standby() -> bool:
            next(asked)
            return False

        async with house() as home:
            home.context.may_decide = is_standby
            flooding, other = [await home.connect() for _ in range(2)]
            for raw in (flooding, other):
                await raw.hear_of(frames.SETTINGS, frames.ACK)
            flooding.say(*(arrival(2 * number + 1) for number in range(1000)))
            other.say(arrival(1))
            await other.hear_of(frames.HEADERS, frames.END_STREAM)
            before = next(asked)
            answered = [
                (await flooding.hear_of(frames.HEADERS, frames.END_STREAM)).stream_id
                for _ in range(1000)
            ]

        assert before < 500
        assert answered == [2 * number + 1 for number in range(1000)]

    async def test_lost_in_the_midst(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A connection that breaks gives all up, turn by turn, and the rest of its input."""
        monkeypatch.setattr(direct_line, "TURN_NS", 0)
        async with house(config=slots(1)) as home:
            raw = await home.connect()
            raw.say(*(arrival(2 * number + 1) for number in range(500)))
            await raw.hear_of(frames.DATA)
            await raw.hang_up()
            await home.until(waiting=0, in_flight=0)
            await home.door.close(TIMEOUT_S)

            assert not home.door.lines


class TestDrain:
    """The door closes."""

    async def test_clients_are_asked(self) -> None:
        """A drain asks clients to leave in two steps; what is under way goes on, then it ends."""
        async with house() as home:
            raw = await home.connect()
            raw.say(arrival(1))
            await raw.hear_of(frames.DATA)
            home.door.begin_drain()
            first = await raw.hear_of(frames.GOAWAY)
            ping = await raw.hear_of(frames.PING)
            raw.say(frames.frame(frames.PING, frames.ACK, 0, ping.payload))
            second = await raw.hear_of(frames.GOAWAY)
            raw.say(framed_end(1))
            await raw.hear_of(frames.HEADERS, frames.END_STREAM)

            assert frames.read_word(first.payload[:4]) == 2**31 - 1
            assert frames.read_word(second.payload[:4]) == 1
            assert await raw.eof() == b""

    async def test_in_flight_ends_well(self) -> None:
        """Closing ends the stream of a request in flight with OK: Envoy lets its response be."""
        async with house() as home, grpcio(home.port) as channel:
            stream = Stream(channel)
            await stream.say(headers_message())
            await stream.hear()
            await home.door.close(1)

            assert await stream.ending() == (grpc.StatusCode.OK, "")

    async def test_parked_is_answered(self) -> None:
        """A request decided while the door closes is answered, and its stream ends well."""
        config = slots(1)
        async with house(config=config) as home, grpcio(home.port) as channel:
            first, second = Stream(channel), Stream(channel)
            await first.say(headers_message())
            await first.hear()
            await second.say(headers_message())
            await home.until(waiting=1)
            closing = asyncio.ensure_future(home.door.close(TIMEOUT_S))

            assert await first.ending() == (grpc.StatusCode.OK, "")
            assert (await second.hear()).WhichOneof("response") == "request_headers"
            assert await second.ending() == (grpc.StatusCode.OK, "")
            await closing

    async def test_client_that_stays(self) -> None:
        """A client that does not hang up is cut off when the grace is over."""
        async with house() as home:
            raw = await home.connect()
            await raw.hear_of(frames.SETTINGS, frames.ACK)
            await asyncio.wait_for(home.door.close(0.05), TIMEOUT_S)

            assert heard(await raw.eof())[-1].kind == frames.GOAWAY

    async def test_closed(self) -> None:
        """Nobody is let in any more."""
        async with house() as home:
            await home.door.close(0)
            with pytest.raises(OSError, match=r"refused|Connect"):
                await asyncio.open_connection("127.0.0.1", home.port)

    async def test_connection_lost(self) -> None:
        """A connection that breaks gives up all its requests, waiting and in flight."""
        async with house(config=slots(1)) as home:
            raw = await home.connect()
            raw.say(*(arrival(2 * number + 1) for number in range(100)))
            await home.until(waiting=99, in_flight=1)
            await raw.hang_up()
            await home.until(waiting=0, in_flight=0)

            assert sorted({outcome.value for outcome in home.outcomes}) == [
                "dispatched",
                "evicted-cancelled",
            ]
            assert len(home.outcomes) == 100


def framed_end(stream_id: int) -> bytes:
    """The end of a client's side."""
    return data(stream_id, b"", is_end=True)

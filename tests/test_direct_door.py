"""The direct door: grpcio as its client, and a client of bare frames for what grpcio never does."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, final

import grpc
import pytest
import trustme
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hpack import Decoder

from flowcontrol.config import Concurrency, ControllerConfig, Reclaim
from flowcontrol.errors import ListenError
from flowcontrol.events import Decision, ObjectivesChanged
from flowcontrol.request import Outcome
from server import direct_calls, direct_line
from server.classify import ExemptPaths, Intake
from server.direct_calls import HealthCall, ProcessCall
from server.direct_door import DirectDoor
from server.gate import FlowGate, Parked
from server.health import Health
from server.http2 import frames
from server.http2.errors import ErrorCode
from server.http2.grpc_framing import framed
from server.http2.headers import encode_block
from server.http2.limits import Http2Limits, Rate
from server.terms import Terms
from tests.gates import TIMEOUT_S, running_gate
from tests.test_http2_connection import Heard, heard

OBJECTIVE = "x-llm-d-inference-objective"
PROCESS = ProcessCall.PATH.decode()
RESPONSE_MESSAGE = ext_proc_pb2.ProcessingRequest(response_headers={}).SerializeToString()
BODY_MESSAGE = ext_proc_pb2.ProcessingRequest(request_body={"body": b"x"}).SerializeToString()
TRAILERS_MESSAGE = ext_proc_pb2.ProcessingRequest(response_trailers={}).SerializeToString()


def headers_message(path: str = "/v1/completions", **more: str) -> bytes:
    """Request headers, as Envoy sends them."""
    request = ext_proc_pb2.ProcessingRequest()
    for name, value in {":path": path, **more}.items():
        request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    message: bytes = request.SerializeToString()
    return message


def slots(count: int) -> ControllerConfig:
    """So many slots."""
    return ControllerConfig(detectors=(Concurrency(requests_max=count),))


RECLAIMING = ControllerConfig(
    detectors=(Concurrency(requests_max=1),), reclaim=Reclaim(is_enabled=True)
)


@final
class House:
    """A door, its gate and what has become of its requests."""

    def __init__(
        self, gate: FlowGate, limits: Http2Limits, ended: list[tuple[Parked, Decision]]
    ) -> None:
        self.gate = gate
        self.ended = ended
        self.health = Health()
        self.terms = Terms(
            gate=gate,
            intake=Intake(exempt=ExemptPaths(("/health",))),
            health=self.health.check,
            limits=limits,
        )
        self.door = DirectDoor(self.terms)
        self.port = 0
        self.raws: list[Raw] = []

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of the requests that are over."""
        return [decision.outcome for _, decision in self.ended]

    async def connect(self, **settings: int) -> "Raw":
        """Connect a client of bare frames and say hello; it is closed with the house."""
        raw = Raw(*await asyncio.open_connection("127.0.0.1", self.port))
        self.raws.append(raw)
        numbers = {getattr(frames, name): value for name, value in settings.items()}
        raw.say(frames.PREFACE, frames.settings(numbers), frames.SETTINGS_ACK)
        return raw

    async def until(self, *, waiting: int | None = None, in_flight: int | None = None) -> None:
        """Wait until the engine has so many."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                snapshot = await self.gate.snapshot()
                if waiting in {None, snapshot.waiting} and in_flight in {None, snapshot.in_flight}:
                    return


@asynccontextmanager
async def house(
    limits: Http2Limits | None = None,
    *,
    config: ControllerConfig | None = None,
    has_pool: bool = True,
) -> AsyncIterator[House]:
    """A door that is open on a port of 127.0.0.1; all slots are free at the end."""
    ended: list[tuple[Parked, Decision]] = []
    async with running_gate(config, has_pool=has_pool, ended=ended) as gate:
        each = House(gate, limits or Http2Limits(), ended)
        each.port = await each.door.listen(("127.0.0.1", 0))
        try:
            yield each
        finally:
            for raw in each.raws:
                await raw.hang_up()
            await each.door.close(0)
            await each.until(waiting=0, in_flight=0)


@final
class Stream:
    """One call of grpcio's."""

    def __init__(self, channel: grpc.aio.Channel, path: str = PROCESS, **more: Any) -> None:
        method: Any = channel.stream_stream
        self.call = method(path)(**more)

    async def say(self, message: bytes) -> None:
        """Send a message."""
        await self.call.write(message)

    async def hear(self) -> ext_proc_pb2.ProcessingResponse:
        """Wait for a message."""
        data = await asyncio.wait_for(self.call.read(), TIMEOUT_S)
        assert isinstance(data, bytes), await self.ending()
        return ext_proc_pb2.ProcessingResponse.FromString(data)

    async def end(self) -> None:
        """Say no more."""
        await self.call.done_writing()

    async def ending(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the status the call ends with."""
        code = await asyncio.wait_for(self.call.code(), TIMEOUT_S)
        return code, await self.call.details()


@asynccontextmanager
async def grpcio(target: int | str, **more: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of grpcio's."""
    address = f"127.0.0.1:{target}" if isinstance(target, int) else target
    async with grpc.aio.insecure_channel(address, **more) as channel:
        yield channel


@final
class Raw:
    """A client of bare frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *said: bytes) -> None:
        """Send."""
        self.writer.write(b"".join(said))

    async def hear(self) -> Heard:
        """Wait for a frame."""
        async with asyncio.timeout(TIMEOUT_S):
            header = await self.reader.readexactly(frames.FRAME_HEADER_BYTES)
            high, low, *_ = frames.unpack_header(header, 0)
            return heard(header + await self.reader.readexactly(high << 8 | low))[0]

    async def hear_of(self, kind: int, flags: int = 0) -> Heard:
        """Wait for a frame of this kind with these flags."""
        while True:
            frame = await self.hear()
            if frame.kind == kind and frame.flags & flags == flags:
                return frame

    async def eof(self) -> bytes:
        """Wait for the end of the connection; return what came before it."""
        async with asyncio.timeout(TIMEOUT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def hang_up(self) -> None:
        """Close."""
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def opening(stream_id: int, path: str = PROCESS, **more: str) -> bytes:
    """The HEADERS of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "me"}
    fields |= {"te": "trailers", "content-type": "application/grpc"}
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    return frames.header_frames(stream_id, encode_block(fields.items()), 16_384, is_end=False)


def fields_of(frame: Heard) -> dict[bytes, bytes]:
    """The fields of a HEADERS frame."""
    return dict(Decoder().decode(frame.payload, raw=True))


def data(stream_id: int, content: bytes, *, is_end: bool = False) -> bytes:
    """A DATA frame."""
    return frames.frame(frames.DATA, int(is_end), stream_id, content)


def arrival(stream_id: int) -> bytes:
    """A request of Envoy's."""
    return opening(stream_id) + data(stream_id, framed(headers_message()))


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
            ([headers_message(), BODY_MESSAGE], "processing_mode must keep"),
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
            assert body.payload.startswith(b"only gRPC calls are taken here, of /envoy.")


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

    @pytest.mark.parametrize("said", [b"", framed(b"\xff")])
    async def test_mistakes(self, said: bytes) -> None:
        """A check that asks nothing, or nothing readable, is refused."""
        async with house() as home:
            raw = await home.connect()
            raw.say(opening(1, HealthCall.PATH.decode()), data(1, said, is_end=True))
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
                ("nowhere/door.sock", "its folder is not there"),
                ("file", "what stands there is no socket"),
                (".", "what stands there is no socket"),
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
        """One connection too many is closed; the others stay."""
        async with house(Http2Limits(connections_max=2)) as home:
            first, second = [await home.connect() for _ in range(2)]
            await first.hear()
            await second.hear()
            third = await home.connect()

            assert await third.eof() == b""
            first.say(frames.frame(frames.PING, 0, 0, b"12345678"))
            assert (await first.hear_of(frames.PING, frames.ACK)).payload == b"12345678"

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

            assert home.outcomes.count(Outcome.DISPATCHED) >= 500

    async def test_slow_reader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that does not read what the system buffers is read no more, then cut off."""
        monkeypatch.setattr(direct_line, "WRITE_BUFFER_BYTES", 10_000)
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
            await raw.hear()
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

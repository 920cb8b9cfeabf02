"""An open direct door, a grpcio client of it, and a client of bare frames."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, final

import grpc
from hpack import Decoder

from flowcontrol.config import Concurrency, ControllerConfig, Reclaim
from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.access_log import AccessLog
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.direct.calls import ProcessCall
from flowcontrol_server.doors.direct.door import DirectDoor
from flowcontrol_server.doors.health import Health
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.headers import encode_block
from flowcontrol_server.doors.http2.limits import Http2Limits
from flowcontrol_server.requests.classify import ExemptPaths, Intake
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked
from tests.support.gates import TIMEOUT_S, running_gate
from tests.support.http2 import Heard, heard

OBJECTIVE = "x-llm-d-inference-objective"
PROCESS = ProcessCall.PATH.decode()
RESPONSE_MESSAGE = envoy_messages.ProcessingRequest(response_headers={}).SerializeToString()
BODY_MESSAGE = envoy_messages.ProcessingRequest(request_body={"body": b"x"}).SerializeToString()
TRAILERS_MESSAGE = envoy_messages.ProcessingRequest(response_trailers={}).SerializeToString()


def headers_message(path: str = "/v1/completions", **more: str) -> bytes:
    """Request headers, as Envoy sends them."""
    request = envoy_messages.ProcessingRequest()
    for name, value in {":method": "GET", ":path": path, **more}.items():
        request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    message: bytes = request.SerializeToString()
    return message


def announcing(
    mode: str = "FULL_DUPLEX_STREAMED",
    *,
    is_end: bool = False,
    path: str = "/v1/completions",
    objective: str = "",
    content_type: str = "application/json",
) -> bytes:
    """Request headers of an Envoy that announces its modes for bodies."""
    more = {"content-type": content_type}
    if objective:
        more[OBJECTIVE] = objective
    request = envoy_messages.ProcessingRequest.FromString(headers_message(path, **more))
    request.request_headers.end_of_stream = is_end
    modes = envoy_messages.ProcessingMode.BodySendMode.Value(mode)
    request.protocol_config.request_body_mode = modes
    request.protocol_config.response_body_mode = modes
    message: bytes = request.SerializeToString()
    return message


def slots(count: int) -> ControllerConfig:
    """A configuration with so many slots."""
    return ControllerConfig(detectors=(Concurrency(requests_max=count),))


RECLAIMING = ControllerConfig(
    detectors=(Concurrency(requests_max=1),), reclaim=Reclaim(is_enabled=True)
)


@final
class House:
    """A door, its gate and the outcomes of its requests."""

    def __init__(
        self,
        gate: FlowGate,
        limits: Http2Limits,
        ended: list[tuple[Parked, Decision]],
        access_log: AccessLog | None,
    ) -> None:
        self.gate = gate
        self.ended = ended
        self.health = Health()
        self.context = CallContext(
            gate=gate,
            intake=Intake(exempt=ExemptPaths(("/health",))),
            health=self.health,
            access_log=access_log,
            limits=limits,
        )
        self.door = DirectDoor(self.context)
        self.port = 0
        self.raws: list[Raw] = []

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of the requests that have ended."""
        return [decision.outcome for _, decision in self.ended]

    async def connect(self, **settings: int) -> "Raw":
        """Connect a client of bare frames and send its preface; it is closed with the house."""
        raw = Raw(*await asyncio.open_connection("127.0.0.1", self.port))
        self.raws.append(raw)
        numbers = {getattr(frames, name): value for name, value in settings.items()}
        raw.say(frames.PREFACE, frames.settings(numbers), frames.SETTINGS_ACK)
        return raw

    async def until(self, *, waiting: int | None = None, in_flight: int | None = None) -> None:
        """Wait until the engine has so many requests."""
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
    access_log: AccessLog | None = None,
) -> AsyncIterator[House]:
    """A door on a port of 127.0.0.1; all slots must be free at the end."""
    ended: list[tuple[Parked, Decision]] = []
    async with running_gate(config, has_pool=has_pool, ended=ended) as gate:
        each = House(gate, limits or Http2Limits(), ended, access_log)
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
    """One call of grpcio."""

    def __init__(self, channel: grpc.aio.Channel, path: str = PROCESS, **more: Any) -> None:
        method: Any = channel.stream_stream
        self.call = method(path)(**more)

    async def say(self, message: bytes) -> None:
        """Send a message."""
        await self.call.write(message)

    async def hear(self) -> envoy_messages.ProcessingResponse:
        """Wait for a message and return it."""
        data = await asyncio.wait_for(self.call.read(), TIMEOUT_S)
        assert isinstance(data, bytes), await self.ending()
        return envoy_messages.ProcessingResponse.FromString(data)

    async def end(self) -> None:
        """Close our side."""
        await self.call.done_writing()

    async def ending(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the status of the call."""
        code = await asyncio.wait_for(self.call.code(), TIMEOUT_S)
        return code, await self.call.details()


@asynccontextmanager
async def grpcio(target: int | str, **more: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of grpcio."""
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
        """Send bytes."""
        self.writer.write(b"".join(said))

    async def hear(self) -> Heard:
        """Wait for the next frame."""
        async with asyncio.timeout(TIMEOUT_S):
            header = await self.reader.readexactly(frames.FRAME_HEADER_BYTES)
            high, low, *_ = frames.unpack_header(header, 0)
            return heard(header + await self.reader.readexactly(high << 8 | low))[0]

    async def hear_of(self, kind: int, flags: int = 0) -> Heard:
        """Wait for a frame of this type with these flags."""
        while True:
            frame = await self.hear()
            if frame.kind == kind and frame.flags & flags == flags:
                return frame

    async def eof(self) -> bytes:
        """Wait for the end of the connection; return the frames before it."""
        async with asyncio.timeout(TIMEOUT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def hang_up(self) -> None:
        """Close the connection."""
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
    """A request, as Envoy sends it."""
    return opening(stream_id) + data(stream_id, framed(headers_message()))

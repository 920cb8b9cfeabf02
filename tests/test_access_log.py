"""The door for Envoy's access log, in process, with a real gRPC client."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2

from flowcontrol.events import Settled
from server.access_log import AccessLogDoor
from server.codec import INSTANCE
from server.log_codec import REPORT_FORMAT, REPORT_TAG, SERVICE
from server.settlement import Result, Settlement
from tests.e2e.harness import eventually

METHOD = f"/{SERVICE}/StreamAccessLogs"


def message(*request_ids: int) -> bytes:
    """A message of the log about these requests."""
    log = als_pb2.StreamAccessLogsMessage()
    for request_id in request_ids:
        tags = log.http_logs.log_entry.add().common_properties.custom_tags
        words = (f"{INSTANCE}.{request_id}", *REPORT_FORMAT.split()[1:])
        tags[REPORT_TAG] = " ".join(words)
    data: bytes = log.SerializeToString()
    return data


class Home:
    """A door, open."""

    def __init__(self, door: AccessLogDoor, settlement: Settlement, port: int) -> None:
        self.door = door
        self.settlement = settlement
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    def stream(self) -> "grpc.aio.StreamUnaryCall[bytes, bytes]":
        """A stream like one of Envoy's workers'."""
        return self.channel.stream_unary(METHOD)()  # type: ignore[call-arg]  # as documented


@pytest.fixture(name="settled")
def _settled() -> list[Settled]:
    """What the engine was told."""
    return []


@pytest.fixture(name="home")
async def _home(settled: list[Settled]) -> AsyncIterator[Home]:
    """A server with nothing but the door; requests 1 to 999 are in flight."""
    settlement = Settlement(10, lambda i: 0 if i < 1000 else None, settled.append)
    door = AccessLogDoor(settlement)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((door.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    home = Home(door, settlement, port)
    yield home
    await home.channel.close(None)
    await server.stop(None)


class TestStream:
    """One stream of the log."""

    async def test_entries(self, home: Home, settled: list[Settled]) -> None:
        """Every entry of every message is taken, and the stream ends politely."""
        stream = home.stream()
        await stream.write(message(1, 2))
        await stream.write(message())
        await stream.write(message(3))
        await stream.done_writing()

        assert await stream == b""
        assert [each.request_id for each in settled] == [1, 2, 3]
        assert home.settlement.streams == 0

    async def test_garbage_between(self, home: Home, settled: list[Settled]) -> None:
        """What cannot be read is counted; what follows is taken."""
        stream = home.stream()
        for data in (message(1), b"\xff\xff", message(2000), message(2)):
            await stream.write(data)
        await stream.done_writing()
        await stream

        assert [each.request_id for each in settled] == [1, 2]
        assert home.settlement.results == {
            Result.SETTLED: 2,
            Result.MALFORMED: 1,
            Result.UNKNOWN: 1,
        }

    async def test_breaks_off(self, home: Home, settled: list[Settled]) -> None:
        """A stream that breaks off is forgotten; the next one goes on."""
        first = home.stream()
        await first.write(message(1))
        await eventually(lambda: settled, what="the entry")
        first.cancel()
        await eventually(lambda: home.settlement.streams == 0, what="the end of the stream")
        second = home.stream()
        await second.write(message(2))
        await eventually(lambda: len(settled) == 2, what="the entry of the second stream")

        assert (home.settlement.streams, home.settlement.streams_opened) == (1, 2)

    async def test_close(self, home: Home) -> None:
        """Closing the door ends the streams that Envoy would hold for ever."""
        streams = [home.stream() for _ in range(3)]
        for number, stream in enumerate(streams):
            await stream.write(message(number + 1))
        await eventually(lambda: home.settlement.streams == 3, what="the streams")
        home.door.close()

        assert await asyncio.wait_for(asyncio.gather(*streams), 5) == [b""] * 3
        assert home.settlement.streams == 0

"""Envoy's access log at the direct door, in process, with a real gRPC client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, final

import grpc
import pytest

from flowcontrol.events import Settled, SettlementLost
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors import access_log as module
from flowcontrol_server.doors.access_log import AccessLog
from flowcontrol_server.doors.direct.calls import LogCall
from flowcontrol_server.doors.envoy_secret import EnvoySecret
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ErrorCode
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.requests.log_codec import REPORT_FORMAT, REPORT_TAG
from flowcontrol_server.requests.log_join import Claim, EntryResult, LogJoin
from flowcontrol_server.requests.tickets import TICKETS
from tests.e2e.harness import eventually
from tests.support.direct import House, arrival, data, fields_of, house, opening

SECRET = "known-to-envoy-alone"
METHOD = LogCall.PATH.decode()
TIMEOUT_S = 10.0


def message(*request_ids: int) -> bytes:
    """A message of the log about these requests."""
    log = envoy_messages.StreamAccessLogsMessage()
    for request_id in request_ids:
        tags = log.http_logs.log_entry.add().common_properties.custom_tags
        words = (TICKETS.issue(request_id).decode(), *REPORT_FORMAT.split()[1:])
        tags[REPORT_TAG] = " ".join(words)
    said: bytes = log.SerializeToString()
    return said


@final
class Home:
    """A door, open, and what it settles."""

    def __init__(
        self, room: House, log: AccessLog, settled: list[Settled | SettlementLost]
    ) -> None:
        self.room = room
        self.log = log
        self.settlement = log.log_join
        self.settled = settled
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{room.port}")

    @property
    def settled_ids(self) -> list[int]:
        """The requests that were settled, in order."""
        return [each.request_id for each in self.settled]

    def stream(
        self, metadata: tuple[tuple[str, str], ...] = ()
    ) -> "grpc.aio.StreamUnaryCall[bytes, bytes]":
        """A stream like one of Envoy's workers'."""
        channel: Any = self.channel  # its stubs want what has defaults
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary(METHOD)(
            metadata=metadata
        )
        return call


@asynccontextmanager
async def opened() -> AsyncIterator[Home]:
    """A direct door; requests 1 to 9999 are in flight."""
    settled: list[Settled | SettlementLost] = []
    settlement = LogJoin(10, lambda i: Claim(0) if i < 10_000 else None, settled.append)
    log = AccessLog(settlement)
    async with house(access_log=log) as room:
        home = Home(room, log, settled)
        try:
            yield home
        finally:
            await home.channel.close(None)


@pytest.fixture(name="home")
async def _home() -> AsyncIterator[Home]:
    """An open door that asks for no secret."""
    async with opened() as home:
        yield home


class TestStream:
    """One stream of the log."""

    async def test_entries(self, home: Home) -> None:
        """Every entry of every message is settled before the stream ends politely."""
        stream = home.stream()
        await stream.write(message(1, 2))
        await stream.write(message())
        await stream.write(message(3))
        await stream.done_writing()

        assert await stream == b""
        assert home.settled_ids == [1, 2, 3]
        assert home.settlement.streams == 0

    async def test_nothing(self, home: Home) -> None:
        """A stream without a message ends well, too."""
        stream = home.stream()
        await stream.done_writing()

        assert await stream == b""

    async def test_garbage_between(self, home: Home) -> None:
        """What cannot be read is counted; what follows is taken."""
        stream = home.stream()
        for each in (message(1), b"\xff\xff", message(20_000), message(2)):
            await stream.write(each)
        await stream.done_writing()
        await stream

        assert home.settled_ids == [1, 2]
        assert home.settlement.results == {
            EntryResult.SETTLED: 2,
            EntryResult.MALFORMED: 1,
            EntryResult.UNKNOWN: 1,
        }

    async def test_breaks_off(self, home: Home) -> None:
        """A stream that breaks off is forgotten; the next one goes on."""
        first = home.stream()
        await first.write(message(1))
        await eventually(lambda: home.settled, what="the entry")
        first.cancel()
        await eventually(lambda: home.settlement.streams == 0, what="the end of the stream")
        second = home.stream()
        await second.write(message(2))
        await eventually(lambda: len(home.settled) == 2, what="the entry of the second stream")

        assert (home.settlement.streams, home.settlement.streams_opened) == (1, 2)

    async def test_too_large(self, home: Home) -> None:
        """A message larger than any of Envoy's ends the stream; others go on."""
        stream = home.stream()
        await stream.write(b"\x00" * (module.MESSAGE_BYTES_MAX + 1))

        assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert home.settlement.streams == 0

    async def test_close(self, home: Home) -> None:
        """A door that closes ends the streams that Envoy would hold, for it to try again."""
        streams = [home.stream() for _ in range(3)]
        for number, stream in enumerate(streams):
            await stream.write(message(number + 1))
        await eventually(lambda: home.settlement.streams == 3, what="the streams")
        closing = asyncio.ensure_future(home.room.door.close(TIMEOUT_S))
        codes = [await asyncio.wait_for(stream.code(), TIMEOUT_S) for stream in streams]
        await home.channel.close(None)
        await closing

        assert codes == [grpc.StatusCode.UNAVAILABLE] * 3
        assert home.settlement.streams == 0

    async def test_other_replica(self, home: Home) -> None:
        """When another replica takes over, Envoy's streams go there."""
        stream = home.stream()
        await stream.write(message(1))
        await eventually(lambda: home.settled, what="the entry")
        home.room.context.may_decide = lambda: False
        home.room.door.move_calls()
        again = home.stream()

        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        assert await again.code() is grpc.StatusCode.UNAVAILABLE


class TestWhoMay:
    """Streams that are not served."""

    async def test_off(self, home: Home) -> None:
        """Where Envoy is not to report, open streams end and new ones are refused, until it is."""
        open_stream = home.stream()
        await open_stream.write(message(1))
        await eventually(lambda: home.settled, what="the entry")
        home.log.serve(is_served=False)
        refused = home.stream()

        assert await open_stream.code() is grpc.StatusCode.UNAVAILABLE
        assert await refused.code() is grpc.StatusCode.UNIMPLEMENTED
        home.log.serve(is_served=True)
        again = home.stream()
        await again.write(message(2))
        await again.done_writing()
        assert await again == b""
        assert home.settled_ids == [1, 2]

    async def test_no_log(self) -> None:
        """A door without a log serves none."""
        async with house() as room:
            raw = await room.connect()
            raw.say(opening(1, METHOD))
            ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)

            assert fields_of(ending)[b"grpc-status"] == b"12"

    async def test_secret(self, home: Home, tmp_path: Path) -> None:
        """Where Envoy must show a secret, nobody else's stream is read."""
        (tmp_path / "secret").write_text(SECRET)
        home.room.context.secret = EnvoySecret(tmp_path / "secret")
        for shown in ((), (("authorization", "Bearer something-else-as-long"),)):
            stranger = home.stream(shown)
            assert await stranger.code() is grpc.StatusCode.UNAUTHENTICATED
        envoy = home.stream((("authorization", f"Bearer {SECRET}"),))
        await envoy.write(message(1))
        await envoy.done_writing()
        await envoy

        assert home.settled_ids == [1]
        assert home.settlement.streams_refused == 2


class TestBounds:
    """A log that reports more than can be settled at once."""

    async def test_in_turns(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between two turns of a long message a request of another connection is decided."""
        monkeypatch.setattr(module, "TURN_NS", 1)  # one entry a turn
        logging, asking = [await home.room.connect() for _ in range(2)]
        for raw in (logging, asking):
            await raw.hear_of(frames.SETTINGS, frames.ACK)
        log = envoy_messages.StreamAccessLogsMessage()
        for _ in range(5000):
            log.http_logs.log_entry.add()
        said = framed(log.SerializeToString())
        logging.say(opening(1, METHOD), data(1, said))
        await eventually(lambda: home.settlement.results, what="the first entry")
        asking.say(arrival(1))
        await asking.hear_of(frames.DATA)
        when_answered = home.settlement.results[EntryResult.MALFORMED]
        monkeypatch.setattr(module, "TURN_NS", 10**9)
        await eventually(
            lambda: home.settlement.results[EntryResult.MALFORMED] == 5000, what="the rest"
        )

        assert when_answered < 5000

    async def test_back_pressure(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a message waits, no window is returned: it is once it is settled."""
        monkeypatch.setattr(module, "TURN_NS", 0)  # nothing is settled
        raw = await home.room.connect()
        await raw.hear_of(frames.SETTINGS, frames.ACK)
        said = framed(message(*range(1, 9)))
        count = 50_000 // len(said)
        raw.say(opening(1, METHOD), *(data(1, said) for _ in range(count)))
        raw.say(frames.frame(frames.PING, 0, 0, b"12345678"))
        while (frame := await raw.hear()).kind != frames.PING:
            assert (frame.kind, frame.stream_id) != (frames.WINDOW_UPDATE, 1)
        monkeypatch.setattr(module, "TURN_NS", 10**9)
        while (frame := await raw.hear()).stream_id != 1:
            pass

        assert frame.kind == frames.WINDOW_UPDATE
        assert home.settled_ids == [*range(1, 9)]

    async def test_all_that_waits(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        """Streams that break off leave no pile behind: beyond the bound they are refused."""
        monkeypatch.setattr(module, "TURN_NS", 0)  # nothing is settled
        monkeypatch.setattr(module, "WAITING_BYTES_MAX", 1_000)
        raw = await home.room.connect()
        await raw.hear_of(frames.SETTINGS, frames.ACK)
        small = framed(message())
        for stream_id in (1, 3, 5):
            raw.say(opening(stream_id, METHOD), data(stream_id, small * 2))
            raw.say(frames.rst_stream(stream_id, ErrorCode.CANCEL))
        raw.say(opening(7, METHOD), data(7, small * 2))
        ending = await raw.hear_of(frames.HEADERS, frames.END_STREAM)
        monkeypatch.setattr(module, "TURN_NS", 10**9)

        assert (ending.stream_id, fields_of(ending)[b"grpc-status"]) == (7, b"8")
        again = home.stream()
        await again.write(message(1))
        await again.done_writing()
        assert await again == b""

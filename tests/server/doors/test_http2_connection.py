"""The core of HTTP/2: what a client may do, what it may not, and how much of it."""

import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import final

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, TrailersReceived
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.connection import Http2Connection
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode, StreamFault
from flowcontrol_server.doors.http2.events import Ended, Event, Opened, Received, Reset
from flowcontrol_server.doors.http2.headers import HeaderReader, encode_block
from flowcontrol_server.doors.http2.limits import Http2Limits, Rate
from tests.support.http2 import Heard, heard, received

SECOND_NS = 1_000_000_000
REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a/b"), (":authority", "me")]
ANSWER = encode_block([(":status", "200"), ("content-type", "application/grpc")])
TRAILERS = encode_block([("grpc-status", "0")])
HELLO = frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK
PING = frames.frame(frames.PING, 0, 0, b"12345678")


def block(fields: Sequence[tuple[str, str]] = REQUEST) -> bytes:
    """A field block that uses no table."""
    return encode_block(fields)


def request(stream_id: int, *more: tuple[str, str], is_end: bool = False) -> bytes:
    """A request in one HEADERS frame."""
    return frames.header_frames(stream_id, block([*REQUEST, *more]), 16_384, is_end=is_end)


def data(stream_id: int, content: bytes = b"", *, is_end: bool = False) -> bytes:
    """A DATA frame."""
    return frames.frame(frames.DATA, frames.END_STREAM if is_end else 0, stream_id, content)


@final
class Client:
    """A client at its best behaviour so far, and what it hears."""

    def __init__(self, limits: Http2Limits | None = None, hello: bytes = HELLO) -> None:
        self.server = Http2Connection(limits or Http2Limits(), 0)
        self.now_ns = 0
        self.say(hello)
        self.hear()

    def say(self, *said: bytes) -> list[Event]:
        """Send; what the server's owner is told."""
        return received(self.server, b"".join(said), self.now_ns)

    def hear(self) -> list[Heard]:
        """What the server says since last asked."""
        return heard(self.server.data_to_send())

    def reset_codes(self) -> list[tuple[int, int]]:
        """The streams the server resets, with the codes."""
        said = self.hear()
        assert all(each.kind != frames.GOAWAY for each in said)
        return [
            (each.stream_id, frames.read_word(each.payload))
            for each in said
            if each.kind == frames.RST_STREAM
        ]

    def farewell(self) -> tuple[int, str]:
        """Code and reason of the GOAWAY that must be the server's last word."""
        last = self.hear()[-1]
        assert last.kind == frames.GOAWAY
        assert self.server.is_closed
        return frames.read_word(last.payload[4:8]), last.payload[8:].decode()


class TestGreeting:
    """The first words of both."""

    def test_server(self) -> None:
        """Our SETTINGS come first, unasked, then the wide window of the connection."""
        settings_frame, update = heard(Http2Connection(Http2Limits(), 0).data_to_send())

        assert settings_frame.kind == frames.SETTINGS
        assert frames.read_settings(settings_frame.payload) == Http2Limits().announced()
        assert (update.kind, update.stream_id) == (frames.WINDOW_UPDATE, 0)
        assert frames.read_word(update.payload) == 16_777_216 - 65_535

    def test_no_wider_window(self) -> None:
        """The default window needs no update."""
        core = Http2Connection(Http2Limits(connection_window_bytes=65_535), 0)

        assert [each.kind for each in heard(core.data_to_send())] == [frames.SETTINGS]

    def test_client(self) -> None:
        """A client's SETTINGS are acknowledged."""
        client = Client(hello=b"")

        assert client.say(frames.PREFACE, frames.settings({})) == []
        assert client.hear() == [Heard(frames.SETTINGS, frames.ACK, 0, b"")]

    @pytest.mark.parametrize(
        "hello",
        [
            b"GET / HTTP/1.1\r\nHost: me\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
            b"X",
            frames.PREFACE + PING,
            frames.PREFACE + frames.SETTINGS_ACK,
            frames.PREFACE + request(1),
            frames.PREFACE + frames.frame(99, 0, 0, b""),
        ],
    )
    def test_wrong(self, hello: bytes) -> None:
        """Anything but the preface and SETTINGS is another protocol."""
        client = Client(hello=b"")
        events = client.say(hello)

        code, reason = client.farewell()
        assert code == ErrorCode.PROTOCOL_ERROR
        assert events == [Ended(ErrorCode.PROTOCOL_ERROR, reason)]

    def test_nothing_is_read_after_the_end(self) -> None:
        """What follows a mistake is not looked at, and nothing more is said."""
        client = Client()
        client.say(data(0))
        client.hear()

        assert client.say(request(1)) == []
        assert client.server.check(10**18) == []
        client.server.send_trailers(1, TRAILERS)
        client.server.begin_drain()
        client.server.end_drain()
        assert client.hear() == []


class TestRequests:
    """What makes a stream."""

    def test_head(self) -> None:
        """The owner gets the request with what matters taken out."""
        (event,) = Client().say(
            request(1, ("content-type", "application/grpc"), ("content-length", "7"), ("x", ""))
        )

        assert isinstance(event, Opened)
        assert (event.stream_id, event.is_ended) == (1, False)
        head = event.head
        assert (head.method, head.path) == (b"POST", b"/a/b")
        assert (head.content_type, head.content_length) == (b"application/grpc", 7)
        assert head.fields[-1] == (b"x", b"")

    def test_body_and_trailers(self) -> None:
        """DATA is handed on as it comes; trailers are the end, whatever they say."""
        client = Client()
        trailers = frames.header_frames(1, block([("checksum", "x")]), 16_384, is_end=True)

        events = client.say(request(1), data(1, b"abc"), data(1, b"d"), trailers)

        assert events[1:] == [
            *(Received(1, b"abc", is_ended=False), Received(1, b"d", is_ended=False)),
            Received(1, b"", is_ended=True),
        ]

    def test_ended_at_once(self) -> None:
        """A request may be its head alone."""
        (event,) = Client().say(request(1, is_end=True))

        assert isinstance(event, Opened)
        assert event.is_ended

    def test_everything_optional(self) -> None:
        """Padding, priority and CONTINUATION change nothing about a request."""
        whole = block()
        padded = b"\x03" + b"\x00\x00\x00\x00\xff" + whole[:5] + bytes(3)
        flags = frames.PADDED | frames.HAS_PRIORITY
        client = Client()

        events = client.say(
            frames.frame(frames.HEADERS, flags, 1, padded),
            frames.frame(frames.CONTINUATION, 0, 1, b""),
            frames.frame(frames.CONTINUATION, 0, 1, whole[5:9]),
            frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, whole[9:]),
            frames.frame(frames.DATA, frames.PADDED | frames.END_STREAM, 1, b"\x02hi\x00\x00"),
        )

        assert events == [*Client().say(request(1)), Received(1, b"hi", is_ended=True)]

    def test_ids_may_be_left_out(self) -> None:
        """A higher id closes the lower ones that were never used (5.1.1)."""
        client = Client()
        assert len(client.say(request(9))) == 1

        client.say(request(7))

        assert client.farewell()[0] == ErrorCode.STREAM_CLOSED

    def test_ignored(self) -> None:
        """Priorities, unknown frames, unknown settings and the client's farewell change nothing."""
        client = Client()

        events = client.say(
            request(1),
            frames.frame(frames.PRIORITY, 0, 1, b"\x00\x00\x00\x00\x10"),
            frames.frame(frames.PRIORITY, 0, 77, b"\x00\x00\x00\x01\x10"),
            frames.frame(0xEE, 0xFF, 1, b"anything"),
            frames.settings({0x99: 1}),
            frames.goaway(0, 0x77, "bye"),
            data(1, b"x", is_end=True),
        )

        assert [type(event) for event in events] == [Opened, Received]
        assert client.hear() == [Heard(frames.SETTINGS, frames.ACK, 0, b"")]

    def test_ping(self) -> None:
        """PING comes back; its own answer does not."""
        client = Client()

        client.say(PING, frames.frame(frames.PING, frames.ACK, 0, b"87654321"))

        assert client.hear() == [Heard(frames.PING, frames.ACK, 0, b"12345678")]

    def test_reset(self) -> None:
        """A client may end its stream at any time, with any code."""
        client = Client()
        client.say(request(1))

        assert client.say(frames.rst_stream(1, 0x1234)) == [Reset(1, 0x1234)]
        assert client.say(frames.rst_stream(1, 8)) == []
        assert client.hear() == []


MALFORMED = {
    "no method": [(":scheme", "http"), (":path", "/")],
    "no scheme": [(":method", "GET"), (":path", "/")],
    "no path": [(":method", "GET"), (":scheme", "http")],
    "empty path": [(":method", "GET"), (":scheme", "http"), (":path", "")],
    "two paths": [*REQUEST, (":path", "/")],
    "unknown pseudo-header": [*REQUEST, (":protocol", "websocket")],
    "status": [*REQUEST, (":status", "200")],
    "pseudo-header last": [("x", "y"), *REQUEST],
    "connect with path": [(":method", "CONNECT"), (":authority", "me"), (":path", "/")],
    "connect to nowhere": [(":method", "CONNECT")],
    "upper case": [*REQUEST, ("X-Y", "z")],
    "no name": [*REQUEST, ("", "z")],
    "space in a name": [*REQUEST, ("x y", "z")],
    "line feed": [*REQUEST, ("x", "a\nb")],
    "zero byte": [*REQUEST, ("x", "\0")],
    "space before": [*REQUEST, ("x", " y")],
    "tab behind": [*REQUEST, ("x", "y\t")],
    "carriage return in path": [*REQUEST[:2], (":path", "/\r")],
    "connection": [*REQUEST, ("connection", "keep-alive")],
    "transfer-encoding": [*REQUEST, ("transfer-encoding", "chunked")],
    "upgrade": [*REQUEST, ("upgrade", "h2c")],
    "te": [*REQUEST, ("te", "trailers, deflate")],
    "another host": [*REQUEST, ("host", "you")],
    "length is no number": [*REQUEST, ("content-length", "-1")],
    "length beyond all": [*REQUEST, ("content-length", "9" * 19)],
    "two lengths": [*REQUEST, ("content-length", "1"), ("content-length", "2")],
}


class TestMalformed:
    """A request that is none ends its stream, and nothing else (8.1.1)."""

    @pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
    def test_head(self, fields: list[tuple[str, str]]) -> None:
        """The stream is reset, its owner never hears of it, and the next one is served."""
        client = Client()

        events = client.say(frames.header_frames(1, block(fields), 16_384, is_end=False))

        assert events == []
        assert client.reset_codes() == [(1, ErrorCode.PROTOCOL_ERROR)]
        assert len(client.say(data(1, b"late"), request(3))) == 1
        assert client.hear() == []

    @pytest.mark.parametrize(
        "fields",
        [
            [(":method", "CONNECT"), (":authority", "me")],
            [*REQUEST, ("te", "trailers"), ("host", "me")],
            [*REQUEST, ("content-length", "0"), ("content-length", "0")],
            [*REQUEST[:3], ("x", "a\tb c"), ("x", "y")],
        ],
    )
    def test_unusual(self, fields: list[tuple[str, str]]) -> None:
        """What is merely unusual is a request."""
        client = Client()

        assert len(client.say(frames.header_frames(1, block(fields), 16_384, is_end=True))) == 1

    @pytest.mark.parametrize(
        "body",
        [
            [data(1, b"toolong")],
            [data(1, b"123"), data(1, b"45")],
            [data(1, b"123", is_end=True)],
            [data(1, b"123"), frames.header_frames(1, block([("a", "b")]), 99, is_end=True)],
            [frames.header_frames(1, block([("a", "b")]), 99, is_end=False)],
            [frames.header_frames(1, block([(":path", "/")]), 99, is_end=True)],
            [frames.header_frames(1, block([("A", "b")]), 99, is_end=True)],
        ],
    )
    def test_body(self, body: list[bytes]) -> None:
        """A body of another length than announced, and trailers that are none, end the stream."""
        client = Client()

        *_, last = client.say(request(1, ("content-length", "4")), *body)

        assert last == Reset(1, ErrorCode.PROTOCOL_ERROR)
        assert client.reset_codes() == [(1, ErrorCode.PROTOCOL_ERROR)]

    def test_head_alone(self) -> None:
        """A body that is announced and does not come is none."""
        client = Client()

        assert client.say(request(1, ("content-length", "4"), is_end=True)) == []
        assert client.reset_codes() == [(1, ErrorCode.PROTOCOL_ERROR)]

    @pytest.mark.parametrize("late", [data(1, b"x"), request(1)])
    def test_after_the_end(self, late: bytes) -> None:
        """Who has ended a stream must not go on with it (5.1)."""
        client = Client()

        events = client.say(request(1, is_end=True), late)

        assert events[1:] == [Reset(1, ErrorCode.STREAM_CLOSED)]
        assert client.reset_codes() == [(1, ErrorCode.STREAM_CLOSED)]


FATAL: dict[str, tuple[list[bytes], ErrorCode]] = {
    "DATA on stream 0": ([data(0)], ErrorCode.PROTOCOL_ERROR),
    "DATA on an idle stream": ([data(3)], ErrorCode.PROTOCOL_ERROR),
    "DATA on a stream of ours": ([data(2)], ErrorCode.PROTOCOL_ERROR),
    "padding too long": (
        [request(1), frames.frame(frames.DATA, frames.PADDED, 1, b"\x05ab")],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "HEADERS on stream 0": ([request(0)], ErrorCode.PROTOCOL_ERROR),
    "HEADERS on an even stream": ([request(2)], ErrorCode.PROTOCOL_ERROR),
    "HEADERS without its priority": (
        [frames.frame(frames.HEADERS, frames.HAS_PRIORITY, 1, bytes(4))],
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "HEADERS that depends on itself": (
        [frames.frame(frames.HEADERS, frames.HAS_PRIORITY, 1, b"\x00\x00\x00\x01\x10" + block())],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "PRIORITY that depends on itself": (
        [frames.frame(frames.PRIORITY, 0, 1, b"\x80\x00\x00\x01\x10")],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a frame inside a field block": (
        [frames.frame(frames.HEADERS, 0, 1, block()), PING],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "CONTINUATION of another stream": (
        [
            frames.frame(frames.HEADERS, 0, 1, block()),
            frames.frame(frames.CONTINUATION, frames.END_HEADERS, 3, b""),
        ],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "CONTINUATION of nothing": (
        [request(1), frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, b"")],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "PUSH_PROMISE": (
        [request(1), frames.frame(frames.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4))],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "RST_STREAM on an idle stream": ([frames.rst_stream(1, 8)], ErrorCode.PROTOCOL_ERROR),
    "WINDOW_UPDATE on an idle stream": ([frames.window_update(1, 8)], ErrorCode.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 0": ([frames.window_update(0, 0)], ErrorCode.PROTOCOL_ERROR),
    "connection window beyond all": (
        [frames.window_update(0, frames.WINDOW_MAX)],
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "settings make a window too large": (
        [
            request(1),
            frames.window_update(1, 1),
            frames.settings({frames.INITIAL_WINDOW_SIZE: frames.WINDOW_MAX}),
        ],
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "SETTINGS out of range": (
        [frames.settings({frames.ENABLE_PUSH: 2})],
        ErrorCode.PROTOCOL_ERROR,
    ),
    "SETTINGS ACK with settings": (
        [frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6))],
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a frame too large": (
        [frames.frame(frames.DATA, 0, 1, bytes(16_385))],
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a field block that is none": (
        [frames.header_frames(1, b"\xff\xff\xff\xff", 99, is_end=True)],
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a field block cut off": (
        [frames.header_frames(1, b"\x00\x05ab", 99, is_end=True)],
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a stream used twice": (
        [request(3, is_end=True), frames.rst_stream(3, 8), request(3)],
        ErrorCode.STREAM_CLOSED,
    ),
}


class TestFatal:
    """A mistake that puts the connection in doubt ends it (5.4.1)."""

    @pytest.mark.parametrize(("said", "code"), FATAL.values(), ids=FATAL)
    def test_mistake(self, said: list[bytes], code: ErrorCode) -> None:
        """GOAWAY says why, the owner is told last of all, and nothing stays open."""
        client = Client()

        *_, last = client.say(*said)

        got, reason = client.farewell()
        assert got == code
        assert last == Ended(code, reason)
        assert reason.count(" must ") == 1

    def test_last_stream(self) -> None:
        """GOAWAY names the highest stream that was looked at."""
        client = Client()
        client.say(request(5), request(7), data(0))

        assert frames.read_word(client.hear()[-1].payload[:4]) == 7


class TestAnswers:
    """What the owner says."""

    def test_whole(self) -> None:
        """Headers, data and trailers; the field blocks need no table, and say so once."""
        client = Client()
        client.say(request(1, is_end=True), request(3, is_end=True))
        for stream_id in (1, 3):
            client.server.send_headers(stream_id, ANSWER)
            client.server.send_data(stream_id, b"hello")
            client.server.send_trailers(stream_id, TRAILERS)

        said = client.hear()

        assert said == [
            Heard(frames.HEADERS, frames.END_HEADERS, 1, b"\x20" + ANSWER),
            Heard(frames.DATA, 0, 1, b"hello"),
            Heard(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, TRAILERS),
            Heard(frames.HEADERS, frames.END_HEADERS, 3, ANSWER),
            Heard(frames.DATA, 0, 3, b"hello"),
            Heard(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 3, TRAILERS),
        ]
        decoder = Decoder()
        decoder.max_allowed_table_size = 0  # as of a client that announced 0
        assert dict(decoder.decode(said[0].payload, raw=True)) == {
            b":status": b"200",
            b"content-type": b"application/grpc",
        }

    def test_before_the_end(self) -> None:
        """A client that could go on is told not to, and what was on its way is ignored (8.1)."""
        client = Client()
        client.say(request(1))
        client.server.send_trailers(1, ANSWER)

        assert client.reset_codes() == [(1, ErrorCode.NO_ERROR)]
        trailers = frames.header_frames(1, block([("a", "b")]), 99, is_end=True)
        assert client.say(data(1, b"late"), frames.window_update(1, 5), trailers) == []
        assert client.hear() == []

    def test_in_doubt(self) -> None:
        """DATA long after an end is answered, once, with STREAM_CLOSED."""
        client = Client()
        client.say(request(1, is_end=True))
        client.server.send_trailers(1, ANSWER)
        client.hear()

        assert client.say(data(1, b"x"), data(1, b"y")) == []
        assert client.reset_codes() == [(1, ErrorCode.STREAM_CLOSED)]

    def test_reset(self) -> None:
        """We can break a stream off; what it still wanted to say is dropped."""
        client = Client(hello=HELLO + frames.settings({frames.INITIAL_WINDOW_SIZE: 2}))
        client.say(request(1))
        client.server.send_data(1, b"hello")
        assert client.server.queued_bytes == 3

        client.server.reset(1, ErrorCode.INTERNAL_ERROR)

        assert client.server.queued_bytes == 0
        assert client.reset_codes() == [(1, ErrorCode.INTERNAL_ERROR)]
        assert client.say(frames.window_update(1, 100)) == []
        assert client.hear() == []

    def test_to_nobody(self) -> None:
        """Whatever is said on a stream that is gone is not said."""
        client = Client()
        client.say(request(1), frames.rst_stream(1, 8))

        client.server.send_headers(1, ANSWER)
        client.server.send_data(1, b"x", is_end=True)
        client.server.send_trailers(1, TRAILERS)
        client.server.reset(1, ErrorCode.CANCEL)

        assert client.hear() == []

    def test_large_block(self) -> None:
        """A field block larger than a frame is continued."""
        client = Client()
        client.say(request(1, is_end=True))
        client.server.send_trailers(1, bytes(20_000))

        first, second = client.hear()

        assert (first.kind, first.flags, len(first.payload)) == (frames.HEADERS, 1, 16_384)
        assert (second.kind, second.flags) == (frames.CONTINUATION, frames.END_HEADERS)
        assert first.payload + second.payload == b"\x20" + bytes(20_000)

    def test_smaller_window_than_sent(self) -> None:
        """SETTINGS may take a window below zero; it is filled up before more is sent (6.9.2)."""
        client = Client()
        client.say(request(1))
        client.server.send_data(1, bytes(100))
        client.hear()
        client.say(frames.settings({frames.INITIAL_WINDOW_SIZE: 30}))
        client.server.send_data(1, b"abc", is_end=True)
        client.hear()

        client.say(frames.window_update(1, 70))
        assert client.hear() == []
        client.say(frames.window_update(1, 2))
        assert client.hear() == [Heard(frames.DATA, 0, 1, b"ab")]
        client.say(frames.window_update(1, 2))
        assert client.hear()[0] == Heard(frames.DATA, frames.END_STREAM, 1, b"c")

    def test_stream_window_beyond_all(self) -> None:
        """A stream whose window overflows is reset (6.9.1)."""
        client = Client()

        events = client.say(request(1), frames.window_update(1, frames.WINDOW_MAX))

        assert events[1:] == [Reset(1, ErrorCode.FLOW_CONTROL_ERROR)]
        assert client.reset_codes() == [(1, ErrorCode.FLOW_CONTROL_ERROR)]

    def test_stream_window_by_0(self) -> None:
        """A stream whose window is widened by nothing is reset (6.9)."""
        client = Client()

        events = client.say(request(1), frames.window_update(1, 0))

        assert events[1:] == [Reset(1, ErrorCode.PROTOCOL_ERROR)]

    def test_larger_frames(self) -> None:
        """Frames are as large as the client allows, not larger."""
        client = Client()
        client.say(frames.settings({frames.MAX_FRAME_SIZE: 20_000}), request(1))
        client.server.send_data(1, bytes(50_000))

        sizes = [len(each.payload) for each in client.hear() if each.kind == frames.DATA]

        assert sizes == [20_000, 20_000, 10_000]


class TestReading:
    """The client's windows."""

    def test_given_back(self) -> None:
        """What was read is free again, at half of a window; nothing for a stream that ended."""
        client = Client(Http2Limits(connection_window_bytes=65_536))
        client.say(request(1), request(3))

        client.say(data(1, bytes(16_384)), data(3, bytes(16_383)))
        assert client.hear() == []
        client.say(data(3, b"x", is_end=True))
        assert client.hear() == [Heard(frames.WINDOW_UPDATE, 0, 0, (32_768).to_bytes(4))]
        client.say(data(1, bytes(16_384)))
        assert client.hear() == [Heard(frames.WINDOW_UPDATE, 0, 1, (32_768).to_bytes(4))]

    def test_padding_counts(self) -> None:
        """Padding takes window, and is given back with it (6.9.1)."""
        client = Client(Http2Limits(connection_window_bytes=65_536, stream_window_bytes=65_536))
        client.say(request(1))
        padded = frames.frame(frames.DATA, frames.PADDED, 1, b"\xff" + bytes(255))

        for _ in range(127):
            client.say(padded)
        assert client.hear() == []
        client.say(padded)
        assert [each.stream_id for each in client.hear()] == [0, 1]

    @pytest.mark.parametrize("is_known", [True, False])
    def test_beyond_the_streams(self, *, is_known: bool) -> None:
        """Who sends more than a stream's window allows loses the stream.

        Until the client has acknowledged our SETTINGS that is HTTP/2's default.
        """
        limits = Http2Limits(frame_bytes_max=2**20, stream_window_bytes=20_000)
        hello = HELLO if is_known else HELLO.removesuffix(frames.SETTINGS_ACK)
        client = Client(limits, hello)
        window = 20_000 if is_known else 65_535

        events = client.say(request(1), request(3), data(1, bytes(window)))
        beyond = client.say(data(3, bytes(window + 1)))

        assert events[2:] == [Received(1, bytes(window), is_ended=False)]
        assert beyond == [Reset(3, ErrorCode.FLOW_CONTROL_ERROR)]
        assert client.reset_codes() == [(3, ErrorCode.FLOW_CONTROL_ERROR)]

    def test_below_zero(self) -> None:
        """A window that our SETTINGS take below zero stays so until what was sent is returned."""
        limits = Http2Limits(frame_bytes_max=2**20, stream_window_bytes=20_000)
        client = Client(limits, HELLO.removesuffix(frames.SETTINGS_ACK))
        client.say(request(1), request(3))
        for stream_id in (1, 3):
            client.server.hold(stream_id, is_held=True)
        client.say(data(1, bytes(60_000)), data(3, bytes(60_000)), frames.SETTINGS_ACK)

        last = client.say(data(1, b"", is_end=True))
        too_much = client.say(data(3, b"x"))

        assert last == [Received(1, b"", is_ended=True)]
        assert too_much == [Reset(3, ErrorCode.FLOW_CONTROL_ERROR)]
        assert client.reset_codes() == [(3, ErrorCode.FLOW_CONTROL_ERROR)]

    def test_beyond_the_connections(self) -> None:
        """Who sends more than the connection's window allows loses the connection."""
        client = Client(Http2Limits(frame_bytes_max=2**20, connection_window_bytes=65_535))

        client.say(request(1), data(1, bytes(65_536)))

        assert client.farewell()[0] == ErrorCode.FLOW_CONTROL_ERROR

    def test_late_data_counts(self) -> None:
        """DATA for a stream that was reset takes the connection's window all the same (5.1)."""
        client = Client(Http2Limits(connection_window_bytes=65_535))
        client.say(request(1), request(3))
        client.server.reset(1, ErrorCode.CANCEL)
        client.hear()

        client.say(data(1, bytes(16_384)), data(1, bytes(16_384)))

        assert client.hear() == [Heard(frames.WINDOW_UPDATE, 0, 0, (32_768).to_bytes(4))]


class TestDrain:
    """A polite end."""

    def test_in_two_steps(self) -> None:
        """Streams that were on their way are served; later ones are refused, and may be retried."""
        client = Client()
        client.say(request(1))
        client.server.begin_drain()
        client.server.begin_drain()
        goaway, ping = client.hear()
        assert goaway == Heard(frames.GOAWAY, 0, 0, b"\x7f\xff\xff\xff\x00\x00\x00\x00")
        assert client.server.is_draining

        assert len(client.say(request(3, is_end=True))) == 1
        client.say(frames.frame(frames.PING, frames.ACK, 0, ping.payload))
        assert client.hear() == [Heard(frames.GOAWAY, 0, 0, b"\x00\x00\x00\x03\x00\x00\x00\x00")]
        assert client.say(request(5)) == []
        assert client.reset_codes() == [(5, ErrorCode.REFUSED_STREAM)]
        assert not client.server.is_drained

        client.server.send_trailers(1, ANSWER)
        assert not client.server.is_drained
        client.server.send_trailers(3, ANSWER)
        assert client.server.is_drained

    def test_at_once(self) -> None:
        """Without waiting for the client."""
        client = Client()

        client.server.end_drain()
        client.server.end_drain()

        assert [each.kind for each in client.hear()] == [frames.GOAWAY]
        assert client.server.is_drained

    def test_another_ping(self) -> None:
        """Only the answer to our own PING moves a drain on."""
        client = Client()
        client.say(frames.frame(frames.PING, frames.ACK, 0, b"draining"))
        client.server.begin_drain()
        client.say(frames.frame(frames.PING, frames.ACK, 0, b"12345678"))

        assert len(client.say(request(1))) == 1


class TestCheck:
    """Whether the client is still there."""

    LIMITS = Http2Limits(handshake_ns=10 * SECOND_NS, keepalive_ns=30 * SECOND_NS)

    @pytest.mark.parametrize(
        "hello", [b"", frames.PREFACE[:10], frames.PREFACE + frames.settings({})]
    )
    def test_slow_handshake(self, hello: bytes) -> None:
        """Preface, SETTINGS and its acknowledgement are due in time."""
        client = Client(self.LIMITS, hello)

        assert client.server.check(10 * SECOND_NS - 1) == []
        (event,) = client.server.check(10 * SECOND_NS)

        assert isinstance(event, Ended)
        assert client.farewell()[0] == ErrorCode.SETTINGS_TIMEOUT

    def test_silence(self) -> None:
        """A silent client with open streams is asked once, and is gone if it does not answer."""
        client = Client(self.LIMITS)
        client.now_ns = 5 * SECOND_NS
        client.say(request(1))

        assert client.server.check(35 * SECOND_NS - 1) == []
        assert client.hear() == []
        assert client.server.check(35 * SECOND_NS) == []
        assert [each.kind for each in client.hear()] == [frames.PING]
        assert client.server.check(65 * SECOND_NS - 1) == []
        assert client.hear() == []
        (event,) = client.server.check(65 * SECOND_NS)
        assert isinstance(event, Ended)
        assert client.farewell()[0] == ErrorCode.NO_ERROR

    def test_sign_of_life(self) -> None:
        """Any byte is an answer."""
        client = Client(self.LIMITS)
        client.say(request(1))
        client.server.check(30 * SECOND_NS)
        client.now_ns = 40 * SECOND_NS
        client.say(b"\x00")

        assert client.server.check(60 * SECOND_NS) == []
        assert client.server.check(70 * SECOND_NS) == []
        assert [each.kind for each in client.hear()] == [frames.PING] * 2

    def test_nothing_open(self) -> None:
        """Who wants nothing may be silent for ever."""
        client = Client(self.LIMITS)

        assert client.server.check(10**18) == []
        assert client.hear() == []


def flood(each: bytes) -> Callable[[int], list[bytes]]:
    """The same again and again, on an open stream 1."""
    return lambda count: [request(1), *[each] * count]


def opened_and(each: Callable[[int], bytes]) -> Callable[[int], list[bytes]]:
    """A request and something about it, again and again."""
    return lambda count: [
        part for number in range(count) for part in (request(2 * number + 1), each(2 * number + 1))
    ]


FLOODS: dict[str, tuple[str, Callable[[int], list[bytes]]]] = {
    "SETTINGS": ("settings", flood(frames.settings({}))),
    "PING": ("pings", flood(PING)),
    "PING acknowledged": ("pings", flood(frames.frame(frames.PING, frames.ACK, 0, bytes(8)))),
    "made you reset": ("faults", opened_and(lambda stream_id: frames.window_update(stream_id, 0))),
    "empty DATA": ("empty_data", flood(data(1))),
    "padding alone": (
        "empty_data",
        flood(frames.frame(frames.DATA, frames.PADDED, 1, b"\x03" + bytes(3))),
    ),
    "PRIORITY": ("priorities", flood(frames.frame(frames.PRIORITY, 0, 1, bytes(5)))),
    "WINDOW_UPDATE": ("window_updates", flood(frames.window_update(0, 1))),
    "unknown frames": ("ignored", flood(frames.frame(0x77, 0, 0, b""))),
    "GOAWAY": ("ignored", flood(frames.goaway(0, 0))),
    "late DATA": (
        "ignored",
        lambda count: [request(1), frames.rst_stream(1, 8), *[data(1)] * count],
    ),
    "late RST_STREAM": (
        "ignored",
        lambda count: [request(1), *[frames.rst_stream(1, 8)] * (count + 1)],
    ),
}


class TestLimits:
    """How much of anything."""

    @pytest.mark.parametrize(("limit", "said"), FLOODS.values(), ids=FLOODS)
    def test_flood(self, limit: str, said: Callable[[int], list[bytes]]) -> None:
        """What moves nothing may come so often; once more, and the connection ends."""
        limits = Http2Limits(**{limit: Rate(20, 0)})  # type: ignore[arg-type]  # a rate each
        client = Client(limits)

        said_before = said(20 - (limit == "settings"))  # one SETTINGS was in the greeting
        assert not any(isinstance(event, Ended) for event in client.say(*said_before))
        again = Client(limits)
        events = again.say(*said(21 - (limit == "settings")))

        assert again.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM
        assert isinstance(events[-1], Ended)

    def test_work_of_a_call(self) -> None:
        """However much comes at once, a call reads a part of it, and the next ones the rest."""
        core = Client().server
        said = b"".join(request(stream_id) for stream_id in range(1, 20_001, 2))

        calls = [core.receive(said, 0)]
        while core.is_behind:
            calls.append(core.receive(b"", 0))

        assert max(map(len, calls)) < 200
        assert [
            event.stream_id for events in calls for event in events if isinstance(event, Opened)
        ] == [*range(1, 20_001, 2)]

    def test_behind_and_more_comes(self) -> None:
        """What comes while something is left is read after it; an end leaves nothing."""
        core = Client().server
        events = core.receive(b"".join(map(request, range(1, 2_001, 2))), 0)
        events += received(core, request(2_001) + frames.frame(frames.PUSH_PROMISE, 0, 1, b""))

        assert len(events) == 1_002
        assert isinstance(events[-1], Ended)
        assert not core.is_behind

    @pytest.mark.slow
    def test_abandoned_requests(self) -> None:
        """What a proxy's clients abandon does not end the connection, however many they are."""
        client = Client()
        for begin in range(1, 240_001, 20_000):
            said = (
                part
                for stream_id in range(begin, begin + 20_000, 2)
                for part in (request(stream_id), frames.rst_stream(stream_id, 8))
            )
            assert len(client.say(*said)) == 20_000

        assert client.hear() == []
        assert not client.server.is_closed

    def test_answered_streams(self) -> None:
        """Envoy ends every request with RST_STREAM: after an answer that costs nothing."""
        client = Client()

        for stream_id in range(1, 101, 2):
            client.say(request(stream_id))
            client.server.send_headers(stream_id, ANSWER)
            assert client.say(frames.rst_stream(stream_id, 8)) == [Reset(stream_id, 8)]

    def test_resets_of_answered_streams_are_free(self) -> None:
        """Envoy resets each stream that we end; however many end at once, that costs nothing."""
        client = Client(Http2Limits(ignored=Rate(1, 0)))
        stream_ids = range(1, 6_001, 2)
        client.say(*map(request, stream_ids))
        for stream_id in stream_ids:
            client.server.send_trailers(stream_id, ANSWER)

        client.say(*(frames.rst_stream(stream_id, 8) for stream_id in stream_ids))
        assert not client.server.is_closed
        client.say(frames.rst_stream(1, 8))
        assert not client.server.is_closed
        client.say(frames.rst_stream(1, 8))
        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_resets_of_refused_streams_are_free(self) -> None:
        """A stream that is refused may be reset by the client at the same time."""
        client = Client(Http2Limits(ignored=Rate(1, 0), streams_max=1))
        stream_ids = range(1, 201, 2)
        client.say(*map(request, stream_ids))

        client.say(*(frames.rst_stream(stream_id, 8) for stream_id in stream_ids))

        assert not client.server.is_closed

    def test_late_frames_of_many_streams(self) -> None:
        """What streams earn is kept: late frames of thousands of them may come at once."""
        client = Client(Http2Limits(ignored=Rate(10, 0, 2)))
        stream_ids = range(1, 2_001, 2)
        client.say(*map(request, stream_ids))
        for stream_id in stream_ids:
            client.server.send_trailers(stream_id, ANSWER)
        late = [data(stream_id, b"late") for stream_id in stream_ids]

        client.say(*late, *late, *late[:10])
        assert not client.server.is_closed
        client.say(late[0])
        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_streams(self) -> None:
        """A stream too many is refused, and may be tried again; HPACK's state is kept."""
        client = Client(Http2Limits(streams_max=2))
        encoder = Encoder()
        blocks = [encoder.encode([*REQUEST, ("x", str(number))]) for number in range(4)]
        sent = [
            frames.header_frames(2 * number + 1, each, 16_384, is_end=False)
            for number, each in enumerate(blocks)
        ]

        assert len(client.say(*sent[:3])) == 2
        assert client.reset_codes() == [(5, ErrorCode.REFUSED_STREAM)]
        client.say(frames.rst_stream(1, 8))
        (event,) = client.say(sent[3])
        assert isinstance(event, Opened)
        assert event.head.fields[-1] == (b"x", b"3")

    def test_continuation_frames(self) -> None:
        """A field block comes in so many pieces, not more (CVE-2024-27316)."""
        client = Client(Http2Limits(continuation_frames_max=3))
        piece = frames.frame(frames.CONTINUATION, 0, 1, b"")
        assert client.say(frames.frame(frames.HEADERS, 0, 1, block()), *[piece] * 3) == []

        client.say(piece)

        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_header_block_bytes(self) -> None:
        """A field block has so many bytes, not more."""
        client = Client(Http2Limits(header_block_bytes_max=100))
        client.say(frames.frame(frames.HEADERS, 0, 1, bytes(90)))
        client.say(frames.frame(frames.CONTINUATION, 0, 1, bytes(10)))
        assert not client.server.is_closed

        client.say(frames.frame(frames.CONTINUATION, 0, 1, b"x"))

        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_header_list_bytes(self) -> None:
        """A request larger than announced is reset."""
        size = sum(len(name) + len(value) + 32 for name, value in REQUEST)
        client = Client(Http2Limits(header_list_bytes_max=size + 33 + 10))
        assert len(client.say(request(1, ("x", "y" * 10)))) == 1

        assert client.say(request(3, ("x", "y" * 11))) == []
        assert client.reset_codes() == [(3, ErrorCode.ENHANCE_YOUR_CALM)]

    @pytest.mark.parametrize("is_coded", [True, False])
    def test_large_fields_of_clients(self, is_coded: bool) -> None:  # noqa: FBT001 - a table
        """What a proxy's clients send ends their streams, however often, and never a connection."""
        client = Client(Http2Limits(faults=Rate(1, 0)))
        large = Encoder().encode([("tracestate", "a0-=" * 15_000, True)], huffman=is_coded)
        for stream_id in range(1, 41, 2):
            sent = frames.header_frames(stream_id, block() + large, 16_384, is_end=False)
            assert client.say(sent) == []

        assert client.reset_codes() == [
            (stream_id, ErrorCode.ENHANCE_YOUR_CALM) for stream_id in range(1, 41, 2)
        ]
        assert len(client.say(request(41))) == 1

    def test_small_blocks_that_grow(self) -> None:
        """A small block that decodes to more than announced is a fault: there may be few."""
        client = Client(Http2Limits(faults=Rate(1, 0)))
        fill = b"\x40\x01x\x7f\xe1\x1d" + b"y" * 3_936  # one field of 4,000 bytes
        client.say(frames.header_frames(1, block() + fill, 16_384, is_end=False))
        grown = block() + b"\xbe" * 5
        client.say(frames.header_frames(3, grown, 16_384, is_end=False))
        assert client.reset_codes() == [(3, ErrorCode.ENHANCE_YOUR_CALM)]

        client.say(frames.header_frames(5, grown, 16_384, is_end=False))

        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_header_bomb(self) -> None:
        """Indices into a full table blow up only so far."""
        client = Client()
        fill = b"\x40\x01x\x7f\xe1\x1d" + b"y" * 3_936  # one field of 4,000 bytes
        client.say(frames.header_frames(1, block() + fill, 16_384, is_end=False))

        client.say(frames.header_frames(3, b"\xbe" * 10_000, 16_384, is_end=False))

        assert client.farewell()[0] == ErrorCode.ENHANCE_YOUR_CALM

    def test_header_table(self) -> None:
        """A smaller table, once acknowledged, must be kept to (RFC 7541, 4.2)."""
        limits = Http2Limits(header_table_bytes=0)
        client = Client(limits, frames.PREFACE + frames.settings({}))
        assert len(client.say(request(1))) == 1
        client.say(frames.SETTINGS_ACK)

        kept = frames.header_frames(3, b"\x20" + block(), 16_384, is_end=False)
        assert len(client.say(kept)) == 1
        another = Client(limits)
        another.say(request(1))
        assert another.farewell()[0] == ErrorCode.COMPRESSION_ERROR

    def test_resets_remembered(self) -> None:
        """Of the streams we reset the last thousand may still be heard of; not more are kept."""
        client = Client(Http2Limits(streams_max=1))
        client.say(request(1), *(request(2 * number + 1) for number in range(1, 1_100)))
        client.hear()

        client.say(request(2_199))
        assert client.hear() == []
        client.say(request(3))
        assert client.farewell()[0] == ErrorCode.STREAM_CLOSED

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "endless",
        [
            frames.frame(frames.CONTINUATION, 0, 1, bytes(1_000)),
            data(1, bytes(1_000)),
            PING,
            frames.settings({frames.INITIAL_WINDOW_SIZE: 5}),
            frames.frame(0x99, 0, 1, bytes(1_000)),
            frames.window_update(1, 1),
            frames.rst_stream(1, 8),
            frames.frame(frames.DATA, 0, 1, bytes(16_000))[:-1],
        ],
    )
    def test_memory(self, endless: bytes) -> None:
        """However long a client goes on with the same, it takes no memory that grows."""
        client = Client()
        start = (
            frames.frame(frames.HEADERS, 0, 1, block())
            if endless[3] == frames.CONTINUATION
            else request(1)
        )
        client.say(start)
        tracemalloc.start()
        try:
            for _ in range(3_000):
                client.say(endless)
                client.server.data_to_send()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 200_000


class TestHeaderReader:
    """Blocks are remembered, and mean what they mean."""

    FIELDS = st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "authorization"]),
            st.sampled_from(["1", "2", "x" * 50]),
            st.booleans(),
        ),
        max_size=4,
    )

    @given(
        st.lists(st.tuples(FIELDS, st.sampled_from([None, None, None, 0, 60, 4_096])), max_size=40)
    )
    def test_like_a_decoder_without_memory(
        self, requests: list[tuple[list[tuple[str, str, bool]], int | None]]
    ) -> None:
        """Whatever the table does between equal blocks, the fields are those of a new decoder."""
        encoder, reader, decoder = Encoder(), HeaderReader(Http2Limits()), Decoder()
        for fields, table_bytes in requests:
            if table_bytes is not None:
                encoder.header_table_size = table_bytes
            encoded = encoder.encode([*REQUEST, *fields])

            head = reader.request(1, encoded)

            assert head.fields == tuple(decoder.decode(encoded, raw=True))

    def test_equal_blocks_after_another_table(self) -> None:
        """An index that points elsewhere now is read anew."""
        reader = HeaderReader(Http2Limits())
        short = block()
        reader.request(1, short + b"\x40\x01x\x01a")
        index = short + b"\xbe"
        assert reader.request(3, index).fields[-1] == (b"x", b"a")
        assert reader.request(5, index).fields[-1] == (b"x", b"a")

        reader.request(7, short + b"\x40\x01x\x01b")
        assert reader.request(9, index).fields[-1] == (b"x", b"b")
        reader.request(11, b"\x20\x3f\xe1\x1f" + short)  # to 0, and back to 4,096
        with pytest.raises(ConnectionFault, match="must be HPACK"):
            reader.request(13, index)

    def test_mistakes_are_not_remembered(self) -> None:
        """A malformed block is malformed each time, and says of which stream."""
        reader = HeaderReader(Http2Limits())
        for stream_id in (1, 3):
            with pytest.raises(StreamFault) as caught:
                reader.request(stream_id, block([("a", "b")]))
            assert caught.value.stream_id == stream_id

    def test_many_different(self) -> None:
        """More blocks than are remembered are read as well."""
        reader = HeaderReader(Http2Limits())
        for _ in range(2):
            for number in range(200):
                head = reader.request(1, block([*REQUEST, ("x", str(number))]))
                assert head.fields[-1] == (b"x", str(number).encode())


class TestH2:
    """h2, a library of other people, as the client."""

    def test_conversation(self) -> None:
        """Both understand each other, through windows of a few bytes and trailers both ways."""
        client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        server = Http2Connection(Http2Limits(), 0)
        client.initiate_connection()
        client.update_settings({4: 3})
        client.send_headers(1, [*REQUEST, ("te", "trailers")])
        client.send_data(1, b"question" * 100)
        client.send_headers(1, [("sum", "1")], end_stream=True)
        client.ping(b"abcdefgh")

        events = server.receive(client.data_to_send(), 0)
        server.send_headers(1, ANSWER)
        server.send_data(1, b"the answer")
        server.send_trailers(1, TRAILERS)
        told = []
        while data_to_send := server.data_to_send():
            said = client.receive_data(data_to_send)
            told += said
            for event in said:
                if isinstance(event, DataReceived) and not isinstance(said[-1], StreamEnded):
                    client.increment_flow_control_window(event.flow_controlled_length or 1, 1)
            server.receive(client.data_to_send(), 0)

        assert [type(event) for event in events] == [Opened, Received, Received]
        assert (
            b"".join(each.data for each in told if isinstance(each, DataReceived)) == b"the answer"
        )
        kinds = {type(event) for event in told}
        assert {ResponseReceived, TrailersReceived, StreamEnded} <= kinds


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What a client might send, sensible and not, as bytes."""
    encoder = Encoder()
    said = [HELLO]
    stream_ids = st.sampled_from([1, 3, 5, 7, 9])
    for _ in range(draw(st.integers(0, 12))):
        match draw(st.integers(0, 9)):
            case 0 | 1 | 2:
                encoded = encoder.encode([*REQUEST, ("x", draw(st.text("abc", max_size=5)))])
                size, is_end = draw(st.integers(3, 50)), draw(st.booleans())
                said.append(frames.header_frames(draw(stream_ids), encoded, size, is_end=is_end))
            case 3 | 4 | 5:
                content, is_end = draw(st.binary(max_size=30)), draw(st.booleans())
                said.append(data(draw(stream_ids), content, is_end=is_end))
            case 6:
                said.append(frames.window_update(draw(stream_ids), draw(st.integers(0, 2**31 - 1))))
            case 7:
                said.append(frames.rst_stream(draw(stream_ids), draw(st.integers(0, 20))))
            case 8:
                values = st.dictionaries(st.integers(0, 7), st.integers(0, 2**17), max_size=3)
                said.append(frames.settings(draw(values)))
            case _:
                kind, flags = draw(st.integers(0, 12)), draw(st.integers(0, 255))
                payload = draw(st.binary(max_size=20))
                said.append(frames.frame(kind, flags, draw(st.integers(0, 9)), payload))
    return b"".join(said)


def pieces(whole: bytes, cuts: list[int]) -> Iterator[bytes]:
    """Cut bytes at these places, as far as they have them."""
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    return (whole[begin:end] for begin, end in itertools.pairwise(places))


def told(parts: Iterator[bytes]) -> tuple[list[Event], bytes]:
    """What an owner hears and a client gets, when it comes in these parts."""
    core = Http2Connection(Http2Limits(), 0)
    events: list[Event] = []
    said = b""
    for part in parts:
        events += received(core, part)
        said += core.data_to_send()
    return events, said


class TestAnyBytes:
    """Whatever comes, in whatever pieces."""

    @given(conversations(), st.lists(st.integers(0, 600), max_size=30))
    def test_cuts(self, whole: bytes, cuts: list[int]) -> None:
        """However the bytes are cut, the events and the answers are the same."""
        assert told(pieces(whole, cuts)) == told(iter([whole]))

    @given(conversations())
    @settings(max_examples=30)
    def test_byte_by_byte(self, whole: bytes) -> None:
        """Down to single bytes."""
        assert told(whole[at : at + 1] for at in range(len(whole))) == told(iter([whole]))

    @given(st.binary(max_size=400))
    def test_noise(self, noise: bytes) -> None:
        """Noise is answered with frames, and at most one GOAWAY."""
        _, said = told(iter([HELLO, noise]))

        assert sum(each.kind == frames.GOAWAY for each in heard(said)) <= 1

    @given(
        st.lists(
            st.builds(
                frames.frame,
                st.integers(0, 11),
                st.integers(0, 255),
                st.integers(0, 12),
                st.binary(max_size=40),
            ),
            max_size=30,
        )
    )
    @settings(max_examples=500)
    def test_any_frames(self, noise: list[bytes]) -> None:
        """Frames in any order are answered with no more than they are: nothing is amplified."""
        events, said = told(iter([HELLO, request(1), request(3), *noise]))

        assert len(said) < 400 + 100 * len(noise)
        assert len(events) <= 2 + 2 * len(noise)


@final
class FlowControl(RuleBasedStateMachine):
    """Sending, against a model of the windows that only counts."""

    SIZES = st.one_of(st.integers(0, 60), st.sampled_from([16_384, 40_000, 70_000]))

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.window = 65_535
        self.initial = 65_535
        self.frame_bytes_max = 16_384
        self.windows: dict[int, int] = {}
        self.due: dict[int, bytearray] = {}
        self.ends: set[int] = set()
        self.next_id = 1
        self.counter = 0

    def hear(self) -> None:
        """Take what was sent off the model, which must allow each frame of it."""
        for each in self.client.hear():
            stream_id = each.stream_id
            if each.kind == frames.DATA:
                size = len(each.payload)
                assert size <= self.frame_bytes_max
                assert size == 0 or size <= min(self.window, self.windows[stream_id])
                assert self.due[stream_id][:size] == each.payload, "in order, none lost"
                del self.due[stream_id][:size]
                self.window -= size
                self.windows[stream_id] -= size
            if each.flags & frames.END_STREAM and each.kind in {frames.DATA, frames.HEADERS}:
                assert stream_id in self.ends
                assert not self.due[stream_id], "the end comes last"
                self.forget(stream_id)

    def forget(self, stream_id: int) -> None:
        """Drop a stream from the model."""
        del self.windows[stream_id], self.due[stream_id]
        self.ends.discard(stream_id)

    def one_of_them(self, draw: int) -> int:
        """An open stream."""
        return list(self.windows)[draw % len(self.windows)]

    @initialize()
    def begin(self) -> None:
        """Open two streams."""
        self.open()
        self.open()

    @rule()
    def open(self) -> None:
        """A request comes."""
        self.client.say(request(self.next_id, is_end=True))
        self.windows[self.next_id] = self.initial
        self.due[self.next_id] = bytearray()
        self.next_id += 2

    @precondition(lambda self: self.windows.keys() - self.ends)
    @rule(draw=st.integers(0, 99), size=SIZES, is_end=st.booleans())
    def send(self, draw: int, size: int, is_end: bool) -> None:  # noqa: FBT001 - drawn
        """Its answer, or a piece of it."""
        stream_ids = [stream_id for stream_id in self.windows if stream_id not in self.ends]
        stream_id = stream_ids[draw % len(stream_ids)]
        self.counter += 1
        content = bytes([self.counter % 256]) * size
        self.due[stream_id] += content
        if is_end:
            self.ends.add(stream_id)
        self.client.server.send_data(stream_id, content, is_end=is_end)

    @precondition(lambda self: self.windows.keys() - self.ends)
    @rule(draw=st.integers(0, 99))
    def send_trailers(self, draw: int) -> None:
        """The end of its answer."""
        stream_ids = [stream_id for stream_id in self.windows if stream_id not in self.ends]
        stream_id = stream_ids[draw % len(stream_ids)]
        self.ends.add(stream_id)
        self.client.server.send_trailers(stream_id, TRAILERS)

    @rule(increment=st.one_of(st.integers(1, 100), st.integers(1, 100_000)))
    def widen(self, increment: int) -> None:
        """The client reads."""
        self.window += increment
        self.client.say(frames.window_update(0, increment))

    @precondition(lambda self: self.windows)
    @rule(draw=st.integers(0, 99), increment=st.integers(1, 100_000))
    def widen_stream(self, draw: int, increment: int) -> None:
        """The client reads one stream."""
        stream_id = self.one_of_them(draw)
        self.windows[stream_id] += increment
        self.client.say(frames.window_update(stream_id, increment))

    @rule(initial=st.one_of(st.integers(0, 50), st.integers(0, 100_000)))
    def change_initial(self, initial: int) -> None:
        """The client changes its mind about windows."""
        for stream_id in self.windows:
            self.windows[stream_id] += initial - self.initial
        self.initial = initial
        self.client.say(frames.settings({frames.INITIAL_WINDOW_SIZE: initial}))

    @rule(size=st.sampled_from([16_384, 20_000, 60_000]))
    def change_frame_bytes(self, size: int) -> None:
        """The client changes its mind about frames."""
        self.frame_bytes_max = size
        self.client.say(frames.settings({frames.MAX_FRAME_SIZE: size}))

    @precondition(lambda self: self.windows)
    @rule(draw=st.integers(0, 99))
    def reset(self, draw: int) -> None:
        """The client gives a stream up."""
        self.hear()
        if self.windows:
            stream_id = self.one_of_them(draw)
            self.client.say(frames.rst_stream(stream_id, 8))
            self.forget(stream_id)

    @invariant()
    def as_much_as_possible(self) -> None:
        """What can be sent has been, and what waits is counted."""
        self.hear()
        waiting = sum(map(len, self.due.values()))
        for stream_id, due in self.due.items():
            assert not due or self.window <= 0 or self.windows[stream_id] <= 0
            assert due or stream_id not in self.ends
        assert self.client.server.queued_bytes in range(waiting, waiting + 50 * len(self.due) + 1)


TestFlowControl = FlowControl.TestCase

"""Frames on the wire, with hyperframe as the independent second opinion; limits as arithmetic."""

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode
from flowcontrol_server.doors.http2.limits import Budget, Budgets, Http2Limits, Rate

STREAM_IDS = st.integers(0, frames.STREAM_ID_MAX)
SECOND_NS = 1_000_000_000


def read_by_hyperframe(data: bytes) -> tuple[Frame, bytes]:
    """The first frame as hyperframe reads it, and the rest."""
    frame, length = Frame.parse_frame_header(memoryview(data[:9]))
    frame.parse_body(memoryview(data[9 : 9 + length]))
    return frame, data[9 + length :]


class TestWriting:
    """What we write is what others read."""

    @given(st.integers(0, 255), st.integers(0, 255), STREAM_IDS, st.binary(max_size=300))
    def test_any_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Length, type, flags and stream stand where RFC 9113 4.1 wants them."""
        data = frames.frame(kind, flags, stream_id, payload)

        high, low, *fields = frames.unpack_header(data, 0)
        assert (high << 8 | low, fields) == (len(payload), [kind, flags, stream_id])
        assert data[frames.FRAME_HEADER_BYTES :] == payload

    def test_length_of_24_bits(self) -> None:
        """The largest frame has the largest length."""
        data = frames.frame(frames.DATA, 0, 1, bytes(frames.FRAME_BYTES_MAX))

        assert data[:3] == b"\xff\xff\xff"

    @given(st.binary(max_size=100), st.integers(1, 40), st.booleans())
    def test_header_frames(self, block: bytes, bytes_max: int, is_end: bool) -> None:  # noqa: FBT001 - drawn
        """A block is cut into HEADERS and CONTINUATION, the last of which ends it."""
        data = frames.header_frames(5, block, bytes_max, is_end=is_end)

        pieces = []
        while data:
            piece, data = read_by_hyperframe(data)
            pieces.append(piece)
        assert isinstance(pieces[0], HeadersFrame)
        assert ("END_STREAM" in pieces[0].flags) == is_end
        assert all(isinstance(piece, ContinuationFrame) for piece in pieces[1:])
        assert [("END_HEADERS" in piece.flags) for piece in pieces] == (
            [False] * (len(pieces) - 1) + [True]
        )
        assert {piece.stream_id for piece in pieces} == {5}
        parts = [
            piece.data for piece in pieces if isinstance(piece, HeadersFrame | ContinuationFrame)
        ]
        assert b"".join(parts) == block
        assert all(len(part) <= bytes_max for part in parts)

    def test_small_frames(self) -> None:
        """Resets, windows, settings and farewells say what they should."""
        data = (
            frames.rst_stream(7, ErrorCode.CANCEL)
            + frames.window_update(9, 4_711)
            + frames.settings({frames.MAX_FRAME_SIZE: 20_000, frames.ENABLE_PUSH: 0})
            + frames.goaway(11, ErrorCode.ENHANCE_YOUR_CALM, "enough")
            + frames.SETTINGS_ACK
        )

        reset, data = read_by_hyperframe(data)
        assert isinstance(reset, RstStreamFrame)
        assert (reset.stream_id, reset.error_code) == (7, 8)
        update, data = read_by_hyperframe(data)
        assert isinstance(update, WindowUpdateFrame)
        assert (update.stream_id, update.window_increment) == (9, 4_711)
        settings, data = read_by_hyperframe(data)
        assert isinstance(settings, SettingsFrame)
        assert settings.settings == {5: 20_000, 2: 0}
        goaway, data = read_by_hyperframe(data)
        assert isinstance(goaway, GoAwayFrame)
        assert (goaway.last_stream_id, goaway.error_code) == (11, 11)
        assert goaway.additional_data == b"enough"
        ack, data = read_by_hyperframe(data)
        assert isinstance(ack, SettingsFrame)
        assert ("ACK" in ack.flags, data) == (True, b"")


class TestReading:
    """What others write is what we read."""

    @given(st.binary(max_size=50), st.integers(0, 255))
    def test_padding(self, data: bytes, pad_length: int) -> None:
        """Padding is taken off."""
        frame = DataFrame(1, data, pad_length=pad_length, flags=["PADDED"])

        payload = frame.serialize()[frames.FRAME_HEADER_BYTES :]
        assert frames.unpadded(payload) == data

    @pytest.mark.parametrize("payload", [b"", b"\x01", b"\x02x", b"\xff" + bytes(254)])
    def test_padding_too_long(self, payload: bytes) -> None:
        """Padding of the payload's length or more ends the connection (6.1)."""
        with pytest.raises(ConnectionFault, match="padding must be shorter") as caught:
            frames.unpadded(payload)
        assert caught.value.code is ErrorCode.PROTOCOL_ERROR

    def test_settings(self) -> None:
        """Of equal identifiers the last counts; unknown ones are kept, for nobody."""
        frame = SettingsFrame(0, settings={4: 1_000, 99: 7, 1: 0})
        payload = frame.serialize()[frames.FRAME_HEADER_BYTES :]

        assert frames.read_settings(payload + b"\x00\x04\x00\x00\x00\x05") == {4: 5, 99: 7, 1: 0}
        assert frames.read_settings(b"") == {}

    @pytest.mark.parametrize(
        ("setting", "value", "code"),
        [
            (frames.ENABLE_PUSH, 2, ErrorCode.PROTOCOL_ERROR),
            (frames.INITIAL_WINDOW_SIZE, 2**31, ErrorCode.FLOW_CONTROL_ERROR),
            (frames.MAX_FRAME_SIZE, 16_383, ErrorCode.PROTOCOL_ERROR),
            (frames.MAX_FRAME_SIZE, 2**24, ErrorCode.PROTOCOL_ERROR),
        ],
    )
    def test_settings_out_of_range(self, setting: int, value: int, code: ErrorCode) -> None:
        """Each setting has the range and the error of RFC 9113 6.5.2."""
        payload = frames.settings({setting: value})[frames.FRAME_HEADER_BYTES :]

        with pytest.raises(
            ConnectionFault, match=rf"^SETTINGS_\w+ must be from .*, got {value}$"
        ) as caught:
            frames.read_settings(payload)
        assert caught.value.code is code

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            (frames.ENABLE_PUSH, 1),
            (frames.INITIAL_WINDOW_SIZE, 2**31 - 1),
            (frames.INITIAL_WINDOW_SIZE, 0),
            (frames.MAX_FRAME_SIZE, 16_384),
            (frames.MAX_FRAME_SIZE, 2**24 - 1),
            (frames.MAX_HEADER_LIST_SIZE, 2**32 - 1),
        ],
    )
    def test_settings_at_the_edge(self, setting: int, value: int) -> None:
        """The ends of a range belong to it."""
        payload = frames.settings({setting: value})[frames.FRAME_HEADER_BYTES :]

        assert frames.read_settings(payload) == {setting: value}

    def test_settings_cut_off(self) -> None:
        """A setting is six bytes."""
        with pytest.raises(ConnectionFault, match="multiple of 6 bytes, got 7") as caught:
            frames.read_settings(bytes(7))
        assert caught.value.code is ErrorCode.FRAME_SIZE_ERROR

    def test_dependency(self) -> None:
        """The bit for exclusive is no part of the stream."""
        assert frames.read_dependency(b"\x80\x00\x00\x07\x10rest") == 7


class TestShapes:
    """What a type alone asks of a frame."""

    @pytest.mark.parametrize(
        ("kind", "stream_id", "size", "code"),
        [
            (frames.PRIORITY, 0, 5, ErrorCode.PROTOCOL_ERROR),
            (frames.PRIORITY, 1, 4, ErrorCode.FRAME_SIZE_ERROR),
            (frames.RST_STREAM, 0, 4, ErrorCode.PROTOCOL_ERROR),
            (frames.RST_STREAM, 1, 5, ErrorCode.FRAME_SIZE_ERROR),
            (frames.SETTINGS, 1, 0, ErrorCode.PROTOCOL_ERROR),
            (frames.PING, 1, 8, ErrorCode.PROTOCOL_ERROR),
            (frames.PING, 0, 7, ErrorCode.FRAME_SIZE_ERROR),
            (frames.GOAWAY, 1, 8, ErrorCode.PROTOCOL_ERROR),
            (frames.GOAWAY, 0, 7, ErrorCode.FRAME_SIZE_ERROR),
            (frames.WINDOW_UPDATE, 0, 3, ErrorCode.FRAME_SIZE_ERROR),
        ],
    )
    def test_wrong(self, kind: int, stream_id: int, size: int, code: ErrorCode) -> None:
        """A frame in the wrong place or of the wrong size ends the connection."""
        with pytest.raises(ConnectionFault) as caught:
            frames.check_shape(kind, stream_id, size)
        assert caught.value.code is code

    @pytest.mark.parametrize(
        ("kind", "stream_id", "size"),
        [
            (frames.PRIORITY, 1, 5),
            (frames.RST_STREAM, 1, 4),
            (frames.SETTINGS, 0, 600),
            (frames.PING, 0, 8),
            (frames.GOAWAY, 0, 100),
            (frames.WINDOW_UPDATE, 0, 4),
            (frames.WINDOW_UPDATE, 1, 4),
            (frames.DATA, 0, 0),
            (99, 0, 0),
        ],
    )
    def test_right(self, kind: int, stream_id: int, size: int) -> None:
        """What is right, and what is judged elsewhere, passes."""
        frames.check_shape(kind, stream_id, size)


class TestBudget:
    """How often something may come."""

    def test_burst(self) -> None:
        """So many at once, and no more."""
        budget = Budget(Rate(3, 1))

        assert [budget.spend(0, 0) for _ in range(5)] == [True, True, True, False, False]

    def test_time(self) -> None:
        """Time earns more, never beyond the burst."""
        budget = Budget(Rate(2, 10))
        assert [budget.spend(0, 0) for _ in range(3)] == [True, True, False]

        assert not budget.spend(SECOND_NS // 10 - 1, 0)
        assert budget.spend(SECOND_NS // 10, 0)
        assert not budget.spend(SECOND_NS // 10, 0)
        assert [budget.spend(9 * SECOND_NS, 0) for _ in range(3)] == [True, True, False]

    def test_work(self) -> None:
        """Streams earn more."""
        budget = Budget(Rate(5, 0, 2))
        assert [budget.spend(0, 0) for _ in range(6)][-1] is False

        assert [budget.spend(0, 2) for _ in range(5)] == [True] * 4 + [False]

    @given(
        st.integers(1, 20),
        st.integers(0, 20),
        st.integers(0, 3),
        st.lists(st.tuples(st.integers(0, SECOND_NS), st.integers(0, 3)), max_size=200),
    )
    def test_bound(
        self, burst: int, per_s: int, per_stream: int, asks: list[tuple[int, int]]
    ) -> None:
        """Whatever the rhythm, the total keeps within what burst, time and work allow."""
        budget = Budget(Rate(burst, per_s, per_stream))
        now_ns = streams = spent = 0
        for wait_ns, opened in asks:
            now_ns += wait_ns
            streams += opened
            spent += budget.spend(now_ns, streams)

            assert spent <= burst + per_s * now_ns / SECOND_NS + per_stream * streams

    def test_by_name(self) -> None:
        """Each kind has its own budget; the one that is spent ends the connection."""
        budgets = Budgets(0)
        budgets.spend("PING frames", Rate(1, 0))
        budgets.spend("SETTINGS frames", Rate(1, 0))

        rule = "^PING frames must be at most 1 at once and 0 a second$"
        with pytest.raises(ConnectionFault, match=rule) as caught:
            budgets.spend("PING frames", Rate(1, 0))
        assert caught.value.code is ErrorCode.ENHANCE_YOUR_CALM


class TestLimits:
    """Limits that contradict HTTP/2 are a mistake of ours."""

    @pytest.mark.parametrize(
        "wrong",
        [
            {"stream_window_bytes": 0},
            {"connection_window_bytes": 65_534},
            {"connection_window_bytes": 2**31},
            {"frame_bytes_max": 16_383},
            {"frame_bytes_max": 2**24},
        ],
    )
    def test_relations(self, wrong: dict[str, int]) -> None:
        """Windows and frames keep to RFC 9113's ranges."""
        with pytest.raises(AssertionError):
            Http2Limits(**wrong)  # type: ignore[arg-type]  # rates are other fields

    def test_announced(self) -> None:
        """What is limited by a setting is announced."""
        assert Http2Limits().announced() == {1: 4_096, 3: 100_000, 4: 57_344, 5: 16_384, 6: 16_384}

"""Pure. The sender's half of flow control (RFC 9113, 5.2 and 6.9).

DATA needs room in three places: the stream's window, the connection's window, and a frame. Data
that does not fit waits in the stream's outbox, and everything after it on that stream waits, too. A
stream whose own window is closed waits for its own WINDOW_UPDATE. A stream with an open window
waits in line for the connection's window. So the cost of a WINDOW_UPDATE is proportional to what it
lets through, not to what is waiting.

A stream's window is kept as `credit`, its difference from the initial window size in the peer's
SETTINGS: changing that size changes every window at once (6.9.2), and may make it negative.
"""

from collections.abc import Iterable
from typing import final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode, StreamFault
from flowcontrol_server.doors.http2.headers import EMPTY_TABLE
from flowcontrol_server.doors.http2.stream import Piece, Stream


@final
class Outflow:
    """The output of one connection, in order."""

    __slots__ = (
        "_is_table_empty",
        "_starved",
        "_waiting",
        "data_frames",
        "drained",
        "ended",
        "frame_bytes_max",
        "initial_window",
        "queued_bytes",
        "ready",
        "window",
    )

    def __init__(self) -> None:
        self.ready: list[bytes] = []
        """Frames that can be written now."""
        self.ended: list[Stream] = []
        """Streams whose last frame has become ready; the owner clears the list."""
        self.data_frames = 0
        """DATA frames that have become ready so far."""
        self.drained: list[Stream] = []
        """Streams whose outbox has become empty; the owner clears the list."""
        self.queued_bytes = 0
        """Bytes that wait for a window."""
        self.window = frames.WINDOW_DEFAULT
        """Window of the connection."""
        self.initial_window = frames.WINDOW_DEFAULT
        self.frame_bytes_max = frames.FRAME_BYTES_DEFAULT
        self._is_table_empty = False
        self._waiting: dict[int, Stream] = {}
        """Streams with an outbox."""
        self._starved: dict[int, Stream] = {}
        """Those of them that wait only for the connection's window, in line."""

    def send_block(self, stream: Stream, block: bytes, *, is_end: bool) -> None:
        """Send response headers or trailers; they need no window, but wait for DATA before them."""
        if stream.outbox is None:
            self._write_block(stream, block, is_end=is_end)
        else:
            self._queue(stream, Piece(block, is_data=False, is_end=is_end))

    def send_data(self, stream: Stream, data: bytes, *, is_end: bool = False) -> None:
        """Send DATA, as far as the windows allow."""
        size = len(data)
        if (
            stream.outbox is None
            and size <= self.window
            and size <= self.initial_window + stream.credit
            and size <= self.frame_bytes_max
        ):
            self._write_data(stream, data, is_end=is_end)
            return
        self._queue(stream, Piece(data, is_data=True, is_end=is_end))
        self._pump(stream)

    def forget(self, stream: Stream) -> None:
        """Drop the outbox of a stream that was reset."""
        if stream.outbox is not None:
            self.queued_bytes -= sum(len(piece.content) for piece in stream.outbox)
            stream.outbox = None
            del self._waiting[stream.stream_id]
            self._starved.pop(stream.stream_id, None)

    def widen(self, increment: int) -> None:
        """Apply a WINDOW_UPDATE for the connection.

        Raises:
            ConnectionFault: the window exceeds 2^31-1 (6.9.1).
        """
        self.window += increment
        if self.window > frames.WINDOW_MAX:
            reason = f"connection window must be at most 2^31-1, got {self.window}"
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, reason)
        while self._starved and self.window > 0:
            self._pump(self._starved.pop(next(iter(self._starved))))

    def widen_stream(self, stream: Stream, increment: int) -> None:
        """Apply a WINDOW_UPDATE for one stream.

        Raises:
            StreamFault: the window exceeds 2^31-1.
        """
        stream.credit += increment
        if self.initial_window + stream.credit > frames.WINDOW_MAX:
            reason = "stream window must be at most 2^31-1"
            raise StreamFault(stream.stream_id, ErrorCode.FLOW_CONTROL_ERROR, reason)
        if stream.outbox is not None:
            self._pump(stream)

    def apply(self, settings: dict[int, int], streams: Iterable[Stream]) -> None:
        """Apply those of the client's SETTINGS that concern output.

        Args:
            settings: each within its range.
            streams: all open streams; a new initial window changes their windows (6.9.2).

        Raises:
            ConnectionFault: a window would exceed 2^31-1.
        """
        self.frame_bytes_max = settings.get(frames.MAX_FRAME_SIZE, self.frame_bytes_max)
        size = settings.get(frames.INITIAL_WINDOW_SIZE, self.initial_window)
        if size == self.initial_window:
            return
        if size + max((stream.credit for stream in streams), default=0) > frames.WINDOW_MAX:
            reason = f"SETTINGS_INITIAL_WINDOW_SIZE must keep windows below 2^31, got {size}"
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, reason)
        self.initial_window = size
        for stream in list(self._waiting.values()):
            self._pump(stream)

    def _queue(self, stream: Stream, piece: Piece) -> None:
        stream.queue(piece)
        self._waiting[stream.stream_id] = stream
        self.queued_bytes += len(piece.content)

    def _pump(self, stream: Stream) -> None:
        """Send as much of a stream's outbox as the windows allow now."""
        outbox = stream.outbox
        while outbox:
            content, is_data, is_end = outbox[0]
            size = len(content)
            if is_data and size:
                window = min(self.window, self.initial_window + stream.credit)
                size = min(size, window, self.frame_bytes_max)
                if size <= 0:
                    break
            self.queued_bytes -= size
            if size < len(content):
                self._write_data(stream, content[:size], is_end=False)
                outbox[0] = Piece(content[size:], is_data=True, is_end=is_end)
                continue
            outbox.popleft()
            if is_data:
                self._write_data(stream, content, is_end=is_end)
            else:
                self._write_block(stream, content, is_end=is_end)
        self._starved.pop(stream.stream_id, None)
        if not outbox:
            stream.outbox = None
            self._waiting.pop(stream.stream_id, None)
            self.drained.append(stream)
        elif self.initial_window + stream.credit > 0:
            self._starved[stream.stream_id] = stream

    def _write_block(self, stream: Stream, block: bytes, *, is_end: bool) -> None:
        if not self._is_table_empty:
            self._is_table_empty = True
            block = EMPTY_TABLE + block
        self.ready.append(
            frames.header_frames(stream.stream_id, block, self.frame_bytes_max, is_end=is_end)
        )
        if is_end:
            self.ended.append(stream)

    def _write_data(self, stream: Stream, data: bytes, *, is_end: bool) -> None:
        size = len(data)
        self.data_frames += 1
        self.window -= size
        stream.credit -= size
        flags = frames.END_STREAM if is_end else 0
        self.ready.append(frames.frame(frames.DATA, flags, stream.stream_id, data))
        if is_end:
            self.ended.append(stream)

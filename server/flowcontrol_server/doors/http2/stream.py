"""Pure. The state of one open stream, with the receiver's half of its flow control."""

from collections import deque
from typing import NamedTuple, final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ErrorCode, StreamFault


class Piece(NamedTuple):
    """A part of the output of a stream, in order."""

    content: bytes
    is_data: bool
    is_end: bool


@final
class Stream:
    """One stream, until its answer has ended.

    Args:
        stream_id: odd, chosen by the client.
        length_left: bytes of body that content-length announces; None: it has none.
        is_remote_open: whether the client may still send.
    """

    __slots__ = (
        "credit",
        "is_held",
        "is_remote_open",
        "length_left",
        "outbox",
        "stream_id",
        "unread",
    )

    def __init__(self, stream_id: int, length_left: int | None, *, is_remote_open: bool) -> None:
        self.stream_id = stream_id
        self.is_remote_open = is_remote_open
        self.length_left = length_left
        self.credit = 0
        """Our window on this stream, minus the initial one."""
        self.unread = 0
        """Bytes received by which the client's window was not widened yet."""
        self.is_held = False
        """Whether the owner has stopped widening the client's window."""
        self.outbox: deque[Piece] | None = None
        """Output that waits for a window, in order; None: there is none."""

    def queue(self, piece: Piece) -> None:
        """Append to the output that waits for a window."""
        if self.outbox is None:
            self.outbox = deque()
        self.outbox.append(piece)

    def take(
        self, data_size: int, frame_size: int, window: int, *, is_end: bool, is_known: bool = True
    ) -> int:
        """Account for a DATA frame; return by how much to widen the client's window; 0: not at all.

        Args:
            data_size: bytes of body in it.
            frame_size: bytes it takes of the window, padding included (6.9.1).
            window: the full window. It is widened when half of it is used up, but not while the
                owner has stopped it, or output waits for the client's own window.
            is_end: whether it is the client's last frame.
            is_known: whether the client has acknowledged this window. Before, it may use HTTP/2's
                default, and exceed this window (6.9.2).

        Raises:
            StreamFault: the frame is not allowed.
        """
        if not self.is_remote_open:
            reason = "DATA must not follow END_STREAM"
            raise StreamFault(self.stream_id, ErrorCode.STREAM_CLOSED, reason)
        most = window if is_known else max(window, frames.WINDOW_DEFAULT)
        self.unread += frame_size
        if frame_size and self.unread > most:
            reason = f"DATA must keep within the stream's window of {most} bytes"
            raise StreamFault(self.stream_id, ErrorCode.FLOW_CONTROL_ERROR, reason)
        if self.length_left is not None:
            self.length_left -= data_size
            if self.length_left < 0:
                raise self._length_fault()
        if is_end:
            self.end()
            return 0
        return self.increment(window)

    def increment(self, window: int) -> int:
        """Return by how much to widen the client's window now; 0: not at all."""
        if self.unread * 2 < window or self.is_held or self.outbox is not None:
            return 0
        increment, self.unread = self.unread, 0
        return increment if self.is_remote_open else 0

    def end(self) -> None:
        """Note that the client has sent everything.

        Raises:
            StreamFault: it was less than content-length announces (8.1.1).
        """
        if self.length_left:
            raise self._length_fault()
        self.is_remote_open = False

    def _length_fault(self) -> StreamFault:
        reason = "DATA must have the length in content-length"
        return StreamFault(self.stream_id, ErrorCode.PROTOCOL_ERROR, reason)

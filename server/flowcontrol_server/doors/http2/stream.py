"""Pure. What is remembered of one open stream, and what the client may still send on it."""

from collections import deque
from typing import NamedTuple, final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ErrorCode, StreamFault


class Piece(NamedTuple):
    """Something to be sent, in its turn."""

    content: bytes
    is_data: bool
    is_end: bool


@final
class Stream:
    """One stream whose answer has not ended; then it is forgotten.

    Args:
        stream_id: odd, the client's.
        length_left: bytes of body that content-length promises; None without it.
        is_remote_open: whether the client may still send.
    """

    __slots__ = (
        "credit",
        "is_answered",
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
        self.is_answered = False
        """Whether anything was sent."""
        self.credit = 0
        """Our window on this stream, beyond the initial one."""
        self.unread = 0
        """Bytes received that were not yet returned to the client's window."""
        self.is_held = False
        """Whether the owner wants no more for now than the client's window still admits."""
        self.outbox: deque[Piece] | None = None
        """What waits for a window, in order."""

    def queue(self, piece: Piece) -> None:
        """Put something behind what waits for a window already."""
        if self.outbox is None:
            self.outbox = deque()
        self.outbox.append(piece)

    def take(
        self, data_size: int, frame_size: int, window: int, *, is_end: bool, is_known: bool = True
    ) -> int:
        """Account for a DATA frame; return by how much to widen the client's window again, or 0.

        Args:
            data_size: bytes of body in it.
            frame_size: bytes it takes of the window: padding counts (6.9.1).
            window: the whole window; widened again when half of it is used up, but not while the
                owner wants no more, or output waits for the client's own window.
            is_end: whether it is the client's last.
            is_known: whether the client knows of this window; before, it may use HTTP/2's default,
                and what it has sent so is above the window until it is returned (6.9.2).

        Raises:
            StreamFault: it should not have been sent.
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
        """Return by how much to widen the client's window now, or 0."""
        if self.unread * 2 < window or self.is_held or self.outbox is not None:
            return 0
        increment, self.unread = self.unread, 0
        return increment if self.is_remote_open else 0

    def end(self) -> None:
        """Note that the client has sent everything.

        Raises:
            StreamFault: it was less than content-length promises (8.1.1).
        """
        if self.length_left:
            raise self._length_fault()
        self.is_remote_open = False

    def _length_fault(self) -> StreamFault:
        reason = "DATA must be as long as content-length says"
        return StreamFault(self.stream_id, ErrorCode.PROTOCOL_ERROR, reason)

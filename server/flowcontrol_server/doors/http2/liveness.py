"""Pure. Time limits for the client.

A client must complete its handshake in time. While it has streams open, it must send something from
time to time: any byte counts, and if none comes, a PING asks for one (RFC 9113, 6.7). A silent
connection without open streams is left alone.
"""

from typing import final

from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode
from flowcontrol_server.doors.http2.limits import Http2Limits


@final
class Liveness:
    """The times of one connection, in monotonic nanoseconds."""

    __slots__ = ("_born_ns", "_handshake_ns", "_latest_ns", "_pinged_ns", "_silence_ns")

    def __init__(self, limits: Http2Limits, now_ns: int) -> None:
        self._handshake_ns = limits.handshake_ns
        self._silence_ns = limits.keepalive_ns
        self._born_ns = now_ns
        self._latest_ns = now_ns
        self._pinged_ns: int | None = None

    def heard(self, now_ns: int) -> None:
        """Note that bytes have come."""
        self._latest_ns = now_ns
        self._pinged_ns = None

    def check(self, now_ns: int, *, is_greeted: bool, is_idle: bool) -> bool:
        """Return whether to send a PING now, which starts the time limit for its answer.

        Args:
            now_ns: not before the last `heard`.
            is_greeted: whether the handshake is complete.
            is_idle: whether no stream is open.

        Raises:
            ConnectionFault: the client has exceeded a time limit.
        """
        if not is_greeted:
            if now_ns - self._born_ns >= self._handshake_ns:
                reason = "preface, SETTINGS and SETTINGS ACK must come in time"
                raise ConnectionFault(ErrorCode.SETTINGS_TIMEOUT, reason)
            return False
        if self._pinged_ns is not None:
            if now_ns - self._pinged_ns >= self._silence_ns:
                raise ConnectionFault(ErrorCode.NO_ERROR, "PING must be answered, got silence")
            return False
        if is_idle or now_ns - self._latest_ns < self._silence_ns:
            return False
        self._pinged_ns = now_ns
        return True

"""Pure. Whether the client does its part in time.

A client must finish its handshake, and one that has streams open must give a sign of life now and
then: any byte is one, and if none comes, PING asks for it (RFC 9113, 6.7). With nothing open a
silent connection is left alone.
"""

from typing import final

from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode
from flowcontrol_server.doors.http2.limits import Http2Limits


@final
class Liveness:
    """Signs of life of one connection. Times are monotonic nanoseconds."""

    __slots__ = ("_asked_ns", "_born_ns", "_handshake_ns", "_heard_ns", "_silence_ns")

    def __init__(self, limits: Http2Limits, now_ns: int) -> None:
        self._handshake_ns = limits.handshake_ns
        self._silence_ns = limits.keepalive_ns
        self._born_ns = now_ns
        self._heard_ns = now_ns
        self._asked_ns: int | None = None

    def heard(self, now_ns: int) -> None:
        """Note that something came."""
        self._heard_ns = now_ns
        self._asked_ns = None

    def check(self, now_ns: int, *, is_greeted: bool, is_idle: bool) -> bool:
        """Return whether to send a PING now; from then on the time for its answer runs.

        Args:
            now_ns: not before the last `heard`.
            is_greeted: whether the handshake is complete.
            is_idle: whether no stream is open.

        Raises:
            ConnectionFault: the client is too slow, or gone.
        """
        if not is_greeted:
            if now_ns - self._born_ns >= self._handshake_ns:
                reason = "preface and SETTINGS must come in time, got silence"
                raise ConnectionFault(ErrorCode.SETTINGS_TIMEOUT, reason)
            return False
        if self._asked_ns is not None:
            if now_ns - self._asked_ns >= self._silence_ns:
                raise ConnectionFault(ErrorCode.NO_ERROR, "PING must be answered, got silence")
            return False
        if is_idle or now_ns - self._heard_ns < self._silence_ns:
            return False
        self._asked_ns = now_ns
        return True

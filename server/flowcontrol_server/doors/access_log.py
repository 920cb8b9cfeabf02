"""Takes the messages of Envoy's access log from its streams, and settles their requests.

Messages wait here undecoded, and a bounded part of them is settled in each turn of the loop: one
message can hold thousands of entries, and requests come through the same door.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Final, Protocol, final

import structlog

from flowcontrol_server.requests.codec import MalformedMessageError
from flowcontrol_server.requests.log_codec import LogEntry, decode_log
from flowcontrol_server.requests.log_join import LogJoin

MESSAGE_BYTES_MAX: Final = 131_072
"""Size limit of one message. Envoy sends a message once it has 64 KiB (with `envoy-config`) or
16 KiB (by default), so one entry more always fits. Parsing this many bytes of empty entries takes
10 ms."""
WAITING_BYTES_MAX: Final = 16_777_216
"""Size limit of all waiting messages. A stream with a waiting message is read up to its window
only, so some 200 streams must report faster than entries are settled to reach this."""
MESSAGE_COST_BYTES: Final = 128
"""Memory of a message in addition to its bytes."""
TURN_NS: Final = 1_000_000
"""Time for settling entries in one turn of the loop: enough for about fifty."""
_log = structlog.get_logger()


class LogStream(Protocol):
    """An open stream of the log."""

    def settled(self) -> None:
        """Note that one more of its messages is settled."""

    def move(self) -> None:
        """End the stream, so that Envoy opens another."""


@final
class AccessLog:
    """Settles the entries from the streams of all connections.

    Nothing of a message is kept. A message that cannot be read is counted and skipped. A message
    counts even if its stream has ended meanwhile.

    Args:
        log_join: gets each entry.
    """

    def __init__(self, log_join: LogJoin) -> None:
        self.log_join = log_join
        self.is_served = True
        self._loop = asyncio.get_running_loop()
        self._streams: set[LogStream] = set()
        self._waiting: deque[tuple[LogStream, bytes]] = deque()
        self._waiting_bytes = 0
        self._entries: Iterator[LogEntry] | None = None
        """Remaining entries of the first waiting message; None: it is not decoded yet."""
        self._is_work_due = False

    def serve(self, *, is_served: bool) -> None:
        """Accept streams from now on, or refuse them and end the open ones."""
        self.is_served = is_served
        if not is_served:
            for stream in list(self._streams):
                stream.move()

    def opened(self, stream: LogStream) -> None:
        """Note that a stream has opened."""
        self._streams.add(stream)
        self.log_join.stream_opened()

    def closed(self, stream: LogStream) -> None:
        """Note that a stream has ended."""
        if stream in self._streams:
            self._streams.discard(stream)
            self.log_join.stream_closed()

    def take(self, stream: LogStream, message: bytes) -> bool:
        """Queue a message for settlement; return False if too many bytes wait already."""
        cost_bytes = len(message) + MESSAGE_COST_BYTES
        if self._waiting_bytes + cost_bytes > WAITING_BYTES_MAX:
            return False
        self._waiting_bytes += cost_bytes
        self._waiting.append((stream, message))
        self._work_soon()
        return True

    def _work_soon(self) -> None:
        if not self._is_work_due:
            self._is_work_due = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Settle waiting entries for the time of one turn."""
        self._is_work_due = False
        now_ns = time.monotonic_ns()
        end_ns = now_ns + TURN_NS
        is_logged = _log.is_enabled_for(logging.DEBUG)  # a line costs as much as settling
        while self._waiting and now_ns < end_ns:
            if self._entries is None:
                self._entries = self._read(self._waiting[0][1])
            entry = next(self._entries, None)
            if entry is None:
                self._finish_message()
            else:
                result = self.log_join.take(entry, now_ns)
                if is_logged:
                    _log.debug("request_reported", result=result.value, **asdict(entry))
            now_ns = time.monotonic_ns()
        if self._waiting:
            self._work_soon()

    def _finish_message(self) -> None:
        stream, message = self._waiting.popleft()
        self._waiting_bytes -= len(message) + MESSAGE_COST_BYTES
        self._entries = None
        stream.settled()

    def _read(self, message: bytes) -> Iterator[LogEntry]:
        try:
            return decode_log(message)
        except MalformedMessageError:
            self.log_join.malformed()
            return iter(())

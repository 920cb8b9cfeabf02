"""What Envoy's access log reports of finished requests: taken off its streams, settled in turns.

Messages wait here as they came, and a bounded part of them is settled in each turn of the loop: one
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
"""Of one message. Envoy sends one when 64 KiB have gathered, as `envoy-config` writes it, and by
default 16 KiB: an entry beyond that fits. To parse this many bytes of empty entries takes 10 ms."""
WAITING_BYTES_MAX: Final = 16_777_216
"""Of all messages that wait. A stream with one waiting is not read on, beyond its window: it takes
some 200 streams that report faster than can be settled."""
MESSAGE_COST_BYTES: Final = 128
"""What a message takes beside its bytes."""
TURN_NS: Final = 1_000_000
"""How long entries are settled in one turn of the loop: some fifty of them."""
_log = structlog.get_logger()


class LogStream(Protocol):
    """An open stream of the log."""

    def settled(self) -> None:
        """Take note that one more of its messages is settled."""

    def move(self) -> None:
        """End, so that Envoy opens another."""


@final
class AccessLog:
    """Settles what the streams of all connections report.

    Nothing of a message is kept, and what cannot be read is counted and skipped. A message of a
    stream that has ended meanwhile counts all the same.

    Args:
        log_join: takes each entry.
    """

    def __init__(self, log_join: LogJoin) -> None:
        self.log_join = log_join
        self.is_served = True
        self._loop = asyncio.get_running_loop()
        self._streams: set[LogStream] = set()
        self._waiting: deque[tuple[LogStream, bytes]] = deque()
        self._waiting_bytes = 0
        self._entries: Iterator[LogEntry] | None = None
        """What is left of the first message that waits, if it has begun."""
        self._is_work_due = False

    def serve(self, *, is_served: bool) -> None:
        """Take streams from now on, or refuse them and end those that are open."""
        self.is_served = is_served
        if not is_served:
            for stream in list(self._streams):
                stream.move()

    def opened(self, stream: LogStream) -> None:
        """Take note of a stream."""
        self._streams.add(stream)
        self.log_join.stream_opened()

    def closed(self, stream: LogStream) -> None:
        """Take note that a stream is over."""
        if stream in self._streams:
            self._streams.discard(stream)
            self.log_join.stream_closed()

    def take(self, stream: LogStream, message: bytes) -> bool:
        """Settle a message soon; return False if too much waits already."""
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
        """Settle what waits, as far as the time of a turn allows."""
        self._is_work_due = False
        now_ns = time.monotonic_ns()
        end_ns = now_ns + TURN_NS
        is_told = _log.is_enabled_for(logging.DEBUG)  # to say nothing costs as much as to settle
        while self._waiting and now_ns < end_ns:
            if self._entries is None:
                self._entries = self._read(self._waiting[0][1])
            entry = next(self._entries, None)
            if entry is None:
                self._finish_message()
            else:
                result = self.log_join.take(entry, now_ns)
                if is_told:
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

"""Writes log lines to standard error; a slow reader delays nothing."""

import json
import sys
from datetime import UTC, datetime
from threading import Condition, Thread
from typing import Final, Protocol, final

BACKLOG_BYTES_MAX: Final = 4 * 2**20
"""Bytes of lines that may wait for a slow reader: about 10,000 requests. The lines being written
are in addition, at most as many bytes again."""


class Unbuffered(Protocol):
    """A file without a buffer, which would retry failed lines at the end of the process."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of the data, and return how much; None: the write would block."""


@final
class Sink:
    """Writes complete lines, and never raises: a log that cannot be written must change nothing.

    Until `start`, the caller's thread writes its lines. From then on, the sink's thread writes
    them, through a bounded queue, so that a stalled reader blocks no caller. Lines that cannot be
    written, or that do not fit into the queue, are dropped and counted. Once lines can be written
    again, one line reports the count. Owner: any thread.

    Args:
        file: takes the lines; None: all lines are dropped.
        backlog_bytes_max: size of the queue.
    """

    def __init__(self, file: Unbuffered | None, backlog_bytes_max: int = BACKLOG_BYTES_MAX) -> None:
        self.lost_lines = 0
        """Lines dropped since the process began."""
        self._file = file
        self._backlog_bytes_max = backlog_bytes_max
        self._unreported = 0
        """Dropped lines that no line has reported yet."""
        self._is_cut = False
        """Whether the last write has ended within a line."""
        self._condition = Condition()
        """Guards the queue. It is held during writes only without a thread."""
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._thread: Thread | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Write in the sink's thread from now on."""
        assert self._thread is None, "one thread writes"
        self._is_stopping = False
        self._thread = Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Write the queue, and end the thread; return whether that succeeded in time.

        If not, the reader has stalled. Every line from now on is dropped, because the thread may
        hang in its write for as long as the process lives.
        """
        if self._thread is None:
            return True
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True

    def write(self, text: str) -> None:
        """Write lines, each with its line end."""
        data = text.encode(errors="backslashreplace")
        with self._condition:
            if self._thread is None:
                self._deliver(data)
            elif self._is_stopping or self._backlog_bytes + len(data) > self._backlog_bytes_max:
                self._lose(data)
            else:
                self._backlog.append(data)
                self._backlog_bytes += len(data)
                if len(self._backlog) == 1:
                    self._condition.notify()

    def flush(self) -> None:
        """Do nothing, because there is no buffer to flush."""

    def _run(self) -> None:
        """Write until stopped and the queue is empty."""
        while True:
            with self._condition:
                while not (self._backlog or self._is_stopping):
                    self._condition.wait()
                if not self._backlog:
                    return
                backlog, self._backlog, self._backlog_bytes = self._backlog, [], 0
            self._deliver(b"".join(backlog))
            if self._unreported:  # dropped meanwhile: the queue was full
                self._deliver(b"")

    def _deliver(self, data: bytes) -> None:
        """Write lines, and before them the number of dropped ones."""
        unreported = self._unreported
        try:
            if self._is_cut or unreported:
                self._write_all(self._notice(unreported))
                with self._condition:
                    self._unreported -= unreported
            self._write_all(data)
        except (OSError, ValueError):  # ValueError: the file has been closed
            self._lose(data)

    def _lose(self, data: bytes) -> None:
        count = data.count(b"\n")
        with self._condition:  # called in the sink's thread and in others
            self.lost_lines += count
            self._unreported += count

    def _write_all(self, data: bytes) -> None:
        if self._file is None:
            raise BrokenPipeError
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest)
            if not written:  # would block
                raise BlockingIOError
            rest = rest[written:]
            self._is_cut = bool(rest)

    def _notice(self, count: int) -> bytes:
        line = {
            "event": "log_lines_lost",
            "level": "warning",
            "lines": count,
            "timestamp": datetime.now(UTC).isoformat(),
        }
        return b"\n" * self._is_cut + json.dumps(line).encode() + b"\n"


def _standard_error() -> Unbuffered | None:
    if sys.__stderr__ is None:  # closed before Python began
        return None
    return open(sys.__stderr__.fileno(), "wb", buffering=0, closefd=False)


STANDARD_ERROR: Final = Sink(_standard_error())

"""Output of a serving process to its standard streams, from any module.

A pipe whose reader has stalled blocks the writer. So while the service runs, nothing in Python
writes there directly: our own log, the `logging` module that libraries use, warnings, tracebacks
and `print` all pass through the log's queue.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, final

import structlog

from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR, Sink

FLUSH_TIMEOUT_S: Final = 1.0
"""Longest wait at the end of the process for a slow reader of its log."""
_log = structlog.get_logger()


@contextmanager
def queued_output(sink: Sink = STANDARD_ERROR) -> Iterator[None]:
    """Pass everything written to standard error or output through a sink's queue.

    On leaving, the queue is written within `FLUSH_TIMEOUT_S`. If the reader has stalled, the
    streams stay redirected, and drop further output, until the process ends.
    """
    # gRPC's C library writes from its own threads, past everything below. An operator can set the
    # variable to debug it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    stream, before = _Stream(sink), (sys.stdout, sys.stderr)
    handler = _Handler(logging.WARNING)
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(handler)
    sink.start()
    sys.stdout = sys.stderr = stream
    try:
        yield
    finally:
        stream.end_line()
        if sink.stop(FLUSH_TIMEOUT_S):
            sys.stdout, sys.stderr = before
            logging.getLogger().removeHandler(handler)
            logging.captureWarnings(capture=False)


@final
class _Stream(io.TextIOBase):
    """Replaces a standard stream, and passes on complete lines."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._begun = ""
        """Start of a line whose end has not been written yet."""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property is all that is asked for
        """The encoding of the sink, which click reads."""
        return "utf-8"

    def writable(self) -> bool:
        """Return True: the stream is writable."""
        return True

    def write(self, text: str, /) -> int:
        """Take text; pass on the complete lines."""
        lines, end, self._begun = (self._begun + text).rpartition("\n")
        if end:
            self._sink.write(lines + end)
        return len(text)

    def end_line(self) -> None:
        """Pass on an incomplete line as if it were complete."""
        if self._begun:
            self.write("\n")


@final
class _Handler(logging.Handler):
    """Writes log records of libraries as lines of our own log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - the caller's error, which `logging` ignores, too
            message = str(record.msg)
        _log.log(
            min(record.levelno // 10 * 10, logging.CRITICAL),  # the only levels that structlog has
            "library_logged",
            logger=record.name,
            message=message,
            exc_info=record.exc_info,
        )

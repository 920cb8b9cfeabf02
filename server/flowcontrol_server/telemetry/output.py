"""What a serving process writes to its standard streams, from any module.

A pipe whose reader has stalled blocks the writer. So while the service runs nothing in
Python writes there directly: our own log, the `logging` module that libraries use, warnings,
tracebacks and `print` all pass through the log's queue.
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
"""How long the end of the process waits for a slow reader of its log."""
_log = structlog.get_logger()


@contextmanager
def queued_output(sink: Sink = STANDARD_ERROR) -> Iterator[None]:
    """Let everything that is written to standard error or output pass through a sink's queue.

    On leaving, what the queue holds is written within `FLUSH_TIMEOUT_S`. Where the reader has
    stalled the streams stay as they are, and drop what is written, until the process ends.
    """
    # Its C library writes from whatever thread it is on, past everything below; an operator who
    # debugs it may ask for that by the variable.
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
    """Stands for a standard stream, and passes whole lines on."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._begun = ""
        """A line whose end has not been written yet."""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property is all that is asked for
        """As the sink encodes; click looks at it."""
        return "utf-8"

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, text: str, /) -> int:
        """Take text; pass on the lines that are whole."""
        lines, end, self._begun = (self._begun + text).rpartition("\n")
        if end:
            self._sink.write(lines + end)
        return len(text)

    def end_line(self) -> None:
        """Pass on a line that has begun, as if it were whole."""
        if self._begun:
            self.write("\n")


@final
class _Handler(logging.Handler):
    """Writes what libraries log as lines of our own log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - the caller's mistake, as `logging` itself passes over it
            message = str(record.msg)
        _log.log(
            min(record.levelno // 10 * 10, logging.CRITICAL),  # structlog knows no others
            "library_logged",
            logger=record.name,
            message=message,
            exc_info=record.exc_info,
        )

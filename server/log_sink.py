"""Where log lines go: standard error, whatever becomes of it."""

import json
import sys
from datetime import UTC, datetime
from threading import Lock
from typing import Final, Protocol, final


class Unbuffered(Protocol):
    """A file without a buffer: one would keep what failed, and try again as the process ends."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of it, and say how much; None: it would have to wait."""


@final
class Sink:
    """Writes whole lines, and never raises: what a log cannot hold must not decide what is done.

    Lines that cannot be written are lost and counted; once lines can be written again, that is
    told. A reader that went away and a full disk are such cases. Owner: any thread.

    Args:
        file: None: all is lost.
    """

    def __init__(self, file: Unbuffered | None) -> None:
        self.lost_lines = 0
        """Since lines could last be written."""
        self._file = file
        self._is_cut = False
        """Whether what was written last ends within a line."""
        self._lock = Lock()

    def write(self, text: str) -> None:
        """Write lines, each with its end."""
        with self._lock:
            try:
                if self._is_cut or self.lost_lines:
                    self._write(self._confession())
                    self.lost_lines = 0
                self._write(text)
            except (OSError, ValueError):  # ValueError: it has been closed
                self.lost_lines += text.count("\n")

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def _write(self, text: str) -> None:
        if self._file is None:
            raise BrokenPipeError
        rest = memoryview(text.encode(errors="backslashreplace"))
        while rest:
            written = self._file.write(rest)
            if not written:  # would block
                raise BlockingIOError
            rest = rest[written:]
            self._is_cut = bool(rest)

    def _confession(self) -> str:
        line = {
            "event": "log_lines_lost",
            "level": "warning",
            "lines": self.lost_lines,
            "timestamp": datetime.now(UTC).isoformat(),
        }
        return "\n" * self._is_cut + json.dumps(line) + "\n"


def _standard_error() -> Unbuffered | None:
    if sys.__stderr__ is None:  # closed before Python began
        return None
    return open(sys.__stderr__.fileno(), "wb", buffering=0, closefd=False)


STANDARD_ERROR: Final = Sink(_standard_error())

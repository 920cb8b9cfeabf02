"""The decision ledger of a serving process: its lock, its writer, and the feed between them."""

import time
from typing import IO, Final, final

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import LedgerError
from flowcontrol_server.common.file_lock import lock_file
from flowcontrol_server.config.ledger import LedgerSection
from flowcontrol_server.ledger.recording import TurnFeed
from flowcontrol_server.ledger.writer import LedgerWriter

LATELY_S: Final = 300.0
"""Time for which lost turns are shown as a problem, after the last of them."""
_CLOSE_TIMEOUT_S: Final = 5.0


@final
class Ledger:
    """Owns the thread that writes.

    Args:
        settings: the file, and how much to keep.
    """

    def __init__(self, settings: LedgerSection) -> None:
        self.feed = TurnFeed()
        """Takes the turns of the processor."""
        self._path = settings.file
        self._lock: IO[bytes] | None = None
        """Beside the ledger, because its parts come and go."""
        self._writer = LedgerWriter(
            settings.file,
            settings.max_bytes,
            settings.files,
            self.feed,
            hides_flows=settings.hide_flow_ids,
        )
        self._is_open = False

    @property
    def turns(self) -> tuple[int, int]:
        """Numbers of turns written and lost."""
        return self._writer.turns, self._writer.lost_turns

    @property
    def problem(self) -> str | None:
        """The current problem: the ledger cannot be written, or has lost turns lately."""
        lost = f"{self._writer.lost_turns} turns since the start are not in the ledger"
        if self._writer.failure is not None:
            return f"{lost}; it cannot be written: {self._writer.failure}"
        missed_s = self.feed.missed_s
        return lost if missed_s is not None and time.monotonic() < missed_s + LATELY_S else None

    def start(self, config: ControllerConfig, made_ns: int) -> None:
        """Start the ledger of an engine with this configuration, created at this time.

        Raises:
            LedgerError: the ledger cannot be written, or another process writes it.
        """
        try:
            self._lock = lock_file(self._path.with_name(f"{self._path.name}.lock"))
            if self._lock is None:
                message = f"ledger.file must not be in use by another process, got {self._path}"
                raise LedgerError(message)
            self._writer.start(config, made_ns)
        except OSError as error:
            message = f"ledger.file cannot be written: {error}"
            raise LedgerError(message) from error
        self._is_open = True

    def close(self) -> None:
        """Write the remaining turns, and end; permitted even if it was never started."""
        if self._is_open:
            self._writer.close(_CLOSE_TIMEOUT_S)
        if self._lock is not None:
            self._lock.close()

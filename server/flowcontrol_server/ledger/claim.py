"""The lock by which only one process writes a ledger."""

import fcntl
from pathlib import Path
from typing import IO, final

from flowcontrol.errors import LedgerError


@final
class LedgerLock:
    """Locks a ledger for one process, by a file beside it, because its parts come and go.

    Args:
        path: the newest part.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Lock the ledger.

        Raises:
            LedgerError: another process has locked it.
            OSError: the lock file cannot be written.
        """
        file = self._path.with_name(f"{self._path.name}.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            message = f"ledger.file must not be in use by another process, got {self._path}"
            raise LedgerError(message) from error
        except OSError:  # a file system without locks: go on without one
            pass
        self._file = file

    def release(self) -> None:
        """Unlock the ledger."""
        if self._file is not None:
            self._file.close()

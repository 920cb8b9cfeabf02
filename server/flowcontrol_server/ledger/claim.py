"""One process writes a ledger: the lock beside it."""

import fcntl
from pathlib import Path
from typing import IO, final

from flowcontrol.errors import LedgerError


@final
class LedgerLock:
    """One process's hold on a ledger, by a lock on a file beside it: its parts come and go.

    Args:
        path: of the newest part.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Take hold of it.

        Raises:
            LedgerError: another process has.
            OSError: the file beside it cannot be written.
        """
        file = self._path.with_name(f"{self._path.name}.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            message = f"ledger.file must not be in use by another process, got {self._path}"
            raise LedgerError(message) from error
        except OSError:  # a file system without locks: then there are none
            pass
        self._file = file

    def release(self) -> None:
        """Let another process have it."""
        if self._file is not None:
            self._file.close()

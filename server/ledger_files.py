"""The files a ledger may take: only those of ledgers, and of no other process that runs.

Older parts are renamed and the oldest is written over: what is no ledger must not come to that.
"""

import fcntl
from pathlib import Path
from typing import IO, final

from flowcontrol.errors import LedgerError

_BEGINNING = b'{"header":'
"""Of a ledger's first line, of which a crash may have left less."""


def stranger_among(path: Path, files_max: int) -> Path | None:
    """Return the first file that would be renamed or written over and is no ledger, if any is.

    Raises:
        OSError: one cannot be read.
    """
    for number in range(files_max):
        part = part_path(path, number)
        if part.exists() and not (part.is_file() and _begins_like_one(part)):
            return part
    return None


def part_path(path: Path, number: int) -> Path:
    """Return where a part is, 0 being the newest."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _begins_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    return _BEGINNING.startswith(beginning)


@final
class Claim:
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
        """Let go of it."""
        if self._file is not None:
            self._file.close()

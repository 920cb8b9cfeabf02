"""Reads a ledger while it is being written: the existing entries, then those that are added."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, final

from flowcontrol.errors import LedgerError
from flowcontrol.replay.ledger import Entry, Gap, Header
from flowcontrol_server.common.parts import part_path
from flowcontrol_server.ledger.reader import entry_of, parts_of


@final
class Follower:
    """A reader that keeps its place in a ledger, even while parts are renamed.

    A part that is gone before it could be read is a gap, as if its turns had never been written;
    the next part begins with a checkpoint. A new run of the service begins with a header.

    Args:
        path: the newest part.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._header: Header | None = None
        self._line = 0
        self._rest = b""
        """Start of a line that is not complete yet."""

    def entries(self) -> Iterator[Entry]:
        """Yield the entries added since the last call, up to the current end of the ledger.

        Raises:
            LedgerError: a line cannot be read; names the file and the line.
        """
        if self._file is None:
            self._open(parts_of(self._path)[0])
        while True:
            yield from self._added()
            following = self._next_part()
            if following is None:
                return
            yield from self._added()  # written between the last read and the new part
            yield from self._turn_to(following)

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path) -> None:
        self.close()
        self._file = path.open("rb")
        self._line, self._rest = 0, b""

    def _added(self) -> Iterator[Entry]:
        assert self._file is not None, "it has been opened"
        for text in self._file:
            whole = self._rest + text
            if not whole.endswith(b"\n"):
                self._rest = whole
                return
            self._rest = b""
            self._line += 1
            try:
                entry = entry_of(whole)
            except LedgerError as error:
                message = f"{self._path} line {self._line} of part {self._part} {error}"
                raise LedgerError(message) from error
            if isinstance(entry, Header):
                self._header = entry
            yield entry

    @property
    def _part(self) -> int:
        return 0 if self._header is None else self._header.part

    def _next_part(self) -> Path | None:
        """Return the part after the open one; None: there is none yet."""
        assert self._file is not None, "it has been opened"
        here = _identity(os.fstat(self._file.fileno()))
        found: Path | None = None
        number = 0
        while True:
            path = part_path(self._path, number)
            try:
                if _identity(path.stat()) == here:
                    return found
            except FileNotFoundError:  # the open part has been deleted, or is being renamed
                return found
            found = path
            number += 1

    def _turn_to(self, path: Path) -> Iterator[Entry]:
        before = self._header
        self._open(path)
        for entry in self._added():
            is_next = (
                isinstance(entry, Header)
                and before is not None
                and (entry.run != before.run or entry.part == before.part + 1)
            )
            if isinstance(entry, Header) and not is_next:
                yield Gap(1)
            yield entry


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino

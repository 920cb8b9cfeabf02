"""Reads the parts of a decision ledger, and the entries of each."""

import json
from collections.abc import Iterator
from pathlib import Path

from flowcontrol.errors import LedgerError
from flowcontrol.replay.ledger import Entry, Header, from_line
from flowcontrol_server.common.parts import part_path


def parts_of(path: Path) -> list[Path]:
    """Return the files of the run of `path`, oldest first, back to the first missing part.

    Raises:
        LedgerError: `path` is no ledger.
    """
    newest = header_of(path)
    found = [path]
    number = 1
    while (older := part_path(path, number)).exists():
        header = header_of(older)
        if header.run != newest.run or header.part != newest.part - number:
            break
        found.append(older)
        number += 1
    return found[::-1]


def header_of(path: Path) -> Header:
    """Return the header of a file, its first line."""
    entry = next(read_entries(path), None)
    if not isinstance(entry, Header):
        message = f"{path} must begin with a header"
        raise LedgerError(message)
    return entry


def entry_of(text: str | bytes) -> Entry:
    """Return the entry of one line.

    Raises:
        LedgerError: it is not a line of a ledger.
    """
    try:
        return from_line(json.loads(text))
    except (ValueError, RecursionError) as error:
        message = f"must be a line of a decision ledger, in JSON ({error})"
        raise LedgerError(message) from error


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a file, without a last line that a crash has cut off.

    Raises:
        LedgerError: a line cannot be read; names the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith("\n"):
                    return
                try:
                    yield entry_of(text)
                except LedgerError as error:
                    message = f"{path}:{number} {error}"
                    raise LedgerError(message) from error
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read: {error}"
        raise LedgerError(message) from error

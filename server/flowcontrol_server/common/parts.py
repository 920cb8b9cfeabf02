"""A file that grows in parts: the newest has its name, older ones add .1, .2 and so on to it.

Older parts are renamed and the oldest is overwritten, so every file among them must be a part that
this service wrote.
"""

from itertools import takewhile
from pathlib import Path
from typing import Final

SMALL_MAX: Final = 100
"""Parts that may be kept beyond the number set, because restarts leave small ones."""


def stranger_among(path: Path, files_max: int, beginning: bytes) -> Path | None:
    """Return the first file in the way of the parts that is not a part itself; None: there is none.

    Args:
        path: path of the newest part.
        files_max: parts kept.
        beginning: first bytes of every part; a crash may have left fewer of them.

    Raises:
        OSError: a part cannot be read.
    """
    for number in range(files_max):
        part = part_path(path, number)
        if part.exists() and not _is_part(part, beginning):
            return part
    return None


def make_room(path: Path, files_max: int, bytes_max: int, beginning: bytes) -> None:
    """Increase the number of every part by one, which frees `path`, and delete the oldest.

    `files_max` parts are kept, the next one included. More are kept while their total size stays
    within that of `files_max` full parts, so a restart that leaves a small part removes none.

    Args:
        path: path of the newest part.
        files_max: parts kept whatever their size.
        bytes_max: size of a full part.
        beginning: first bytes of every part; a file beyond `files_max` without them is left alone.

    Raises:
        OSError: a part cannot be read or renamed.
    """
    last = files_max - 1
    while last < files_max - 1 + SMALL_MAX and _may_take(part_path(path, last + 1), beginning):
        last += 1
    row = (part_path(path, number) for number in range(last + 1))
    parts = list(takewhile(Path.exists, row))
    room = (files_max - 1) * bytes_max
    kept = 0
    for number, part in enumerate(parts[:last], 1):
        room -= part.stat().st_size
        if number >= files_max and room < 0:
            break
        kept = number
    for part in reversed(parts[max(kept, 1) :]):
        part.unlink()
    for number in range(kept, 0, -1):
        part_path(path, number - 1).replace(part_path(path, number))


def _may_take(part: Path, beginning: bytes) -> bool:
    return not part.exists() or _is_part(part, beginning)


def _is_part(part: Path, beginning: bytes) -> bool:
    return part.is_file() and _begins_with(part, beginning)


def part_path(path: Path, number: int) -> Path:
    """Return the path of a part; 0 is the newest."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _begins_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return beginning.startswith(file.read(len(beginning)))

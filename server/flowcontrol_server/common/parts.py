"""A file that grows in parts: the newest has its name, older ones have .1, .2 and so on behind it.

Older parts are renamed and the oldest is overwritten, so every file among them must be one of ours.
"""

from pathlib import Path


def stranger_among(path: Path, files_max: int, beginning: bytes) -> Path | None:
    """Return the first file that would be renamed or overwritten and begins otherwise, if any does.

    Args:
        path: of the newest part.
        files_max: parts kept.
        beginning: of every part; a crash may have left less of it.

    Raises:
        OSError: one cannot be read.
    """
    for number in range(files_max):
        part = part_path(path, number)
        if part.exists() and not (part.is_file() and _begins_with(part, beginning)):
            return part
    return None


def part_path(path: Path, number: int) -> Path:
    """Return where a part is, 0 being the newest."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _begins_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return beginning.startswith(file.read(len(beginning)))

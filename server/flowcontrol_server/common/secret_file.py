"""Pure, except that it reads files. Secrets in files; errors and logs never contain them."""

from pathlib import Path
from typing import Final

OWN_LENGTHS: Final = range(16, 1025)
"""Lengths of secrets that peers present to this service: too long to be guessed."""
_FILE_BYTES_MAX: Final = 65_536


def read_secret(path: Path, lengths: range) -> str:
    """Return the secret in a file, without the spaces and line ends around it.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `checked`.
    """
    return checked(_text(path).strip(), lengths)


def read_secrets(path: Path, count_max: int) -> tuple[str, ...]:
    """Return the secrets in a file, one a line, each with a length in `OWN_LENGTHS`.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is none, there are too many, or as `checked`.
    """
    secrets = tuple(_text(path).split())
    if not 0 < len(secrets) <= count_max:
        message = f"must hold 1 to {count_max} secrets, one a line, got {len(secrets)}"
        raise ValueError(message)
    return tuple([checked(each, OWN_LENGTHS) for each in secrets])


def checked(secret: str, lengths: range) -> str:
    """Return a secret unchanged.

    Raises:
        ValueError: its length is not in `lengths`, or a header cannot carry it.
    """
    if len(secret) not in lengths or not all("!" <= letter <= "~" for letter in secret):
        rule = f"must hold {lengths.start} to {lengths.stop - 1} visible ASCII characters"
        message = f"{rule}, got {len(secret)} characters"
        raise ValueError(message)
    return secret


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_FILE_BYTES_MAX).decode("latin-1")

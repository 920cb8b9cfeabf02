"""Secrets in files: what is taken, and what an error says without showing it."""

from pathlib import Path

import pytest

from flowcontrol_server.common.secret_file import OWN_LENGTHS, read_secret, read_secrets

A, B = "a" * 16, "b" * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the secret is."""
    return tmp_path / "secret"


def test_one(path: Path) -> None:
    """Without the spaces and line ends around it."""
    path.write_text(f" {A}\r\n")

    assert read_secret(path, OWN_LENGTHS) == A


def test_several(path: Path) -> None:
    """One a line."""
    path.write_text(f"{A}\n{B}\n")

    assert read_secrets(path, 2) == (A, B)


@pytest.mark.parametrize(
    ("text", "length"),
    [("", 0), ("a" * 15, 15), ("a" * 1025, 1025), ("a" * 70_000, 65_536), ("a" * 16 + " b", 18)],
)
def test_unusable(path: Path, text: str, length: int) -> None:
    """Too short, too long, or with characters that a header cannot carry."""
    path.write_text(text)
    rule = f"must hold 16 to 1024 visible ASCII characters, got {length} characters"

    with pytest.raises(ValueError, match=f"^{rule}$"):
        read_secret(path, OWN_LENGTHS)


def test_not_ascii(path: Path) -> None:
    """Bytes that are no ASCII are no secret, whatever their encoding."""
    path.write_bytes(b"\xe9" * 20)

    with pytest.raises(ValueError, match="visible ASCII characters, got 20 characters"):
        read_secret(path, OWN_LENGTHS)


@pytest.mark.parametrize(("lines", "count"), [("", 0), (f"{A}\n" * 3, 3)])
def test_count(path: Path, lines: str, count: int) -> None:
    """No secret, or one too many."""
    path.write_text(lines)

    with pytest.raises(ValueError, match=f"must hold 1 to 2 secrets, one a line, got {count}"):
        read_secrets(path, 2)

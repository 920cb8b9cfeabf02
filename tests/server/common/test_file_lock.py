"""A lock on a file."""

import errno
import fcntl
from pathlib import Path

import pytest

from flowcontrol_server.common.file_lock import lock_file


def test_one_at_a_time(tmp_path: Path) -> None:
    """What one has locked no other gets, until it is closed."""
    path = tmp_path / "lock"
    first = lock_file(path)
    assert first is not None
    assert lock_file(path) is None
    first.close()

    second = lock_file(path)

    assert second is not None
    second.close()


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, as some of the network, keeps no process out."""

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    files = [lock_file(tmp_path / "lock") for _ in range(2)]

    assert None not in files
    for file in files:
        assert file is not None
        file.close()

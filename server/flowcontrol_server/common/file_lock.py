"""A lock on a file, held by at most one process."""

import fcntl
from pathlib import Path
from typing import IO


def lock_file(path: Path) -> IO[bytes] | None:
    """Lock a file, which is created if there is none; None: another process has locked it.

    The lock is held until the file that is returned is closed, or the process ends. On a file
    system without locks every process gets the file.

    Raises:
        OSError: the file cannot be written.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file

"""Watching a folder, also while it is missing."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import structlog
from watchfiles import awatch

LOOK_AGAIN_MS = 5_000
"""How often to check for changes that inotify does not report. It watches the folder itself, and
misses a swapped link above it (git-sync), a new folder in its place, and changes of a file that a
link in the folder leads to, that is mounted there by itself (`docker run -v FILE:FILE`), or that
another machine writes on a network file system."""
_DEBOUNCE_MS = 50
_STEP_MS = 250
"""Interval at which watchfiles polls its events; it reports once an interval passes without a new
one. Each poll wakes a thread: ten times a second would be 0.05 % of a core for each folder."""
_log = structlog.get_logger()


async def watch_folder(
    directory: Path, look: Callable[[], Awaitable[None]], look_again_ms: int = LOOK_AGAIN_MS
) -> NoReturn:
    """Call `look` now and whenever something in a folder may have changed, until cancelled.

    Each change is followed by a call that begins after it; changes close together share one. A
    folder that is missing is polled until it exists. A folder that cannot be watched, because it is
    not readable or an inotify limit of the system is reached, is polled until it can be. Exceptions
    of `look` are passed on.
    """
    is_refused = False
    while True:
        watched = _identity(directory)
        if watched is None:
            await look()
            await asyncio.sleep(look_again_ms / 1000)
        else:
            error = await _watch(directory, watched, look, look_again_ms)
            if error is not None:
                if not is_refused:
                    every_s, reason = look_again_ms / 1000, " ".join(str(error).split())
                    _log.warning(
                        "folder_polled", folder=str(directory), every_s=every_s, reason=reason
                    )
                await asyncio.sleep(look_again_ms / 1000)
            is_refused = error is not None


async def _watch(
    directory: Path,
    watched: tuple[int, int],
    look: Callable[[], Awaitable[None]],
    look_again_ms: int,
) -> Exception | None:
    """Watch the folder while it stays the same one; return the error if it cannot be watched."""
    changes = awatch(
        directory,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        rust_timeout=look_again_ms,
        yield_on_timeout=True,
        recursive=False,
    )
    pending = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.sleep(0)  # the watch begins before the first look, so no change is missed
        stamps = await asyncio.to_thread(_stamps, directory)
        await look()
        while _identity(directory) == watched:
            try:
                has_changed = await pending
            except FileNotFoundError:  # gone before the watch began
                return None
            except Exception as error:  # noqa: BLE001 - OSError, or an internal one of watchfiles
                return error
            pending = asyncio.ensure_future(anext(changes))
            before, stamps = stamps, await asyncio.to_thread(_stamps, directory)
            if has_changed or stamps != before:
                await look()
    finally:
        pending.cancel()
        await asyncio.wait((pending,))
        if not pending.cancelled():
            pending.exception()  # else asyncio logs it as never retrieved
        await changes.aclose()
    return None


def _identity(directory: Path) -> tuple[int, int] | None:
    """Return an identifier of the folder now at this path; None: there is none."""
    try:
        stat = directory.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino) if directory.is_dir() else None


def stamp_of(stat: os.stat_result) -> tuple[int, ...]:
    """Return a value that changes when the file at a path is replaced, rewritten or its mode set.

    Both times count: some tools set the modification time back.
    """
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


def _stamps(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return values that change when a file in a folder is replaced or rewritten; follows links."""
    stamps: dict[str, tuple[int, ...]] = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):  # for example a broken link
                stamps[entry.name] = stamp_of(entry.stat())
    return stamps

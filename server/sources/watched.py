"""Watching a folder for as long as anybody wants to, whatever becomes of it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from watchfiles import awatch

LOOK_AGAIN_MS = 5_000
"""How often to see whether the folder is still the one watched: inotify follows the folder itself,
and does not notice when a link above it is swapped (git-sync), or when it is made anew."""
_DEBOUNCE_MS = 50
_STEP_MS = 20


async def watch_folder(
    directory: Path, look: Callable[[], Awaitable[None]], look_again_ms: int = LOOK_AGAIN_MS
) -> NoReturn:
    """Call `look` now and whenever something in a folder may have changed, until cancelled.

    Each change is followed by a look that begins after it; changes close together share one. A
    folder that is missing, or may not be read or entered, is looked at again and again until it is
    there and may.
    """
    while True:
        watched = _identity(directory)
        if watched is None:
            await look()
            await asyncio.sleep(look_again_ms / 1000)
        else:
            await _watch(directory, watched, look, look_again_ms)


async def _watch(
    directory: Path,
    watched: tuple[int, int],
    look: Callable[[], Awaitable[None]],
    look_again_ms: int,
) -> None:
    """Watch the folder as long as it is the same one."""
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
        await asyncio.sleep(0)  # the watch begins before the first look: no gap
        await look()
        while _identity(directory) == watched:
            has_changed = await pending
            pending = asyncio.ensure_future(anext(changes))
            if has_changed:
                await look()
    except FileNotFoundError:  # gone before the watch began
        return
    except PermissionError:  # there, but not to be watched
        await asyncio.sleep(look_again_ms / 1000)
    finally:
        pending.cancel()
        await asyncio.wait((pending,))
        await changes.aclose()


def _identity(directory: Path) -> tuple[int, int] | None:
    """Return what tells this folder from another at the same place; None if there is none."""
    try:
        stat = directory.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino) if directory.is_dir() else None

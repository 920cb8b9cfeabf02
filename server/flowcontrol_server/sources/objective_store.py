"""InferenceObjectives put and deleted by the gRPC API, kept in memory and perhaps in a file.

The file holds manifests, as a folder would: to outgrow the API, move it into one.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import yaml

from flowcontrol_server.common.watched import watch_folder
from flowcontrol_server.sources.folder import declared_in
from flowcontrol_server.sources.mistakes import FileSource, told
from flowcontrol_server.sources.objectives import (
    GROUPS,
    NAME_LENGTH_MAX,
    OBJECTIVES_MAX,
    PRIORITY_MAX,
    Objective,
    priorities_of,
    to_manifest,
)

FILE_BYTES_MAX = 32 << 20
"""As much as `OBJECTIVES_MAX` of the longest names take."""
_NONE = "# no objectives\n"
"""Written where there are none: an empty file is one that somebody is writing."""


@final
class ObjectiveStore(FileSource):
    """Objectives that callers change. Owner: the loop.

    The whole file is written at each change. So one that cannot be read, or holds anything else, is
    left alone, and no change is taken until it does not; and what others have written is read
    before each change, and whenever the file changes.

    Args:
        file: where they are kept across restarts; None: nowhere.
        pool: name of the pool.
    """

    def __init__(self, file: Path | None, pool: str) -> None:
        super().__init__("objective_rejected")
        self._file = file
        self._pool = pool
        self._priorities: dict[str, int] | None = None if file else {}
        self._changed: Callable[[Mapping[str, int]], None] | None = None
        self._turn = asyncio.Lock()
        """Of reading and writing the file."""
        self._stamp: _FileStamp | None = None
        """Of the file as it was last read or written."""

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Tell the whole set as soon as it is known and at every change, until cancelled."""
        self._changed = changed
        if self._priorities is not None:  # followed again
            changed(self._priorities)
        try:
            if self._file is None:
                await asyncio.get_running_loop().create_future()
            else:
                await watch_folder(self._file.parent, self._look)
        finally:
            self._changed = None

    async def _look(self) -> None:
        async with self._turn:
            await self._read()

    async def _read(self) -> None:
        """Read the file if it is another than was last read or written; it is the caller's turn."""
        if self._file is None:
            return
        stamp = _stamp(self._file)
        if self._priorities is not None:
            if stamp is None:  # removed: it is written again with the next change
                self.complain({})
                return
            if stamp == self._stamp and not self.problems:
                return
        try:
            priorities, problem = await asyncio.to_thread(read_kept, self._file, self._pool)
        except Exception as error:  # noqa: BLE001 - whatever it is, it stands in the file
            self.complain({self._file: told(error, self._file)})
            return
        self._stamp = stamp
        self.complain({self._file: problem} if problem else {})
        is_being_written = self._priorities and stamp is not None and not stamp.byte_size
        if priorities != self._priorities and not is_being_written:
            self._tell(priorities)

    async def put(self, name: str, priority: int) -> None:
        """Declare an objective, new or changed; on return it is on disk and reported.

        Raises:
            ValueError: the name or the priority is out of its range, or there are too many.
            OSError: it could not be written, and has not been changed.
        """
        if not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
            message = f"name must be printable, of 1 to {NAME_LENGTH_MAX} characters, got {name!r}"
            raise ValueError(message)
        if not -PRIORITY_MAX - 1 <= priority <= PRIORITY_MAX:
            message = f"priority must fit into 32 bits, got {priority}"
            raise ValueError(message)
        async with self._turn:
            known = await self._known()
            if len(known) >= OBJECTIVES_MAX and name not in known:
                message = f"there must be at most {OBJECTIVES_MAX} objectives"
                raise ValueError(message)
            await self._replace({**known, name: priority})

    async def delete(self, name: str) -> bool:
        """Take an objective back; whether there was one.

        Raises:
            OSError: it could not be written, and has not been changed.
        """
        async with self._turn:
            known = await self._known()
            if name not in known:
                return False
            await self._replace({key: value for key, value in known.items() if key != name})
            return True

    async def _known(self) -> dict[str, int]:
        """Return what the file says, if it may be written."""
        await self._read()
        if self._priorities is None or self.problems:
            raise OSError(next(iter(self.problems.values()), "not yet read"))
        return self._priorities

    async def _replace(self, priorities: dict[str, int]) -> None:
        if self._file is not None:
            self._stamp = await asyncio.to_thread(_write, self._file, priorities, self._pool)
        self._tell(priorities)

    def _tell(self, priorities: dict[str, int]) -> None:
        self._priorities = priorities
        if self._changed is not None:
            self._changed(priorities)


def read_kept(file: Path, pool: str) -> tuple[dict[str, int], str]:
    """Return the objectives of a pool that a file holds, and why it must not be written over.

    Raises:
        ConfigError: it cannot be read, or an object in it.
    """
    if not file.exists():
        return {}, ""
    objectives: list[Objective] = []
    problem = ""
    for found, objective in declared_in(file, pool, FILE_BYTES_MAX):
        if objective is not None:
            objectives.append(objective)
        elif found is not None:
            problem = problem or (
                f"{file}: must hold objectives of pool {pool!r} alone, as a change by the API "
                f"writes all of it; it also holds {_named(found)}, so none is taken"
            )
    return dict(priorities_of(objectives)), problem


def _named(found: Any) -> str:
    """Return what to call an object in a message."""
    metadata = found.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{found['kind']} {name!r}" if name else f"a {found['kind']}"


class _FileStamp(NamedTuple):
    """What differs once a file has been replaced or rewritten."""

    inode: int
    modified_ns: int
    byte_size: int


def _stamp(file: Path) -> _FileStamp | None:
    """Return what tells a file from another at the same place; None if there is none."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return _FileStamp(stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _write(path: Path, priorities: Mapping[str, int], pool: str) -> _FileStamp | None:
    """Write the file whole or not at all, also when the machine fails in between."""
    objectives = (Objective(name, value, GROUPS[0]) for name, value in sorted(priorities.items()))
    text = yaml.safe_dump_all([to_manifest(each, pool) for each in objectives], sort_keys=False)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text or _NONE)
        file.flush()
        os.fsync(file.fileno())
    stamp = _stamp(new)
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return stamp

"""InferenceObjectives put and deleted by the gRPC API, kept in memory and optionally in a file.

The file holds manifests. To change from the API to a folder of manifests, move it there.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, final

import yaml

from flowcontrol_server.common.sections import PRIORITY_MAX
from flowcontrol_server.common.watched import watch_folder
from flowcontrol_server.sources.folder import declared_in
from flowcontrol_server.sources.mistakes import FileSource, describe_error
from flowcontrol_server.sources.objectives import (
    GROUPS,
    NAME_LENGTH_MAX,
    OBJECTIVES_MAX,
    Objective,
    kind_and_name,
    priorities_of,
    to_manifest,
)

FILE_BYTES_MAX = 32 << 20
"""Size of `OBJECTIVES_MAX` objectives with names of the longest kind."""
_NONE = "# no objectives\n"
"""Content without objectives: an empty file is taken to be one that is being written."""


@final
class ObjectiveStore(FileSource):
    """Objectives that clients of the API change. Owner: the loop.

    Each change writes the whole file. So while the file cannot be read, or holds anything else, it
    is left as it is and every change is refused. The file is read before each change, and whenever
    it changes.

    Args:
        file: keeps them across restarts; None: they are not kept.
        pool: name of the pool.
        before: the store that this one replaces; its objectives apply while there is no file.
    """

    def __init__(
        self, file: Path | None, pool: str, before: "ObjectiveStore | None" = None
    ) -> None:
        super().__init__("objective_rejected")
        self._file = file
        self._pool = pool
        self._before = before
        self._priorities: dict[str, int] | None = None
        self._changed: Callable[[Mapping[str, int]], None] | None = None
        self._turn = asyncio.Lock()
        """Held while the file is read or written."""
        self._stamp: _FileStamp | None = None
        """Stamp of the file when it was last read or written."""

    @property
    def known(self) -> dict[str, int]:
        """Objectives, name to priority; until the file has been read, those of the store before."""
        if self._priorities is None:
            return {} if self._before is None else self._before.known
        return self._priorities

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Report the whole set once it is known and at every change, until cancelled."""
        self._changed = changed
        if self._priorities is not None:  # not the first call
            changed(self._priorities)
        try:
            if self._file is None:
                await self._look()
                await asyncio.get_running_loop().create_future()
            else:
                await watch_folder(self._file.parent, self._look)
        finally:
            self._changed = None

    async def _look(self) -> None:
        async with self._turn:
            await self._read()

    async def _read(self) -> None:
        """Read the file, if it has changed since it was last read or written; needs `_turn`."""
        if self._file is None:
            if self._priorities is None:
                self._publish(self.known)
            return
        stamp = _stamp(self._file)
        if self._priorities is not None:
            if stamp is None:  # removed: the next change writes it again
                self.report({})
                return
            if stamp == self._stamp and not self.problems:
                return
        try:
            if stamp is None and self.known:
                await self._replace(self.known)
                self.report({})
                return
            priorities, problem = await asyncio.to_thread(read_kept, self._file, self._pool)
        except Exception as error:  # noqa: BLE001 - an error of the file
            self.report({self._file: describe_error(error, self._file)})
            return
        self._stamp = stamp
        self.report({self._file: problem} if problem else {})
        is_being_written = self._priorities and stamp is not None and not stamp.byte_size
        if priorities != self._priorities and not is_being_written:
            self._publish(priorities)

    async def put(self, name: str, priority: int) -> None:
        """Add or change an objective; on return it is on disk and reported.

        Raises:
            ValueError: the name or the priority is out of its range, or there are too many.
            OSError: it could not be written, and nothing has changed.
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
        """Delete an objective; return whether there was one.

        Raises:
            OSError: it could not be written, and nothing has changed.
        """
        async with self._turn:
            known = await self._known()
            if name not in known:
                return False
            await self._replace({key: value for key, value in known.items() if key != name})
            return True

    async def _known(self) -> dict[str, int]:
        """Return the objectives in the file, if it may be written."""
        await self._read()
        if self._priorities is None or self.problems:
            raise OSError(next(iter(self.problems.values()), "not yet read"))
        return self._priorities

    async def _replace(self, priorities: dict[str, int]) -> None:
        if self._file is not None:
            self._stamp = await asyncio.to_thread(_write, self._file, priorities, self._pool)
        self._publish(priorities)

    def _publish(self, priorities: dict[str, int]) -> None:
        self._priorities, self._before = priorities, None
        if self._changed is not None:
            self._changed(priorities)


def read_kept(file: Path, pool: str) -> tuple[dict[str, int], str]:
    """Return the objectives of a pool in a file, and why the file must not be overwritten, if so.

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
            also = kind_and_name(found) or f"a {found['kind']}"
            problem = problem or (
                f"{file}: must hold only objectives of pool {pool!r}, because a change by the API "
                f"writes the whole file; it also holds {also}, so changes are refused"
            )
    return dict(priorities_of(objectives)), problem


class _FileStamp(NamedTuple):
    """Identifies one version of a file."""

    inode: int
    modified_ns: int
    byte_size: int


def _stamp(file: Path) -> _FileStamp | None:
    """Return the stamp of a file; None: it does not exist."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return _FileStamp(stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _write(path: Path, priorities: Mapping[str, int], pool: str) -> _FileStamp | None:
    """Write the file whole or not at all, also when the machine fails in between.

    A link stays one: the file that it leads to is replaced.
    """
    path = path.resolve()
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

"""InferenceObjectives put and deleted by the gRPC API, kept in memory and perhaps in a file.

The file holds manifests, as a folder would: to outgrow the API, move it into one.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import yaml

from flowcontrol_server.common.watched import watch_folder
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.sources.mistakes import FileSource, told
from flowcontrol_server.sources.objectives import (
    GROUPS,
    NAME_LENGTH_MAX,
    OBJECTIVES_MAX,
    PRIORITY_MAX,
    Objective,
    objects_of,
    priorities_of,
    read_objective,
    to_manifest,
)

FILE_BYTES_MAX = 32 << 20
"""As much as `OBJECTIVES_MAX` of the longest names take."""


@final
class ObjectiveStore(FileSource):
    """Objectives that callers change. Owner: the loop.

    Args:
        file: where they are kept across restarts; None: nowhere. One that cannot be read is left
            alone, and no change is taken until it can: it is read whenever it changes.
        pool: name of the pool.
    """

    def __init__(self, file: Path | None, pool: str) -> None:
        super().__init__("objective_rejected")
        self._file = file
        self._pool = pool
        self._priorities: dict[str, int] | None = None
        self._changed: Callable[[Mapping[str, int]], None] | None = None
        self._writing = asyncio.Lock()

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Tell the whole set as soon as it is known and at every change, until cancelled."""
        self._changed = changed
        if self._priorities is not None:  # followed again
            changed(self._priorities)
        try:
            if self._file is None:
                await self._look(changed)
                await asyncio.get_running_loop().create_future()
            else:
                await watch_folder(self._file.parent, lambda: self._look(changed))
        finally:
            self._changed = None

    async def _look(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Read the file and report what it says, until that has been done once."""
        if self._priorities is not None:
            return
        try:
            priorities = await asyncio.to_thread(self._read)
        except Exception as error:  # noqa: BLE001 - whatever it is, it stands in the file
            assert self._file is not None, "only a file can be wrong"
            self.complain({self._file: told(error, self._file)})
            return
        self.complain({})
        self._priorities = priorities
        changed(priorities)

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
        async with self._writing:
            known = self._known()
            if len(known) >= OBJECTIVES_MAX and name not in known:
                message = f"there must be at most {OBJECTIVES_MAX} objectives"
                raise ValueError(message)
            await self._replace({**known, name: priority})

    async def delete(self, name: str) -> bool:
        """Take an objective back; whether there was one.

        Raises:
            OSError: it could not be written, and has not been changed.
        """
        async with self._writing:
            known = self._known()
            if name not in known:
                return False
            await self._replace({key: value for key, value in known.items() if key != name})
            return True

    def _known(self) -> dict[str, int]:
        if self._priorities is None:
            raise OSError(next(iter(self.problems.values()), "not yet read"))
        return self._priorities

    async def _replace(self, priorities: dict[str, int]) -> None:
        if self._file is not None:
            await asyncio.to_thread(_write, self._file, priorities, self._pool)
        self._priorities = priorities
        if self._changed is not None:
            self._changed(priorities)

    def _read(self) -> dict[str, int]:
        if self._file is None or not self._file.exists():
            return {}
        documents = read_documents(self._file, FILE_BYTES_MAX)
        objects = (each for document in documents for _place, each in objects_of(document))
        read = (read_objective(each, self._pool) for each in objects)
        return dict(priorities_of(objective for objective in read if objective is not None))


def _write(path: Path, priorities: Mapping[str, int], pool: str) -> None:
    """Write the file whole or not at all, also when the machine fails in between."""
    objectives = (Objective(name, value, GROUPS[0]) for name, value in sorted(priorities.items()))
    text = yaml.safe_dump_all([to_manifest(each, pool) for each in objectives], sort_keys=False)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

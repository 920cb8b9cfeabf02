"""InferenceObjectives from a folder of manifests, followed live.

A mistake in one manifest never takes the others down: what that file last said keeps counting, and
the mistake is reported until it is mended. The same holds for the folder itself, and for a file
that declared objectives and now declares none: that is how one looks that is being written.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import final

from server.sources.mistakes import FileSource, told
from server.sources.objectives import (
    OBJECTIVES_MAX,
    MalformedObjectiveError,
    Objective,
    priorities_of,
    read_objective,
)
from server.sources.watched import LOOK_AGAIN_MS, watch_folder
from server.yamlfile import read_documents

MANIFEST_BYTES_MAX = 2**20
"""As much as a ConfigMap holds."""
EMPTIED = (
    "declares no objective of this pool any more; what it declared counts until the file is removed"
)


@final
class ObjectiveFolder(FileSource):
    """The objectives that the manifests in a folder declare for one pool.

    Args:
        directory: its *.yaml and *.yml files are read, each of one or more documents; documents of
            another kind or for another pool are passed over.
        pool: name of the pool.
        look_again_ms: how often to see whether the folder is still the one watched.
    """

    def __init__(self, directory: Path, pool: str, look_again_ms: int = LOOK_AGAIN_MS) -> None:
        super().__init__("objective_rejected")
        self._directory = directory
        self._pool = pool
        self._look_again_ms = look_again_ms
        self._last_good: dict[Path, list[Objective]] = {}
        self._known: dict[str, int] | None = None
        """What was last read."""

    def read(self) -> dict[str, int]:
        """Read the folder anew; return all objectives, name to priority."""
        problems: dict[Path, str] = {}
        try:
            paths = sorted(p for p in self._directory.iterdir() if p.suffix in {".yaml", ".yml"})
        except OSError as error:
            self.complain({self._directory: f"cannot be read: {error.strerror}"})
            self._known = self._known or {}
            return self._known
        for gone in self._last_good.keys() - set(paths):
            del self._last_good[gone]
        for path in paths:
            try:
                objectives = _read_file(path, self._pool)
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                problems[path] = told(error, path)
                continue
            if self._last_good.get(path) and not objectives:
                problems[path] = EMPTIED
            else:
                self._last_good[path] = objectives
        declared = {path: self._last_good.get(path, []) for path in paths}
        self.complain({**_oddities(declared), **problems})
        self._known = dict(priorities_of(chain.from_iterable(declared.values())))
        return self._known

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Tell the whole set whenever it differs from what was last read, until cancelled."""

        async def look() -> None:
            """Read, and tell what differs."""
            known = self._known
            if await asyncio.to_thread(self.read) != known and self._known is not None:
                changed(self._known)

        await watch_folder(self._directory, look, self._look_again_ms)


def _oddities(declared: Mapping[Path, Iterable[Objective]]) -> dict[Path, str]:
    """Return what is wrong with files that count all the same.

    They declare what has been declared in the same group, or have keys that are not known.
    """
    first: dict[tuple[str, str], Path] = {}
    oddities: dict[Path, list[str]] = {}
    for path, objectives in declared.items():
        for name, _priority, group, unknown in objectives:
            texts = oddities.setdefault(path, [])
            if (name, group) in first:
                texts.append(f"{name!r} is declared in {first[name, group].name} already")
            texts += (f"{name!r} counts without spec.{key}, which is not known" for key in unknown)
            first.setdefault((name, group), path)
    return {
        path: texts[0] if len(texts) == 1 else f"{texts[0]}, and {len(texts) - 1} more"
        for path, texts in oddities.items()
        if texts
    }


def _read_file(path: Path, pool: str) -> list[Objective]:
    size = path.stat().st_size
    if size > MANIFEST_BYTES_MAX:
        message = f"must be at most {MANIFEST_BYTES_MAX} bytes, got {size}"
        raise MalformedObjectiveError(message)
    read = [read_objective(document, pool) for document in read_documents(path)]
    objectives = [objective for objective in read if objective is not None]
    if len(objectives) > OBJECTIVES_MAX:
        message = f"must declare at most {OBJECTIVES_MAX} objectives, got {len(objectives)}"
        raise MalformedObjectiveError(message)
    return objectives

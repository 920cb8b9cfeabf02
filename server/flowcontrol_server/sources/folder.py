"""InferenceObjectives from a folder of manifests, reread when it changes.

An error in one manifest does not affect the others. The last valid content of that file stays in
effect, and the error is reported until it is fixed. The same holds for the folder itself, and for a
file that declared objectives and now declares none, because it may be half written.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, final

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.watched import LOOK_AGAIN_MS, watch_folder
from flowcontrol_server.common.yamlfile import FILE_BYTES_MAX, line_of, read_documents
from flowcontrol_server.sources.mistakes import FileSource, describe_error
from flowcontrol_server.sources.objectives import (
    OBJECTIVES_MAX,
    MalformedObjectiveError,
    Objective,
    Place,
    kind_and_name,
    objects_of,
    priorities_of,
    read_objective,
)

FIELDS = ("priority", "poolRef")
"""The fields of an objective's spec that are read."""
EMPTIED = (
    "no longer declares an objective of this pool; its last valid content stays in effect "
    "until the file is removed"
)


@final
class ObjectiveFolder(FileSource):
    """The objectives that the manifests in a folder declare for one pool.

    Args:
        directory: its *.yaml and *.yml files are read, each of one or more documents, which may be
            lists of objects. Objects of another kind or for another pool are ignored. Files whose
            names begin with a dot or # belong to editors and tools, and are not read.
        pool: name of the pool.
        look_again_ms: how often to check whether the path still leads to the watched folder.
    """

    def __init__(self, directory: Path, pool: str, look_again_ms: int = LOOK_AGAIN_MS) -> None:
        super().__init__("objective_rejected")
        self._directory = directory
        self._pool = pool
        self._look_again_ms = look_again_ms
        self._last_good: dict[Path, list[Objective]] = {}
        self._known: dict[str, int] | None = None
        """Name to priority, as last read; None: not read yet."""

    def read(self) -> dict[str, int]:
        """Read the folder; return all objectives, name to priority."""
        self.report(self.survey())
        assert self._known is not None, "the survey has set it"
        return self._known

    def survey(self) -> dict[Path, str]:
        """Read the folder; return the problems by file, without counting or logging them."""
        problems: dict[Path, str] = {}
        try:
            paths = sorted(filter(_is_manifest, self._directory.iterdir()))
        except OSError as error:
            self._known = self._known or {}
            return {self._directory: f"cannot be read: {error.strerror}"}
        for gone in self._last_good.keys() - set(paths):
            del self._last_good[gone]
        for path in paths:
            try:
                objectives = _read_file(path, self._pool)
            except Exception as error:  # noqa: BLE001 - the other files are read in any case
                problems[path] = describe_error(error, path)
                continue
            if self._last_good.get(path) and not objectives:
                problems[path] = EMPTIED
            else:
                self._last_good[path] = objectives
        declared = {path: self._last_good.get(path, []) for path in paths}
        self._known = dict(priorities_of(chain.from_iterable(declared.values())))
        return {**_oddities(declared), **problems}

    @property
    def known(self) -> Mapping[str, int]:
        """Name to priority, as last read."""
        return self._known or {}

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Report the whole set whenever it has changed, until cancelled."""

        async def look() -> None:
            """Read the folder; report the set if it has changed."""
            known = self._known
            if await asyncio.to_thread(self.read) != known and self._known is not None:
                changed(self._known)

        await watch_folder(self._directory, look, self._look_again_ms)


def _oddities(declared: Mapping[Path, Iterable[Objective]]) -> dict[Path, str]:
    """Return the errors for which a file is not rejected.

    It declares a name that another file has declared in the same group, or it has unknown keys.
    """
    first: dict[tuple[str, str], Path] = {}
    oddities: dict[Path, list[str]] = {}
    for path, objectives in declared.items():
        for name, _priority, group, unknown in objectives:
            texts = oddities.setdefault(path, [])
            if (name, group) in first:
                texts.append(f"{name!r} is declared in {first[name, group].name} already")
            texts += (f"{name!r}: {_unknown_field(key)}" for key in unknown)
            first.setdefault((name, group), path)
    return {
        path: texts[0] if len(texts) == 1 else f"{texts[0]}, and {len(texts) - 1} more"
        for path, texts in oddities.items()
        if texts
    }


def _unknown_field(key: str) -> str:
    near = get_close_matches(key, FIELDS, 1)
    hint = f", did you mean {near[0]}?" if near else ""
    return f"spec.{key} is not a known field and is ignored{hint}"


def _is_manifest(path: Path) -> bool:
    return path.suffix in {".yaml", ".yml"} and not path.name.startswith((".", "#"))


def _read_file(path: Path, pool: str) -> list[Objective]:
    found = (objective for _object, objective in declared_in(path, pool))
    objectives = [each for each in found if each is not None]
    if len(objectives) > OBJECTIVES_MAX:
        message = f"must declare at most {OBJECTIVES_MAX} objectives, got {len(objectives)}"
        raise ConfigError([f"{path}: {message}"])
    return objectives


def declared_in(
    path: Path, pool: str, bytes_max: int = FILE_BYTES_MAX
) -> Iterator[tuple[Any, Objective | None]]:
    """Yield each object in a file, and the objective of this pool that it declares, if it does.

    Raises:
        ConfigError: the file cannot be read, or an object in it; naming the line.
    """
    documents = read_documents(path, bytes_max)
    for index, document in enumerate(documents):
        found: Any = None
        place: Place = ()
        try:
            for at, found in objects_of(document):
                place = at
                yield found, read_objective(found, pool)
        except MalformedObjectiveError as error:
            line = line_of(path, index, (*place, *error.place))
            number = f"document {index + 1}" if len(documents) > 1 else None
            which = ", ".join(filter(None, (number, kind_and_name(found))))
            text = f"{which}: {error}" if which else str(error)
            raise ConfigError([f"{path}:{line}: {text}"]) from error

"""InferenceObjectives from a folder of manifests, followed live.

A mistake in one manifest never takes the others down: what that file last said keeps counting, and
the mistake is reported until it is mended.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from watchfiles import awatch

from flowcontrol.errors import ConfigError
from server.yamlfile import read_documents

GROUPS = ("llm-d.ai/v1alpha2", "inference.networking.x-k8s.io/v1alpha2")
"""The API groups read. Where both declare a name, the first counts."""
KIND = "InferenceObjective"
_PRIORITY_MAX = 2**31 - 1
_log = structlog.get_logger()


class _Spec(BaseModel):
    model_config = ConfigDict(extra="ignore")  # fields of later versions are not our business

    class _PoolRef(BaseModel):
        name: str

    priority: int = Field(default=0, ge=-_PRIORITY_MAX - 1, le=_PRIORITY_MAX, strict=True)
    poolRef: _PoolRef  # noqa: N815 - the manifest's own spelling


class _Metadata(BaseModel):
    name: str = Field(min_length=1)


class _Manifest(BaseModel):
    metadata: _Metadata
    spec: _Spec


class Objective(NamedTuple):
    """One declared objective."""

    name: str
    priority: int
    group: str


@final
class ObjectiveFolder:
    """The objectives that the manifests in a folder declare for one pool.

    Args:
        directory: its *.yaml and *.yml files are read, each of one or more documents; documents of
            another kind or for another pool are passed over.
        pool: name of the pool.
    """

    def __init__(self, directory: Path, pool: str) -> None:
        self.error_count = 0
        """Mistakes met since the start."""
        self._directory = directory
        self._pool = pool
        self._last_good: dict[Path, list[Objective]] = {}
        self._known: dict[str, int] = {}
        """What was last read."""

    def read(self) -> dict[str, int]:
        """Read the folder anew; return all objectives, name to priority."""
        paths = sorted(p for p in self._directory.iterdir() if p.suffix in {".yaml", ".yml"})
        for gone in self._last_good.keys() - set(paths):
            del self._last_good[gone]
        for path in paths:
            try:
                self._last_good[path] = _read_file(path, self._pool)
            except _ManifestError as error:
                self._complain(path, str(error))
        self._known = self._merge(paths)
        return self._known

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Tell the whole set whenever it differs from what was last read, until cancelled."""
        changes = awatch(self._directory, debounce=50, step=20, recursive=False)
        while True:
            step = asyncio.ensure_future(anext(changes))
            try:
                await asyncio.sleep(0)  # the watch begins before the folder is read: no gap
                known = self._known
                if await asyncio.to_thread(self.read) != known:
                    changed(self._known)
                await step
            finally:
                step.cancel()

    def _merge(self, paths: list[Path]) -> dict[str, int]:
        chosen: dict[str, tuple[Objective, Path]] = {}
        for path in paths:
            for objective in self._last_good.get(path, ()):
                name = objective.name
                other = chosen.get(name)
                if other is None or GROUPS.index(objective.group) < GROUPS.index(other[0].group):
                    chosen[name] = (objective, path)
                elif objective.group == other[0].group:
                    self._complain(path, f"{name!r} is declared in {other[1].name} already")
        return {name: objective.priority for name, (objective, _path) in chosen.items()}

    def _complain(self, path: Path, problem: str) -> None:
        self.error_count += 1
        _log.error("objective_rejected", file=str(path), problem=problem)


class _ManifestError(Exception):
    pass


def _read_file(path: Path, pool: str) -> list[Objective]:
    try:
        documents = read_documents(path)
    except ConfigError as error:
        raise _ManifestError(str(error)) from error
    objectives = [_read_document(document, pool) for document in documents]
    return [objective for objective in objectives if objective is not None]


def _read_document(document: Any, pool: str) -> Objective | None:
    if document is None:
        return None
    if not isinstance(document, dict) or "kind" not in document:
        message = "every document must be a mapping with apiVersion and kind"
        raise _ManifestError(message)
    if document["kind"] != KIND:
        return None
    group = document.get("apiVersion")
    if group not in GROUPS:
        message = f"apiVersion must be one of {', '.join(GROUPS)}, got {group!r}"
        raise _ManifestError(message)
    try:
        manifest = _Manifest.model_validate(document)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise _ManifestError("; ".join(problems)) from error
    if manifest.spec.poolRef.name != pool:
        return None
    return Objective(manifest.metadata.name, manifest.spec.priority, group)

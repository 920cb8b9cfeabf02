"""Pure. Reads InferenceObjectives, and selects one where several declare the same name."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowcontrol_server.common.sections import Priority
from flowcontrol_server.config.problems import problems_of

GROUPS = ("llm-d.ai/v1alpha2", "inference.networking.x-k8s.io/v1alpha2")
"""The API groups that are read. If both declare a name, the first is used."""
KIND = "InferenceObjective"
LISTS = ("List", f"{KIND}List")
"""Kinds of lists, as `kubectl get -o yaml` prints them."""
NAME_LENGTH_MAX = 253
"""Longest name that Kubernetes permits."""
OBJECTIVES_MAX = 10_000
"""More in one place are an error."""
POOL_KIND = "InferencePool"
_NEAR = 0.9
"""How much alike a misspelt kind is to the right one: a letter too many, too few or wrong."""


class Objective(NamedTuple):
    """One declared objective."""

    name: str
    priority: int
    group: str
    unknown: tuple[str, ...] = ()
    """Unknown keys in its spec: of a later version, or misspelt."""


Place = tuple[int | str, ...]
"""Keys and indices from the top of a document."""


class MalformedObjectiveError(Exception):
    """An InferenceObjective is invalid.

    Args:
        message: the rule and the value that breaks it.
        place: where in the object.
    """

    def __init__(self, message: str, place: Place = ()) -> None:
        super().__init__(message)
        self.place = place


class _PoolRef(BaseModel):
    """The group is not read: older CRDs fill in llm-d.ai, which has no InferencePool."""

    name: str
    kind: str = POOL_KIND


class _Spec(BaseModel):
    model_config = ConfigDict(extra="allow")  # fields of later versions are ignored, but reported

    priority: Priority = 0
    poolRef: _PoolRef  # noqa: N815 - the manifest's own spelling


class _Metadata(BaseModel):
    name: str = Field(min_length=1, max_length=NAME_LENGTH_MAX)


class _Manifest(BaseModel):
    metadata: _Metadata
    spec: _Spec


def objects_of(document: Any) -> Iterator[tuple[Place, Any]]:
    """Yield the objects of a document, each with its place: the document, or the items of a list.

    Raises:
        MalformedObjectiveError: it is a list without items.
    """
    if not isinstance(document, dict) or document.get("kind") not in LISTS:
        yield (), document
        return
    items = document.get("items")
    if not isinstance(items, list):
        message = f"items of a {document['kind']} must be a list, got {items!r:.120}"
        raise MalformedObjectiveError(message, ("items",))
    defaults = {}
    if document["kind"] != LISTS[0]:  # items of a typed list may leave these out
        defaults = {"apiVersion": document.get("apiVersion"), "kind": KIND}
    for index, item in enumerate(items):
        yield ("items", index), {**defaults, **item} if isinstance(item, dict) else item


def read_objective(document: Any, pool: str) -> Objective | None:
    """Return the objective that a document declares; None: it declares none of this pool.

    Raises:
        MalformedObjectiveError: it is an InferenceObjective, but an invalid one.
    """
    if document is None:
        return None
    if not isinstance(document, dict) or "kind" not in document:
        message = "must be a mapping with apiVersion and kind"
        raise MalformedObjectiveError(message)
    kind = document["kind"]
    if kind != KIND:
        if _is_meant_by(str(kind or "").casefold()):
            message = f"kind must be {KIND} or the full name of another kind, got {kind!r}"
            raise MalformedObjectiveError(message, ("kind",))
        return None
    group = document.get("apiVersion")
    if group not in GROUPS:
        message = f"apiVersion must be one of {', '.join(GROUPS)}, got {group!r}"
        raise MalformedObjectiveError(message, ("apiVersion",))
    try:
        manifest = _Manifest.model_validate(document)
    except ValidationError as error:
        problems, place = problems_of(error), error.errors()[0]["loc"]
        raise MalformedObjectiveError("; ".join(problems), place) from error
    spec = manifest.spec
    if spec.poolRef.name != pool or spec.poolRef.kind != POOL_KIND:
        return None
    return Objective(manifest.metadata.name, spec.priority, group, tuple(spec.model_extra or ()))


def _is_meant_by(kind: str) -> bool:
    """Whether it is our kind misspelt, or half written."""
    return KIND.casefold().startswith(kind) or bool(
        get_close_matches(kind, [KIND.casefold()], 1, _NEAR)
    )


def kind_and_name(document: Any) -> str | None:
    """Return an object's kind and name for a message, as in Service 'x'; None: it has no name."""
    metadata = document.get("metadata") if isinstance(document, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{document.get('kind')} {name!r}" if isinstance(name, str) else None


def to_manifest(objective: Objective, pool: str) -> dict[str, Any]:
    """Return the document that declares an objective."""
    return {
        "apiVersion": objective.group,
        "kind": KIND,
        "metadata": {"name": objective.name},
        "spec": {"priority": objective.priority, "poolRef": {"name": pool}},
    }


def priorities_of(objectives: Iterable[Objective]) -> Mapping[str, int]:
    """Return the priority of each name; if both groups declare it, the first group's."""
    chosen: dict[str, Objective] = {}
    for objective in objectives:
        other = chosen.get(objective.name)
        if other is None or GROUPS.index(objective.group) < GROUPS.index(other.group):
            chosen[objective.name] = objective
    return {name: objective.priority for name, objective in chosen.items()}

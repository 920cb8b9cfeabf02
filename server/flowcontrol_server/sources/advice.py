"""Advice of `check-config` on files that sources read, and on rules that name objectives."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources.endpoint_file import read_endpoints
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.sources.mistakes import describe_error
from flowcontrol_server.sources.objective_store import read_kept
from flowcontrol_server.sources.objectives import KIND, MalformedObjectiveError, objects_of


def source_advice(settings: Settings) -> Iterator[str]:
    """Yield a line for each possible mistake; reads the files that sources read."""
    directory, api = settings.objectives.directory, settings.objectives.api
    if directory is not None:
        yield from _folder_advice(directory, settings)
    if api is not None and api.file is not None:
        yield from (f"objectives.api.file: {each}" for each in _kept(api.file, settings.pool))
    file = settings.endpoints.file
    if file is not None:
        are_picked = settings.picker != "off"
        yield from (f"endpoints.file: {each}" for each in _listed(file, are_picked=are_picked))


def _kept(file: Path, pool: str) -> Iterator[str]:
    try:
        _priorities, problem = read_kept(file, pool)
    except Exception as error:  # noqa: BLE001 - as in the source: an error of the file
        problem = describe_error(error, file)
    if problem:
        yield problem


def _listed(file: Path, *, are_picked: bool) -> Iterator[str]:
    try:
        yield from read_endpoints(file, are_picked=are_picked).oddities
    except ConfigError as error:
        yield from error.problems
    except Exception as error:  # noqa: BLE001 - as above
        yield describe_error(error, file)


def _folder_advice(directory: Path, settings: Settings) -> Iterator[str]:
    folder = ObjectiveFolder(directory, settings.pool)
    for path, problem in folder.survey().items():
        text = problem if problem.startswith(str(directory)) else f"{path}: {problem}"
        yield f"objectives.directory: {text}"
    if not folder.known:
        pools = sorted(_pools(directory))
        named = f"; they name {', '.join(pools)}" if pools else ""
        yield (
            f"pool is {settings.pool!r}, which no manifest in {directory} names{named}: every "
            "request is served at priority 0"
        )
    yield from _undeclared(settings, folder.known)


def _undeclared(settings: Settings, declared: Mapping[str, int]) -> Iterator[str]:
    for index, rule in enumerate(settings.requests.rules):
        name = rule.objective
        if name is not None and name not in declared:
            near = get_close_matches(name, declared, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            yield (
                f"requests.rules[{index}].objective is {name!r}, which no manifest declares: such "
                f"requests are served at priority 0{hint}"
            )


def _pools(directory: Path) -> Iterator[str]:
    """Yield the pools that the objectives in a folder name."""
    found = set[str]()
    for path in sorted(directory.glob("*.y*ml")):
        try:
            for document in read_documents(path):
                for _place, each in objects_of(document):
                    if isinstance(each, dict) and each.get("kind") == KIND:
                        found.add(str(each["spec"]["poolRef"]["name"]))
        except (ConfigError, MalformedObjectiveError, LookupError, TypeError):
            continue
    yield from found

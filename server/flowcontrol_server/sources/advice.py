"""What `check-config` says of the objectives folder, and of rules that name objectives."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.sources.objectives import KIND, MalformedObjectiveError, objects_of


def objective_advice(settings: Settings) -> Iterator[str]:
    """Yield a line for each thing to look at; reads the folder."""
    directory = settings.objectives.directory
    if directory is None:
        return
    folder = ObjectiveFolder(directory, settings.pool)
    for path, problem in folder.survey().items():
        said = problem if problem.startswith(str(directory)) else f"{path}: {problem}"
        yield f"objectives.directory: {said}"
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
    """Yield the pools that objectives in a folder are for."""
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

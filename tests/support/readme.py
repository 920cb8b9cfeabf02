"""The parts of pages that are generated from code: `python -m tests.support.readme --write`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from prometheus_client.core import Metric
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flowcontrol.request import Outcome
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.replies import REFUSALS
from tests.support.exposition import own_families, reference_families

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
_RETRY_AFTER = {
    Outcome.REJECTED_CAPACITY: "yes",
    Outcome.REJECTED_NO_ENDPOINTS: "when known",
    Outcome.REJECTED_DRAINING: "yes",
    Outcome.EVICTED_NO_ENDPOINTS: "when known",
    Outcome.EVICTED_DISPLACED: "yes",
    Outcome.EVICTED_DRAINED: "yes",
    Outcome.EVICTED_STOOD_DOWN: "yes",
    Outcome.RECLAIMED: "yes",
}


def config_reference() -> str:
    """Return every setting as a table row: path, default, meaning."""
    rows = [f"| `{path}` | {default} | {text} |" for path, default, text in _settings(Settings, "")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def outcome_table() -> str:
    """Return the client's view of every outcome."""
    rows = [
        f"| {outcome.value} | {refused.status} | `{refused.reason}` "
        f"| {_RETRY_AFTER.get(outcome, 'no')} |"
        for outcome, refused in REFUSALS.items()
    ]
    head = [
        "| outcome | HTTP | `x-llm-d-request-dropped-reason` | Retry-After |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def metric_table() -> str:
    """Return all our own metrics."""
    return _metrics(own_families())


def reference_metric_table() -> str:
    """Return all metrics under the reference's names."""
    return _metrics(reference_families())


PARTS = {
    "settings": config_reference,
    "outcomes": outcome_table,
    "metrics": metric_table,
    "reference metrics": reference_metric_table,
}
"""Generated parts; each is in one page."""


def marks(name: str) -> tuple[str, str]:
    """Return the lines before and after a generated part."""
    return f"<!-- {name}: made from the code by `make docs` -->", f"<!-- /{name} -->"


def renewed(text: str) -> str:
    """Return a page with its generated parts updated."""
    for name, make in PARTS.items():
        begin, end = marks(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(text):
            before, after = pattern.split(text, maxsplit=1)
            text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def _metrics(families: list[Metric]) -> str:
    rows = []
    for family in families:
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        suffix = "_total" if family.type == "counter" else ""
        rows.append(
            f"| `{family.name}{suffix}` | {family.type} | {shown} | {family.documentation} |"
        )
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        section, is_list = _section(field.annotation)
        if section is None:
            yield path, _default(field), " ".join((field.description or "").split())
        else:
            yield from _settings(section, f"{path}[]." if is_list else f"{path}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section of a setting, and whether it is a list; None: the setting is no section.

    One that can be written as a single section or as several is shown as single.
    """
    if get_origin(annotation) in {Annotated, Union, UnionType}:
        parts = [_section(part) for part in get_args(annotation)]
        return next((part for part in parts if part[0] is not None), (None, False))
    if get_origin(annotation) is tuple:
        return _section(get_args(annotation)[0])[0], True
    if get_origin(annotation) is UnionType:  # a section that may be left out
        return _section(get_args(annotation)[0])
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return (annotation if is_section else None), False


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{default}`".lower()
    if isinstance(default, tuple):
        return ", ".join(f"`{each}`" for each in default)
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    stale = [page for page in PAGES if renewed(page.read_text()) != page.read_text()]
    if sys.argv[1:] == ["--write"]:
        for page in stale:
            page.write_text(renewed(page.read_text()))
    elif stale:
        sys.exit(f"{', '.join(map(str, stale))}: not what the code says, run `make docs`")

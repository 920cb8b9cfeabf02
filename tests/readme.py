"""What the README quotes from the code: `python -m tests.readme --write` renews it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flowcontrol.request import Outcome
from server.replies import REFUSALS
from server.settings import Settings

README = Path(__file__).parent.parent / "README.md"
_RETRY_AFTER = {
    Outcome.REJECTED_CAPACITY: "yes",
    Outcome.REJECTED_NO_ENDPOINTS: "when known",
    Outcome.REJECTED_DRAINING: "yes",
    Outcome.EVICTED_NO_ENDPOINTS: "when known",
    Outcome.EVICTED_DISPLACED: "yes",
    Outcome.EVICTED_DRAINED: "yes",
    Outcome.RECLAIMED: "yes",
}


def config_reference() -> str:
    """Return every setting as a table row: path, default, meaning."""
    rows = [f"| `{path}` | {default} | {text} |" for path, default, text in _settings(Settings, "")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def outcome_table() -> str:
    """Return what a client sees of every outcome."""
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


def renewed(text: str) -> str:
    """Return the README with its generated parts as the code has them now."""
    for name, make in (("settings", config_reference), ("outcomes", outcome_table)):
        begin, end = f"<!-- {name}: made from the code by `make docs` -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert pattern.search(text), f"README.md has no part {begin}"
        before, after = pattern.split(text, maxsplit=1)
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        section, is_list = _section(field.annotation)
        if section is None:
            yield path, _default(field), " ".join((field.description or "").split())
        else:
            yield from _settings(section, f"{path}[]." if is_list else f"{path}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, UnionType):
        return _section(next(each for each in get_args(annotation) if each is not type(None)))
    if get_origin(annotation) is tuple:
        return _section(get_args(annotation)[0])[0], True
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
    return f"`{default}`"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(renewed(README.read_text()))
    elif renewed(README.read_text()) != README.read_text():
        sys.exit("README.md does not say what the code says: run `make docs`")

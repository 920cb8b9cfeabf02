"""Pure. Pydantic's errors in the words of this project: place, rule, value."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flowcontrol_server.config.engine import TAGS

_SHOWN_MAX = 120
"""Characters of an invalid value that an error shows."""
_EXPONENT = re.compile(r"-?([0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})[eE][+-]?[0-9]{1,2}")
_RULES = {
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be >= {ge}",
    "less_than_equal": "must be <= {le}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length}, got {actual_length}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a whole number",
    "string_type": "must be text",
    "string_unicode": "must be text",
    "path_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "rule": "{rule}",
}
"""This project's text for each kind of pydantic's errors."""


def problems_of(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """Return pydantic's errors in this project's format, each with its path in the file.

    Args:
        error: pydantic's error.
        model: the model that failed, to suggest names of its settings; None: no suggestions.
    """
    names = [] if model is None else list(_names(model))
    return [f"{_text(each)}{_hint(each, names)}" for each in error.errors()]


def _names(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Yield every setting that a mapping may have, as a path without indices."""
    for name, field in model.model_fields.items():
        path = f"{where}{field.alias or name}"
        yield path
        for section in _sections(field.annotation):
            yield from _names(section, f"{path}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _hint(error: ErrorDetails, names: Sequence[str]) -> str:
    """Return a suggestion for an unknown setting; empty: there is none."""
    if error["type"] != "extra_forbidden":
        return ""
    *above, last = error["loc"]
    prefix = "".join(f"{part}." for part in above if isinstance(part, str) and part not in TAGS)
    key = str(last)
    beside = [n.removeprefix(prefix) for n in names if n.rpartition(".")[0] == prefix[:-1]]
    near = get_close_matches(key, beside, 1)
    elsewhere = [n for n in names if n.rpartition(".")[2].lower() == key.lower()]
    is_case = any(each.lower() == key.lower() for each in near)
    found = near if is_case or not elsewhere else elsewhere
    return f", did you mean {found[0]}?" if found else ""


def _text(error: ErrorDetails) -> str:
    """Return one of pydantic's errors as place, rule, value."""
    # The tag for one or several is not part of the place in the file.
    is_key = error["loc"][-1:] == ("[key]",)
    loc = error["loc"][:-2] if is_key else error["loc"]
    places = ("''" if part == "" else part for part in loc if part not in TAGS)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in places)
    where = str(error["loc"][-1]) if error["type"] == "invalid_key" else "".join(parts).lstrip(".")
    if error["type"] == "missing":
        return f"{where} is required"
    if error["type"] in {"extra_forbidden", "invalid_key"}:
        return f"{where} is not a known setting"
    rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    if is_key and error["type"] == "string_type":
        rule = "must have keys that are text, in quotes"
    value = error["input"]
    is_complete = isinstance(value, dict | BaseModel) or ", got " in rule
    shown = "" if is_complete else f", got {_shortened(repr(value))}"
    return f"{where} {rule}{shown}{_in_digits(rule, value)}".strip()


def _in_digits(rule: str, value: object) -> str:
    """Return how to write a number that YAML 1.1 reads as text, such as 1e3; empty: it is not."""
    if "number" not in rule or not isinstance(value, str) or not _EXPONENT.fullmatch(value):
        return ""
    return f": YAML reads that as text, write {Decimal(value):f}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."

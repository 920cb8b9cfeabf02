"""What sections of a configuration file are made of: their strictness, their units, their rules.

Every field of a section carries its meaning as a docstring; the README's reference is generated
from them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from flowcontrol_server.common.units import format_duration, parse_duration, parse_quantity

QUANTITY_MAX = 10**15
"""Of whatever is limited: far beyond any use, and in sums and products still a number for a metric,
for the API's 64 bits and for a fraction."""
COUNT_MAX = 1_000_000_000
"""Of what is counted one by one."""
PRIORITY_MAX = 2**31 - 1
"""An InferenceObjective has 32 bits for it."""
_NUMBER_MAX = 1e15
_DURATION_MAX_HOURS = 10_000
"""More than a year."""
_DURATION_MAX_NS = _DURATION_MAX_HOURS * 3_600_000_000_000


class Section(BaseModel):
    """A mapping of the file: settings in camelCase, none unknown, none changed once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def broken(rule: str) -> PydanticCustomError:
    """Return the error to raise for a rule that does not hold."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def written(default: object, alias: str | None = None) -> Any:
    """Return a field whose default is given as one would write it in the file."""
    return Field(default=default, alias=alias)


def written_duration(default_ns: int) -> Any:
    """Return a field whose default is given in nanoseconds."""
    return written(format_duration(default_ns))


def switched_off(value: object) -> object:
    """Read what YAML makes of a bare off."""
    return "off" if value is False else value


def can_be_a_path(text: str) -> bool:
    """Whether the system can be asked for a path that is called so."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _path(value: object) -> object:
    if value == "":  # pathlib's for it is the folder itself
        rule = "must not be empty"
        raise broken(rule)
    if isinstance(value, str) and not can_be_a_path(value):
        rule = "must be a path without a NUL or half a character"
        raise broken(rule)
    return value


def _beside(value: Path, info: ValidationInfo) -> Path:
    directory: Path = (info.context or {}).get("directory", Path())
    return (directory / value).absolute()  # one spelling, wherever one stands: one hash


def is_read_elsewhere(info: ValidationInfo) -> bool:
    """Whether the file is read on another machine than the service's, which has what it names."""
    return bool((info.context or {}).get("is_elsewhere"))


def expect(path: Path, rule: str, is_so: Callable[[Path], bool], info: ValidationInfo) -> Path:
    """Return a path, or raise that it is missing, or not accessible."""
    if is_read_elsewhere(info):
        return path
    try:
        if is_so(path):
            return path
        reason = ""
    except OSError as error:
        reason = f": {error.strerror}"
    rule = f"{rule}, got {str(path)!r}{reason}"
    raise broken(rule)


def can_be_a_file(path: Path) -> bool:
    """Whether a file is there, or could be made there."""
    return path.parent.is_dir() and not path.is_dir()


def _is_a_file(value: Path, info: ValidationInfo) -> Path:
    return expect(value, "must be a file", Path.is_file, info)


PathBeside = Annotated[Path, BeforeValidator(_path), AfterValidator(_beside)]
"""Starts at the file it stands in, unless it is absolute."""
FileBeside = Annotated[PathBeside, AfterValidator(_is_a_file)]
"""The same, of a file that is there."""


def _duration(value: object) -> object:
    duration_ns = parse_duration(value) if isinstance(value, str) else None
    if duration_ns is None or duration_ns <= 0:
        rule = "must be a duration above zero such as 500ms, 60s or 5m"
        raise broken(rule)
    if duration_ns > _DURATION_MAX_NS:
        rule = f"must be at most {_DURATION_MAX_HOURS}h"
        raise broken(rule)
    return duration_ns


def _limit(value: object) -> object:
    return _limit_from(0, value, "such as 500, 20k or 4Gi")


def _limit_from_1(value: object) -> object:
    return _limit_from(1, value, "such as 64 or 20k")


def _limit_from(least: int, value: object, examples: str) -> object:
    if value == "unlimited":
        return None
    if isinstance(value, str):
        value = parse_quantity(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        rule = f"must be a whole number from {least} {examples}, or the word unlimited"
        raise broken(rule)
    if value > QUANTITY_MAX:
        rule = "must be at most 1P, or the word unlimited"
        raise broken(rule)
    return value


def plain_number(value: object) -> float | None:
    """Return a plain number of a size one can count with, None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _NUMBER_MAX else None  # type: ignore[arg-type]  # seen


def _positive(value: object) -> object:
    number = plain_number(value)
    if number is None or number <= 0:
        rule = "must be a number above 0, at most 1e15"
        raise broken(rule)
    return number


def _from_0(value: object) -> object:
    number = plain_number(value)
    if number is None or number < 0:
        rule = "must be a number from 0 to 1e15"
        raise broken(rule)
    return number


def _share(value: object) -> object:
    number = plain_number(value)
    if number is None or not 0 <= number < 1:
        rule = "must be a number from 0 to below 1"
        raise broken(rule)
    return number


def _part(value: object) -> object:
    number = plain_number(value)
    if number is None or not 0 < number <= 1:
        rule = "must be a number above 0, at most 1"
        raise broken(rule)
    return number


def _size_from_1(value: object) -> object:
    size = parse_quantity(value) if isinstance(value, str) else value
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= QUANTITY_MAX:
        rule = "must be a size from 1 to 1P such as 500k or 64Mi"
        raise broken(rule)
    return size


Count = Annotated[int, Field(ge=0, le=COUNT_MAX, strict=True)]
CountFrom1 = Annotated[int, Field(ge=1, le=COUNT_MAX, strict=True)]
Priority = Annotated[int, Field(ge=-PRIORITY_MAX - 1, le=PRIORITY_MAX, strict=True)]
SizeFrom1 = Annotated[int, BeforeValidator(_size_from_1)]
"""Bytes, from 1."""
Duration = Annotated[
    int, BeforeValidator(_duration), PlainSerializer(format_duration, when_used="json")
]
"""Nanoseconds, above zero."""
_AS_WRITTEN = PlainSerializer(lambda v: "unlimited" if v is None else v, when_used="json")
Limit = Annotated[int | None, BeforeValidator(_limit), _AS_WRITTEN]
"""From 0; None: unlimited."""
LimitFrom1 = Annotated[int | None, BeforeValidator(_limit_from_1), _AS_WRITTEN]
"""From 1; None: unlimited."""
Positive = Annotated[float, BeforeValidator(_positive)]
From0 = Annotated[float, BeforeValidator(_from_0)]
Share = Annotated[float, BeforeValidator(_share)]
"""From 0 to below 1."""
Part = Annotated[float, BeforeValidator(_part)]
"""Above 0, at most 1."""

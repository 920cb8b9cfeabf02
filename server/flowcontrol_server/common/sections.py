"""Building blocks for the sections of a configuration file: strict models, units, rules.

Every field of a section has its meaning as a docstring; the reference of settings is generated from
them.
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
"""Largest value of any limit: far beyond any use, and its sums and products still fit a metric, the
API's 64 bits and a float."""
COUNT_MAX = 1_000_000_000
"""Largest number of things that are counted one by one."""
PRIORITY_MAX = 2**31 - 1
"""An InferenceObjective stores the priority in 32 bits."""
_NUMBER_MAX = 1e15
_DURATION_MAX_HOURS = 10_000
"""More than a year."""
_DURATION_MAX_NS = _DURATION_MAX_HOURS * 3_600_000_000_000


class Section(BaseModel):
    """A mapping in the file: keys in camelCase, unknown keys rejected, immutable once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def broken(rule: str) -> PydanticCustomError:
    """Return the error to raise for a broken rule."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def written(default: object, alias: str | None = None) -> Any:
    """Return a field whose default is given as it would be written in the file."""
    return Field(default=default, alias=alias)


def written_duration(default_ns: int) -> Any:
    """Return a field whose default is given in nanoseconds."""
    return written(format_duration(default_ns))


def switched_off(value: object) -> object:
    """Return "off" for the value that YAML reads from a bare off."""
    return "off" if value is False else value


def can_be_a_path(text: str) -> bool:
    """Whether the operating system accepts a text as a path."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _path(value: object) -> object:
    if value == "":  # pathlib would read it as the folder itself
        rule = "must not be empty"
        raise broken(rule)
    if isinstance(value, str) and not can_be_a_path(value):
        rule = "must be a path without NUL or a lone surrogate"
        raise broken(rule)
    return value


def _beside(value: Path, info: ValidationInfo) -> Path:
    directory: Path = (info.context or {}).get("directory", Path())
    return (directory / value).absolute()  # one hash, whatever the working directory


def is_read_elsewhere(info: ValidationInfo) -> bool:
    """Whether this machine only checks the file, so that the paths in it need not exist here."""
    return bool((info.context or {}).get("is_elsewhere"))


def expect(path: Path, rule: str, is_so: Callable[[Path], bool], info: ValidationInfo) -> Path:
    """Return a path, or raise the error that it breaks the rule or is not accessible."""
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
    """Whether a file exists at this path, or could be created there."""
    return path.parent.is_dir() and not path.is_dir()


def _is_a_file(value: Path, info: ValidationInfo) -> Path:
    return expect(value, "must be a file", Path.is_file, info)


PathBeside = Annotated[Path, BeforeValidator(_path), AfterValidator(_beside)]
"""Relative to the folder of the file that contains it, unless it is absolute."""
FileBeside = Annotated[PathBeside, AfterValidator(_is_a_file)]
"""A `PathBeside` of an existing file."""


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
    """Return a number of at most 1e15 in magnitude; None: it is anything else."""
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

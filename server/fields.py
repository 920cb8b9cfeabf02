"""What settings are made of: a section, its values as people write them, and its errors.

Apart from `settings` because the direct door's settings, in a module of their own, need it too.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from server.units import parse_duration


def rule(text: str) -> PydanticCustomError:
    """Return what a validator raises: a rule that the value breaks, as in `must be ...`."""
    return PydanticCustomError("rule", "{rule}", {"rule": text})


def written(default: str, alias: str | None = None) -> Any:
    """Return a field whose default is given as one would write it in the file."""
    return Field(default=default, alias=alias)


def _duration(value: object) -> object:
    duration_ns = parse_duration(value) if isinstance(value, str) else None
    if duration_ns is None or duration_ns <= 0:
        text = "must be a duration above zero such as 500ms, 60s or 5m"
        raise rule(text)
    return duration_ns


Duration = Annotated[int, BeforeValidator(_duration)]
"""Nanoseconds."""


class Section(BaseModel):
    """A part of the configuration file; names in camel case, unknown ones are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=True,
        use_attribute_docstrings=True,
    )

"""Settings of the direct door: the limits of its clients.

The limits are those of `Http2Limits`, each stated once, there: name, default and reason.
"""

import ast
import dataclasses
import inspect
import itertools
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model
from pydantic.alias_generators import to_camel

from server.http2.limits import RANGES, Http2Limits, Rate
from server.sections import Duration, Section, broken
from server.units import format_duration, parse_quantity

_RATE = re.compile(r"(\d{1,9})(?: ?\+ ?(\d{1,9})/s)?(?: ?\+ ?(\d{1,9})/stream)?")


def _number(smallest: int, largest: int) -> BeforeValidator:
    """Return what reads a number as people write it, and holds it to its range."""
    bound = f"from {smallest} to {largest}" if largest < 2**63 - 1 else f"from {smallest}"

    def read(value: object) -> object:
        if isinstance(value, str):
            value = parse_quantity(value)
        if type(value) is not int or not smallest <= value <= largest:
            rule = f"must be a whole number {bound}, such as 500, 20k or 4Mi"
            raise broken(rule)
        return value

    return BeforeValidator(read)


def _rate(value: object) -> object:
    match = _RATE.fullmatch(str(value))
    if match is None or not int(match[1]):
        rule = "must be a burst and what is earned after it, as in 100 + 10/s + 2/stream"
        raise broken(rule)
    return Rate(int(match[1]), int(match[2] or 0), int(match[3] or 0))


def _written_rate(rate: Rate) -> str:
    parts = (str(rate.burst), f"{rate.per_s}/s", f"{rate.per_stream}/stream")
    return " + ".join(part for part in parts if part[0] != "0")


def _name(field: str) -> str:
    """Return a limit's name in the file: frame_bytes_max is maxFrameBytes there."""
    name = field.removesuffix("_ns")
    return to_camel("max_" + name.removesuffix("_max") if name.endswith("_max") else name)


def _setting(field: dataclasses.Field[Any], text: str) -> tuple[Any, Any]:
    """Return a limit as pydantic wants it: type, and default as one would write it."""
    kind: Any
    default: Any = field.default
    if isinstance(default, Rate):
        kind, default = Annotated[Rate, BeforeValidator(_rate)], _written_rate(default)
    elif field.name.endswith("_ns"):
        kind, default = Duration, format_duration(default)
    else:
        kind = Annotated[int, _number(*RANGES[field.name])]
    return kind, Field(default=default, alias=_name(field.name), description=text)


def _documentation() -> dict[str, str]:
    """Return the string below each field of the limits."""
    body = ast.parse(inspect.getsource(Http2Limits)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        ast.unparse(field.target): inspect.cleandoc(ast.literal_eval(text.value))
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


_LIMITS: dict[str, Any] = {
    field.name: _setting(field, _documentation()[field.name])
    for field in dataclasses.fields(Http2Limits)
}
DirectLimits: Any = create_model("DirectLimits", __base__=Section, **_LIMITS)
"""A section with a setting for each of `Http2Limits`."""


class Direct(Section):
    """What concerns the direct door alone."""

    limits: DirectLimits = DirectLimits()

    def http2_limits(self) -> Http2Limits:
        """Return the limits as the door takes them."""
        return Http2Limits(**dict(self.limits))

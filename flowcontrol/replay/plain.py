"""Pure. Converts values of the engine to plain values for JSON, and back.

The form of a type is derived once from its hints: a dataclass becomes a mapping of the fields that
differ from their defaults, an enumeration its value, a named tuple a list, and a member of a union
of dataclasses a mapping with one key, its name: `{"arrived": {"request": {"request_id": 7}}}`.
"""

import ast
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pkgutil import get_data
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints


class Plainly(NamedTuple):
    """How values of one type are written and read."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


@cache
def plainly(hint: Any) -> Plainly:
    """Return how values of a type are written and read.

    `read` raises ValueError, TypeError or KeyError on anything that `write` would not have written.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _union(get_args(hint))
    if origin is tuple:
        return _sequence(plainly(get_args(hint)[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(*(plainly(each) for each in get_args(hint)))
    return _of_class(hint)


def _of_class(kind: Any) -> Plainly:
    if kind in (int, str, bool, float):
        return _scalar(kind)
    if issubclass(kind, Enum):
        return Plainly(lambda value: value.value, kind)
    if is_dataclass(kind):
        return _record(kind)
    assert issubclass(kind, tuple), f"no plain form of {kind}"
    return _named_tuple(kind)


def _scalar(kind: type) -> Plainly:
    accepted = (int, float) if kind is float else kind

    def read(plain: Any) -> Any:
        if not isinstance(plain, accepted) or (isinstance(plain, bool) and kind is not bool):
            message = f"must be {kind.__name__}, got {plain!r}"
            raise ValueError(message)
        return plain

    return Plainly(lambda value: value, read)


def _sequence(item: Plainly) -> Plainly:
    write, read = item
    return Plainly(
        lambda values: [write(each) for each in values],
        lambda plain: tuple(read(each) for each in plain),
    )


def _mapping(key: Plainly, value: Plainly) -> Plainly:
    return Plainly(
        lambda values: {key.write(k): value.write(v) for k, v in values.items()},
        lambda plain: {key.read(k): value.read(v) for k, v in plain.items()},
    )


def _named_tuple(kind: Any) -> Plainly:
    hints = get_type_hints(kind)
    items = [plainly(hints[name]) for name in kind._fields]
    return Plainly(
        lambda values: [item.write(value) for item, value in zip(items, values, strict=True)],
        lambda plain: kind(*(item.read(value) for item, value in zip(items, plain, strict=True))),
    )


def hints_of(kind: Any) -> dict[str, Any]:
    """Return the type hints of a dataclass's fields.

    A compiled class has lost hints of unions and generic types; they are read from its source.
    """
    module = sys.modules[kind.__module__]
    if not isinstance(module.__loader__, ExtensionFileLoader):
        return get_type_hints(kind)
    package, _, name = module.__name__.rpartition(".")
    source = get_data(package, f"{name}.py")
    assert source is not None, f"{module.__name__} has no source beside it"
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    written = {
        node.target.id: ast.unparse(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    like = type(kind.__name__, (), {"__annotations__": written, "__module__": kind.__module__})
    return get_type_hints(like)


def _record(kind: Any) -> Plainly:
    hints = hints_of(kind)
    items = [(field.name, plainly(hints[field.name]), _default(field)) for field in fields(kind)]
    plan = [(name, item.write, default) for name, item, default in items]
    readers = {name: item.read for name, item, _ in items}

    def write(value: Any) -> dict[str, Any]:
        plain = {}
        for name, write_field, default in plan:
            part = getattr(value, name)
            if part is not default and part != default:
                plain[name] = write_field(part)
        return plain

    def read(plain: Any) -> Any:
        return kind(**{name: readers[name](part) for name, part in plain.items()})

    return Plainly(write, read)


def _default(field: "Field[Any]") -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _union(hints: tuple[Any, ...]) -> Plainly:
    kinds = [hint for hint in hints if hint is not NoneType]
    if len(kinds) == 1:
        only = plainly(kinds[0])
        return Plainly(
            lambda value: None if value is None else only.write(value),
            lambda plain: None if plain is None else only.read(plain),
        )
    writers = {kind: (_word(kind), plainly(kind).write) for kind in kinds}
    readers = {_word(kind): plainly(kind).read for kind in kinds}

    def write(value: Any) -> dict[str, Any]:
        word, write_member = writers[type(value)]
        return {word: write_member(value)}

    def read(plain: Any) -> Any:
        ((word, part),) = plain.items()
        return readers[word](part)

    return Plainly(write, read)


def _word(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()

"""YAML files written by people: read strictly, with one-line errors that name file and line.

Reading is bounded: a file of 464 bytes with aliases of aliases took 35 s and 1.7 GB.
"""

import os
import stat
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flowcontrol.errors import ConfigError

FILE_BYTES_MAX = 2**20
"""The size limit of a ConfigMap."""
DEPTH_MAX = 64
"""Nesting depth of mappings and lists."""
REPEATED_MAX = 2**16
"""Characters that all aliases of a file repeat; each mapping, list and value counts as one more.
Merge keys (<<) are aliases, too."""
NUMBER_LENGTH_MAX = 1000
"""Characters of a number or a date. Python parses a number such as 1:1:1:... in quadratic time."""


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a file that must hold one mapping.

    Raises:
        ConfigError: it cannot be read, is not YAML, sets a key twice, exceeds a bound or is not a
            mapping.
    """
    documents = read_documents(path, loader=_PlainNumbers)
    if len(documents) > 1:
        raise ConfigError([f"{path}: must be one document, got {len(documents)}"])
    if not documents or not isinstance(documents[0], dict):
        raise ConfigError([f"{path}: must be a mapping with apiVersion and kind"])
    return documents[0]


def read_documents(
    path: Path, bytes_max: int = FILE_BYTES_MAX, *, loader: type["_Loader"] | None = None
) -> list[Any]:
    """Read every document of a file.

    Args:
        path: path of the file.
        bytes_max: size limit of the file.
        loader: a stricter loader.

    Raises:
        ConfigError: it cannot be read, is not YAML, sets a key twice or exceeds a bound.
    """
    try:
        return list(yaml.load_all(_text(path, bytes_max), loader or _Loader))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    except _BoundError as error:
        raise ConfigError([f"{path}:{error.line}: {error}"]) from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{path}{line}: is not YAML: {problem}"]) from error
    except yaml.reader.ReaderError as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError([f"{path}: is not YAML: {problem}"]) from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # raised by PyYAML for invalid tags and scalars
        raise ConfigError([f"{path}: is not YAML: {error}"]) from error


def line_of(path: Path, document: int, place: Sequence[int | str]) -> int:
    """Return the line of a value in a file that has been read, or of its nearest parent.

    Args:
        path: path of the file.
        document: index of the document.
        place: keys and indices that lead from the top of the document to the value.
    """
    try:
        node = list(yaml.compose_all(_text(path, FILE_BYTES_MAX), _Loader))[document]
    except (OSError, ValueError, LookupError, ConfigError, yaml.YAMLError, _BoundError):
        return 1  # the file has changed since
    line = node.start_mark.line
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = next(((v, v) for v in node.value[part : part + 1]), None)
        else:
            found = None
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every problem of a ConfigError begin with the file that it is in.

    Raises:
        ConfigError: in place of the original one.
    """
    try:
        yield
    except ConfigError as error:
        name = f"{path}:"
        problems = [each if each.startswith(name) else f"{name} {each}" for each in error.problems]
        raise ConfigError(problems) from error


def _text(path: Path, bytes_max: int) -> str:
    """Return the text of a regular file. Others are refused: reading a pipe could block."""
    with open(path, "rb", opener=_opened_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            message = "not a regular file"
            raise OSError(message)
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        size = max(status.st_size, len(data))
        raise ConfigError([f"{path}: must be at most {bytes_max} bytes, got {size}"])
    return data.decode()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class _BoundError(Exception):
    """A file exceeds a bound at this position."""

    def __init__(self, mark: Any, problem: str) -> None:
        super().__init__(problem)
        self.line: int = mark.line + 1


class _Loader(yaml.SafeLoader):
    """Reads strictly and within bounds.

    YAML requires unique keys; PyYAML silently keeps the last one. Here a repeated key is an error.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._size = 0
        """Size read so far with aliases expanded, in characters as `REPEATED_MAX` counts them."""
        self._repeated = 0
        self._sizes: dict[str | None, int] = {}
        """Size of each anchored value that has been read to its end."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803 - PyYAML's
        """Read a bracket, within the depth bound: each token costs PyYAML time per open bracket."""
        if self.flow_level == DEPTH_MAX:
            raise _BoundError(self.get_mark(), _TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def compose_document(self) -> yaml.Node | None:
        """Read a document; anchors are valid only within it."""
        self._sizes = {}
        return super().compose_document()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read a node; an alias counts as its expansion."""
        event: yaml.NodeEvent = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs
        if isinstance(event, yaml.AliasEvent):
            self._repeat(event)
            return super().compose_node(parent, index)
        if self._depth == DEPTH_MAX:
            raise _BoundError(event.start_mark, _TOO_DEEP)
        before = self._size
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._size += 1
        if isinstance(node, yaml.ScalarNode):
            self._size += len(node.value)
            if node.tag in _NUMBERS and len(node.value) > NUMBER_LENGTH_MAX:
                problem = (
                    f"a number must have at most {NUMBER_LENGTH_MAX} characters, "
                    f"got {len(node.value)}"
                )
                raise _BoundError(event.start_mark, problem)
        if event.anchor is not None:
            self._sizes[event.anchor] = self._size - before
        return node

    def _repeat(self, event: yaml.AliasEvent) -> None:
        if event.anchor in self.anchors and event.anchor not in self._sizes:
            problem = f"*{event.anchor} must not be inside the value that it repeats"
            raise _BoundError(event.start_mark, problem)
        size = self._sizes.get(event.anchor, 0)
        self._size += size
        self._repeated += size
        if self._repeated > REPEATED_MAX:
            problem = (
                f"aliases must repeat at most {REPEATED_MAX} characters in all, got "
                f"{self._repeated} up to *{event.anchor}"
            )
            raise _BoundError(event.start_mark, problem)

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 - PyYAML's signature
    ) -> dict[Hashable, Any]:
        """Build a mapping after checking that its keys are unique."""
        seen: set[str] = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _PlainNumbers(_Loader):
    """Rejects integers that YAML reads as another number: 0012345 is 5349, 2024_01 is 202401."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return the number if its text is its decimal form."""
        number: int = super().construct_yaml_int(node)
        if node.value != str(number):
            problem = f"YAML reads {node.value} as {number}: quote it, or write it in decimal"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


_PlainNumbers.add_constructor("tag:yaml.org,2002:int", _PlainNumbers.construct_yaml_int)
_NUMBERS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_TOO_DEEP = f"mappings and lists must be nested at most {DEPTH_MAX} deep"

"""YAML files as people write them: read strictly, with errors on one line that say where."""

import os
import stat
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flowcontrol.errors import ConfigError


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a file that must hold one mapping.

    Raises:
        ConfigError: it cannot be read, is not YAML, sets a key twice or is not a mapping.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        raise ConfigError([f"{path}: must be one document, got {len(documents)}"])
    if not documents or not isinstance(documents[0], dict):
        raise ConfigError([f"{path}: must be a mapping with apiVersion and kind"])
    return documents[0]


def read_documents(path: Path) -> list[Any]:
    """Read every document of a file.

    Raises:
        ConfigError: it cannot be read, is not YAML or sets a key twice.
    """
    try:
        return list(yaml.load_all(_text(path), _UniqueKeyLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{path}{line}: is not YAML: {said}"]) from error
    except yaml.reader.ReaderError as error:
        said = str(error).partition("\n")[0]
        raise ConfigError([f"{path}: is not YAML: {said}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: is not YAML: nested too deeply"]) from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # what its tags and scalars trip over
        raise ConfigError([f"{path}: is not YAML: {error}"]) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have every mistake that is found begin with the file it is in.

    Raises:
        ConfigError: in place of the one that was raised.
    """
    try:
        yield
    except ConfigError as error:
        said = f"{path}:"
        problems = [each if each.startswith(said) else f"{said} {each}" for each in error.problems]
        raise ConfigError(problems) from error


def _text(path: Path) -> str:
    """Return what a regular file holds; opening or reading a pipe could take for ever."""
    with open(path, encoding="utf-8", opener=_opened_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            message = "not a regular file"
            raise OSError(message)
        return file.read()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML says keys are unique; PyYAML lets the last one win. A lost setting is an error here."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 - PyYAML's signature
    ) -> dict[Hashable, Any]:
        """Build a mapping, once its keys are known to be unique."""
        seen: set[str] = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

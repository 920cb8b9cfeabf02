"""YAML files as people write them: read strictly, with errors on one line that say where."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flowcontrol.errors import ConfigError


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a file that must hold one mapping.

    Raises:
        ConfigError: it cannot be read, is not YAML, sets a key twice or is not a mapping.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    try:
        content = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{path}{line}: is not YAML: {said}"]) from error
    except yaml.reader.ReaderError as error:
        said = str(error).partition("\n")[0]
        raise ConfigError([f"{path}: is not YAML: {said}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: is not YAML: nested too deeply"]) from error
    except (ValueError, LookupError, AttributeError) as error:  # what its scalars trip over
        raise ConfigError([f"{path}: is not YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: must be a mapping with apiVersion and kind"])
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML says keys are unique; PyYAML lets the last one win. A lost setting is an error here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[str] = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

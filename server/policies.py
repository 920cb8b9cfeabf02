"""Reads the part of a configuration file that the engine is told, whatever else stands in it."""

from pathlib import Path

from pydantic import ConfigDict, ValidationError

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import ConfigError
from server.engine_settings import Engine
from server.settings import Settings, problems_of
from server.yamlfile import read_mapping


class _Policies(Engine):
    """Picker, saturation and queue; the rest of the file is for the service."""

    model_config = ConfigDict(extra="ignore")


def load_policies(path: Path) -> ControllerConfig:
    """Read what an engine would be told by a configuration file; folders in it need not exist.

    Raises:
        ConfigError: naming every mistake in the part that counts, and every setting nobody knows.
    """
    content = read_mapping(path)
    known = {str(field.alias or name) for name, field in Settings.model_fields.items()}
    problems = [f"{name} is not a known setting" for name in content if name not in known]
    try:
        policies = _Policies.model_validate(content)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error)]) from error
    if problems:
        raise ConfigError(problems)
    return policies.controller_config()

"""Pure. What kept a file from being read, in words for whoever wrote it."""

from pathlib import PurePath

from flowcontrol.errors import ConfigError
from server.sources.objectives import MalformedObjectiveError


def told(error: Exception, path: PurePath) -> str:
    """Return on one line what is wrong; an error nobody thought of is told with its kind."""
    if isinstance(error, ConfigError | MalformedObjectiveError):
        return str(error)
    if isinstance(error, OSError):
        return f"{path}: cannot be read: {error.strerror}"
    return f"{path}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"

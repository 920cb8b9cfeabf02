"""Errors in files that sources read: logged once, counted, and shown until fixed."""

from collections.abc import Mapping
from pathlib import Path, PurePath

import structlog

from flowcontrol.errors import ConfigError
from flowcontrol_server.sources.objectives import MalformedObjectiveError

_log = structlog.get_logger()


def describe_error(error: Exception, path: PurePath) -> str:
    """Return an error as one line, an unexpected one with its type."""
    if isinstance(error, ConfigError | MalformedObjectiveError):
        return str(error)
    if isinstance(error, OSError):
        return f"{path}: cannot be read: {error.strerror}"
    return f"{path}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"


class FileSource:
    """The common part of sources that read files.

    Args:
        rejected: the log event of an error, in the past tense.
    """

    def __init__(self, rejected: str) -> None:
        self.error_count = 0
        """Errors since the start."""
        self.problems: dict[str, str] = {}
        """The current errors, by file name."""
        self._rejected = rejected

    def report(self, problems: Mapping[Path, str]) -> None:
        """Replace the current errors; log and count those that are new or have changed."""
        for path, problem in problems.items():
            if self.problems.get(path.name) != problem:
                self.error_count += 1
                _log.error(self._rejected, file=str(path), problem=problem)
        self.problems = {path.name: problem for path, problem in problems.items()}

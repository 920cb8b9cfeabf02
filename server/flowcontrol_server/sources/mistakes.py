"""What is wrong with files that sources read: said once, counted, and shown until it is mended."""

from collections.abc import Mapping
from pathlib import Path, PurePath

import structlog

from flowcontrol.errors import ConfigError
from flowcontrol_server.sources.objectives import MalformedObjectiveError

_log = structlog.get_logger()


def told(error: Exception, path: PurePath) -> str:
    """Return on one line what is wrong; an unexpected error with its type."""
    if isinstance(error, ConfigError | MalformedObjectiveError):
        return str(error)
    if isinstance(error, OSError):
        return f"{path}: cannot be read: {error.strerror}"
    return f"{path}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"


class FileSource:
    """What sources that read files have in common.

    Args:
        rejected: how the log calls a mistake, in the past tense.
    """

    def __init__(self, rejected: str) -> None:
        self.error_count = 0
        """Mistakes met since the start."""
        self.problems: dict[str, str] = {}
        """The mistakes that now stand, by file name."""
        self._rejected = rejected

    def complain(self, problems: Mapping[Path, str]) -> None:
        """Take all that is wrong now; say and count what was not wrong before, or otherwise."""
        for path, problem in problems.items():
            if self.problems.get(path.name) != problem:
                self.error_count += 1
                _log.error(self._rejected, file=str(path), problem=problem)
        self.problems = {path.name: problem for path, problem in problems.items()}

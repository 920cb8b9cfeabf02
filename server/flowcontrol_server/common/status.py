"""Current problems, and the running version: the same for the dashboard, the API and metrics."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, final

PROBLEMS_MAX: Final = 200
"""Problems of one kind that are shown at once."""
TEXT_LENGTH_MAX: Final = 500

Found = Iterable[tuple[str, str]]
"""The subject of each problem, and its description."""


class Problem(NamedTuple):
    """A problem that exists now."""

    kind: str
    about: str
    text: str
    since_s: float
    """When it was first found, seconds since 1970."""


class About(NamedTuple):
    """The running version and configuration."""

    version: str
    configuration: str
    """Hash of the configuration in force."""
    changed_s: float
    """When it came into force, seconds since 1970."""
    changes: tuple[str, ...]
    """Changes of the last reload; empty before the first."""
    is_deciding: bool
    """Whether this replica decides requests, and not another one."""


@final
class ServiceStatus:
    """Gathers problems, and remembers since when each exists. Owner: the loop.

    Args:
        finders: functions that find problems, by kind.
        about: returns the running version and configuration.
        wall_s: the time, seconds since 1970.
    """

    def __init__(
        self,
        finders: Mapping[str, Callable[[], Found]],
        about: Callable[[], About],
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.about = about
        self._finders = finders
        self._wall_s = wall_s
        self._since_s: dict[tuple[str, str], float] = {}

    @property
    def kinds(self) -> Iterable[str]:
        """Every kind of problem that can be found."""
        return self._finders.keys()

    def problems(self) -> list[Problem]:
        """Return the current problems; one that persists keeps its time."""
        now_s = self._wall_s()
        found = [
            Problem(kind, about, text[:TEXT_LENGTH_MAX], self._since_s.get((kind, about), now_s))
            for kind, find in self._finders.items()
            for about, text in list(find())[:PROBLEMS_MAX]
        ]
        self._since_s = {(each.kind, each.about): each.since_s for each in found}
        return found

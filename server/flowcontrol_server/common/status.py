"""What is wrong now, and what runs: the same for the dashboard, the API and the metrics."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, final

PROBLEMS_MAX: Final = 200
"""Shown at once, of each kind."""
TEXT_LENGTH_MAX: Final = 500

Found = Iterable[tuple[str, str]]
"""What each problem is about, and what is wrong."""


class Problem(NamedTuple):
    """Something that is wrong now."""

    kind: str
    about: str
    text: str
    since_s: float
    """When it was first seen, seconds since 1970."""


class About(NamedTuple):
    """What runs."""

    version: str
    configuration: str
    """Hash of the configuration in force."""
    changed_s: float
    """When it was put into force, seconds since 1970."""
    changes: tuple[str, ...]
    """What the last reload changed; empty before the first."""
    is_deciding: bool
    """Whether requests are decided here, and not by another replica."""


@final
class ServiceStatus:
    """Gathers problems, and remembers since when each stands. Owner: the loop.

    Args:
        finders: by the kind of the problems that each finds.
        about: says what runs.
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
        """Every kind of problem that is looked for."""
        return self._finders.keys()

    def problems(self) -> list[Problem]:
        """Return what is wrong now; one that is still there keeps its time."""
        now_s = self._wall_s()
        found = [
            Problem(kind, about, text[:TEXT_LENGTH_MAX], self._since_s.get((kind, about), now_s))
            for kind, find in self._finders.items()
            for about, text in list(find())[:PROBLEMS_MAX]
        ]
        self._since_s = {(each.kind, each.about): each.since_s for each in found}
        return found

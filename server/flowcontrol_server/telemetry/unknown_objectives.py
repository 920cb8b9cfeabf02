"""Logs, once, each undeclared objective that requests name.

The engine counts such requests and serves them at priority 0. The names come from clients, so their
number in the log is bounded.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, final

import structlog

from flowcontrol.events import Fact, ObjectivesChanged
from flowcontrol.request import DEFAULT_PRIORITY

NAMES_MAX: Final = 100
LATELY_S: Final = 300.0
"""Time for which an undeclared objective is shown as a problem after a request has named it."""
_log = structlog.get_logger()


@final
class UnknownObjectives:
    """Finds undeclared objectives; reads the declared ones from the facts for the engine.

    Owner: the event loop's thread.

    Args:
        post: takes the facts for the engine.
    """

    def __init__(self, post: Callable[[Fact], None]) -> None:
        self._post = post
        self._declared: Mapping[str, int] = {}
        self._logged: set[str] = set()
        self._named_s: dict[str, float] = {}
        """When each logged objective was last named, on the monotonic clock."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the undeclared objectives that requests have named lately."""
        since_s = time.monotonic() - LATELY_S
        for name, named_s in sorted(self._named_s.items()):
            if named_s > since_s and name not in self._declared:
                yield name, "requests name this objective, which is not declared: priority 0"

    def post(self, fact: Fact) -> None:
        """Pass a fact on to the engine."""
        if isinstance(fact, ObjectivesChanged):
            self._declared = fact.priorities
        self._post(fact)

    def request_ended(self, objective: str | None, priority: int) -> None:
        """Take in the objective that a request named, and its resulting priority."""
        if objective is None or priority != DEFAULT_PRIORITY:
            return
        if objective in self._declared:
            return
        if objective in self._logged:
            self._named_s[objective] = time.monotonic()
        elif len(self._logged) < NAMES_MAX:
            self._named_s[objective] = time.monotonic()
            self._logged.add(objective)
            is_last = len(self._logged) == NAMES_MAX
            _log.warning("objective_unknown", objective=objective, further_names_suppressed=is_last)

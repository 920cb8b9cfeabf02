"""Tells the log, once, of each objective that requests name and nobody declared.

The engine counts them and serves them at priority 0; the names come from clients, so only so many
are told.
"""

from collections.abc import Callable, Mapping
from typing import Final, final

import structlog

from flowcontrol.events import Fact, ObjectivesChanged
from flowcontrol.request import DEFAULT_PRIORITY

NAMES_MAX: Final = 100
_log = structlog.get_logger()


@final
class UnknownObjectives:
    """Stands on the way of what sources tell, to know what is declared.

    Owner: the event loop's thread.

    Args:
        post: takes the facts, on their way to the engine.
    """

    def __init__(self, post: Callable[[Fact], None]) -> None:
        self._post = post
        self._declared: Mapping[str, int] = {}
        self._told: set[str] = set()

    def post(self, fact: Fact) -> None:
        """Pass on a fact."""
        if isinstance(fact, ObjectivesChanged):
            self._declared = fact.priorities
        self._post(fact)

    def request_ended(self, objective: str | None, priority: int) -> None:
        """Notice what a request named, and the priority that it came to mean."""
        if objective is None or priority != DEFAULT_PRIORITY:
            return
        if objective in self._declared or objective in self._told:
            return
        if len(self._told) < NAMES_MAX:
            self._told.add(objective)
            is_last = len(self._told) == NAMES_MAX
            _log.warning("objective_unknown", objective=objective, no_more_are_told=is_last)

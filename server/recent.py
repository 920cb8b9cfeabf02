"""The newest decisions, kept in memory so that they can be asked about."""

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, final

from flowcontrol.events import Decision
from server.classify import RequestFacts


class Decided(NamedTuple):
    """One decision, with what the gate knows of its request."""

    facts: RequestFacts
    decision: Decision
    decided_ns: int
    """Monotonic."""


@final
class RecentDecisions:
    """A ring of decisions, found by our id and by the client's. O(1) a decision.

    Owner: the event loop's thread.

    Args:
        count_max: decisions kept, at least 1.
    """

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._ring: deque[Decided] = deque()
        self._by_id: dict[int, Decided] = {}
        self._by_client_id: dict[str, Decided] = {}
        self._wall_offset_ns = time.time_ns() - time.monotonic_ns()

    def __len__(self) -> int:
        return len(self._ring)

    def keep(self, facts: RequestFacts, decision: Decision, decided_ns: int) -> None:
        """Take in a decision, and forget the oldest if there are too many."""
        decided = Decided(facts, decision, decided_ns)
        self._ring.append(decided)
        self._by_id[decision.request_id] = decided
        if facts.client_request_id:
            self._by_client_id[facts.client_request_id] = decided
        if len(self._ring) > self._count_max:
            self._forget(self._ring.popleft())

    def find(self, request_id: str) -> Decided | None:
        """Return the latest decision about a request of this id: ours, else the client's."""
        known = self._by_id.get(int(request_id)) if is_ours(request_id) else None
        return known or self._by_client_id.get(request_id)

    def newest(
        self,
        count: int,
        *,
        priority: int | None = None,
        flow_id: str | None = None,
        outcome: str | None = None,
    ) -> list[Decided]:
        """Return the latest decisions that fit, the newest first; O(kept)."""
        return list(islice(self._fitting(priority, flow_id, outcome), count))

    def _fitting(
        self, priority: int | None, flow_id: str | None, outcome: str | None
    ) -> Iterator[Decided]:
        for decided in reversed(self._ring):
            decision = decided.decision
            if priority is not None and decision.priority != priority:
                continue
            if flow_id is not None and decision.flow_id != flow_id:
                continue
            if outcome is not None and decision.outcome.value != outcome:
                continue
            yield decided

    def wall_ns(self, monotonic_ns: int) -> int:
        """Return the time of day of a moment, since 1970."""
        return monotonic_ns + self._wall_offset_ns

    def _forget(self, oldest: Decided) -> None:
        request_id, client_id = oldest.decision.request_id, oldest.facts.client_request_id
        if self._by_id.get(request_id) is oldest:
            del self._by_id[request_id]
        if self._by_client_id.get(client_id) is oldest:
            del self._by_client_id[client_id]


def is_ours(request_id: str) -> bool:
    """Whether it can be an id of ours: a number of at most 18 digits."""
    return request_id.isascii() and request_id.isdigit() and len(request_id) <= _DIGITS_MAX


_DIGITS_MAX = 18

"""The newest decisions, kept in memory for queries."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, final

from flowcontrol.events import Decision
from flowcontrol.request import Request
from flowcontrol_server.common.units import parse_whole
from flowcontrol_server.requests.classify import Origin


@final
class Decided:
    """One decision, with its request."""

    __slots__ = ("client_request_id", "decided_ns", "decision", "origin", "request", "wall_ns")

    def __init__(  # noqa: PLR0913, PLR0917 - its fields
        self,
        request: Request,
        client_request_id: str,
        decision: Decision,
        decided_ns: int,
        wall_ns: int,
        origin: Origin | None,
    ) -> None:
        self.request = request
        self.client_request_id = client_request_id
        self.decision = decision
        self.decided_ns = decided_ns
        """Monotonic."""
        self.wall_ns = wall_ns
        """The same by the wall clock, since 1970: monotonic time stops while a machine sleeps."""
        self.origin = origin
        """Origin of the objective and the flow of the request; None: unknown."""


@final
class RecentDecisions:
    """A ring of decisions, found by our id and by the client's. O(1) a decision.

    Owner: the event loop's thread.

    Args:
        count_max: decisions kept, at least 1.
        wall_clock: nanoseconds since 1970.
    """

    def __init__(self, count_max: int, wall_clock: Callable[[], int] = time.time_ns) -> None:
        self._count_max = count_max
        self._ring: deque[Decided] = deque()
        self._by_id: dict[int, Decided] = {}
        self._by_client_id: dict[str, Decided] = {}
        self._wall_clock = wall_clock

    def __len__(self) -> int:
        return len(self._ring)

    def keep(
        self,
        request: Request,
        client_request_id: str,
        decision: Decision,
        decided_ns: int,
        origin: Origin | None = None,
    ) -> None:
        """Add a decision, and drop the oldest if there are too many."""
        wall_ns = self._wall_clock()
        decided = Decided(request, client_request_id, decision, decided_ns, wall_ns, origin)
        self._ring.append(decided)
        self._by_id[decision.request_id] = decided
        if client_request_id:
            self._by_client_id[client_request_id] = decided
        if len(self._ring) > self._count_max:
            self._forget(self._ring.popleft())

    def find(self, request_id: str) -> Decided | None:
        """Return the latest decision about a request with this id: ours, else the client's."""
        own = own_id(request_id)
        known = None if own is None else self._by_id.get(own)
        return known or self._by_client_id.get(request_id)

    def newest(
        self,
        count: int,
        *,
        priority: int | None = None,
        flow_id: str | None = None,
        outcome: str | None = None,
    ) -> list[Decided]:
        """Return the latest decisions that match, the newest first; O(kept)."""
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

    def _forget(self, oldest: Decided) -> None:
        request_id, client_id = oldest.decision.request_id, oldest.client_request_id
        if self._by_id.get(request_id) is oldest:
            del self._by_id[request_id]
        if self._by_client_id.get(client_id) is oldest:
            del self._by_client_id[client_id]


def own_id(request_id: str) -> int | None:
    """Return a text as an id of this process, at most 18 digits; None: it cannot be one."""
    return parse_whole(request_id, _DIGITS_MAX)


_DIGITS_MAX: Final = 18

"""Data of the dashboard: always a sample a second, and the whole view while a browser is open.

A sample costs the processor O(bands + detectors) a second, so that a browser that is opened later
shows the last minutes, too. A whole view costs O(flows), and is taken once for all browsers.
"""

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.request import DEFAULT_PRIORITY, Group, Outcome, by_group
from flowcontrol.views.snapshot import Snapshot, requests_limit
from flowcontrol.views.view import detector_snapshots
from flowcontrol_server.admin.messages import (
    add_status,
    decision_message,
    plain_message,
    snapshot_message,
)
from flowcontrol_server.common.status import ServiceStatus
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import LogJoin
from flowcontrol_server.requests.recent import RecentDecisions

INTERVAL_S = 1.0
HISTORY_MAX = 900
"""Samples kept: 15 minutes."""
_FLOWS_SHOWN_MAX = 30
"""Flows shown for each band: those with the longest backlogs."""
_DECISIONS_SHOWN_MAX = 40
"""Decisions of each kind in a view."""
_MINUTE_NS = 60_000_000_000
_RECENT_SEEN_MAX = 5_000
"""Most decisions of the last minute used for percentiles: the newest."""


_ELSEWHERE = frozenset((Outcome.EVICTED_CANCELLED, Outcome.EVICTED_MOVED))
_NOT_OURS = _ELSEWHERE | {Outcome.DISPATCHED}
"""Outcomes that are neither a refusal nor an eviction by this service."""


class Reading(NamedTuple):
    """The figures of a sample."""

    saturation: float
    in_flight: int
    limit: int | None
    """Requests in flight at which the pool is full; None: no detector limits their number."""
    waiting: Mapping[int, int]
    """Waiting requests, by priority."""
    outcomes: Mapping[int, Mapping[Outcome, int]]
    """Decisions since the start, by priority."""


class _Counted(NamedTuple):
    """Outcomes of requests since the start."""

    at_ns: int
    outcomes: Mapping[int, Mapping[Outcome, int]]
    """By priority, as counted by the engine."""
    unseen: int
    """Requests refused before they reached the engine."""

    @property
    def undispatched(self) -> int:
        """Requests refused or evicted, without those cancelled or moved."""
        return self.unseen + sum(
            count
            for outcomes in self.outcomes.values()
            for outcome, count in outcomes.items()
            if outcome not in _NOT_OURS
        )


_NONE_YET = _Counted(0, {}, 0)


def read(controller: FlowController, now_ns: int) -> Reading:
    """Return the figures of a sample; O(bands + detectors)."""
    return Reading(
        controller.pool.saturation(),
        controller.in_flight,
        requests_limit(detector_snapshots(controller.pool, now_ns)),
        {band.priority: band.waiting for band in controller.bands},
        {priority: tally.outcomes for priority, tally in controller.decisions.tallies.items()},
    )


@final
class LiveView:
    """Keeps the history, and makes one view a second for all open dashboards.

    Owner: the event loop's thread.

    Args:
        gate: the way to the processor.
        pool: the name of the inference pool.
        log_join: counts the requests that the access log has reported.
        status: the current problems, version and configuration.
        interval_s: between two samples, and two views.
    """

    def __init__(
        self,
        gate: FlowGate,
        pool: str,
        log_join: LogJoin,
        status: ServiceStatus,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_MAX)
        self._gate = gate
        self._pool = pool
        self._log_join = log_join
        self._status = status
        self._interval_s = interval_s
        self._counted: deque[_Counted] = deque()
        """Counts of each sample of the last minute, and of the one before them."""
        self._next: asyncio.Future[str] | None = None
        """The next view; None: no dashboard waits for it."""
        self._is_over = False

    async def run(self) -> None:
        """Take samples until the processor has ended, or until cancelled."""
        try:
            while True:
                await self._sample()
                if self._next is not None:
                    await self._show()
                await asyncio.sleep(self._interval_s)
        except NotRunningError:
            pass
        finally:
            self._is_over = True
            if self._next is not None and not self._next.done():
                self._next.set_exception(NotRunningError("the service is shutting down"))

    async def next_view(self) -> str:
        """Return the next view, as JSON.

        Raises:
            NotRunningError: there are no more views.
        """
        if self._is_over:
            message = "the service is shutting down"
            raise NotRunningError(message)
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._next)

    async def view(self) -> str:
        """Return a current view, as JSON.

        Raises:
            NotRunningError: the processor has ended.
        """
        if not self._counted:
            await self._sample()
        snapshot = await self._gate.snapshot()
        return json.dumps(self._view(snapshot))

    async def _show(self) -> None:
        text = await self.view()
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(text)

    async def _sample(self) -> None:
        self._status.problems()  # records when each problem began
        reading = await self._gate.ask(read)
        past, now_ns = self._counted, time.monotonic_ns()
        before = past[-1] if past else None
        after = _Counted(now_ns, reading.outcomes, self._gate.inbox_refusals)
        past.append(after)
        while len(past) > 1 and past[1].at_ns <= now_ns - _MINUTE_NS:
            past.popleft()
        self.history.append(
            {
                "time": round(time.time(), 1),
                "saturation": round(reading.saturation, 4),
                "in_flight": reading.in_flight,
                "limit": reading.limit,
                "waiting": sum(reading.waiting.values()),
                "refused": _grown(before, after),
                "bands": reading.waiting,
            }
        )

    def _view(self, snapshot: Snapshot) -> dict[str, Any]:
        waits = _waits(self._gate.recent)
        message = snapshot_message(
            snapshot,
            self._pool,
            self._gate.inbox_refusals,
            self._log_join.counts(time.monotonic_ns()),
            _FLOWS_SHOWN_MAX,
        )
        add_status(message, self._status)
        view = plain_message(message)
        grown = self._grown_in_a_minute(snapshot)
        for band in view["bands"]:
            priority = band["priority"]
            band["minute"] = _minute(grown.get(priority, Counter()), waits.get(priority, []))
        return {
            **view,
            "limit": requests_limit(snapshot.detectors),
            "decisions": self._newest(),
            "sample": self.history[-1],
        }

    def _grown_in_a_minute(self, snapshot: Snapshot) -> dict[int, Counter[Outcome]]:
        """Return the outcomes of requests in the last minute, by priority.

        They are differences of counts, because the number of recent decisions is bounded. A count
        that was reset meanwhile has not grown.
        """
        first, now_ns = self._counted[0], time.monotonic_ns()
        before = first if first.at_ns <= now_ns - _MINUTE_NS else _NONE_YET
        grown = {
            priority: Counter(totals.outcomes) - Counter(before.outcomes.get(priority, {}))
            for priority, totals in snapshot.totals.items()
        }
        unseen = self._gate.inbox_refusals - before.unseen
        grown.setdefault(DEFAULT_PRIORITY, Counter())[Outcome.REJECTED_CAPACITY] += unseen
        return grown

    def _newest(self) -> list[dict[str, Any]]:
        """Return the newest decisions, and in addition the newest refusals and evictions."""
        recent, count = self._gate.recent, _DECISIONS_SHOWN_MAX
        newest = recent.newest(count)
        undispatched = [
            each
            for each in recent.newest(_RECENT_SEEN_MAX)
            if each.decision.outcome is not Outcome.DISPATCHED
        ]
        chosen = {id(each): each for each in (*newest, *undispatched[:count])}
        return [
            plain_message(decision_message(each, self._gate.live(each.decision.request_id)))
            for each in chosen.values()
        ]


def _waits(recent: RecentDecisions) -> dict[int, list[int]]:
    """Return the waits of requests dispatched in the last minute, by priority, sorted."""
    since_ns = time.monotonic_ns() - _MINUTE_NS
    found: dict[int, list[int]] = {}
    for decided in recent.newest(_RECENT_SEEN_MAX):
        if decided.decided_ns < since_ns:
            break
        decision = decided.decision
        if decision.outcome is Outcome.DISPATCHED:
            found.setdefault(decision.priority, []).append(decision.waited_ns)
    return {priority: sorted(waits) for priority, waits in found.items()}


def _minute(grown: Counter[Outcome], waits: Sequence[int]) -> dict[str, Any]:
    """Return outcomes and waits of the requests of one band."""
    groups = by_group({each: count for each, count in grown.items() if each not in _ELSEWHERE})
    return {
        **{group.value: groups[group] for group in Group},
        "cancelled": sum(grown[each] for each in _ELSEWHERE),
        "wait_p50": _seconds(waits[len(waits) // 2]) if waits else None,
        "wait_p95": _seconds(waits[len(waits) * 95 // 100]) if waits else None,
    }


def _seconds(duration_ns: int) -> float:
    return round(duration_ns / 1e9, 4)


def _grown(before: _Counted | None, after: _Counted) -> int:
    """Return the growth of refusals and evictions; 0 if the counts have been reset."""
    return 0 if before is None else max(0, after.undispatched - before.undispatched)

"""What the dashboard is told: a sample a second, always, and the whole view while somebody looks.

A sample costs the processor a question of O(bands + detectors) a second, so that whoever comes
after the fact still sees the last minutes. A whole view costs O(flows), and is taken once for all
who look.
"""

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from heapq import nsmallest
from typing import Any, NamedTuple, final

from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.request import Group, Outcome
from flowcontrol.snapshot import (
    BandSnapshot,
    DetectorSnapshot,
    FlowSnapshot,
    Snapshot,
    requests_limit,
)
from flowcontrol.view import detector_snapshots
from server.gate import FlowGate
from server.recent import Decided, RecentDecisions
from server.settlement import Settlement
from server.wording import reason

INTERVAL_S = 1.0
HISTORY_MAX = 900
"""Samples kept: a quarter of an hour."""
_FLOWS_SHOWN_MAX = 30
"""Of each band, those with the longest backlogs."""
_DECISIONS_SHOWN_MAX = 40
"""Of each kind, in each view."""
_MOVES_SHOWN_MAX = 40
_MINUTE_NS = 60_000_000_000
_RECENT_SEEN_MAX = 5_000
"""Decisions of the last minute that are counted; the newest of them, when there were more."""


class Reading(NamedTuple):
    """What a sample is made of."""

    saturation: float
    in_flight: int
    limit: int | None
    """Requests in flight at which the pool is full; None where no detector goes by a number."""
    waiting: Mapping[int, int]
    """By priority."""
    undispatched: int
    """Requests refused or evicted, since the start."""
    requests_max: int | None


def read(controller: FlowController, now_ns: int) -> Reading:
    """Return what a sample needs; O(bands + detectors)."""
    return Reading(
        controller.pool.saturation(),
        controller.in_flight,
        requests_limit(detector_snapshots(controller.pool, now_ns)),
        {band.priority: band.waiting for band in controller.bands},
        sum(
            count
            for tally in controller.decisions.tallies.values()
            for outcome, count in tally.outcomes.items()
            if outcome is not Outcome.DISPATCHED
        ),
        controller.config.limits.requests_max,
    )


@final
class LiveView:
    """Keeps the history, and makes one view a second for all who wait for it.

    Owner: the event loop's thread.

    Args:
        gate: the way to the processor.
        pool: the name of the inference pool.
        settlement: knows what the access log has told, and what not.
        interval_s: between two samples, and two views.
    """

    def __init__(
        self, gate: FlowGate, pool: str, settlement: Settlement, interval_s: float = INTERVAL_S
    ) -> None:
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_MAX)
        self._gate = gate
        self._pool = pool
        self._settlement = settlement
        self._interval_s = interval_s
        self._reading: Reading | None = None
        self._next: asyncio.Future[str] | None = None
        """Made by who waits for the next view."""
        self._is_over = False

    async def run(self) -> None:
        """Sample until the processor has ended, or this is cancelled."""
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
                self._next.set_exception(NotRunningError("there is nothing more to see"))

    async def next_view(self) -> str:
        """Return the next view, as JSON.

        Raises:
            NotRunningError: there will be none.
        """
        if self._is_over:
            message = "there is nothing more to see"
            raise NotRunningError(message)
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._next)

    async def view(self) -> str:
        """Return a view of now, as JSON.

        Raises:
            NotRunningError: the processor has ended.
        """
        if self._reading is None:
            await self._sample()
        snapshot = await self._gate.snapshot()
        return json.dumps(self._view(snapshot))

    async def _show(self) -> None:
        text = await self.view()
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(text)

    async def _sample(self) -> None:
        before, reading = self._reading, await self._gate.ask(read)
        self._reading = reading
        self.history.append(
            {
                "time": round(time.time(), 1),
                "saturation": round(reading.saturation, 4),
                "in_flight": reading.in_flight,
                "limit": reading.limit,
                "waiting": sum(reading.waiting.values()),
                "refused": 0 if before is None else reading.undispatched - before.undispatched,
                "bands": reading.waiting,
            }
        )

    def _view(self, snapshot: Snapshot) -> dict[str, Any]:
        reading, recent = self._reading, self._gate.recent
        assert reading is not None, "sampled before"
        minutes = _minutes(recent)
        named: dict[int, list[str]] = {}
        for name, priority in sorted(snapshot.objectives.items()):
            named.setdefault(priority, []).append(name)
        return {
            "time": time.time(),
            "pool": self._pool,
            "draining": snapshot.is_draining,
            "saturation": snapshot.saturation,
            "limit": requests_limit(snapshot.detectors),
            "waiting": snapshot.waiting,
            "in_flight": snapshot.in_flight,
            "requests_max": reading.requests_max,
            "bands": [
                _band(band, named.get(band.priority, []), minutes.get(band.priority, []))
                for band in snapshot.bands
            ],
            "endpoints": [
                {
                    "address": each.address,
                    "in_flight": each.in_flight,
                    "saturation": each.saturation,
                }
                for each in snapshot.endpoints
            ],
            "detectors": [_detector(detector) for detector in snapshot.detectors],
            "moves": _moves(snapshot.detectors),
            "settlements": self._settlement.counts(time.monotonic_ns())._asdict(),
            "decisions": _newest(recent),
            "sample": self.history[-1],
        }


def _minutes(recent: RecentDecisions) -> dict[int, list[Decided]]:
    """Return the decisions of the last minute by priority."""
    since_ns = time.monotonic_ns() - _MINUTE_NS
    found: dict[int, list[Decided]] = {}
    for decided in recent.newest(_RECENT_SEEN_MAX):
        if decided.decided_ns < since_ns:
            break
        found.setdefault(decided.decision.priority, []).append(decided)
    return found


def _band(
    band: BandSnapshot, objectives: Sequence[str], minute: Sequence[Decided]
) -> dict[str, Any]:
    outcomes = Counter(each.decision.outcome.group for each in minute)
    waits = sorted(
        each.decision.waited_ns for each in minute if each.decision.outcome is Outcome.DISPATCHED
    )
    return {
        "priority": band.priority,
        "declared": band.is_declared,
        "objectives": list(objectives),
        "waiting": band.waiting,
        "in_flight": band.in_flight,
        "oldest_wait": _seconds(band.oldest_wait_ns),
        "expected_wait": _seconds(band.expected_wait_ns),
        "ceiling": band.ceiling,
        "requests_max": band.requests_max,
        "flow_count": band.flow_count,
        "flows": [_flow(flow) for flow in band.flows[:_FLOWS_SHOWN_MAX]],
        "minute": {
            **{group.value: outcomes[group] for group in Group},
            "wait_p50": _seconds(waits[len(waits) // 2]) if waits else None,
            "wait_p95": _seconds(waits[len(waits) * 95 // 100]) if waits else None,
        },
    }


def _flow(flow: FlowSnapshot) -> dict[str, Any]:
    return {
        "id": flow.flow_id,
        "waiting": flow.waiting,
        "in_flight": flow.in_flight,
        "oldest_wait": _seconds(flow.oldest_wait_ns),
        "share": flow.share,
        "fair_share": flow.fair_share,
    }


def _detector(detector: DetectorSnapshot) -> dict[str, Any]:
    return {
        "stage": detector.stage,
        "kind": detector.kind,
        "saturation": detector.saturation,
        "limit": detector.requests_limit,
    }


def _moves(detectors: Sequence[DetectorSnapshot]) -> list[dict[str, Any]]:
    """Return the latest changes of limits that were found, the newest first, each with its why."""
    now_s = time.time()
    moves = [(move, each.stage) for each in detectors for move in each.moves]
    return [
        {
            "time": round(now_s - move.ago_ns / 1e9, 1),
            "stage": stage,
            "endpoint": move.address,
            "before": move.before,
            "after": move.after,
            "reason": move.reason,
        }
        for move, stage in nsmallest(_MOVES_SHOWN_MAX, moves, key=lambda each: each[0].ago_ns)
    ]


def _newest(recent: RecentDecisions) -> list[dict[str, Any]]:
    """Return the newest decisions; those that were not dispatched are not crowded out."""
    count = _DECISIONS_SHOWN_MAX
    newest = recent.newest(count)
    undispatched = [
        each
        for each in recent.newest(_RECENT_SEEN_MAX)
        if each.decision.outcome is not Outcome.DISPATCHED
    ]
    chosen = {id(each): each for each in (*newest, *undispatched[:count])}
    return [decision_view(each, recent) for each in chosen.values()]


def decision_view(decided: Decided, recent: RecentDecisions) -> dict[str, Any]:
    """Return a decision as the dashboard shows it."""
    decision = decided.decision
    return {
        "id": decision.request_id,
        "client_id": decided.facts.client_request_id,
        "time": recent.wall_ns(decided.decided_ns) / 1e9,
        "outcome": decision.outcome.value,
        "reason": reason(decision),
        "priority": decision.priority,
        "flow": decision.flow_id,
        "waited": _seconds(decision.waited_ns),
        "endpoint": decision.endpoint,
    }


def _seconds(duration_ns: int | None) -> float | None:
    return None if duration_ns is None else round(duration_ns / 1e9, 4)

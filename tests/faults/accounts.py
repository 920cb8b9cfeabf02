"""What clients and model servers wrote down, and what follows from it. Pure."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Final, NamedTuple

STARTED_BEFORE_S: Final = 0.12
"""So much earlier a request must have been at Envoy to be the first: those that reach the gate
within 0.1 s count as they come."""
ARRIVED_BEFORE_S: Final = 0.25
"""And so much later at a model server, to have been overtaken."""
_NOTED_WITHIN_S: Final = 0.02
"""How far off a time may be that follows from a gate's log: it reads two clocks for it, one after
the other, and a busy machine gives it no time between."""
_PATIENCE_S: Final = 60.0
"""A dispatch noted further from when Envoy saw the request was noted by a wrong clock."""
_DECIDED: Final = '{"event": "request_decided"'


@dataclass(slots=True)
class Asked:
    """One request, as its client saw it."""

    name: str
    flow: str
    sent_s: float
    status: int = 0
    is_whole: bool = False
    is_left: bool = False
    """Whether the client left before the end."""
    problem: str = ""
    """Why there was no answer, or no whole one."""
    ended_s: float = 0.0


class Served(NamedTuple):
    """One request, as a model server saw it."""

    name: str
    ticket: str
    endpoint: str
    arrived_s: float
    ended_s: float
    is_whole: bool
    has_died: bool
    """Whether the server was killed meanwhile."""


def read_ledger(lines: Iterable[str], endpoint: str, deaths: Sequence[float]) -> list[Served]:
    """Return what a model server wrote down; what it had not ended at its death ended then."""
    open_: dict[str, list[tuple[float, str]]] = {}
    served = []
    for line in lines:
        kind, at, name, word = line.split(" ")
        if kind == "A":
            open_.setdefault(name, []).append((float(at), word))
        else:
            arrived_s, ticket = open_[name].pop()
            served.append(
                Served(
                    name, ticket, endpoint, arrived_s, float(at), word == "whole", has_died=False
                )
            )
    for name, left in open_.items():
        for arrived_s, ticket in left:
            death_s = min((each for each in deaths if each >= arrived_s), default=float("inf"))
            times = (arrived_s, death_s)
            served.append(Served(name, ticket, endpoint, *times, is_whole=False, has_died=True))
    return sorted(served, key=lambda each: each.arrived_s)


class Dispatch(NamedTuple):
    """One dispatch, as the gate logged it; seconds since 1970."""

    gate: str
    """Which process."""
    number: int
    """Its requests are numbered as they come to it."""
    came_s: float
    """When it counts as arrived: not later than it came."""
    decided_s: float


def read_dispatches(lines: Iterable[str], gate: str) -> dict[str, Dispatch]:
    """Return what a gate logged of its dispatches, by the names of the requests."""
    dispatches: dict[str, Dispatch] = {}
    for line in lines:
        if line.startswith(_DECIDED) and line.endswith("}"):
            entry = json.loads(line)
            if entry["outcome"] == "dispatched":
                left_s = datetime.fromisoformat(entry["timestamp"]).timestamp()
                decided_s = left_s - entry["in_flight_ms"] / 1000
                dispatches.setdefault(
                    entry["client_request_id"],
                    Dispatch(
                        gate,
                        entry["request_id"],
                        decided_s - entry["waited_ms"] / 1000,
                        decided_s,
                    ),
                )
    return dispatches


class Overtaken(NamedTuple):
    """A request that reached a model server before an earlier one of its flow."""

    name: str
    earlier: str
    started_s: float
    """How much later it came to Envoy."""
    arrived_s: float
    """And by how much it was first at a model server."""
    is_excused: bool
    """Whether the gate did what it could, as its log says."""


class Excess(NamedTuple):
    """By how much, and for how long in all, more was in flight at an endpoint than allowed."""

    requests: int
    seconds: float


def excess(served: Iterable[Served], limit: int) -> Excess:
    """Return the worst excess over the limit of an endpoint, and how long all of it lasted."""
    worst, lasted_s = 0, 0.0
    by_endpoint: dict[str, list[tuple[float, int]]] = {}
    for each in served:
        moves = by_endpoint.setdefault(each.endpoint, [])
        moves += [(each.arrived_s, 1), (each.ended_s, -1)]
    for moves in by_endpoint.values():
        running = 0
        for (at_s, move), (next_s, _) in pairwise([*sorted(moves), (float("inf"), 0)]):
            running += move
            if running > limit:
                worst = max(worst, running - limit)
                lasted_s += next_s - at_s
    return Excess(worst, lasted_s)


@dataclass
class Books:
    """All that was written down during one fault."""

    asked: list[Asked]
    served: list[Served]
    started: Mapping[str, float]
    """When Envoy saw each request first, as far as its log says."""
    limit: int
    dispatches: Mapping[str, Dispatch]
    """What the gates logged, as far as they did: it excuses who is not to blame for an order."""

    def unanswered(self) -> list[Asked]:
        """Requests without any answer, whose client waited."""
        return [each for each in self.asked if not each.status and not each.is_left]

    def cut(self) -> list[Asked]:
        """Answers that began and did not end."""
        return [
            each
            for each in self.asked
            if each.status == 200 and not each.is_whole and not each.is_left
        ]

    def double(self) -> list[str]:
        """Requests that model servers worked on twice, other than for the death of the first."""
        counts = Counter(each.name for each in self.served if not each.has_died)
        return [name for name, count in counts.items() if count > 1]

    def ungated(self) -> list[Served]:
        """Requests that reached a model server without a ticket, or with that of another."""
        owners: dict[str, str] = {}
        return [
            each
            for each in self.served
            if "." not in each.ticket or owners.setdefault(each.ticket, each.name) != each.name
        ]

    def overtaken(self) -> list[Overtaken]:
        """Return who overtook an earlier one of its flow, by more than the margins; each once."""
        arrived: dict[str, float] = {}
        for served in self.served:
            arrived.setdefault(served.name, served.arrived_s)
        flows: dict[str, list[_Way]] = {}
        for each in self.asked:
            if each.name in self.started and each.name in arrived:
                flows.setdefault(each.flow, []).append(
                    _Way(self.started[each.name], arrived[each.name], each.name)
                )
        logs = _Logs(self.dispatches, self.started)
        return [each for flow in flows.values() for each in _overtaken(sorted(flow), logs)]

    def order_breaks(self) -> list[Overtaken]:
        """Return those of them that the gate did not dispatch in order, as far as its log says."""
        return [each for each in self.overtaken() if not each.is_excused]


class _Way(NamedTuple):
    """One request on its way through Envoy."""

    started_s: float
    arrived_s: float
    name: str


class _Logs:
    """What the gates' logs say of requests that reached model servers in the wrong order."""

    def __init__(self, dispatches: Mapping[str, Dispatch], started: Mapping[str, float]) -> None:
        self._dispatches = {
            name: each
            for name, each in dispatches.items()
            if name in started and abs(each.decided_s - started[name]) < _PATIENCE_S
        }
        self._came_s: dict[tuple[str, int], float] = {}
        """By gate and number, when it came at the earliest: not before those ahead of it."""
        latest_s: dict[str, float] = {}
        for each in sorted(self._dispatches.values(), key=lambda each: each.number):
            came_s = max(each.came_s, latest_s.get(each.gate, each.came_s))
            latest_s[each.gate] = self._came_s[each.gate, each.number] = came_s

    def excuse(self, earlier: str, later: str) -> bool:
        """Whether the gate did what it could, and the rest is Envoy's.

        It dispatched the earlier one first, or had not seen it when it dispatched the later one: a
        worker of Envoy got no time for a while.
        """
        first, second = self._dispatches.get(earlier), self._dispatches.get(later)
        if first is None or second is None or first.gate != second.gate:
            return False
        came_s = self._came_s[first.gate, first.number]
        return (
            first.decided_s < second.decided_s + _NOTED_WITHIN_S
            or came_s > second.decided_s - _NOTED_WITHIN_S
        )


def _overtaken(flow: list[_Way], logs: _Logs) -> Iterator[Overtaken]:
    """Yield who of a flow, in order of start, arrived before an earlier one; each once."""
    behind, latest_s = 0, float("-inf")
    for way in flow:
        while flow[behind].started_s < way.started_s - STARTED_BEFORE_S:
            latest_s = max(latest_s, flow[behind].arrived_s)
            behind += 1
        from_s = way.arrived_s + ARRIVED_BEFORE_S
        if latest_s > from_s:
            late = [each for each in flow[:behind] if each.arrived_s > from_s]
            blamed = [each for each in late if not logs.excuse(each.name, way.name)]
            earlier = (blamed or late)[0]
            yield Overtaken(
                way.name,
                earlier.name,
                way.started_s - earlier.started_s,
                earlier.arrived_s - way.arrived_s,
                is_excused=not blamed,
            )

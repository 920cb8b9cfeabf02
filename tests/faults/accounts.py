"""What clients and model servers wrote down, and what follows from it. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

STARTED_BEFORE_S: Final = 0.05
ARRIVED_BEFORE_S: Final = 0.25
"""One request must be first at Envoy by the one, and the other first at a model server by the other
time, to count as out of order. Two that are dispatched in one turn arrived up to 0.13 s apart on a
busy machine, where Envoy had to connect for one of them."""


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

    def order_breaks(self) -> int:
        """Requests that overtook an earlier one of their flow, by more than the margins."""
        arrived: dict[str, float] = {}
        for served in self.served:
            arrived.setdefault(served.name, served.arrived_s)
        flows: dict[str, list[tuple[float, float]]] = {}
        for each in self.asked:
            if each.name in self.started and each.name in arrived:
                flows.setdefault(each.flow, []).append(
                    (self.started[each.name], arrived[each.name])
                )
        return sum(_overtakers(sorted(flow)) for flow in flows.values())


def _overtakers(flow: list[tuple[float, float]]) -> int:
    """Return how many of a flow, by start and arrival, arrived before an earlier one."""
    breaks, behind, latest_s = 0, 0, float("-inf")
    for start_s, arrived_s in flow:
        while behind < len(flow) and flow[behind][0] < start_s - STARTED_BEFORE_S:
            latest_s = max(latest_s, flow[behind][1])
            behind += 1
        breaks += arrived_s + ARRIVED_BEFORE_S < latest_s
    return breaks

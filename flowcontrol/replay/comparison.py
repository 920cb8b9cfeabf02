"""Pure. Two engines on the same traffic: where they differ, and what that means for each flow."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

from flowcontrol.events import Decision
from flowcontrol.request import FlowKey, Outcome

FLOWS_MAX = 10_000
"""Flows shown by name; later ones are summed up under `OTHERS`."""
OTHERS = "(others)"


@final
class Figures:
    """What one engine did for one flow, one band, or all."""

    __slots__ = ("outcomes", "waits")

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.waits = array("q")
        """Of those dispatched, in nanoseconds."""

    def count(self, decision: Decision) -> None:
        """Take in one decision."""
        self.outcomes[decision.outcome] += 1
        if decision.outcome is Outcome.DISPATCHED:
            self.waits.append(decision.waited_ns)

    def add(self, other: "Figures") -> None:
        """Take in all of another's."""
        self.outcomes.update(other.outcomes)
        self.waits.extend(other.waits)

    def wait_ns(self, part: float) -> int | None:
        """Return the wait that this part of the dispatched did not exceed, None without any."""
        if not self.waits:
            return None
        return sorted(self.waits)[min(len(self.waits) - 1, int(part * len(self.waits)))]


class Difference(NamedTuple):
    """The first place where two engines did not decide alike."""

    now_ns: int
    recorded: Decision | None
    candidate: Decision | None


@final
class Pairs:
    """What both decided of each request. Memory: the requests that only one has decided."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Outcome, Outcome]] = Counter()
        """How often the recorded engine decided this, and the candidate that."""
        self._recorded: dict[int, Outcome] = {}
        self._candidate: dict[int, Outcome] = {}

    def take(self, recorded: Sequence[Decision], candidate: Sequence[Decision]) -> None:
        """Take in what both decided in one turn."""
        mine, theirs = self._recorded, self._candidate
        for side, decisions in ((mine, recorded), (theirs, candidate)):
            for decision in decisions:
                if decision.outcome is not Outcome.RECLAIMED:  # it was dispatched before
                    side[decision.request_id] = decision.outcome
        for decision in (*recorded, *candidate):
            request_id = decision.request_id
            if request_id in mine and request_id in theirs:
                self.counts[mine.pop(request_id), theirs.pop(request_id)] += 1

    def forget(self) -> None:
        """Pair what comes from now on; what only one has decided yet will not be paired."""
        self._recorded.clear()
        self._candidate.clear()

    @property
    def undecided(self) -> tuple[int, int]:
        """How many only the candidate, and only the recorded engine, has decided."""
        return len(self._candidate), len(self._recorded)


@final
class Comparison:
    """Counts what both did, flow by flow, for as long as a ledger is."""

    def __init__(self) -> None:
        self.recorded: dict[FlowKey, Figures] = {}
        self.candidate: dict[FlowKey, Figures] = {}
        self.pairs = Pairs()
        self.recorded_count = 0
        self.first_difference: Difference | None = None

    def take(
        self, now_ns: int, recorded: Sequence[Decision], candidate: Sequence[Decision]
    ) -> None:
        """Take in what both decided in one turn."""
        self.recorded_count += len(recorded)
        if self.first_difference is None and list(recorded) != list(candidate):
            self.first_difference = _difference(now_ns, recorded, candidate)
        self.pairs.take(recorded, candidate)
        for decision in recorded:
            self._count(self.recorded, decision)
        for decision in candidate:
            self._count(self.candidate, decision)

    @staticmethod
    def _count(side: dict[FlowKey, Figures], decision: Decision) -> None:
        key = FlowKey(decision.priority, decision.flow_id)
        figures = side.get(key)
        if figures is None:
            if len(side) >= FLOWS_MAX:
                key = FlowKey(decision.priority, OTHERS)
            figures = side.setdefault(key, Figures())
        figures.count(decision)


def by_priority(side: dict[FlowKey, Figures]) -> dict[int, Figures]:
    """Return the figures of each band, highest first."""
    bands = {priority: Figures() for priority in sorted({k.priority for k in side}, reverse=True)}
    for key, figures in side.items():
        bands[key.priority].add(figures)
    return bands


def _difference(
    now_ns: int, recorded: Iterable[Decision], candidate: Iterable[Decision]
) -> Difference:
    ours, theirs = list(recorded), list(candidate)
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return Difference(now_ns, mine, other)
    shorter = min(len(ours), len(theirs))
    return Difference(
        now_ns,
        ours[shorter] if len(ours) > shorter else None,
        theirs[shorter] if len(theirs) > shorter else None,
    )

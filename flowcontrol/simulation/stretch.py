"""Pure. A stretch of steps of one engine, each longer than the one before by the same amount."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import final


@final
@dataclass(slots=True)
class Stretch:
    """Steps one after another, from `start_ns`. Every answer is exact and costs O(log steps)."""

    start_ns: int
    step_ns: int
    """Length of the first step."""
    growth_ns: int
    """By how much each is longer than the one before."""
    steps: int
    """How many there are, >= 1."""

    @property
    def end_ns(self) -> int:
        """When the last step ends."""
        return self.start_ns + self._lasts_ns(self.steps)

    def ended_by(self, now_ns: int) -> int:
        """Count the steps that have ended at `now_ns`, the last one left out."""
        return bisect_right(range(1, self.steps), now_ns - self.start_ns, key=self._lasts_ns)

    def cut_from(self, now_ns: int) -> None:
        """Keep no step that begins after `now_ns`, but the first in any case."""
        passed_ns = now_ns - self.start_ns
        self.steps = 1 + bisect_left(range(1, self.steps), passed_ns, key=self._lasts_ns)

    def drop(self, steps: int) -> None:
        """Forget the first so many steps; fewer than there are."""
        self.start_ns += self._lasts_ns(steps)
        self.step_ns += self.growth_ns * steps
        self.steps -= steps

    def _lasts_ns(self, steps: int) -> int:
        """Length of the first so many steps together."""
        return steps * self.step_ns + self.growth_ns * (steps * (steps - 1) // 2)

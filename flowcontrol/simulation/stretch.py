"""Pure. Consecutive steps of one engine, each longer than the one before by the same amount."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import final


@final
@dataclass(slots=True)
class Stretch:
    """Consecutive steps from `start_ns`. Results are exact, and cost O(log steps)."""

    start_ns: int
    step_ns: int
    """Length of the first step."""
    growth_ns: int
    """By how much each step is longer than the one before."""
    steps: int
    """Number of steps, >= 1."""

    @property
    def end_ns(self) -> int:
        """When the last step ends."""
        return self.start_ns + self._lasts_ns(self.steps)

    def ended_by(self, now_ns: int) -> int:
        """Return how many steps have ended at `now_ns`, not counting the last one."""
        return bisect_right(range(1, self.steps), now_ns - self.start_ns, key=self._lasts_ns)

    def cut_from(self, now_ns: int) -> None:
        """Remove the steps that begin after `now_ns`, except the first."""
        passed_ns = now_ns - self.start_ns
        self.steps = 1 + bisect_left(range(1, self.steps), passed_ns, key=self._lasts_ns)

    def drop(self, steps: int) -> None:
        """Remove the first so many steps, fewer than there are."""
        self.start_ns += self._lasts_ns(steps)
        self.step_ns += self.growth_ns * steps
        self.steps -= steps

    def _lasts_ns(self, steps: int) -> int:
        """Length of the first so many steps together."""
        return steps * self.step_ns + self.growth_ns * (steps * (steps - 1) // 2)

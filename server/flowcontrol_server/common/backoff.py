"""Pure. Waits between retries, jittered: clients that failed together do not retry together."""

from collections.abc import Callable
from typing import final


@final
class Backoff:
    """Waits that double up to a limit; each is drawn from the upper half of its range.

    Args:
        first_s: the longest first wait, above 0.
        longest_s: the longest of all, at least `first_s`.
        chance: uniform from 0 to below 1.
    """

    def __init__(self, first_s: float, longest_s: float, chance: Callable[[], float]) -> None:
        assert 0 < first_s <= longest_s
        self._first_s = first_s
        self._longest_s = longest_s
        self._chance = chance
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the wait before the next retry; the one after it is longer."""
        wait_s = self._next_s * (0.5 + self._chance() / 2)
        self._next_s = min(self._next_s * 2, self._longest_s)
        return wait_s

    def reset(self) -> None:
        """Start again with the first wait, after a success."""
        self._next_s = self._first_s

"""Pure. Numbers drawn by chance: lengths in tokens, times in nanoseconds.

Chance is an argument: each user has a `random.Random` with a seed of its own, so that one more user
changes nothing for the others.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import log
from random import Random
from typing import Protocol, final


class Distribution(Protocol):
    """Where a number comes from."""

    def draw(self, chance: Random) -> int:
        """Return the next number."""


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    value: int

    def draw(self, chance: Random) -> int:  # noqa: ARG002 - the others need it
        """Return the value."""
        return self.value


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """Each whole number of a range is as likely as any other; both ends included."""

    least: int
    most: int

    def draw(self, chance: Random) -> int:
        """Return one of them."""
        return chance.randint(self.least, self.most)


@final
@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless, with a mean; times between unrelated events."""

    mean: int

    def draw(self, chance: Random) -> int:
        """Return a number from 0."""
        return round(chance.expovariate(1 / self.mean))


@final
@dataclass(frozen=True, slots=True)
class Lognormal:
    """Many short, few long: prompts and answers of people are about so.

    Half of them are below the median; two thirds lie within a factor of e^sigma of it.
    """

    median: int
    sigma: float
    most: int
    """What is drawn above counts as this."""

    def draw(self, chance: Random) -> int:
        """Return a number from 1 to the most."""
        return min(self.most, max(1, round(chance.lognormvariate(log(self.median), self.sigma))))


@final
class WeightedNames:
    """Names, each drawn as often as its share says; O(log names).

    Args:
        shares: name to share, above 0; they need not add up to anything.
    """

    def __init__(self, shares: dict[str, float]) -> None:
        assert shares, "there must be a name to draw"
        self.names = tuple(shares)
        self._bounds = list(accumulate(shares.values()))

    def draw(self, chance: Random) -> str:
        """Return a name."""
        place = bisect_right(self._bounds, chance.random() * self._bounds[-1])
        return self.names[min(place, len(self.names) - 1)]  # rounding may reach the end

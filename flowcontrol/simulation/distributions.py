"""Pure. Random numbers: lengths in tokens, times in nanoseconds.

The source of randomness is an argument: each user has its own `random.Random` with its own seed, so
that an additional user changes nothing for the others.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import log
from random import Random
from typing import Protocol, final


class Distribution(Protocol):
    """A distribution of whole numbers."""

    def draw(self, chance: Random) -> int:
        """Return the next number."""


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same number."""

    value: int

    def draw(self, chance: Random) -> int:  # noqa: ARG002 - the others need it
        """Return the value."""
        return self.value


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number of a range is equally likely; both ends included."""

    least: int
    most: int

    def draw(self, chance: Random) -> int:
        """Return a number of the range."""
        return chance.randint(self.least, self.most)


@final
@dataclass(frozen=True, slots=True)
class Exponential:
    """The exponential distribution: times between independent events."""

    mean: int

    def draw(self, chance: Random) -> int:
        """Return a number from 0."""
        return round(chance.expovariate(1 / self.mean))


@final
@dataclass(frozen=True, slots=True)
class Lognormal:
    """The lognormal distribution: many short, few long, like prompts and answers of people.

    Half of them are below the median; two thirds lie within a factor of e^sigma of it.
    """

    median: int
    sigma: float
    most: int
    """Upper bound; larger numbers are replaced by it."""

    def draw(self, chance: Random) -> int:
        """Return a number from 1 to the most."""
        return min(self.most, max(1, round(chance.lognormvariate(log(self.median), self.sigma))))


@final
class WeightedNames:
    """Random names, each as often as its share. O(log names).

    Args:
        shares: name to share, above 0; the sum does not matter.
    """

    def __init__(self, shares: dict[str, float]) -> None:
        assert shares, "there must be a name to draw"
        self.names = tuple(shares)
        self._bounds = list(accumulate(shares.values()))

    def draw(self, chance: Random) -> str:
        """Return a name."""
        place = bisect_right(self._bounds, chance.random() * self._bounds[-1])
        return self.names[min(place, len(self.names) - 1)]  # rounding may reach the end

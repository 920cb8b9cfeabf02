"""Pure. How full may the pool be for each band? A band is gated while saturation >= its ceiling.

static: one ceiling for all. Any waiting band uses a free slot, and a person who arrives a moment
later waits for the next one.

priority-holdback: the top band may fill the pool to `ceiling_max`, the lowest to `ceiling_min`, and
those between in even steps: by rank (band i of N, from 0: max - i (max - min) / (N - 1)), or by
value (linear in the priority itself, so that another band between moves no ceiling). The part
held back stays free for higher bands. With `ceiling_min` 0 the lowest band is always gated.

soft-reflective: the top band has `ceiling_max`. A lower band i of N has a soft threshold
1 - i s / (N - 1) at saturation s. Below it the band is open; in a full pool it is closed; between,
it is open for one turn in every max(1, round(s / (1 - s))). So it fades out as the pool fills,
instead of stopping at a line. Turns count events, not time, so that an idle engine needs no timer.

reserve: a lower band leaves as much free as the bands above it need, learnt from their arrivals
(`reserve`). Here every band has `ceiling_max`.

One band alone has `ceiling_max` under every policy.
"""

from collections.abc import Sequence
from typing import assert_never, final

from flowcontrol.config import Ceilings, CeilingSettings


@final
class BandCeilings:
    """The ceilings of the present bands; computed once, if nothing else changes them."""

    def __init__(self, settings: CeilingSettings, priorities: Sequence[int]) -> None:
        self.priorities = priorities
        """Of all bands, highest first."""
        self._settings = settings
        self._fixed: list[float] | None = None
        if settings.policy is not Ceilings.SOFT_REFLECTIVE:
            self._fixed = ceilings_for(settings, priorities, 0.0, 0)

    def of(self, rank: int, saturation: float, turn_count: int) -> float:
        """Return the ceiling of one band, as `ceiling_for`; O(1)."""
        if self._fixed is not None:
            return self._fixed[rank]
        return ceiling_for(self._settings, self.priorities, rank, saturation, turn_count)


def ceiling_for(
    settings: CeilingSettings,
    priorities: Sequence[int],
    rank: int,
    saturation: float,
    turn_count: int,
) -> float:
    """Return the ceiling of one band; O(1).

    Args:
        settings: the policy and its bounds.
        priorities: of all bands, highest first.
        rank: of the band, 0 for the highest.
        saturation: of the pool, now.
        turn_count: turns so far, for soft-reflective.
    """
    high = settings.ceiling_max
    if rank == 0 or settings.policy is Ceilings.STATIC or settings.policy is Ceilings.RESERVE:
        return high
    step = high - settings.ceiling_min
    last = len(priorities) - 1
    match settings.policy:
        case Ceilings.HOLDBACK_BY_RANK:
            return high - rank * step / last
        case Ceilings.HOLDBACK_BY_VALUE:
            top = priorities[0]
            return high - (top - priorities[rank]) * step / (top - priorities[last])
        case Ceilings.SOFT_REFLECTIVE:
            is_open = _is_open(rank / last, saturation, turn_count)
            return high if is_open else 0.0
        case _:
            assert_never(settings.policy)


def ceilings_for(
    settings: CeilingSettings, priorities: Sequence[int], saturation: float, turn_count: int
) -> list[float]:
    """Return the ceiling of every band, highest first; O(bands)."""
    return [
        ceiling_for(settings, priorities, rank, saturation, turn_count)
        for rank in range(len(priorities))
    ]


def _is_open(depth: float, saturation: float, turn_count: int) -> bool:
    if saturation >= 1:
        return False
    if saturation < 1 - depth * saturation:
        return True
    return turn_count % max(1, round(saturation / (1 - saturation))) == 0

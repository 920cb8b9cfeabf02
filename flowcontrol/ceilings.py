"""Pure. How full may the pool be for each band? A band is gated while saturation >= its ceiling.

static: one ceiling for all. A free slot is used by whoever waits, and a person who comes a moment
later waits for the next.

priority-holdback: the top band may fill the pool to `ceiling_max`, the lowest to `ceiling_min`, and
those between in even steps: by rank (i of N bands, step (max - min) / (N - 1)), or by value (linear
in the priority itself, so that declaring another band moves nobody else's ceiling). The part held
back is what a person finds free.

soft-reflective: the top band is never gated below full. A lower band i of N has a soft threshold
1 - i s / (N - 1) at saturation s: below it, the band is open; at full it is closed; between, it is
open for one dispatch in every max(1, round(s / (1 - s))), so it fades out as the pool fills instead
of stopping at a line. Counted in dispatches, not in time, so that an idle engine needs no clock.

Ceilings never stand in the way of a band that has nothing above it waiting and an empty pool: the
lowest ceiling of 0 would, and is for operators who mean it.
"""

from collections.abc import Sequence

from flowcontrol.config import Ceilings, CeilingSettings


def ceilings_for(
    settings: CeilingSettings, priorities: Sequence[int], saturation: float, dispatch_count: int
) -> list[float]:
    """Return the ceiling of each band; O(bands).

    Args:
        settings: which policy, and its ends.
        priorities: of the bands, highest first.
        saturation: of the pool, now.
        dispatch_count: dispatches so far, for the duty cycle of soft-reflective.
    """
    high, low = settings.ceiling_max, settings.ceiling_min
    last = len(priorities) - 1
    if settings.policy is Ceilings.STATIC or last < 1:
        return [high] * len(priorities)
    match settings.policy:
        case Ceilings.HOLDBACK_BY_RANK:
            return [high - rank * (high - low) / last for rank in range(last + 1)]
        case Ceilings.HOLDBACK_BY_VALUE:
            top, span = priorities[0], priorities[0] - priorities[-1]
            return [high - (top - priority) * (high - low) / span for priority in priorities]
        case Ceilings.SOFT_REFLECTIVE:
            return [
                high,
                *(
                    _soft(rank / last, saturation, dispatch_count, high)
                    for rank in range(1, last + 1)
                ),
            ]


def _soft(depth: float, saturation: float, dispatch_count: int, high: float) -> float:
    if saturation < 1 - depth * saturation:
        return high
    if saturation >= 1:
        return 0.0
    period = max(1, round(saturation / (1 - saturation)))
    return high if dispatch_count % period == 0 else 0.0

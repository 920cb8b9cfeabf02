"""Expected results of policies, computed in another way than the policies do."""

from collections.abc import Mapping


def water_filling(
    demands: Mapping[str, float], weights: Mapping[str, float], capacity: float
) -> dict[str, float]:
    """Return the weighted max-min fair shares: no flow gets more but from one that has less.

    The level rises evenly by weight until a demand is met. Then that flow is done, and the others
    share the remainder.
    """
    shares: dict[str, float] = {}
    open_flows = dict(demands)
    while open_flows:
        level = capacity / sum(weights[each] for each in open_flows)
        met = [each for each, demand in open_flows.items() if demand <= level * weights[each]]
        if not met:
            return shares | {each: level * weights[each] for each in open_flows}
        for each in met:
            shares[each] = open_flows.pop(each)
            capacity -= shares[each]
    return shares


def unfairness(
    shares: Mapping[str, float],
    demands: Mapping[str, float],
    weights: Mapping[str, float],
) -> float:
    """Return the largest excess, over its weight, of a flow over one whose demand is not met.

    0 is max-min fairness, by its definition with bottlenecks (Bertsekas and Gallager, 1987).
    """
    level = max(share / weights[each] for each, share in shares.items())
    wanting = [each for each, share in shares.items() if share < demands[each] * (1 - 1e-9)]
    return max((level - shares[each] / weights[each] for each in wanting), default=0.0)

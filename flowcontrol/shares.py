"""Pure. The recent share of each flow in what its band was served.

The window fades instead of ending: what was served counts half after a half-life. Accounts grow
with time instead of shrinking (forward decay), so a dispatch changes one of them only. Used by
views, not by policies.
"""

from typing import Final, final

HALF_LIFE_NS: Final = 30_000_000_000
ACCOUNTS_MAX: Final = 10_000
_RESTART_HALF_LIVES: Final = 64
_FORGOTTEN: Final = 1e-3
"""Accounts below this part of the band's sum are dropped."""


@final
class Shares:
    """Cost served to each flow of one band. O(1) a dispatch, amortised."""

    __slots__ = ("_served", "_since_ns", "_sum")

    def __init__(self, now_ns: int) -> None:
        self._since_ns = now_ns
        self._served: dict[str, float] = {}
        """Cost served to each flow, as of `_since_ns`."""
        self._sum = 0.0

    def dispatched(self, flow_id: str, cost: float, now_ns: int) -> None:
        """Take in one dispatch."""
        half_lives = (now_ns - self._since_ns) / HALF_LIFE_NS
        if half_lives > _RESTART_HALF_LIVES or len(self._served) > ACCOUNTS_MAX:
            self._rebase(half_lives, now_ns)
            half_lives = 0.0
        grown = cost * 2.0**half_lives
        self._served[flow_id] = self._served.get(flow_id, 0.0) + grown
        self._sum += grown

    def of(self, flow_id: str) -> float:
        """Return the part a flow got, from 0 to 1; 0 while nothing was served."""
        return self._served.get(flow_id, 0.0) / self._sum if self._sum > 0 else 0.0

    def _rebase(self, half_lives: float, now_ns: int) -> None:
        least = self._sum * _FORGOTTEN
        faded = 2.0**-half_lives
        self._served = {
            flow_id: served * faded for flow_id, served in self._served.items() if served >= least
        }
        self._sum = sum(self._served.values())
        self._since_ns = now_ns

"""Pure. How a detector's limits have moved, and why: for people who ask."""

from collections import deque
from typing import Final, NamedTuple, final

_KEPT: Final = 64


class LimitMove(NamedTuple):
    """One change of a limit, and why."""

    at_ns: int
    address: str | None
    """Whose limit; None: of all endpoints together."""
    before: float
    after: float
    reason: str


@final
class LimitMoves:
    """The latest changes of limits, and how many there were in all. O(1)."""

    def __init__(self) -> None:
        self.latest: deque[LimitMove] = deque(maxlen=_KEPT)
        """The last one last."""
        self.raised = 0
        self.lowered = 0

    def note(self, move: LimitMove) -> None:
        """Add a change."""
        self.latest.append(move)
        self.raised += move.after > move.before
        self.lowered += move.after < move.before

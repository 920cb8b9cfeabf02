"""Pure. How the limits of a detector have moved, and why; shown to operators."""

from collections import deque
from typing import Final, NamedTuple, final

_KEPT: Final = 64


class LimitMove(NamedTuple):
    """One change of a limit, and why."""

    at_ns: int
    address: str | None
    """The endpoint whose limit moved; None: the limit of all endpoints together."""
    before: float
    after: float
    reason: str


@final
class LimitMoves:
    """The latest moves, and counts of all moves. O(1)."""

    def __init__(self) -> None:
        self.latest: deque[LimitMove] = deque(maxlen=_KEPT)
        """The latest last."""
        self.raised = 0
        self.lowered = 0

    def note(self, move: LimitMove) -> None:
        """Add a move."""
        self.latest.append(move)
        self.raised += move.after > move.before
        self.lowered += move.after < move.before

"""Pure. A limited number of places, with a limit in all and one for each peer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final


class NoPlaceError(Exception):
    """Every place is taken, or every place of this peer."""


@final
class Places:
    """Counts the places taken.

    Args:
        count_max: places in all.
        per_peer_max: places that one peer may hold.
    """

    def __init__(self, count_max: int, per_peer_max: int) -> None:
        self._count_max = count_max
        self._per_peer_max = per_peer_max
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, peer: str) -> Iterator[None]:
        """Hold a place for a peer.

        Raises:
            NoPlaceError: a limit is reached; the error names it.
        """
        if self._taken.total() >= self._count_max:
            message = f"must be at most {self._count_max} at once"
            raise NoPlaceError(message)
        if self._taken[peer] >= self._per_peer_max:
            message = f"must be at most {self._per_peer_max} at once from one address"
            raise NoPlaceError(message)
        self._taken[peer] += 1
        try:
            yield
        finally:
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]

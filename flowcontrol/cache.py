"""Pure. How many tokens in flight fill the KV cache of an engine, by its own word."""

from typing import Final, final

from flowcontrol.flow import Lease

_FIRST, _FULL = 0.8, 0.85
"""Part of it to fill: by what a request will need at most, and as it is measured."""
_FULL_LEAST: Final = 0.5
"""The same, where single requests take so much of it that the next may not fit."""
_LARGEST: Final = 0.98
"""How the largest request fades, with each that follows."""
_FADING: Final = 0.998
"""How what a token takes fades, a look."""
_TELLING: Final = 0.3
"""A cache that is emptier tells nothing."""


@final
class CacheUse:
    """The use of one cache, against the tokens in flight there. O(1)."""

    def __init__(self) -> None:
        self.per_token = 0.0
        """Part of the cache that one token in flight takes; 0 while it is not known."""
        self._largest = 0.0
        """Tokens of the largest request of late."""

    def sent(self, lease: Lease) -> None:
        """Note how large a request is."""
        self._largest = max(lease.tokens.input + lease.tokens.output, self._largest * _LARGEST)

    def most(self, usage: float, capacity: int | None, tokens: float) -> float | None:
        """Return how many tokens may be in flight there; None while that is not known.

        Args:
            usage: part of the cache that those in flight take.
            capacity: tokens in it, if the engine says so.
            tokens: in flight.
        """
        if capacity and not self.per_token:
            self.per_token = _FULL / (_FIRST * capacity)
        self.per_token *= _FADING
        if usage >= _TELLING and tokens:
            self.per_token = max(self.per_token, usage / tokens)
        if not self.per_token:
            return None
        full = max(_FULL_LEAST, min(_FULL, 1 - self._largest * self.per_token))
        return full / self.per_token

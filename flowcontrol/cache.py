"""Pure. How many tokens in flight fill the KV cache of an engine, by its own metrics."""

from typing import Final, final

from flowcontrol.flow import Lease

_FIRST, _FULL = 0.8, 0.85
"""Part of the cache to fill: before its use was measured, and after."""
_FULL_LEAST: Final = 0.5
"""The least part to fill, where a single request may take much of it."""
_LARGEST: Final = 0.98
"""With each request that follows, the largest counts for so much of what it was."""
_FADING: Final = 0.998
"""With each scrape, the largest measured use of a token counts for so much of what it was."""
_TELLING: Final = 0.3
"""The use of an emptier cache is not measured."""


@final
class CacheUse:
    """The use of one cache in relation to the tokens in flight there. O(1)."""

    def __init__(self) -> None:
        self.per_token = 0.0
        """Part of the cache that one token in flight takes; 0: unknown."""
        self._largest = 0.0
        """Tokens of the largest recent request."""

    def sent(self, lease: Lease) -> None:
        """Note how large a request is."""
        self._largest = max(lease.tokens.input + lease.tokens.output, self._largest * _LARGEST)

    def most(self, usage: float, capacity: int | None, tokens: float) -> float | None:
        """Return how many tokens may be in flight there; None: unknown.

        Args:
            usage: part of the cache that requests in flight take, 0 to 1.
            capacity: tokens the cache holds; None: the engine does not report it.
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

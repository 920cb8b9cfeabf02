"""Pure. How long a prompt takes to be read: the least time to first token at one endpoint.

Two things follow from it. What exceeds the least for a prompt of that length was spent waiting
inside. And the least times of long prompts over those of short ones tell how long one more token of
a prompt takes, from which it is known when the prompts that were just sent will have been read.

That speed is the least slope there is, of prompts at least a quarter as long as the longest: too
low a speed, learnt from prompts that waited, empties the engine and is corrected by the next prompt
that finds it empty; too high a speed holds back too little, and the queue shows elsewhere. Where
prompts are so short that a step takes longer than most of them, what differs between long and short
ones is how many ran beside: they show no speed.
"""

from math import log2
from typing import Final, final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease

_CLASSES: Final = 2.0
"""Classes of length for each doubling."""
_ENOUGH: Final = 4
"""Prompts seen of a class before its least time tells a speed."""
_LONGER: Final = 4.0
"""So many times as long as the shortest such a prompt must be, and no shorter than the longest."""
_PACED: Final = 1.3
"""Prompts are usually read in so many times the least of all; else their speed is lost in steps."""
_USUAL: Final = 64.0
"""Prompts that the usual time remembers."""
_TOLERATED: Final = 0.5
"""Waiting half as long as the prompt takes is no queue: it came in the middle of a step."""


@final
class FirstTokenTimes:
    """The least time to first token by length of prompt. O(classes), some dozens.

    What a length has never shown is taken from others: a longer prompt takes no less, and a shorter
    one, in proportion, no less either. A prompt is as long as what of it was in no cache.
    """

    __slots__ = ("_counts", "_least", "_prompts", "token_ns", "usual_ns")

    def __init__(self) -> None:
        self._least: dict[int, float] = {}
        """By length, each class a factor of 1.4 longer than the one before."""
        self._prompts: dict[int, float] = {}
        """How long the prompt was that took it."""
        self._counts: dict[int, int] = {}
        self.token_ns = 0.0
        """Time that one more token of a prompt takes; 0 while it is not known."""
        self.usual_ns = 0.0
        """Mean of the least times of the prompts that came; 0 while it is not known."""

    def learn(self, lease: Lease, settled: Settled) -> float | None:
        """Take in a time to first token; return how long it waited, None if it does not say."""
        ttft_ns = settled.ttft_ns
        if ttft_ns is None or not settled.is_success:
            return None
        known = settled.input_tokens
        prompt = lease.tokens.input if known is None else float(known)
        prompt = max(1.0, prompt - (settled.cached_tokens or 0))
        length = round(_CLASSES * log2(prompt))
        before = self._least.get(length)
        count = self._counts[length] = self._counts.get(length, 0) + 1
        is_less = before is None or ttft_ns < before
        if is_less:
            self._least[length] = float(ttft_ns)
            self._prompts[length] = prompt
        if count == _ENOUGH or is_less:
            self.token_ns = self._speed()
        floor_ns = self._floor_ns(length)
        prompts = min(float(sum(self._counts.values())), _USUAL)
        self.usual_ns += (floor_ns - self.usual_ns) / prompts
        waited_ns = ttft_ns - floor_ns * (1 + _TOLERATED)
        return waited_ns if waited_ns > 0 else 0.0

    @property
    def least_ns(self) -> float:
        """The least of all: about a step; 0 while it is not known. O(classes)."""
        return min(self._least.values(), default=0.0)

    def fade(self, growth: float) -> None:
        """Let the least grow a little: it may be outdated."""
        for length in self._least:
            self._least[length] *= growth

    def forget(self) -> None:
        """Forget what was learnt, and begin again."""
        self._least.clear()
        self._prompts.clear()
        self._counts.clear()
        self.token_ns = self.usual_ns = 0.0

    def _floor_ns(self, length: int) -> float:
        floors = [
            least_ns * 2 ** ((length - other) / _CLASSES) if length > other else least_ns
            for other, least_ns in self._least.items()
        ]
        return min(floors)

    def _speed(self) -> float:
        known = [length for length, count in self._counts.items() if count >= _ENOUGH]
        if not known:
            return 0.0
        base = min(known, key=lambda length: self._least[length])
        base_ns, shortest = self._least[base], self._prompts[base]
        bound = max(_LONGER * shortest, self._prompts[max(known)] / _LONGER)
        slopes = [
            (self._least[length] - base_ns) / (self._prompts[length] - shortest)
            for length in known
            if self._prompts[length] >= bound
        ]
        return min(slopes) if slopes and self.usual_ns >= _PACED * base_ns else 0.0

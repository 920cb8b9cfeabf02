"""Pure. How long a prompt takes to read: the least time to first token at one endpoint.

Two things follow from it. A time to first token beyond the least for a prompt of that length was
spent waiting inside the engine. And the slope of the least times over the lengths is the time of
one more token of a prompt, which predicts when the prompts just sent will have been read.

The slope is the smallest there is, among prompts at least a quarter as long as the longest. Errors
correct themselves: too low a speed, learnt from prompts that waited, empties the engine, and the
next prompt finds it empty; too high a speed holds back too little, and the queue shows elsewhere.
If prompts are so short that a step takes longer than reading most of them, long and short ones
differ only by how many ran beside them: they show no speed.
"""

from math import log2
from typing import Final, final

from flowcontrol.events import Settled
from flowcontrol.flow import Lease

_CLASSES: Final = 2.0
"""Classes per doubling of the length."""
_ENOUGH: Final = 4
"""Prompts of a class before its least time counts for the speed."""
_LONGER: Final = 4.0
"""A prompt that shows the speed is at least so many times as long as the shortest, and at least the
longest divided by it."""
_PACED: Final = 1.3
"""If the usual time is less than so many times the least, the speed is lost in the steps."""
_USUAL: Final = 64.0
"""Prompts over which the usual time is a mean."""
_TOLERATED: Final = 0.5
"""A wait of half the time of the prompt is no queue: it arrived in the middle of a step."""


@final
class FirstTokenTimes:
    """The least time to first token by length of prompt. O(classes), some dozens.

    For a length without a least time, others bound it: a longer prompt takes at least as long, and
    a shorter one at least in proportion. Cached tokens do not count for the length of a prompt.
    """

    __slots__ = ("_counts", "_least", "_prompts", "token_ns", "usual_ns")

    def __init__(self) -> None:
        self._least: dict[int, float] = {}
        """By class of length; each class is longer by a factor of 1.4 than the one before."""
        self._prompts: dict[int, float] = {}
        """Length of the prompt with that least time, by class."""
        self._counts: dict[int, int] = {}
        self.token_ns = 0.0
        """Time of one more token of a prompt; 0: unknown."""
        self.usual_ns = 0.0
        """Mean over recent prompts of the least time for their length; 0: unknown."""

    def learn(self, lease: Lease, settled: Settled) -> float | None:
        """Take in a time to first token; return how much of it was waiting, None if unknown."""
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
        """The least of all, about the time of a step; 0: unknown. O(classes)."""
        return min(self._least.values(), default=0.0)

    def fade(self, growth: float) -> None:
        """Let the least times grow a little, because they may be outdated."""
        for length in self._least:
            self._least[length] *= growth

    def forget(self) -> None:
        """Forget everything learnt."""
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

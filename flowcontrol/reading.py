"""Pure. For which part of the time may prompts be read, as long as a lower band has more of them?

An engine computes step by step. With a step of b that reads no prompt, and prompts that are sent
all the time and take a part s of it, a step takes t = b + s t, that is t = b / (1 - s): four times
as long at s = 0.75, twenty times at 0.95. Where nothing limits s a step reads as much as the engine
lets it, such as 8,192 tokens, in a third of a second. And a person's first token waits for the end
of the step under way, and for a step of its own.

So a lower band is let in only while all prompts together, those of the bands above as well, take no
more than a part s. A job that fills free places has its prompts read a little later. One that waits
for nothing but reading, beside people whose prompts take a part p of the time, takes
(1 - p) / (s - p) times as long. So s is 0.75, and grows to 0.95 within a minute in which a lower
band had places all the time and waited for nothing else.

What it does not see: one long prompt is a long step, whatever its share of the time; and where no
speed of prompts is known, nothing is held back.
"""

from typing import Final, final

_LEAST, _MOST = 0.75, 0.95
"""Parts of the time."""
_GROWS_NS: Final = 60_000_000_000
"""How long it takes from one to the other."""
_PAUSE_NS: Final = 1_000_000_000
"""After so long without a wait for reading, the next one is the first."""
_OWED_NS: Final = 2_000_000_000
"""No lower band is held back for longer, whatever was sent: bands above may send too much."""


@final
class ReadingShare:
    """Says when the prompts that were sent leave time for those of a lower band. O(1)."""

    def __init__(self) -> None:
        self.until_ns = 0
        """Until then prompts that were sent take all of their part of the time."""
        self._since_ns = self._held_ns = self._seen_ns = -_PAUSE_NS - 1
        """When a lower band began to wait for nothing but reading; when it was last seen to; and
        when it was last seen to wait at all."""

    def sent(self, reading_ns: float, now_ns: int) -> None:
        """Take in a prompt that keeps all endpoints together from others for so long."""
        grown = min(1.0, (self._held_ns - self._since_ns) / _GROWS_NS)
        share = _LEAST + grown * (_MOST - _LEAST)
        until_ns = max(self.until_ns, now_ns) + round(reading_ns / share)
        self.until_ns = min(until_ns, now_ns + _OWED_NS)

    def holds(self, now_ns: int) -> bool:
        """Whether a lower band, which has a place, has to wait for prompts to be read."""
        self._seen_ns = now_ns
        if self.until_ns <= now_ns:
            return False
        if now_ns - self._held_ns > _PAUSE_NS:
            self._since_ns = now_ns
        self._held_ns = now_ns
        return True

    def filled(self, now_ns: int) -> None:
        """Note that a lower band waits for a place."""
        self._seen_ns = now_ns
        self._since_ns = self._held_ns

    def is_shared(self, now_ns: int) -> bool:
        """Whether a lower band had to wait lately."""
        return now_ns - self._seen_ns <= _PAUSE_NS

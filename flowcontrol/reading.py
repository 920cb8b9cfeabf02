"""Pure. Which part of the time may the endpoints spend on reading prompts of a lower band?

An engine computes step by step. Let a step take b if it reads no prompt, and let reading take a
part s of the time. Then a step takes t = b + s t, that is t = b / (1 - s): four times as long at
s = 0.75, twenty times at 0.95. If nothing limits s, a step reads as much as the engine allows, such
as 8,192 tokens, which takes a third of a second. A person's first token waits for the end of the
step under way, and then for a step of its own.

So a lower band is dispatched only while all prompts together, those of higher bands included, take
at most a part s of the time. A job that fills free places has its prompts read a little later. A
job that waits for nothing but reading, beside people whose prompts take a part p of the time, takes
(1 - p) / (s - p) times as long. So s is 0.75, and grows to 0.95 within a minute in which a lower
band always had places and waited for reading only.

What it does not see: one long prompt is a long step, whatever its share of the time. While the
speed of prompts is unknown, nothing is held back.
"""

from typing import Final, final

_LEAST, _MOST = 0.75, 0.95
"""Part of the time that may go into reading: at first, and at most."""
_GROWS_NS: Final = 60_000_000_000
"""Time in which it grows from one to the other."""
_PAUSE_NS: Final = 1_000_000_000
"""A wait for reading so long after the last one starts the growth again."""
_OWED_NS: Final = 2_000_000_000
"""A lower band is held back for at most so long, however many prompts higher bands send."""


@final
class ReadingShare:
    """Decides when a lower band may have prompts read. O(1)."""

    def __init__(self) -> None:
        self.until_ns = 0
        """Until then the prompts already sent use up their part of the time."""
        self._since_ns = self._held_ns = self._seen_ns = -_PAUSE_NS - 1
        """When a lower band began to wait for reading only; when it last did; and when one last
        waited at all."""

    def sent(self, reading_ns: float, now_ns: int) -> None:
        """Count a prompt whose reading occupies all endpoints together for so long."""
        grown = min(1.0, (self._held_ns - self._since_ns) / _GROWS_NS)
        share = _LEAST + grown * (_MOST - _LEAST)
        until_ns = max(self.until_ns, now_ns) + round(reading_ns / share)
        self.until_ns = min(until_ns, now_ns + _OWED_NS)

    def holds(self, now_ns: int) -> bool:
        """Whether a lower band with a free place must wait for prompts to be read."""
        self._seen_ns = now_ns
        if self.until_ns <= now_ns:
            return False
        if now_ns - self._held_ns > _PAUSE_NS:
            self._since_ns = now_ns
        self._held_ns = now_ns
        return True

    def filled(self, now_ns: int) -> None:
        """Note that a lower band waits for a place, not for reading."""
        self._seen_ns = now_ns
        self._since_ns = self._held_ns

    def is_shared(self, now_ns: int) -> bool:
        """Whether a lower band has waited within the last second."""
        return now_ns - self._seen_ns <= _PAUSE_NS

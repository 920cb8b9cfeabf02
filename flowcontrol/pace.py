"""Pure. Prompts are sent one after the other: when those that were sent will have been read.

`auto` derives why. The speed is the one that the engine has shown (`prefill`); while it is not
known, nothing is held back.
"""

from typing import Final, final

from flowcontrol.prefill import FirstTokenTimes

_BACKLOG: Final = 0.25
"""Work on prompts that may stand before the next one, in usual times to first token."""


@final
class PromptPace:
    """The prompts that were sent to one place, by their lengths. O(1), and O(classes) a prompt.

    Args:
        times: how fast prompts are read there.
        now_ns: the time.
    """

    __slots__ = (
        "_held_until_ns",
        "_read_ns",
        "_reading_until_ns",
        "_times",
        "is_held",
        "is_reading",
    )

    def __init__(self, times: FirstTokenTimes, now_ns: int) -> None:
        self._times = times
        self.is_held = False
        """Whether prompts that were sent have to be read before the next."""
        self.is_reading = False
        """Whether any of them is still being read."""
        self._held_until_ns = self._reading_until_ns = now_ns
        """When either is over."""
        self._read_ns = now_ns
        """When all are expected to be read, by their lengths alone."""

    def sent(self, reading_ns: float, now_ns: int) -> None:
        """Let the next prompt wait until most of those sent before are read.

        The last of them is read in the step after the one under way, and that takes some time, too.

        Args:
            reading_ns: how long this one takes.
            now_ns: the time.
        """
        if not self._times.token_ns:
            return
        if self._read_ns < now_ns:
            self._read_ns = now_ns
        self._read_ns += round(reading_ns)
        self._held_until_ns = self._read_ns - round(_BACKLOG * self._times.usual_ns)
        self._reading_until_ns = self._read_ns + round(self._times.least_ns)
        self.read(now_ns)

    def read(self, now_ns: int) -> None:
        """Let prompts be read until now."""
        self.is_held = self._held_until_ns > now_ns
        self.is_reading = self._reading_until_ns > now_ns

    @property
    def next_ns(self) -> int:
        """When the next prompt may be sent, or else when all are read."""
        return self._held_until_ns if self.is_held else self._reading_until_ns

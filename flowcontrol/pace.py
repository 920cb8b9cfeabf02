"""Pure. Paces prompts to one endpoint: the next is sent when those before are nearly read.

Theory: `auto`. The speed is the one that the engine has shown (`prefill`). While that is unknown,
nothing is held back.
"""

from typing import Final, final

from flowcontrol.prefill import FirstTokenTimes

_BACKLOG: Final = 0.25
"""Reading that may be left when the next prompt is sent, in usual times to first token."""


@final
class PromptPace:
    """The prompts that one place is reading. O(1), and O(classes) for each prompt.

    Args:
        times: how fast prompts are read there.
        now_ns: the time, monotonic.
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
        """Whether prompts must be read before the next is sent."""
        self.is_reading = False
        """Whether any prompt is still being read."""
        self._held_until_ns = self._reading_until_ns = now_ns
        """When either ends."""
        self._read_ns = now_ns
        """When all should be read, by their lengths alone."""

    def sent(self, reading_ns: float, now_ns: int) -> None:
        """Count a prompt; the next has to wait until this one is nearly read.

        The last prompt is read in the step after the one under way, which takes a step's time more.

        Args:
            reading_ns: how long this prompt takes to read.
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
        """Let time pass."""
        self.is_held = self._held_until_ns > now_ns
        self.is_reading = self._reading_until_ns > now_ns

    @property
    def next_ns(self) -> int:
        """When the next prompt may be sent; when all are read, if it may be sent already."""
        return self._held_until_ns if self.is_held else self._reading_until_ns

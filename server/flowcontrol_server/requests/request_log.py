"""The canonical log lines of requests: formatted as requests end, and written many at once."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, final

from flowcontrol.events import Decision
from flowcontrol_server.requests.log_line import request_line
from flowcontrol_server.requests.parked import Parked

_SECOND_NS: Final = 1_000_000_000
_THREE: Final = tuple(f"{number:03d}" for number in range(1000))
"""Numbers of three digits, formatted once."""


@final
class RequestLog:
    """The canonical log lines of requests that are decided and have left.

    Lines are formatted as requests end, and written many at once, a moment later. Passing each
    through structlog's processors costs as much as all other work for a request.

    Args:
        soon: calls its argument a moment later.
        write: writes lines.
        is_wanted: whether to write lines at all.
    """

    def __init__(
        self,
        soon: Callable[[Callable[[], None]], object],
        write: Callable[[str], None],
        *,
        is_wanted: bool,
    ) -> None:
        self._soon = soon
        self._write = write
        self._is_wanted = is_wanted
        self._lines: list[str] = []
        self._second = 0
        self._written = ""

    def request_ended(
        self, parked: Parked, decision: Decision, *, continue_on_fault: bool = False
    ) -> None:
        """Add the line of a request that is decided and has left.

        Args:
            parked: the request.
            decision: the decision about it, the last if there were two.
            continue_on_fault: whether the request passed if the engine failed.
        """
        if not self._is_wanted:
            return
        if not self._lines:
            self._soon(self.write)
        self._lines.append(
            request_line(parked, decision, self._timestamp(), continue_on_fault=continue_on_fault)
        )

    def _timestamp(self) -> str:
        """Return the time in structlog's format; the part up to the second is cached."""
        now_ns = time.time_ns()
        second = now_ns // _SECOND_NS
        micros = now_ns % _SECOND_NS // 1000
        if second != self._second:
            self._second = second
            self._written = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._written}.{_THREE[micros // 1000]}{_THREE[micros % 1000]}Z"

    def write(self) -> None:
        """Write the lines added so far."""
        lines, self._lines = self._lines, []
        if lines:
            self._write("".join(lines))

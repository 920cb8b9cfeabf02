"""The canonical lines of requests, put together as they end, and written many at once."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, final

from flowcontrol.events import Decision
from flowcontrol_server.requests.gate import Parked
from flowcontrol_server.requests.log_line import request_line

_SECOND_NS: Final = 1_000_000_000
_THREE: Final = tuple(f"{number:03d}" for number in range(1000))
"""Numbers of three digits, made once."""


@final
class RequestLog:
    """The canonical lines of requests that are decided and gone.

    They are put together as requests end, and written many at once, a moment later: through
    structlog's processors, one by one, they cost as much as all else that is done for a request.

    Args:
        soon: calls what it is given a moment later.
        write: takes lines.
        is_wanted: whether lines are to be written at all.
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
        """Take note of a request that is decided and gone.

        Args:
            parked: the request.
            decision: about it, the last if there were two.
            continue_on_fault: when it was the engine that failed, the request was let on.
        """
        if not self._is_wanted:
            return
        if not self._lines:
            self._soon(self.write)
        self._lines.append(
            request_line(parked, decision, self._timestamp(), continue_on_fault=continue_on_fault)
        )

    def _timestamp(self) -> str:
        """Return the time as structlog writes it; of that the second is written once."""
        now_ns = time.time_ns()
        second = now_ns // _SECOND_NS
        micros = now_ns % _SECOND_NS // 1000
        if second != self._second:
            self._second = second
            self._written = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._written}.{_THREE[micros // 1000]}{_THREE[micros % 1000]}Z"

    def write(self) -> None:
        """Write what has been put together so far."""
        lines, self._lines = self._lines, []
        if lines:
            self._write("".join(lines))

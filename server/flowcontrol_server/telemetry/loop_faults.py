"""Failed callbacks on the event loop, our own and those of libraries."""

import asyncio
from collections.abc import Callable
from traceback import walk_tb
from typing import Any, Final, final

import structlog

from flowcontrol.errors import FlowControlError

_OWN_PACKAGES: Final = {name.partition(".")[0] for name in (__name__, FlowControlError.__module__)}
_log = structlog.get_logger()


@final
class LoopFaults:
    """The loop's exception handler.

    A failed callback with any of our code on its stack has left that code half done: the fault is
    reported, and the service ends. A failed callback of a library only concerns that library's own
    state: it is logged and counted, and the service goes on. The service also goes on after a fault
    in a connection, which the loop has closed. Owner: the loop.

    Args:
        fail: ends the service because of our own fault.
    """

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        self.library_faults = 0
        """Failed callbacks of libraries."""
        self._fail = fail

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle a fault that the loop reports."""
        exception = context.get("exception")
        if "handle" in context and isinstance(exception, Exception):
            if _is_ours(exception):
                self._fail(exception)
            else:
                self.library_faults += 1
                message = context.get("message")
                _log.error("library_callback_failed", message=message, exc_info=exception)
        elif "protocol" in context and isinstance(exception, Exception):
            _log.error("connection_failed", exc_info=exception)  # the loop closes it
        else:
            loop.default_exception_handler(context)


def _is_ours(exception: Exception) -> bool:
    """Return whether any of our code was on the stack, below or above the library's."""
    frames = walk_tb(exception.__traceback__)
    names = (frame.f_globals.get("__name__", "") for frame, _line in frames)
    return any(name.partition(".")[0] in _OWN_PACKAGES for name in names)

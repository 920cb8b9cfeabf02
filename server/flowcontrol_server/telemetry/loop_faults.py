"""Callbacks that fail on the event loop, ours and those of libraries."""

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

    A callback that fails with any of our code on its stack has left that half done: it is reported,
    and the service ends. One of a library alone concerns that library's own state: it is logged and
    counted, and the service goes on. So it does after a fault in a connection, which the loop has
    closed. Owner: the loop.

    Args:
        fail: ends the service because of our own fault.
    """

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        self.library_faults = 0
        """Callbacks of libraries that failed."""
        self._fail = fail

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take what the loop says of a fault."""
        exception = context.get("exception")
        if "handle" in context and isinstance(exception, Exception):
            if _is_ours(exception):
                self._fail(exception)
            else:
                self.library_faults += 1
                message = context.get("message")
                _log.error("library_callback_failed", message=message, exc_info=exception)
        elif "protocol" in context and isinstance(exception, Exception):
            _log.error("connection_failed", exc_info=exception)  # and is closed
        else:
            loop.default_exception_handler(context)


def _is_ours(exception: Exception) -> bool:
    """Whether any of our code was on the stack, below or above the library's."""
    frames = walk_tb(exception.__traceback__)
    names = (frame.f_globals.get("__name__", "") for frame, _line in frames)
    return any(name.partition(".")[0] in _OWN_PACKAGES for name in names)

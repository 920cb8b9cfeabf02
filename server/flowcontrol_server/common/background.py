"""Tasks that nothing awaits: a failure is logged at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger()


def in_background(work: Coroutine[Any, Any, None], failure: str) -> asyncio.Task[None]:
    """Start a task; the caller keeps a reference to it.

    Args:
        work: the work; its end, or its cancellation, is not logged.
        failure: the log event if it raises an exception, in the past tense.
    """

    def ended(task: asyncio.Task[None]) -> None:
        """Log the exception, if there is one."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error(failure, exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task

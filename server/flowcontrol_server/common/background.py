"""Tasks that are not awaited: a failure is logged at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger()


def in_background(work: Coroutine[Any, Any, None], failure: str) -> asyncio.Task[None]:
    """Begin work; the caller keeps a reference to the task.

    Args:
        work: may end, or be cancelled, without a word.
        failure: what is logged if it ends by an exception, in the past tense.
    """

    def ended(task: asyncio.Task[None]) -> None:
        """Say so, if it failed."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error(failure, exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task

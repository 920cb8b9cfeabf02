"""One thread for blocking calls, which never delays the end of the process."""

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar, final

Answer = TypeVar("Answer")


@final
class Worker:
    """Runs calls one after the other in a daemon thread; Python waits for an executor's at exit.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def do(self, call: Callable[[], Answer]) -> Answer:
        """Run a call in the thread; return its result, or raise its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(answer: Answer | None, error: Exception | None) -> None:
            """Hand over the result, in the loop's thread."""
            if future.done():
                return  # the caller is gone
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer)  # type: ignore[arg-type]  # its call's answer

        def work() -> None:
            """Run the call, in the worker's thread."""
            try:
                answer, fault = call(), None
            except Exception as error:  # noqa: BLE001 - raised in the caller
                answer, fault = None, error
            try:
                loop.call_soon_threadsafe(settle, answer, fault)
            except RuntimeError:
                return  # the loop has been closed: no caller waits

        self._work.put(work)
        return await future

    def stop(self) -> None:
        """End the thread after the calls already given."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

"""What a source told, in order, and waiting for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar, final

_T = TypeVar("_T")
TIMEOUT_S = 5.0


@final
class Told(Generic[_T]):
    """Collects what a source tells."""

    def __init__(self) -> None:
        self.news: list[_T] = []
        self._came = asyncio.Event()

    def changed(self, news: _T) -> None:
        """Take one piece of news."""
        self.news.append(news)
        self._came.set()

    async def until(self, is_so: Callable[[_T], bool]) -> _T:
        """Wait until the latest news is like this; return it."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.news or not is_so(self.news[-1]):
                self._came.clear()
                await self._came.wait()
        return self.news[-1]

    async def until_equal(self, expected: _T) -> None:
        """Wait until the latest news is this."""
        try:
            await self.until(lambda news: news == expected)
        except TimeoutError:
            assert self.news[-1:] == [expected]
            raise


class _Source(Protocol):
    async def follow(self, changed: Callable[[Any], None], /) -> None: ...


@asynccontextmanager
async def following(source: _Source, told: Told[_T]) -> AsyncIterator[asyncio.Task[None]]:
    """Have a source followed; whatever happens, that goes on to the end of the context."""
    task = asyncio.create_task(_awaited(source.follow(told.changed)))
    try:
        yield task
        assert not task.done(), "following goes on"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _awaited(following: Awaitable[None]) -> None:
    await following


async def eventually(is_so: Callable[[], Any], within_s: float = TIMEOUT_S) -> Any:
    """Ask again and again until the answer is true; return it. For what tells nobody."""
    async with asyncio.timeout(within_s):
        while not (answer := is_so()):  # noqa: ASYNC110 - what it asks about rings no bell
            await asyncio.sleep(0.005)
    return answer

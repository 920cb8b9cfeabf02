"""The values that a source reports, in order, and waits for them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar, final

_T = TypeVar("_T")
TIMEOUT_S = 5.0


@final
class Told(Generic[_T]):
    """Collects the values that a source reports."""

    def __init__(self) -> None:
        self.news: list[_T] = []
        self._came = asyncio.Event()

    def changed(self, news: _T) -> None:
        """Add a reported value."""
        self.news.append(news)
        self._came.set()

    async def until(self, is_so: Callable[[_T], bool]) -> _T:
        """Wait until the latest value satisfies a condition; return it."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.news or not is_so(self.news[-1]):
                self._came.clear()
                await self._came.wait()
        return self.news[-1]

    async def until_equal(self, expected: _T) -> None:
        """Wait until the latest value equals this one."""
        try:
            await self.until(lambda news: news == expected)
        except TimeoutError:
            assert self.news[-1:] == [expected]
            raise


class _Source(Protocol):
    async def follow(self, changed: Callable[[Any], None], /) -> None: ...


@asynccontextmanager
async def following(source: _Source, told: Told[_T]) -> AsyncIterator[asyncio.Task[None]]:
    """Follow a source; this must not end before the context, whatever happens."""
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
    """Poll a condition until it is true; return its value. For changes without notification."""
    async with asyncio.timeout(within_s):
        while not (answer := is_so()):  # noqa: ASYNC110 - what it asks about rings no bell
            await asyncio.sleep(0.005)
    return answer

"""The HTTP port: /metrics, /healthz, /readyz."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, final

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from flowcontrol.errors import NotRunningError

_SHARE_MAX: Final = 0.1
"""Most of the time that rendering may take, for any number of scrapes."""


@final
class _Families:
    """Collected metric families, in the form that prometheus_client renders."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """Return the families."""
        return self._families


@final
class Exposition:
    """Renders the metrics once for all concurrent requests, off the loop, within a share of time.

    Metrics are never older than the request for them: a request that comes while they are rendered
    waits for the next ones.

    Args:
        collect: gathers the metrics; may raise NotRunningError.
    """

    def __init__(self, collect: Callable[[], Awaitable[CollectorRegistry]]) -> None:
        self._collect = collect
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None
        self._not_before_s = 0.0

    async def body(self) -> bytes:
        """Return the metrics of a moment after this call.

        Raises:
            NotRunningError: the processor has ended.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._render())
        return await asyncio.shield(self._next)

    async def _render(self) -> bytes:
        async with self._turn:
            await asyncio.sleep(self._not_before_s - time.monotonic())
            self._next = None  # requests from now on wait for the next
            began_s = time.monotonic()
            try:
                # Collectors run in the loop; the thread renders copies.
                families = _Families(list((await self._collect()).collect()))
                return await asyncio.to_thread(generate_latest, families)
            finally:
                ended_s = time.monotonic()
                self._not_before_s = ended_s + (ended_s - began_s) * (1 / _SHARE_MAX - 1)


def web_application(
    collect: Callable[[], Awaitable[CollectorRegistry]],
    is_live: Callable[[], bool],
    is_ready: Callable[[], bool],
    middlewares: Iterable[Middleware] = (),
) -> web.Application:
    """Return the application.

    Args:
        collect: gathers the metrics; may raise NotRunningError.
        is_live: false once the processor has failed.
        is_ready: false also while draining.
        middlewares: applied to all pages, outermost first.
    """
    exposition = Exposition(collect)

    async def metrics(_request: web.Request) -> web.Response:
        """Render the metrics."""
        try:
            body = await exposition.body()
        except NotRunningError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        return web.Response(body=body, headers={"content-type": CONTENT_TYPE_LATEST})

    def health(is_well: Callable[[], bool]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_request: web.Request) -> web.Response:
            """Answer 200 or 503."""
            if is_well():
                return web.Response(text="ok\n")
            return web.Response(status=503, text="not serving\n")

        return handle

    application = web.Application(middlewares=middlewares)
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", health(is_live))
    application.router.add_get("/readyz", health(is_ready))
    return application

"""The HTTP port: /metrics, /healthz, /readyz."""

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from flowcontrol.errors import NotRunningError


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
        middlewares: what stands before the pages, outermost first.
    """

    async def metrics(_request: web.Request) -> web.Response:
        """Render the metrics."""
        try:
            registry = await collect()
        except NotRunningError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        body = generate_latest(registry)
        return web.Response(body=body, headers={"content-type": CONTENT_TYPE_LATEST})

    def health(is_well: Callable[[], bool]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_request: web.Request) -> web.Response:
            """Say yes or no."""
            if is_well():
                return web.Response(text="ok\n")
            return web.Response(status=503, text="not serving\n")

        return handle

    application = web.Application(middlewares=middlewares)
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", health(is_live))
    application.router.add_get("/readyz", health(is_ready))
    return application

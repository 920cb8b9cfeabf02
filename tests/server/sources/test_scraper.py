"""Asking endpoints for their load over real HTTP, whatever they answer."""

import asyncio
import resource
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from flowcontrol.events import LoadObserved
from flowcontrol_server.config.sources import Load
from flowcontrol_server.sources import scraper as scraper_module
from flowcontrol_server.sources.engine_metrics import Engine, EngineLoad, read_load
from flowcontrol_server.sources.health import EndpointHealth
from flowcontrol_server.sources.scraper import PAGE_BYTES_MAX, Scraper, ScrapeResult
from tests.support.certificates import Authority, write_pair
from tests.support.ports import free_port
from tests.support.told import Told, eventually

PAGE = b"vllm:num_requests_waiting 3\nvllm:num_requests_running 8\nvllm:kv_cache_usage_perc 0.5\n"
FAST: dict[str, Any] = {"interval": "10ms", "timeout": "200ms", "scrapesPerSecondMax": 10_000}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def well(_request: web.Request) -> web.Response:
    """A metrics page as it should be."""
    return web.Response(body=PAGE)


async def hung(_request: web.Request) -> web.Response:
    """No answer at all."""
    await asyncio.Event().wait()
    raise AssertionError


async def hung_in_the_middle(request: web.Request) -> web.StreamResponse:
    """A page that never ends, and brings nothing more."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(PAGE)
    await asyncio.Event().wait()
    return response


async def huge(request: web.Request) -> web.StreamResponse:
    """A page that never ends, and brings ever more."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(PAGE)
    for _ in range(2 * PAGE_BYTES_MAX // 65536):
        await response.write(b"#" * 65536)
    return response


async def cut(request: web.Request) -> web.StreamResponse:
    """A page that breaks off."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(PAGE)
    assert request.transport is not None
    request.transport.abort()
    return response


async def garbage(_request: web.Request) -> web.Response:
    """Something else than a page."""
    return web.Response(body=b"\0\xff" * 1000)


async def compressed(_request: web.Request) -> web.Response:
    """A page that nobody asked to be compressed."""
    return web.Response(body=b"\x1f\x8b" + b"\0" * 100, headers={"Content-Encoding": "gzip"})


async def elsewhere(request: web.Request) -> web.Response:
    """A redirection."""
    raise web.HTTPFound(request.url.with_path("/other"))


async def failing(_request: web.Request) -> web.Response:
    """An error."""
    return web.Response(status=500, body=PAGE)


@asynccontextmanager
async def endpoint(handle: Handler, path: str = "/metrics") -> AsyncIterator[str]:
    """An endpoint on a real port."""
    application = web.Application()
    application.router.add_get(path, handle)
    async with TestServer(application, handler_cancellation=True) as server:
        yield f"{server.host}:{server.port}"


Changes = list[tuple[str, bool]]


@asynccontextmanager
async def asking(
    *addresses: str, responses_are_reported: bool = False, **settings: Any
) -> AsyncIterator[tuple[Scraper, Told[LoadObserved], Changes]]:
    """A scraper that asks these, what it observed, and who went down or came up."""
    told: Told[LoadObserved] = Told()
    changes: Changes = []
    load = Load(**{**FAST, **settings})
    health = EndpointHealth(
        load.unreachable_after, lambda address, is_up: changes.append((address, is_up))
    )
    health.watch(addresses)
    scraper = Scraper(load, told.changed, health, responses_are_reported=responses_are_reported)
    scraper.ask(addresses)
    try:
        yield scraper, told, changes
    finally:
        await scraper.close()


class TestLoad:
    """What is told."""

    async def test_observed(self) -> None:
        """A page becomes a fact, again and again."""
        async with endpoint(well) as address, asking(address) as (scraper, told, changes):
            await eventually(lambda: len(told.news) >= 3)

            assert told.news[0] == LoadObserved(address, waiting=3, running=8, kv_usage=0.5)
            assert scraper.results[ScrapeResult.OK] >= 3
            assert changes == []

    @pytest.mark.parametrize(("size", "is_on_loop"), [(len(PAGE), True), (200_000, False)])
    async def test_large_pages(
        self, monkeypatch: pytest.MonkeyPatch, size: int, *, is_on_loop: bool
    ) -> None:
        """A large page is read by another thread: it does not hold up the loop."""
        readers = set[int]()

        def reading(page: bytes, engine: Engine | None = None) -> EngineLoad | None:
            """Note which thread reads."""
            readers.add(threading.get_ident())
            return read_load(page, engine)

        async def large(_request: web.Request) -> web.Response:
            """A metrics page of that size."""
            return web.Response(body=PAGE.rjust(size, b"\n"))

        monkeypatch.setattr(scraper_module, "read_load", reading)
        async with endpoint(large) as address, asking(address) as (_scraper, told, _changes):
            await told.until(lambda fact: fact.waiting == 3)

        assert (threading.get_ident() in readers) is is_on_loop

    async def test_path_and_engine(self) -> None:
        """The page may be elsewhere; of another engine than expected it says nothing."""
        async with endpoint(well, "/stats") as address:
            async with asking(address, path="/stats", engine="vllm") as (_scraper, told, _changes):
                await told.until(lambda fact: fact.waiting == 3)
            async with asking(address, path="/stats", engine="tgi") as (scraper, told, _changes):
                await eventually(lambda: scraper.results[ScrapeResult.NO_LOAD])

                assert told.news == []

    async def test_port(self) -> None:
        """Where the page has a port of its own, the fact is still about the endpoint."""
        async with endpoint(well) as address:
            port = int(address.rpartition(":")[2])
            async with asking("127.0.0.1:1", port=port) as (_scraper, told, _changes):
                fact = await told.until(lambda fact: fact.waiting == 3)

                assert fact.address == "127.0.0.1:1"

    async def test_ollama(self) -> None:
        """A server without metrics is only asked whether it is there."""
        async with AsyncExitStack() as running:
            address = await running.enter_async_context(endpoint(garbage, "/"))
            asked = asking(address, engine="ollama")
            scraper, told, changes = await running.enter_async_context(asked)
            await eventually(lambda: scraper.results[ScrapeResult.OK] >= 3)

            assert (told.news, changes) == ([], [])


BAD: dict[str, tuple[Handler, ScrapeResult]] = {
    "hung": (hung, ScrapeResult.TIMEOUT),
    "hung in the middle": (hung_in_the_middle, ScrapeResult.TIMEOUT),
    "huge": (huge, ScrapeResult.TOO_LARGE),
    "cut": (cut, ScrapeResult.BROKEN),
    "garbage": (garbage, ScrapeResult.NO_LOAD),
    "compressed": (compressed, ScrapeResult.NO_LOAD),
    "elsewhere": (elsewhere, ScrapeResult.STATUS),
    "failing": (failing, ScrapeResult.STATUS),
}


class TestBadPages:
    """They cost their endpoint its freshness, and nothing else."""

    @pytest.mark.parametrize(("handle", "result"), BAD.values(), ids=BAD)
    async def test_others_do_not_wait(self, handle: Handler, result: ScrapeResult) -> None:
        """Nothing is told of a bad page; the endpoint stays; another is asked as often as ever."""
        async with AsyncExitStack() as running:
            bad = await running.enter_async_context(endpoint(handle))
            good = await running.enter_async_context(endpoint(well))
            scraper, told, changes = await running.enter_async_context(asking(bad, good))
            await eventually(lambda: scraper.results[result] >= 3 and len(told.news) >= 3)

            assert {fact.address for fact in told.news} == {good}
            assert scraper.seen[bad].reported_s is None
            assert scraper.seen[bad].result is result
            assert changes == [], "somebody listens there"
            if result is ScrapeResult.TIMEOUT:
                assert len(told.news) > 2 * scraper.results[result], "nobody waits for the slow"

    async def test_many_hang(self) -> None:
        """However many hang, each for long, another is asked as often as ever."""
        async with AsyncExitStack() as running:
            silent = [
                running.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(100)
            ]
            hung = [f"127.0.0.1:{each.getsockname()[1]}" for each in silent]
            good = await running.enter_async_context(endpoint(well))
            asked = asking(good, *hung, timeout="60s")
            scraper, told, changes = await running.enter_async_context(asked)
            await eventually(lambda: len(told.news) >= 10)

            assert scraper.results == {ScrapeResult.OK: len(told.news)}
            assert changes == []

    async def test_said_once(self) -> None:
        """That an endpoint is not heard is said once, and when it is heard again."""
        is_well = False

        async def changing(request: web.Request) -> web.StreamResponse:
            return await (well if is_well else failing)(request)

        with capture_logs() as lines:
            async with endpoint(changing) as address, asking(address) as (scraper, told, _changes):
                await eventually(lambda: scraper.results[ScrapeResult.STATUS] >= 3)
                is_well = True
                await told.until(lambda fact: fact.waiting == 3)
                reported_s = scraper.seen[address].reported_s
                is_well = False
                count = scraper.results[ScrapeResult.STATUS]
                await eventually(lambda: scraper.results[ScrapeResult.STATUS] > count)

                seen = scraper.seen[address]
                assert reported_s is not None
                assert seen.reported_s is not None
                assert reported_s <= seen.reported_s < time.monotonic()
                assert seen.load is not None, "what it last said is still known, and how old it is"
        failed = {
            "event": "endpoint_scrape_failed",
            "endpoint": address,
            "url": f"http://{address}/metrics",
            "result": "status",
            "problem": "HTTP status 500",
            "log_level": "warning",
        }
        recovered = {
            "event": "endpoint_scrape_recovered",
            "endpoint": address,
            "url": f"http://{address}/metrics",
            "log_level": "info",
        }
        assert lines == [failed, recovered, failed]


class TestDown:
    """Nobody listens."""

    async def test_down_and_up(self) -> None:
        """Three attempts at which nobody listens take an endpoint out; an answer brings it back."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        async with asking(address, unreachableAfter=3) as (scraper, _told, changes):
            await eventually(lambda: changes)
            assert changes == [(address, False)]
            assert scraper.results[ScrapeResult.REFUSED] >= 3
            application = web.Application()
            application.router.add_get("/metrics", failing)
            async with TestServer(application, port=port):
                await eventually(lambda: len(changes) == 2)

        assert changes == [(address, False), (address, True)]

    async def test_on_another_port(self) -> None:
        """Nobody listening where the metrics are says nothing of where requests go."""
        async with asking("127.0.0.1:2", port=1) as (scraper, _told, changes):
            await eventually(lambda: scraper.results[ScrapeResult.REFUSED] >= 5)

            assert changes == []


class TestBeforeFirstRequest:
    """An engine whose page has no queue metric before its first request."""

    PYTHON = b"# TYPE python_info gauge\npython_info 1\n"

    @pytest.mark.parametrize("page", [b"", PYTHON])
    async def test_idle_until_served(self, page: bytes) -> None:
        """It counts as idle until it has given a response: a closed gate would never try it."""
        shown = page

        async def changing(_request: web.Request) -> web.Response:
            return web.Response(body=shown)

        async with endpoint(changing) as address:
            asked = asking(address, responses_are_reported=True)
            async with asked as (scraper, told, _changes):
                await eventually(lambda: len(told.news) >= 3)
                idle = LoadObserved(address, 0, None, None)
                assert told.news == [idle] * len(told.news)
                scraper.served(address)
                await eventually(lambda: scraper.results[ScrapeResult.NO_LOAD])
                shown = PAGE
                await told.until(lambda fact: fact.waiting == 3)

    async def test_not_reported(self) -> None:
        """Where no response would end it, nothing is assumed."""

        async def empty(_request: web.Request) -> web.Response:
            return web.Response(body=b"")

        async with endpoint(empty) as address, asking(address) as (scraper, told, _changes):
            await eventually(lambda: scraper.results[ScrapeResult.NO_LOAD] >= 3)

            assert told.news == []

    async def test_not_once_a_load_was_read(self) -> None:
        """A page that has had a queue metric and lost it says nothing."""
        shown = PAGE

        async def changing(_request: web.Request) -> web.Response:
            return web.Response(body=shown)

        async with endpoint(changing) as address:
            asked = asking(address, responses_are_reported=True)
            async with asked as (scraper, told, _changes):
                await told.until(lambda fact: fact.waiting == 3)
                shown = self.PYTHON
                await eventually(lambda: scraper.results[ScrapeResult.NO_LOAD] >= 3)

                assert told.news[-1].waiting == 3


class TestToken:
    """Metrics pages that want a key."""

    async def test_sent(self, tmp_path: Path) -> None:
        """The token in the file is sent, also when it has been renewed."""
        sent: list[str | None] = []

        async def guarded(request: web.Request) -> web.Response:
            sent.append(request.headers.get("Authorization"))
            is_known = sent[-1] in {"Bearer first", "Bearer second"}
            return web.Response(body=PAGE) if is_known else web.Response(status=401)

        path = tmp_path / "token"
        path.write_text("first\n")
        async with endpoint(guarded) as address:
            async with asking(address, tokenFile=str(path)) as (scraper, told, changes):
                await told.until(lambda fact: fact.waiting == 3)
                path.write_text("second")
                await eventually(lambda: "Bearer second" in sent)
                path.write_text("wrong")
                await eventually(lambda: scraper.results[ScrapeResult.STATUS] >= 3)
                problem = f"http://{address}/metrics: HTTP status 401, "
                problem += "the page needs a token (load.tokenFile is sent)"
                assert scraper.seen[address].problem == problem
                path.unlink()
                await eventually(lambda: scraper.results[ScrapeResult.LOCAL] >= 3)
                assert changes == []
            async with asking(address) as (scraper, _told, _changes):
                await eventually(lambda: scraper.seen[address].problem)
                assert scraper.seen[address].problem.endswith("(set load.tokenFile)")

        assert sent[0] == "Bearer first"


class TestOwnFaults:
    """Faults on our own side say nothing about the endpoint: it stays in the pool."""

    async def test_no_file_descriptor(self) -> None:
        """An endpoint that closes each connection stays up while we cannot open another."""

        async def closing(_request: web.Request) -> web.Response:
            return web.Response(body=PAGE, headers={"Connection": "close"})

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with endpoint(closing) as address, asking(address) as (scraper, told, changes):
            await told.until(lambda fact: fact.waiting == 3)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                await eventually(lambda: scraper.results[ScrapeResult.LOCAL] >= 5)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            count = len(told.news)
            await eventually(lambda: len(told.news) > count)

            assert changes == []
            assert scraper.results[ScrapeResult.REFUSED] == 0

    async def test_no_thread(self) -> None:
        """A page for which there is no thread is asked for again: the next one is read."""

        async def large(_request: web.Request) -> web.Response:
            return web.Response(body=PAGE.rjust(200_000, b"\n"))

        none, one = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        none.shutdown()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(none)
        async with endpoint(large) as address, asking(address) as (scraper, told, changes):
            await eventually(lambda: scraper.results[ScrapeResult.LOCAL] >= 2)
            assert "a fault on our side: RuntimeError" in scraper.seen[address].problem
            loop.set_default_executor(one)
            await told.until(lambda fact: fact.waiting == 3)

            assert changes == []

    async def test_untrusted_certificate(self, tmp_path: Path) -> None:
        """An endpoint whose certificate is not trusted answers: it stays up."""
        write_pair(tmp_path, Authority())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
        application = web.Application()
        application.router.add_get("/metrics", well)
        server = TestServer(application, scheme="https")
        await server.start_server(ssl=context)
        try:
            asked = asking(f"127.0.0.1:{server.port}", scheme="https", timeout="2s")
            async with asked as (scraper, told, changes):
                await eventually(lambda: scraper.results[ScrapeResult.CERTIFICATE] >= 5)

                assert (changes, told.news) == ([], [])
        finally:
            await server.close()

    async def test_name_not_resolved(self) -> None:
        """A name that stops resolving is a fault of the name service, not of the endpoint."""
        async with asking("vllm-a.invalid:8000", timeout="5s") as (scraper, _told, changes):
            await eventually(lambda: scraper.results[ScrapeResult.UNRESOLVED] >= 4)

            assert changes == []


class TestRate:
    """How often is asked."""

    async def test_bounded(self) -> None:
        """With many endpoints the interval grows, so that all together keep to the bound."""
        addresses = [f"127.0.0.1:{port}" for port in range(1, 41)]
        async with asking(*addresses, scrapesPerSecondMax=20) as (scraper, _told, _changes):
            assert scraper.interval_s == 2.0
            scraper.ask(addresses[:1])
            assert scraper.interval_s == 0.05
        async with asking(*addresses, interval="3s") as (scraper, _told, _changes):
            assert scraper.interval_s == 3.0

    async def test_out_of_turn(self) -> None:
        """Each endpoint is asked at once, as many as may be in a second, whatever the interval."""
        asked: list[str] = []

        async def note(request: web.Request) -> web.Response:
            asked.append(str(request.url.port))
            return await well(request)

        async with AsyncExitStack() as running:
            addresses = [await running.enter_async_context(endpoint(note)) for _ in range(3)]
            scraper, told, _changes = await running.enter_async_context(
                asking(*addresses, interval="1h", scrapesPerSecondMax=2)
            )
            await scraper.renew()

            assert len(asked) == len(set(asked)) == 2
            assert {fact.address for fact in told.news} == {*sorted(addresses)[:2]}

    async def test_out_of_turn_and_gone(self) -> None:
        """An endpoint that goes meanwhile is forgotten all the same."""
        async with endpoint(hung) as address, asking(address, interval="1h") as (scraper, told, _):
            renewal = asyncio.create_task(scraper.renew())
            await asyncio.sleep(0)
            scraper.ask(())
            await renewal

            assert (scraper.seen, told.news) == ({}, [])

    async def test_who_is_asked(self) -> None:
        """Endpoints that come are asked, those that go are not, and nothing is known of them."""
        async with AsyncExitStack() as running:
            first = await running.enter_async_context(endpoint(well))
            second = await running.enter_async_context(endpoint(well))
            scraper, told, _changes = await running.enter_async_context(asking(first))
            await told.until(lambda fact: fact.address == first)
            scraper.ask([second])
            await told.until(lambda fact: fact.address == second)

            assert set(scraper.seen) == {second}

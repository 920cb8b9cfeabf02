"""Asks the endpoints for their load, each at its own jittered beat, never more often than bounded.

A hung, huge or senseless page costs its endpoint the freshness of its load and nothing else: each
attempt is bounded in time and bytes, none waits for another, and what is not understood is not
told. Nobody listening is another matter: `health` is told of that.

At most one attempt for each endpoint is under way, and in all as many as begin within one timeout:
`scrapesPerSecondMax` times `timeout`, 100 with the defaults, give or take the jitter.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple, final

import aiohttp
import structlog

from flowcontrol.events import LoadObserved
from server.settings_sources import Load
from server.sources.engine_metrics import Engine, EngineLoad, read_load
from server.sources.health import Health

PAGE_BYTES_MAX = 2 * 2**20
"""A page of vLLM's has about 100 KiB; what is larger than this is no metrics page."""
_JITTER = 0.1
_HEADERS = {"Accept": "text/plain", "Accept-Encoding": "identity"}
_log = structlog.get_logger()


class Result(Enum):
    """What became of an attempt."""

    OK = "ok"
    REFUSED = "refused"
    """Nobody listens, or the host cannot be reached."""
    TIMEOUT = "timeout"
    STATUS = "status"
    TOO_LARGE = "too-large"
    NO_LOAD = "no-load"
    """A page that says nothing of a queue."""
    BROKEN = "broken"
    """The answer broke off, or is no HTTP."""


@final
class Seen(NamedTuple):
    """What is known of one endpoint."""

    heard_s: float | None
    """When it last told its load, on the monotonic clock."""
    load: EngineLoad | None
    result: Result | None
    """Of the last attempt."""


_NEVER = Seen(None, None, None)


@final
class Scraper:
    """Asks for metrics pages, over and over. Owner: the loop.

    Args:
        settings: where, how often, and how long to wait.
        observed: told each load.
        health: told whether somebody listens.
    """

    def __init__(
        self, settings: Load, observed: Callable[[LoadObserved], None], health: Health
    ) -> None:
        self.results: Counter[Result] = Counter()
        """What became of all attempts."""
        self._settings = settings
        self._observed = observed
        self._health = health
        self._engine = Engine(settings.engine) if settings.engine in _ENGINES else None
        self._has_pages = settings.engine != "ollama"
        self._chance = random.Random()  # noqa: S311 - spreads requests, keeps no secret
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[str, Seen] = {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def seen(self) -> Mapping[str, Seen]:
        """What is known of each endpoint asked."""
        return self._seen

    def ask(self, addresses: Iterable[str]) -> None:
        """Replace the endpoints asked; must run on the loop."""
        wanted = set(addresses)
        for gone in self._tasks.keys() - wanted:
            self._tasks.pop(gone).cancel()
            del self._seen[gone]
        for address in sorted(wanted - self._tasks.keys()):
            self._seen[address] = _NEVER
            self._tasks[address] = asyncio.create_task(self._follow(address))

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = list(self._tasks.values())
        self.ask(())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    @property
    def interval_s(self) -> float:
        """Between two attempts at one endpoint: as set, or longer to keep the bound on all."""
        shortest_s = len(self._tasks) / self._settings.scrapes_per_second_max
        return max(self._settings.interval / 1e9, shortest_s)

    async def _follow(self, address: str) -> None:
        url = self._url(address)
        await asyncio.sleep(self._chance.random() * self.interval_s)  # not all on one beat
        while True:
            begun_s = time.monotonic()
            result, load = await self._attempt(url)
            self._note(address, result, load)
            beat_s = self.interval_s * (1 + _JITTER * (2 * self._chance.random() - 1))
            await asyncio.sleep(max(0.0, begun_s + beat_s - time.monotonic()))

    def _url(self, address: str) -> str:
        settings = self._settings
        host, _, port = address.rpartition(":")
        path = settings.path or ("/metrics" if self._has_pages else "/")
        return f"{settings.scheme}://{host}:{settings.port or port}{path}"

    async def _attempt(self, url: str) -> tuple[Result, EngineLoad | None]:
        try:
            result, page = await self._fetch(url)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError):
            return Result.REFUSED, None
        except TimeoutError:
            return Result.TIMEOUT, None
        except (aiohttp.ClientError, ValueError):
            return Result.BROKEN, None
        if result is not Result.OK or not self._has_pages:
            return result, None
        load = read_load(page, self._engine)
        return (Result.NO_LOAD, None) if load is None else (Result.OK, load)

    async def _fetch(self, url: str) -> tuple[Result, bytes]:
        async with self._http().get(url, allow_redirects=False, headers=_HEADERS) as response:
            if response.status != 200:  # noqa: PLR2004 - OK
                return Result.STATUS, b""
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > PAGE_BYTES_MAX:
                    return Result.TOO_LARGE, b""
            return Result.OK, bytes(page)

    def _note(self, address: str, result: Result, load: EngineLoad | None) -> None:
        now_s = time.monotonic()
        before = self._seen[address]
        self.results[result] += 1
        heard_s = now_s if result is Result.OK else before.heard_s
        self._seen[address] = Seen(heard_s, load or before.load, result)
        if result is Result.OK and before.result not in {None, Result.OK}:
            _log.info("endpoint_heard_again", endpoint=address)
        elif result is not Result.OK and before.result in {None, Result.OK}:
            _log.warning("endpoint_not_heard", endpoint=address, problem=result.value)
        if self._settings.port is None:  # elsewhere a page says nothing of the server's own port
            if result is Result.REFUSED:
                self._health.missed(address, now_s)
            else:
                self._health.reached(address, now_s)
        if load is not None:
            self._observed(LoadObserved(address, *load))

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout_s = self._settings.timeout / 1e9
            self._session = aiohttp.ClientSession(
                # No limit of its own: whoever waited for those that hang would be heard late.
                connector=aiohttp.TCPConnector(limit=0, limit_per_host=1),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=timeout_s * 0.9),
                auto_decompress=False,
                max_line_size=8190,
                max_field_size=8190,
            )
        return self._session


_ENGINES = frozenset(engine.value for engine in Engine)

"""Scrapes the endpoints' metrics pages, each at a jittered interval, within a total rate.

A page that hangs, is too large or invalid costs its endpoint only the freshness of its load: each
scrape is bounded in time and bytes, none waits for another, and an invalid page is not reported.

`health` gets the results that depend on the endpoint. A refused or unanswered connection is a miss;
any answer proves that the endpoint is reachable. A fault on our own side (no file descriptor left,
no route, a name that does not resolve) is neither, as it would take down every endpoint at once.

At most one scrape of each endpoint is under way, and in total as many as begin within one timeout:
`scrapesPerSecondMax` times `timeout`, 100 with the defaults, give or take the jitter.
"""

import asyncio
import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple, final

import aiohttp
import structlog

from flowcontrol.events import LoadObserved
from flowcontrol_server.common.secret_file import read_secret
from flowcontrol_server.config.sources import Load
from flowcontrol_server.sources.engine_metrics import (
    Engine,
    EngineLoad,
    before_first_request,
    read_load,
)
from flowcontrol_server.sources.health import EndpointHealth

PAGE_BYTES_MAX = 2 * 2**20
"""A page of vLLM has about 100 KiB; a larger response than this is no metrics page."""
_LOOP_BYTES_MAX = 128 << 10
"""A larger page is parsed by a thread: the worst of 2 MiB takes 90 ms, one of this size 6 ms."""
_TOKEN_LENGTHS = range(1, 4097)
PROBLEM_LENGTH_MAX = 500
_DENIED = frozenset((401, 403))
_JITTER = 0.1
_HEADERS = {"Accept": "text/plain", "Accept-Encoding": "identity"}
_log = structlog.get_logger()


class ScrapeResult(Enum):
    """Result of a scrape."""

    OK = "ok"
    REFUSED = "refused"
    """Nothing listens there, or the host does not answer."""
    CERTIFICATE = "certificate"
    """The TLS handshake failed: the certificate is untrusted or has expired, or there is no TLS."""
    UNRESOLVED = "unresolved"
    """The host name could not be resolved."""
    LOCAL = "local"
    """A fault on our side: no file descriptor, no route, no thread."""
    TIMEOUT = "timeout"
    STATUS = "status"
    """An HTTP status other than 200."""
    TOO_LARGE = "too-large"
    NO_LOAD = "no-load"
    """The page has no queue metric."""
    BROKEN = "broken"
    """The connection closed in the middle of the response, or it is not HTTP."""


_MISSES = frozenset((ScrapeResult.REFUSED,))
"""Count against the endpoint."""
_OWN_FAULTS = frozenset((ScrapeResult.UNRESOLVED, ScrapeResult.LOCAL))
"""Independent of the endpoint."""
_PEER_ERRNOS = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)
)
"""Errors of connect(2) that the endpoint or its host caused; all others are faults on our side."""


@final
class Seen(NamedTuple):
    """State of one endpoint."""

    reported_s: float | None
    """When its load was last scraped, on the monotonic clock."""
    load: EngineLoad | None
    result: ScrapeResult | None
    """Result of the last scrape."""
    problem: str = ""
    """Problem of the last scrape, with its URL; empty: none."""


class _Attempt(NamedTuple):
    """Result of one scrape."""

    result: ScrapeResult
    problem: str = ""
    load: EngineLoad | None = None


_NEVER = Seen(None, None, None)


@final
class Scraper:
    """Scrapes metrics pages repeatedly. Owner: the loop.

    Args:
        settings: of the scrapes.
        observed: called with each load.
        health: gets the endpoints that accept or refuse connections.
        responses_are_reported: whether `served` is called for each response.
    """

    def __init__(
        self,
        settings: Load,
        observed: Callable[[LoadObserved], None],
        health: EndpointHealth,
        *,
        responses_are_reported: bool = False,
    ) -> None:
        self.results: Counter[ScrapeResult] = Counter()
        """All scrapes, by result."""
        self._settings = settings
        self._observed = observed
        self._health = health
        self._engine = Engine(settings.engine) if settings.engine in _ENGINES else None
        self._responses_are_reported = responses_are_reported
        self._served: set[str] = set()
        """Endpoints that have given a response, or reported a load, since they came up."""
        self._token_file = settings.token_file
        self._has_pages = settings.engine != "ollama"
        self._chance = random.Random()  # noqa: S311 - spreads requests, keeps no secret
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[str, Seen] = {}
        self._session: aiohttp.ClientSession | None = None
        self.all_attempted = asyncio.Event()
        """Set when each endpoint has been scraped at least once."""

    @property
    def seen(self) -> Mapping[str, Seen]:
        """State of each scraped endpoint."""
        return self._seen

    def ask(self, addresses: Iterable[str]) -> None:
        """Replace the scraped endpoints; must run on the loop."""
        wanted = set(addresses)
        for gone in self._tasks.keys() - wanted:
            self._tasks.pop(gone).cancel()
            del self._seen[gone]
            self._served.discard(gone)
        for address in sorted(wanted - self._tasks.keys()):
            self._seen[address] = _NEVER
            self._tasks[address] = asyncio.create_task(self._follow(address))

    def served(self, address: str) -> None:
        """Record that an endpoint has given a response; from now on its page must have a load."""
        if address in self._tasks:
            self._served.add(address)

    async def close(self) -> None:
        """Stop scraping."""
        tasks = list(self._tasks.values())
        self.ask(())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    @property
    def interval_s(self) -> float:
        """Time between two scrapes of an endpoint: as set, or longer to keep to the total rate."""
        shortest_s = len(self._tasks) / self._settings.scrapes_per_second_max
        return max(self._settings.interval / 1e9, shortest_s)

    async def renew(self) -> None:
        """Scrape the endpoints now, out of turn; return when every scrape has ended.

        These are as many as may be scraped in a second; the others are scraped in their turn.
        """
        scraped = sorted(self._tasks)[: self._settings.scrapes_per_second_max]
        await asyncio.gather(*(self._scrape_once(address) for address in scraped))

    async def _follow(self, address: str) -> None:
        await asyncio.sleep(self._chance.random() * self.interval_s)  # spreads the endpoints
        while True:
            begun_s = time.monotonic()
            await self._scrape_once(address)
            beat_s = self.interval_s * (1 + _JITTER * (2 * self._chance.random() - 1))
            await asyncio.sleep(max(0.0, begun_s + beat_s - time.monotonic()))

    async def _scrape_once(self, address: str) -> None:
        url = self._url(address)
        attempt = await self._attempt(address, url)
        if address in self._tasks:
            self._note(address, url, attempt)

    def _url(self, address: str) -> str:
        settings = self._settings
        host, _, port = address.rpartition(":")
        path = settings.path or ("/metrics" if self._has_pages else "/")
        return f"{settings.scheme}://{host}:{settings.port or port}{path}"

    async def _attempt(self, address: str, url: str) -> _Attempt:
        try:
            return await self._read(address, url)
        except aiohttp.ClientConnectorError as error:
            return _Attempt(_connect_result(error), str(error))
        except aiohttp.ConnectionTimeoutError:
            return _Attempt(ScrapeResult.REFUSED, "the connection timed out")
        except TimeoutError:
            return _Attempt(ScrapeResult.TIMEOUT, "no complete response in time")
        except (aiohttp.ClientError, ValueError) as error:
            return _Attempt(ScrapeResult.BROKEN, str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - the endpoint is scraped again
            return _Attempt(ScrapeResult.LOCAL, f"a fault on our side: {error!r}")

    async def _read(self, address: str, url: str) -> _Attempt:
        """Fetch the page and read it."""
        attempt, page = await self._fetch(url)
        if attempt.result is not ScrapeResult.OK or not self._has_pages:
            return attempt
        if len(page) > _LOOP_BYTES_MAX:
            load = await asyncio.to_thread(read_load, page, self._engine)
        else:
            load = read_load(page, self._engine)
        if load is not None:
            self._served.add(address)
        elif self._is_before_first(address):
            load = before_first_request(page)
        if load is None:
            engine = "any known engine" if self._engine is None else self._engine.value
            return _Attempt(ScrapeResult.NO_LOAD, f"the page has no queue metric of {engine}")
        return attempt._replace(load=load)

    def _is_before_first(self, address: str) -> bool:
        return self._responses_are_reported and address not in self._served

    async def _fetch(self, url: str) -> tuple[_Attempt, bytes]:
        headers = _HEADERS
        if self._token_file is not None:
            try:
                token = await asyncio.to_thread(read_secret, self._token_file, _TOKEN_LENGTHS)
            except (OSError, ValueError) as error:
                return _Attempt(
                    ScrapeResult.LOCAL, f"{self._token_file}: cannot be read: {error}"
                ), b""
            headers = {**_HEADERS, "Authorization": f"Bearer {token}"}
        async with self._http().get(url, allow_redirects=False, headers=headers) as response:
            if response.status != 200:  # noqa: PLR2004 - OK
                hint = ""
                if response.status in _DENIED:
                    sent = "load.tokenFile is sent" if self._token_file else "set load.tokenFile"
                    hint = f", the page needs a token ({sent})"
                return _Attempt(ScrapeResult.STATUS, f"HTTP status {response.status}{hint}"), b""
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > PAGE_BYTES_MAX:
                    return _Attempt(ScrapeResult.TOO_LARGE, f"over {PAGE_BYTES_MAX} bytes"), b""
            return _Attempt(ScrapeResult.OK), bytes(page)

    def _note(self, address: str, url: str, attempt: _Attempt) -> None:
        now_s = time.monotonic()
        before = self._seen[address]
        result, problem, load = attempt
        self.results[result] += 1
        is_ok = result is ScrapeResult.OK
        reported_s = now_s if is_ok else before.reported_s
        text = "" if is_ok else f"{url}: {problem}"[:PROBLEM_LENGTH_MAX]
        self._seen[address] = Seen(reported_s, load or before.load, result, text)
        if before.result is None and all(each.result for each in self._seen.values()):
            self.all_attempted.set()
        if is_ok and before.problem:
            _log.info("endpoint_scrape_recovered", endpoint=address, url=url)
        elif not is_ok and not before.problem:
            _log.warning(
                "endpoint_scrape_failed",
                endpoint=address,
                url=url,
                result=result.value,
                problem=problem,
            )
        if result in _MISSES:
            self._served.discard(address)  # the next process there may be another
        if self._settings.port is None:  # another port proves nothing about the server's own
            if result in _MISSES:
                self._health.missed(address, now_s)
            elif result not in _OWN_FAULTS:
                self._health.reached(address, now_s)
        if load is not None:
            self._observed(LoadObserved(address, *load))

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout_s = self._settings.timeout / 1e9
            self._session = aiohttp.ClientSession(
                # No limit here: endpoints that hang would delay the others.
                connector=aiohttp.TCPConnector(limit=0, limit_per_host=1),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=timeout_s * 0.9),
                auto_decompress=False,
                max_line_size=8190,
                max_field_size=8190,
            )
        return self._session


def _connect_result(error: aiohttp.ClientConnectorError) -> ScrapeResult:
    """Return the result of a failed connection, by its cause."""
    if isinstance(error, aiohttp.ClientSSLError):
        return ScrapeResult.CERTIFICATE
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return ScrapeResult.UNRESOLVED
    return ScrapeResult.REFUSED if error.os_error.errno in _PEER_ERRNOS else ScrapeResult.LOCAL


_ENGINES = frozenset(engine.value for engine in Engine)

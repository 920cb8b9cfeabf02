"""Runs the sources that the settings name, and turns what they tell into facts for the inbox."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, final

import structlog

from flowcontrol.config import Role
from flowcontrol.events import EndpointsChanged, Fact, LoadObserved, ObjectivesChanged
from server.settings import Settings
from server.settings_sources import Endpoints, Load
from server.sources.backoff import Backoff
from server.sources.dns import DnsEndpoints
from server.sources.endpoint_file import EndpointFile
from server.sources.endpoints import Endpoint, Roster
from server.sources.folder import ObjectiveFolder
from server.sources.health import Health
from server.sources.kube_api import KubeApi
from server.sources.kube_endpoints import KubeEndpoints
from server.sources.kube_objectives import KubeObjectives
from server.sources.objective_store import ObjectiveStore
from server.sources.orca import read_report
from server.sources.scraper import Result, Scraper, Seen

PATIENCE_S = 10.0
"""How long to wait at the start for what the sources know. After that requests are served by what
is known; what is not yet arrives as it comes."""
RESTART_FIRST_S = 1.0
RESTART_LONGEST_S = 60.0
_log = structlog.get_logger()


class Source(Protocol):
    """Watches one place."""

    @property
    def error_count(self) -> int:
        """Mistakes and failures met since the start."""

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong now, by what it is about."""

    async def follow(self, changed: Callable[[Any], None]) -> None:
        """Tell the whole of what it knows whenever that differs, until cancelled."""


class _Wanted(NamedTuple):
    """A source that the settings name."""

    key: object
    """Equal as long as the source need not be another."""
    make: Callable[[], Awaitable[tuple[Source, KubeApi | None]]]


@final
@dataclass(slots=True, eq=False)
class _Running:
    """A source at work."""

    key: object
    source: Source
    connection: KubeApi | None
    task: asyncio.Task[None] | None = None
    has_told: asyncio.Event = field(default_factory=asyncio.Event)


@final
@dataclass(frozen=True, slots=True)
class FeedSnapshot:
    """What the sources have gone through."""

    errors: Mapping[str, int]
    """Mistakes and failures since the start, by source."""
    problems: Sequence[tuple[str, str, str]]
    """What is wrong now: the source, what it is about, and the mistake."""
    down: frozenset[str]
    """Endpoints known that are down."""
    scrapes: Mapping[Result, int] | None
    """Attempts to ask an endpoint for its load; None if nobody asks."""
    seen: Mapping[str, Seen]
    """What is known of each endpoint asked."""


@final
class Feed:
    """All sources of one service. Owner: the loop.

    Args:
        post: takes the facts.
    """

    def __init__(self, post: Callable[[Fact], None]) -> None:
        self._post = post
        self._running: dict[str, _Running] = {}
        """By section and source, such as endpoints.dns."""
        self._past_errors: dict[str, int] = {}
        """Of sources no longer asked."""
        self._roster = Roster(self._roster_changed)
        self._told: tuple[Endpoint, ...] | None = None
        self._roles = dict[str, Role]()
        self._load: Load | None = None
        self._health = Health(1, lambda address, is_up: self._health_changed(address, is_up=is_up))
        self._resumption: asyncio.TimerHandle | None = None
        """When the next endpoint out for failing may try again."""
        self._scraper: Scraper | None = None
        self._chance = random.Random()  # noqa: S311 - spreads retries, keeps no secret

    # What there is to see

    @property
    def store(self) -> ObjectiveStore | None:
        """The objectives that may be changed by the API, if that is where they come from."""
        running = self._running.get("objectives.api")
        source = None if running is None else running.source
        return source if isinstance(source, ObjectiveStore) else None

    @property
    def scraper(self) -> Scraper | None:
        """Who asks the endpoints for their load, if anybody does."""
        return self._scraper

    @property
    def down(self) -> frozenset[str]:
        """Endpoints known that are down."""
        return self._roster.down

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong now: the source, what it is about, and the mistake."""
        for name, running in sorted(self._running.items()):
            for about, problem in running.source.problems.items():
                yield name, about, problem

    def error_counts(self) -> Mapping[str, int]:
        """Return mistakes and failures since the start, by source."""
        counts = dict(self._past_errors)
        for name, running in self._running.items():
            counts[name] = counts.get(name, 0) + running.source.error_count
        return counts

    def snapshot(self) -> FeedSnapshot:
        """Return what the sources have gone through so far."""
        scraper = self._scraper
        return FeedSnapshot(
            self.error_counts(),
            tuple(self.problems()),
            self.down,
            None if scraper is None else scraper.results,
            {} if scraper is None else scraper.seen,
        )

    # What is told

    def outcome(self, address: str, now_s: float, *, is_failure: bool) -> None:
        """Take in what became of a request: whether it ended in 5xx or broke off at the server."""
        self._health.outcome(address, now_s, is_failure=is_failure)
        if is_failure:
            self._await_resumption()

    def load_reported(self, address: str, headers: Mapping[str, str]) -> None:
        """Take in the load report among the headers of a response, if there is one in full."""
        load = read_report(headers)
        if load is not None:
            self._post(LoadObserved(address, *load))

    async def start(self, settings: Settings) -> None:
        """Begin; return when every source has told what it knows, or patience is at its end.

        Raises:
            FlowControlError: a source cannot be had at all; none has begun.
        """
        await self.apply(settings)
        first = {
            name: asyncio.ensure_future(running.has_told.wait())
            for name, running in self._running.items()
        }
        if first:
            _told, untold = await asyncio.wait(first.values(), timeout=PATIENCE_S)
            for each in untold:
                each.cancel()
            if untold:
                names = [name for name, each in first.items() if each in untold]
                _log.warning("sources_not_known_yet", sources=names)

    async def apply(self, settings: Settings) -> None:
        """Change to other settings: a source that stays the same is not disturbed.

        What an old source knew stays in force until the new one in its place tells.

        Raises:
            FlowControlError: a source cannot be had at all; nothing has changed.
        """
        wanted = _wanted(settings)
        made: dict[str, _Running] = {}
        try:
            for name, (key, make) in wanted.items():
                if name not in self._running or self._running[name].key != key:
                    made[name] = _Running(key, *await make())
        except BaseException:
            for running in made.values():
                await _disconnect(running)
            raise
        for name in [*(self._running.keys() - wanted.keys()), *(self._running.keys() & made)]:
            await self._end(name)
        await self._change_load(settings.scraping)
        self._change_endpoints(settings.endpoints)
        for name, running in made.items():
            self._begin(name, running)

    async def stop(self) -> None:
        """End every source."""
        for name in list(self._running):
            await self._end(name)
        await self._end_scraping()
        if self._resumption is not None:
            self._resumption.cancel()

    # One source

    def _begin(self, name: str, running: _Running) -> None:
        self._running[name] = running
        running.task = asyncio.create_task(self._keep_following(name, running))

    async def _end(self, name: str) -> None:
        running = self._running.pop(name)
        if running.task is not None:
            running.task.cancel()
            await asyncio.wait((running.task,))
        self._past_errors[name] = self._past_errors.get(name, 0) + running.source.error_count
        await _disconnect(running)

    async def _keep_following(self, name: str, running: _Running) -> None:
        """Follow a source whatever happens: one that fails is started again."""
        backoff = Backoff(RESTART_FIRST_S, RESTART_LONGEST_S, self._chance.random)

        def changed(news: Any) -> None:
            if name.startswith("objectives."):
                self._objectives_changed(news)
            else:
                self._roster.know(name, news)
            running.has_told.set()
            backoff.reset()

        while True:
            try:
                await running.source.follow(changed)
            except Exception:  # noqa: BLE001 - a mistake of ours, said, and no reason to end serving
                self._past_errors[name] = self._past_errors.get(name, 0) + 1
                _log.error("source_failed", source=name, exc_info=True)
            await asyncio.sleep(backoff.next_s())

    # Facts

    def _objectives_changed(self, priorities: Mapping[str, int]) -> None:
        self._post(ObjectivesChanged(priorities))
        _log.info("objectives_changed", objectives=dict(priorities))

    def _roster_changed(self) -> None:
        self._health.watch(self._roster.addresses)
        if self._scraper is not None:
            self._scraper.ask(self._roster.addresses)
        present = tuple(
            each._replace(role=self._roles.get(each.address, each.role))
            for each in self._roster.present
        )
        if present != self._told:
            self._told = present
            roles = {each.address: each.role for each in present if each.role is not Role.BOTH}
            self._post(EndpointsChanged(tuple(each.address for each in present), roles))
            _log.info("endpoints_changed", endpoints=[each.address for each in present])

    def _change_endpoints(self, endpoints: Endpoints) -> None:
        """Take the static endpoints and the roles, and forget what sources no longer named knew."""
        self._roles = endpoints.role_of()
        if endpoints.static is None:
            self._roster.forget("endpoints.static")
        else:
            self._roster.know("endpoints.static", (Endpoint(str(a)) for a in endpoints.static))
        for name, source in (
            ("endpoints.dns", endpoints.dns),
            ("endpoints.file", endpoints.file),
            ("endpoints.kubernetes", endpoints.kubernetes),
        ):
            if source is None:
                self._roster.forget(name)
        if self._told is not None:  # other roles of the same endpoints are news, too
            self._roster_changed()

    def _health_changed(self, address: str, *, is_up: bool) -> None:
        _log.warning("endpoint_up" if is_up else "endpoint_down", endpoint=address)
        self._roster.mark(address, is_up=is_up)

    def _await_resumption(self) -> None:
        """Let time pass for whoever is out for failing, also where nobody asks for loads."""
        if self._resumption is not None:
            self._resumption.cancel()
        until_s = self._health.next_s
        if until_s is None:
            self._resumption = None
        else:
            wait_s = max(0.0, until_s - time.monotonic())
            self._resumption = asyncio.get_running_loop().call_later(wait_s, self._resume)

    def _resume(self) -> None:
        self._health.advance(time.monotonic())
        self._await_resumption()

    async def _change_load(self, load: Load | None) -> None:
        if load == self._load:
            return
        self._load = load
        await self._end_scraping()
        if load is None or load.port is not None:
            self._health.forget_misses(time.monotonic())
        if load is not None:
            self._health.misses_max = load.unreachable_after
            self._scraper = Scraper(load, self._post, self._health)
            self._scraper.ask(self._roster.addresses)

    async def _end_scraping(self) -> None:
        if self._scraper is not None:
            await self._scraper.close()
            self._scraper = None


def _wanted(settings: Settings) -> dict[str, _Wanted]:
    """Return the sources that the settings name, static endpoints apart."""
    pool, kubernetes = settings.pool, settings.kubernetes
    objectives, endpoints = settings.objectives, settings.endpoints
    wanted: dict[str, _Wanted] = {}
    if (directory := objectives.directory) is not None:
        wanted["objectives.directory"] = _plain(directory, lambda: ObjectiveFolder(directory, pool))
    if (api := objectives.api) is not None:
        file = api.file
        wanted["objectives.api"] = _plain(file, lambda: ObjectiveStore(file, pool))
    if (status := objectives.kubernetes) is not None:

        async def follow_objectives() -> tuple[Source, KubeApi]:
            api = await KubeApi.connect(kubernetes)
            return KubeObjectives(api, pool, writes_status=status.write_status), api

        wanted["objectives.kubernetes"] = _Wanted((kubernetes, status), follow_objectives)
    if (dns := endpoints.dns) is not None:
        wanted["endpoints.dns"] = _plain(dns, lambda: DnsEndpoints(dns))
    if (path := endpoints.file) is not None:
        are_picked = settings.picker != "off"
        wanted["endpoints.file"] = _plain(
            (path, are_picked), lambda: EndpointFile(path, are_picked=are_picked)
        )
    if (pods := endpoints.kubernetes) is not None:

        async def follow_endpoints() -> tuple[Source, KubeApi]:
            api = await KubeApi.connect(kubernetes)
            return KubeEndpoints(api, pool, pods), api

        wanted["endpoints.kubernetes"] = _Wanted((kubernetes, pods), follow_endpoints)
    return wanted


def _plain(key: object, make: Callable[[], Source]) -> _Wanted:
    async def make_it() -> tuple[Source, None]:
        return make(), None

    return _Wanted(key, make_it)


async def _disconnect(running: _Running) -> None:
    if running.connection is not None:
        with suppress(Exception):  # it is of no more use
            await running.connection.close()

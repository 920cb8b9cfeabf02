"""Runs the sources that the settings name, and turns their reports into facts for the inbox."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, final

import structlog

from flowcontrol.config import Role
from flowcontrol.events import Endpoint, EndpointsChanged, Fact, LoadObserved, ObjectivesChanged
from flowcontrol_server.common.backoff import Backoff
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.config.sources import Endpoints, Load
from flowcontrol_server.sources.dns import DnsEndpoints
from flowcontrol_server.sources.endpoint_file import EndpointFile
from flowcontrol_server.sources.endpoints import Roster
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.sources.health import EndpointHealth
from flowcontrol_server.sources.kube_api import KubeApi
from flowcontrol_server.sources.kube_endpoints import KubeEndpoints
from flowcontrol_server.sources.kube_objectives import KubeObjectives
from flowcontrol_server.sources.objective_store import ObjectiveStore
from flowcontrol_server.sources.orca import read_report
from flowcontrol_server.sources.scraper import Scraper, ScrapeResult, Seen

PATIENCE_S = 10.0
"""Longest wait at the start for the first report of every source. After it, requests are served
with what is known; later reports are taken in as they come."""
LOGGED_MAX = 20
"""Names in one log line, for each of added, changed and removed."""
READY_WITHIN_S = 60.0
"""Longest time that a replica on Kubernetes is not ready because nothing has been listed yet. Other
replicas serve meanwhile; this one would give named objectives priority 0. After it, all replicas
may have the same problem, such as no access, and a service without ready replicas is worse."""
RESTART_FIRST_S = 1.0
RESTART_LONGEST_S = 60.0
_log = structlog.get_logger()


class Source(Protocol):
    """Watches one place."""

    @property
    def error_count(self) -> int:
        """Errors and failures since the start."""

    @property
    def problems(self) -> Mapping[str, str]:
        """Current problems, by their subject."""

    async def follow(self, changed: Callable[[Any], None]) -> None:
        """Report the whole content whenever it changes, until cancelled."""


class _Wanted(NamedTuple):
    """A source that the settings name."""

    key: object
    """Unchanged as long as the source need not be replaced."""
    make: Callable[[], Awaitable[tuple[Source, KubeApi | None]]]


@final
@dataclass(slots=True, eq=False)
class _Running:
    """A running source."""

    key: object
    source: Source
    connection: KubeApi | None
    task: asyncio.Task[None] | None = None
    has_reported: asyncio.Event = field(default_factory=asyncio.Event)
    is_overdue: bool = False
    """Whether the start waited for its first report in vain."""
    failure: str | None = None
    """Why it is not running now; None: it is. A failed source is restarted."""


@final
@dataclass(frozen=True, slots=True)
class FeedSnapshot:
    """State and error counts of the sources."""

    errors: Mapping[str, int]
    """Errors and failures since the start, by source."""
    problems: Sequence[tuple[str, str, str]]
    """Current problems: source, subject and error."""
    down: frozenset[str]
    """Known endpoints that are down."""
    scrapes: Mapping[ScrapeResult, int] | None
    """Scrapes by result; None without `load`."""
    seen: Mapping[str, Seen]
    """The state of each scraped endpoint."""


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
        """Error counts of sources that have ended."""
        self._roster = Roster(self._roster_changed)
        self._reported: tuple[Endpoint, ...] | None = None
        self._priorities: Mapping[str, int] = {}
        self._roles = dict[str, Role]()
        self._load: tuple[Load | None, bool] = None, False
        """Settings of the scrapes, and whether responses are reported."""
        self._health = EndpointHealth(
            1, lambda address, is_up: self._health_changed(address, is_up=is_up)
        )
        self._resumption: asyncio.TimerHandle | None = None
        """Ends the next ejection of an endpoint."""
        self._scraper: Scraper | None = None
        self._chance = random.Random()  # noqa: S311 - spreads retries, keeps no secret

    # What can be read

    @property
    def store(self) -> ObjectiveStore | None:
        """The objectives that the API changes; None without `objectives.api`."""
        running = self._running.get("objectives.api")
        source = None if running is None else running.source
        return source if isinstance(source, ObjectiveStore) else None

    @property
    def down(self) -> frozenset[str]:
        """Known endpoints that are down."""
        return self._roster.down

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield the current problems: source, subject and error."""
        for name, running in sorted(self._running.items()):
            for about, problem in running.source.problems.items():
                yield name, about, problem
            if running.failure is not None:
                yield name, "source", running.failure
            elif running.is_overdue and not running.has_reported.is_set():
                yield name, "source", "has not reported yet; requests are served without it"

    def problems_of_endpoints(self) -> Iterator[tuple[str, str]]:
        """Yield each endpoint that is down, and why."""
        for address in sorted(self.down):
            why = self._health.why_down(address)
            reasons = [why, self._scraper.seen[address].problem] if self._scraper else [why]
            yield address, "; ".join(filter(None, reasons))

    def problems_of_scrapes(self) -> Iterator[tuple[str, str]]:
        """Yield each endpoint that is up and whose load cannot be read, and why."""
        for address, seen in sorted(self._scraper.seen.items() if self._scraper else ()):
            if seen.problem and address not in self.down:
                yield address, seen.problem

    def error_counts(self) -> Mapping[str, int]:
        """Return the errors and failures since the start, by source."""
        counts = dict(self._past_errors)
        for name, running in self._running.items():
            counts[name] = counts.get(name, 0) + running.source.error_count
        return counts

    def snapshot(self) -> FeedSnapshot:
        """Return the state and error counts of the sources."""
        scraper = self._scraper
        return FeedSnapshot(
            self.error_counts(),
            tuple(self.problems()),
            self.down,
            None if scraper is None else scraper.results,
            {} if scraper is None else scraper.seen,
        )

    # Reports about requests and endpoints

    def outcome(self, address: str, now_s: float, *, is_failure: bool) -> None:
        """Take in the outcome of a request; a failure is a 5xx, or a break-off at the server."""
        self._health.outcome(address, now_s, is_failure=is_failure)
        if self._scraper is not None:
            self._scraper.served(address)
        if is_failure:
            self._await_resumption()

    def refused(self, address: str, now_s: float) -> None:
        """Take in that Envoy could not connect to an endpoint for a request."""
        self._health.refused(address, now_s)
        self._await_resumption()

    def load_reported(self, address: str, headers: Mapping[str, str]) -> None:
        """Take in the load report in the headers of a response, if there is a complete one."""
        load = read_report(headers)
        if load is not None:
            self._post(LoadObserved(address, *load))

    async def start(self, settings: Settings) -> None:
        """Start the sources; return when each has reported, or after `PATIENCE_S`.

        Raises:
            FlowControlError: a source cannot be used at all; none has been started.
        """
        await self.apply(settings)
        await self._until_reported(self._running, PATIENCE_S)

    async def until_listed(self) -> None:
        """Return when the Kubernetes API has been listed, or after `READY_WITHIN_S`.

        There is no wait for other sources: only on Kubernetes another replica serves meanwhile.
        """
        listed = {
            name: running
            for name, running in self._running.items()
            if running.connection is not None
        }
        await self._until_reported(listed, READY_WITHIN_S)

    async def _until_reported(self, sources: Mapping[str, _Running], within_s: float) -> None:
        first = {
            name: asyncio.ensure_future(running.has_reported.wait())
            for name, running in sources.items()
            if not running.has_reported.is_set()
        }
        if not first:
            return
        try:
            await asyncio.wait(first.values(), timeout=within_s)
        finally:
            late = [name for name, each in first.items() if not each.done()]
            for each in first.values():
                each.cancel()
        if late:
            for name in late:
                sources[name].is_overdue = True
            _log.warning("sources_not_ready", sources=late, waited_s=within_s)

    async def loads_known(self, within_s: float) -> None:
        """Wait until every endpoint has been scraped, or the time is over."""
        if self._scraper is not None and self._scraper.seen:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._scraper.all_attempted.wait()

    async def renew_loads(self) -> None:
        """Scrape the endpoints now (`Scraper.renew`); return when that is done."""
        if self._scraper is not None:
            await self._scraper.renew()

    async def apply(self, settings: Settings) -> None:
        """Change to other settings; a source that stays the same is not disturbed.

        The content of an old source stays in effect until its replacement reports.

        Raises:
            FlowControlError: a source cannot be used at all; nothing has changed.
        """
        wanted = _wanted(settings, self.store)
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
        await self._change_load(settings.scraping, settings.is_reported)
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
        """Follow a source; restart it whenever it fails."""
        backoff = Backoff(RESTART_FIRST_S, RESTART_LONGEST_S, self._chance.random)

        def changed(news: Any) -> None:
            if name.startswith("objectives."):
                self._objectives_changed(news)
            else:
                self._roster.know(name, news)
            running.has_reported.set()
            backoff.reset()

        while True:
            try:
                await running.source.follow(changed)
            except Exception as error:  # noqa: BLE001 - our own fault, no reason to stop serving
                running.failure = f"failed and is restarted: {error!r}"
                self._past_errors[name] = self._past_errors.get(name, 0) + 1
                _log.error("source_failed", source=name, exc_info=True)
            await asyncio.sleep(backoff.next_s())
            running.failure = None

    # Facts

    def _objectives_changed(self, priorities: Mapping[str, int]) -> None:
        self._post(ObjectivesChanged(priorities))
        before, self._priorities = self._priorities, dict(priorities)
        added = {name: value for name, value in priorities.items() if name not in before}
        changed = {
            name: value
            for name, value in priorities.items()
            if name in before and before[name] != value
        }
        _log.info(
            "objectives_changed",
            count=len(priorities),
            **_changes(
                added=added, changed=changed, removed=[n for n in before if n not in priorities]
            ),
        )

    def _roster_changed(self) -> None:
        self._health.watch(self._roster.addresses)
        if self._scraper is not None:
            self._scraper.ask(self._roster.addresses)
        present = tuple(
            each._replace(role=self._roles.get(each.address, each.role))
            for each in self._roster.present
        )
        if present != self._reported:
            before, self._reported = self._reported or (), present
            roles = {each.address: each.role for each in present if each.role is not Role.BOTH}
            self._post(EndpointsChanged(tuple(each.address for each in present), roles))
            _log.info(
                "endpoints_changed",
                count=len(present),
                **_changes(
                    added=[each.address for each in _missing(present, before)],
                    removed=[each.address for each in _missing(before, present)],
                ),
            )

    def _change_endpoints(self, endpoints: Endpoints) -> None:
        """Take the static endpoints and roles; drop the endpoints of sources no longer named."""
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
        if self._reported is not None:  # the same endpoints may have other roles
            self._roster_changed()

    def _health_changed(self, address: str, *, is_up: bool) -> None:
        _log.warning("endpoint_up" if is_up else "endpoint_down", endpoint=address)
        self._roster.mark(address, is_up=is_up)

    def _await_resumption(self) -> None:
        """Set the timer that ends the next ejection, also without `load`."""
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

    async def _change_load(self, load: Load | None, are_reported: bool) -> None:  # noqa: FBT001 - as set
        if (load, are_reported) == self._load:
            return
        self._load = load, are_reported
        await self._end_scraping()
        if load is None or load.port is not None:
            self._health.forget_misses(time.monotonic())
        if load is not None:
            self._health.misses_max = load.unreachable_after
            self._scraper = Scraper(
                load, self._post, self._health, responses_are_reported=are_reported
            )
            self._scraper.ask(self._roster.addresses)

    async def _end_scraping(self) -> None:
        if self._scraper is not None:
            await self._scraper.close()
            self._scraper = None


def _wanted(settings: Settings, store: ObjectiveStore | None) -> dict[str, _Wanted]:
    """Return the sources that the settings name, without static endpoints.

    Args:
        settings: in effect from now on.
        store: the objectives until now, if they came from the API.
    """
    pool, kubernetes = settings.pool, settings.kubernetes
    objectives, endpoints = settings.objectives, settings.endpoints
    wanted: dict[str, _Wanted] = {}
    if (directory := objectives.directory) is not None:
        wanted["objectives.directory"] = _plain(directory, lambda: ObjectiveFolder(directory, pool))
    if (api := objectives.api) is not None:
        file = api.file
        wanted["objectives.api"] = _plain(file, lambda: ObjectiveStore(file, pool, store))
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


def _missing(endpoints: Iterable[Endpoint], others: Iterable[Endpoint]) -> Iterator[Endpoint]:
    """Yield the endpoints that are not among the others; one with another role is not."""
    known = set(others)
    return (each for each in endpoints if each not in known)


def _changes(**changes: Mapping[str, int] | Sequence[str]) -> dict[str, object]:
    """Return the log fields of changes: the first few of each kind, and the number left out."""
    logged: dict[str, object] = {}
    for kind, names in changes.items():
        if isinstance(names, Mapping):
            logged[kind] = dict(islice(names.items(), LOGGED_MAX))
        else:
            logged[kind] = list(names[:LOGGED_MAX])
    logged["not_logged"] = sum(max(0, len(names) - LOGGED_MAX) for names in changes.values())
    return {kind: value for kind, value in logged.items() if value}


async def _disconnect(running: _Running) -> None:
    if running.connection is not None:
        with suppress(Exception):  # it is not used again
            await running.connection.close()

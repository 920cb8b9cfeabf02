"""Keeps a copy of one collection of Kubernetes objects: lists it once, then watches what changes.

    list ──resourceVersion──▶ watch ──ended, cut off──▶ watch again from the version last seen
      ▲                         │
      └── 410 Gone, or silence ─┘      every failure: wait, longer each time, jittered

Bookmarks move the version on while nothing changes, so that a watch that is cut off after a quiet
hour needs no new list. Whatever fails, the copy stays as it was last known.

A restarted API server answers 410 to every watch: it is up, so the first 410 brings the first wait,
not what an outage has made of it. A list whose pages expire before all have been read is read once
more, whole.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import NoReturn, final

import structlog

from flowcontrol_server.sources.backoff import Backoff
from flowcontrol_server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, NoJsonError, Object

WATCH_S = 300
"""How long the server is asked to keep one watch open, give or take a fifth: many who began
together do not end together."""
SILENCE_S = 90.0
"""Where anything changes a bookmark comes about every minute. So long without a byte, and nobody
may be there, or the version may be one that is yet to come: an etcd restored from a backup counts
from there, and of what it has done until then no watch tells. A list finds out which."""
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 10.0
"""After an outage a change is seen this much later at most. A try that fails costs next to nothing:
30 s, as client-go waits, would only be longer without news."""
RETRY_AFTER_LONGEST_S = 30.0
"""Of what a server asks for with Retry-After."""
BATCH_S = 0.05
"""Between two evaluations of what has changed: many objects often change together, and whoever is
told takes over a whole set each time."""
ABSENT_TRIES = 3
"""How often in a row a collection that was there must be unknown to be believed gone: while an API
server starts, its custom resources are not there yet."""
_log = structlog.get_logger()


class _ListAgainError(Exception):
    """The version known is too old, or the copy may be wrong."""


@final
class Debounced:
    """Calls a function soon after it has been asked for, and not more often than every `BATCH_S`.

    Args:
        act: what to call.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._is_due = asyncio.Event()

    def ask(self) -> None:
        """Have it called."""
        self._is_due.set()

    async def run(self) -> NoReturn:
        """Call it when it is due, until cancelled; what it raises ends this."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            self._act()
            await asyncio.sleep(BATCH_S)


@final
class Reflector:
    """A copy of one collection. Owner: the loop.

    Args:
        api: of the cluster.
        path: of the collection.
        selection: further parameters of list and watch, such as labelSelector.
        retry_s: longest first and longest later wait after a failure.
        silence_s: seconds without a byte after which a watch counts as dead.
    """

    def __init__(
        self,
        api: KubeApi,
        path: str,
        selection: Mapping[str, str] | None = None,
        retry_s: tuple[float, float] = (RETRY_FIRST_S, RETRY_LONGEST_S),
        silence_s: float = SILENCE_S,
    ) -> None:
        self.objects: dict[str, Object] = {}
        """By name."""
        self.changes: set[str] = set()
        """Names of objects that came, changed or went; the reader clears it."""
        self.is_known = False
        """Whether it has been listed, or found absent, since the start."""
        self.is_absent = False
        """Whether the server does not know the collection at all."""
        self.is_refused = False
        """Whether it has never been known, because that is forbidden. A server forbids what it does
        not have, too, to those who are not permitted it."""
        self.error_count = 0
        """Failures since the start."""
        self.problem: str | None = None
        """What is wrong now."""
        self._api = api
        self._path = path
        self._selection = dict(selection or {})
        self._silence_s = silence_s
        self._chance = random.Random()  # noqa: S311 - spreads requests, keeps no secret
        self._backoff = Backoff(*retry_s, self._chance.random)
        self._absences = 0
        self._is_gone = False
        """Whether 410 was the last that was heard."""
        self._version: str | None = None

    async def follow(self, changed: Callable[[], None]) -> NoReturn:
        """Keep the copy and report every change, and when it is first known; until cancelled.

        Told, too, is that it is refused from the start. Whoever follows again, after an error of
        `changed`, has everything listed and told again: it may have missed the last of it.
        """
        self._version = None
        self.changes |= self.objects.keys()
        while True:
            wait_s: float | None = None
            try:
                if self._version is None:
                    self._version = await self._list()
                    changed()
                await self._watch(self._version, changed)
            except _ListAgainError as error:
                self._list_again(str(error))
            except ApiError as error:
                self._refused(error, changed)
                wait_s = error.retry_after_s
            except NoJsonError as error:
                self._version = None
                self._failed(f"invalid answer: {error}")
            except UNREACHABLE as error:
                self._failed(f"{type(error).__name__}: {error}".rstrip(": "))
            await asyncio.sleep(
                max(self._backoff.next_s(), min(wait_s or 0, RETRY_AFTER_LONGEST_S))
            )

    async def _list(self) -> str:
        """Take the whole copy; return its version."""
        objects: dict[str, Object] = {}
        parameters = dict(self._selection)
        is_whole = False
        while True:
            read = self._api.list_whole if is_whole else self._api.list_page
            try:
                page = await read(self._path, parameters)
                for item in page["items"]:
                    objects[item["metadata"]["name"]] = item
                version = str(page["metadata"]["resourceVersion"])
                more = page["metadata"].get("continue")
            except (NoJsonError, LookupError, TypeError, AttributeError) as error:
                raise ApiError(HTTPStatus.BAD_GATEWAY, f"invalid list: {error!r}") from error
            except ApiError as error:
                if error.status != HTTPStatus.GONE or parameters.pop("continue", None) is None:
                    raise
                _log.info("kubernetes_pages_expired", path=self._path, reason=str(error))
                self.error_count += 1
                objects, is_whole = {}, True
                continue
            if not more:
                break
            parameters["continue"] = more
        self._replace(objects)
        self.is_known, self.is_absent, self._absences = True, False, 0
        self._works()
        return version

    def _replace(self, objects: dict[str, Object]) -> None:
        for name in self.objects.keys() | objects.keys():
            if _version_of(self.objects.get(name)) != _version_of(objects.get(name)):
                self.changes.add(name)
        self.objects = objects

    async def _watch(self, version: str, changed: Callable[[], None]) -> None:
        """Follow one watch to its end; one that lived, or said anything, has worked."""
        seconds = round(WATCH_S * (0.8 + 0.4 * self._chance.random()))
        parameters = {
            **self._selection,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        heard_s = time.monotonic()
        watch = self._api.watch(self._path, parameters, self._silence_s)
        try:
            async with aclosing(watch) as events:
                async for event in events:
                    self._take(event, changed)
                    self._works()
                    self._backoff.reset()
                    self._is_gone = False
                    heard_s = time.monotonic()
        except TimeoutError:
            self._version = None
        if time.monotonic() - heard_s > RETRY_LONGEST_S:
            self._backoff.reset()

    def _take(self, event: Object, changed: Callable[[], None]) -> None:
        try:
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                status, message = int(item.get("code", 500)), str(item.get("message", ""))
                if status == HTTPStatus.GONE:
                    raise _ListAgainError(message)
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._version = None  # it may always fail at this version: etcd has compacted
                raise ApiError(status, message)
            name, version = item["metadata"].get("name"), str(item["metadata"]["resourceVersion"])
            if kind in {"ADDED", "MODIFIED"}:
                self.objects[name] = item
                self.changes.add(name)
            elif kind == "DELETED":
                self.objects.pop(name, None)
                self.changes.add(name)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            message = f"invalid event: {error!r}"
            raise _ListAgainError(message) from error
        self._version = version
        if kind != "BOOKMARK":
            changed()

    def _list_again(self, reason: str) -> None:
        self._version = None
        _log.info("kubernetes_relisted", path=self._path, reason=reason)
        if not self._is_gone:  # again and again, without an event in between: longer each time
            self._backoff.reset()
        self._is_gone = True

    def _refused(self, error: ApiError, changed: Callable[[], None]) -> None:
        if error.status == HTTPStatus.GONE:
            self._list_again(str(error))
            return
        if error.status == HTTPStatus.NOT_FOUND:
            self._version = None
            self._absences += 1
            if not self.objects or self._absences >= ABSENT_TRIES:
                self._absent(changed)
                return
        self._failed(str(error))
        if error.status == HTTPStatus.FORBIDDEN and not (self.is_known or self.is_refused):
            self.is_refused = True
            changed()

    def _absent(self, changed: Callable[[], None]) -> None:
        """Believe that there is no such collection, which may come later."""
        is_news = not self.is_known or bool(self.objects)
        self._replace({})
        self.is_known = self.is_absent = True
        self._works()
        if is_news:
            _log.info("kubernetes_collection_absent", path=self._path)
            changed()

    def _failed(self, problem: str) -> None:
        self.error_count += 1
        if self.problem is None:
            _log.warning("kubernetes_watch_failed", path=self._path, problem=problem)
        self.problem = problem

    def _works(self) -> None:
        self.is_refused = False
        if self.problem is not None:
            self.problem = None
            _log.info("kubernetes_watch_recovered", path=self._path)


def _version_of(item: Object | None) -> object:
    return None if item is None else item["metadata"].get("resourceVersion", item)


def are_known(reflectors: Iterable[Reflector]) -> bool:
    """Whether copies can be judged together: each is known or refused, and any is known."""
    copies = tuple(reflectors)
    is_any = any(each.is_known for each in copies)
    return is_any and all(each.is_known or each.is_refused for each in copies)

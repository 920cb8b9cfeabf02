"""Keeps a copy of one collection of Kubernetes objects: lists it once, then watches its changes.

    list ──resourceVersion──▶ watch ──ended, cut off──▶ watch again from the version last seen
      ▲                         │
      └── 410 Gone, or silence ─┘      every failure: wait, longer each time, jittered

Bookmarks advance the version while nothing changes, so a watch that is cut off after a quiet hour
needs no new list. After any failure, the copy keeps its last state.

A restarted API server answers 410 to every watch. It is up, so the first 410 resets the wait that
has grown during the outage. A list whose pages expire before all have been read is read once more,
without pages.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import NoReturn, final

import structlog

from flowcontrol_server.common.backoff import Backoff
from flowcontrol_server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, NoJsonError, Object

WATCH_S = 300
"""How long the server is asked to keep one watch open, give or take a fifth, so that watches that
began together do not end together."""
SILENCE_S = 90.0
"""A bookmark comes about every minute while anything in the cluster changes. After so long without
a byte, the connection may be dead, or the version may lie in the future: an etcd restored from a
backup continues from an older version, and the watch reports nothing until it has passed ours. A
new list covers both."""
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 10.0
"""Longest delay with which a change is seen after an outage. A failed try costs next to nothing, so
waiting 30 s like client-go would have no benefit."""
RETRY_AFTER_LONGEST_S = 30.0
"""Upper bound on the wait that a server asks for with Retry-After."""
BATCH_S = 0.05
"""Time between two evaluations of changes: many objects often change together, and each report
hands over the whole set."""
ABSENT_TRIES = 3
"""A collection with objects counts as absent after so many 404 in a row: while an API server
starts, it has no custom resources yet."""
_log = structlog.get_logger()


class _ListAgainError(Exception):
    """The known version is too old, or the copy may be wrong."""


@final
class Debounced:
    """Calls a function soon after `ask`, but no more often than every `BATCH_S`.

    Args:
        act: the function.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._is_due = asyncio.Event()

    def ask(self) -> None:
        """Have the function called."""
        self._is_due.set()

    async def run(self) -> NoReturn:
        """Call the function when it is due, until cancelled or until it raises."""
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
        """Names of objects that were added, changed or deleted; the reader clears it."""
        self.is_known = False
        """Whether the collection has been listed, or found absent, since the start."""
        self.is_absent = False
        """Whether the server has no such collection."""
        self.is_refused = False
        """Whether the server forbids the collection, which has never been known. A server without
        such a collection answers the same to a client without permission."""
        self.error_count = 0
        """Failures since the start."""
        self.problem: str | None = None
        """The current problem; None: no problem."""
        self._api = api
        self._path = path
        self._selection = dict(selection or {})
        self._silence_s = silence_s
        self._chance = random.Random()  # noqa: S311 - spreads requests, keeps no secret
        self._backoff = Backoff(*retry_s, self._chance.random)
        self._absences = 0
        self._is_gone = False
        """Whether the last result was 410, without an event since."""
        self._version: str | None = None

    async def follow(self, changed: Callable[[], None]) -> NoReturn:
        """Keep the copy; report every change, and when it is first known; until cancelled.

        A refusal from the start is reported, too. A second call, after an error of `changed`, lists
        and reports all objects again, because the last change may have been missed.
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
        """Replace the whole copy; return its version."""
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
        """Follow one watch to its end; it worked if it lasted, or had an event."""
        seconds = round(WATCH_S * (0.8 + 0.4 * self._chance.random()))
        parameters = {
            **self._selection,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        latest_s = time.monotonic()
        watch = self._api.watch(self._path, parameters, self._silence_s)
        try:
            async with aclosing(watch) as events:
                async for event in events:
                    self._take(event, changed)
                    self._works()
                    self._backoff.reset()
                    self._is_gone = False
                    latest_s = time.monotonic()
        except TimeoutError:
            self._version = None
        if time.monotonic() - latest_s > RETRY_LONGEST_S:
            self._backoff.reset()

    def _take(self, event: Object, changed: Callable[[], None]) -> None:
        try:
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                status, message = int(item.get("code", 500)), str(item.get("message", ""))
                if status == HTTPStatus.GONE:
                    raise _ListAgainError(message)
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._version = None  # this version may fail forever: etcd has compacted it
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
        if not self._is_gone:  # repeated without an event in between: wait longer each time
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
        """Take the collection as absent; it may appear later."""
        has_changed = not self.is_known or bool(self.objects)
        self._replace({})
        self.is_known = self.is_absent = True
        self._works()
        if has_changed:
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
    """Return whether copies can be read together: one is known, and the others known or refused."""
    copies = tuple(reflectors)
    is_any = any(each.is_known for each in copies)
    return is_any and all(each.is_known or each.is_refused for each in copies)

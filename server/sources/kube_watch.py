"""Keeps a copy of one collection of Kubernetes objects: lists it once, then watches what changes.

    list ──resourceVersion──▶ watch ──ended, cut off──▶ watch again from the version last seen
      ▲                         │
      └──── 410 Gone, or nonsense ┘      every failure: wait, longer each time, each its own while

Bookmarks move the version on while nothing changes, so that a watch that is cut off after a quiet
hour needs no new list. Whatever fails, the copy stays as it was last known.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import NoReturn, final

import structlog

from server.sources.backoff import Backoff
from server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, NoJsonError, Object

WATCH_S = 300
"""How long the server is asked to keep one watch open, give or take a fifth: many who began
together do not end together."""
SILENCE_S = 90.0
"""Where anything changes a bookmark comes about every minute. So long without a byte, and the
connection may be dead: a new watch from the same version costs next to nothing."""
RETRY_FIRST_S = 0.5
RETRY_LONGEST_S = 30.0
ABSENT_TRIES = 3
"""How often in a row a collection that was there must be unknown to be believed gone: while an API
server starts, its custom resources are not there yet."""
_log = structlog.get_logger()


class _ListAgainError(Exception):
    """The version known is too old, or the copy may be wrong."""


@final
class Reflector:
    """A copy of one collection. Owner: the loop.

    Args:
        api: whom to ask.
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
        self._version: str | None = None

    async def follow(self, changed: Callable[[], None]) -> NoReturn:
        """Keep the copy and tell of every change, and once when it is first known; for ever.

        Told, too, is that it is refused from the start. Whoever follows again, after an error of
        `changed`, has everything listed and told again: it may have missed the last of it.
        """
        self._version = None
        while True:
            wait_s: float | None = None
            try:
                if self._version is None:
                    self._version = await self._list()
                    changed()
                await self._watch(self._version, changed)
            except _ListAgainError as error:
                self._version = None
                _log.info("kubernetes_lists_again", path=self._path, reason=str(error))
            except ApiError as error:
                self._refused(error, changed)
                wait_s = error.retry_after_s
            except NoJsonError as error:
                self._version = None
                self._failed(f"no JSON: {error}")
            except UNREACHABLE as error:
                self._failed(f"{type(error).__name__}: {error}".rstrip(": "))
            await asyncio.sleep(max(self._backoff.next_s(), min(wait_s or 0, RETRY_LONGEST_S)))

    async def _list(self) -> str:
        """Take the whole copy; return its version."""
        objects: dict[str, Object] = {}
        parameters = dict(self._selection)
        while True:
            try:
                page = await self._api.list_page(self._path, parameters)
                for item in page["items"]:
                    objects[item["metadata"]["name"]] = item
                version = str(page["metadata"]["resourceVersion"])
                more = page["metadata"].get("continue")
            except (NoJsonError, LookupError, TypeError, AttributeError) as error:
                raise ApiError(HTTPStatus.BAD_GATEWAY, f"no list: {error!r}") from error
            if not more:
                break
            parameters["continue"] = more
        self.objects = objects
        self.is_known, self.is_absent, self._absences = True, False, 0
        self._works()
        return version

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
        with suppress(TimeoutError):  # the connection may be dead, or nothing has happened
            async with aclosing(watch) as events:
                async for event in events:
                    self._take(event, changed)
                    self._works()
                    self._backoff.reset()
                    heard_s = time.monotonic()
        if time.monotonic() - heard_s > RETRY_LONGEST_S:
            self._backoff.reset()

    def _take(self, event: Object, changed: Callable[[], None]) -> None:
        try:
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                status, message = int(item.get("code", 500)), str(item.get("message", ""))
                if status == HTTPStatus.GONE:
                    raise _ListAgainError(message)
                raise ApiError(status, message)
            name, version = item["metadata"].get("name"), str(item["metadata"]["resourceVersion"])
            if kind in {"ADDED", "MODIFIED"}:
                self.objects[name] = item
            elif kind == "DELETED":
                self.objects.pop(name, None)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            message = f"no event: {error!r}"
            raise _ListAgainError(message) from error
        self._version = version
        if kind != "BOOKMARK":
            changed()

    def _refused(self, error: ApiError, changed: Callable[[], None]) -> None:
        if error.status == HTTPStatus.GONE:
            self._version = None
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
        self.objects = {}
        self.is_known = self.is_absent = True
        self._works()
        if is_news:
            _log.info("kubernetes_collection_absent", path=self._path)
            changed()

    def _failed(self, problem: str) -> None:
        self.error_count += 1
        if self.problem is None:
            _log.warning("kubernetes_not_followed", path=self._path, problem=problem)
        self.problem = problem

    def _works(self) -> None:
        self.is_refused = False
        if self.problem is not None:
            self.problem = None
            _log.info("kubernetes_followed_again", path=self._path)


def are_known(reflectors: Iterable[Reflector]) -> bool:
    """Whether copies can be judged together: each is known or refused, and any is known."""
    copies = tuple(reflectors)
    is_any = any(each.is_known for each in copies)
    return is_any and all(each.is_known or each.is_refused for each in copies)

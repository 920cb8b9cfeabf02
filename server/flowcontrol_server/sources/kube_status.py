"""Writes conditions into the status of Kubernetes objects.

A condition is written with the version of the object that it is about. A status that another writer
changed meanwhile is left as it is, and its condition is determined again when that change arrives.
A write that the API server refuses for good (a 4xx, such as 422) is not repeated until the object
changes. A write that may be accepted later is retried, with a growing wait of its own. Once two
objects have failed without a success in between, all writes wait. So one object that cannot be
written delays no other.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple, NoReturn, final

import structlog

from flowcontrol_server.common.backoff import Backoff
from flowcontrol_server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, Object

WRITERS = 10
"""Statuses written at the same time."""
WRITE_EVERY_S = 0.04
"""Least time from one write to the next of the same writer. All writers make at most 250 a second,
5,000 in 20 s, even if each write takes this long. An API server grants each client this and more,
and it takes a third of one core here."""
_PASSING = frozenset(
    (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
    )
)
"""Refusals below 500 that may end without a change of the object: a starting API server answers 403
to permitted calls until it has read its roles."""
_MESSAGE_MAX = 32768
"""Longest message of a condition that the schema permits."""
_log = structlog.get_logger()


class _Unwritten(NamedTuple):
    item: Object
    condition: Mapping[str, Any]


class _Refusal(NamedTuple):
    status: int
    text: str


@final
class StatusWriter:
    """Conditions to be written. Owner: the loop.

    Args:
        api: of the cluster.
        retry_s: longest first and longest later wait after a refusal that may end.
    """

    def __init__(self, api: KubeApi, retry_s: tuple[float, float]) -> None:
        self.error_count = 0
        """Refusals logged since the start."""
        self._api = api
        self._retry_s = retry_s
        self._chance = random.Random()  # noqa: S311 - spreads retries, keeps no secret
        self._unwritten: dict[str, _Unwritten] = {}
        """By path; each path is in the queue, or a timer puts it there."""
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._refusals: dict[str, _Refusal] = {}
        """The current refusals, by path."""
        self._backoffs: dict[str, Backoff] = {}
        """Of the paths that are retried."""
        self._failed: set[str] = set()
        """Paths that failed since the last success."""
        self._backoff = self._new_backoff()
        self._paused_until_s = 0.0

    @property
    def problem(self) -> str | None:
        """The current problem; None: every condition is written, or about to be."""
        if not self._refusals:
            return None
        path, (_status, text) = next(iter(self._refusals.items()))
        others = f" and {len(self._refusals) - 1} others" if len(self._refusals) > 1 else ""
        return f"status of {path.split('/')[-2]}{others} not written: {text}"

    def want(self, path: str, item: Object, condition: Mapping[str, Any]) -> None:
        """Have a condition written, unless the object already has it.

        Args:
            path: of the object's status.
            item: the version of the object that the condition is about.
            condition: type, status, reason and message.
        """
        metadata = item["metadata"]
        condition = {
            **condition,
            "message": condition["message"][:_MESSAGE_MAX],
            "observedGeneration": metadata.get("generation", 0),
        }
        standing = _conditions(item).get(condition["type"], {})
        if all(standing.get(key) == value for key, value in condition.items()):
            self.forget(path)
            return
        is_turn = standing.get("status") != condition["status"]
        since = None if is_turn else standing.get("lastTransitionTime")
        condition["lastTransitionTime"] = since or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if path not in self._unwritten:
            self._queue.put_nowait(path)
        self._unwritten[path] = _Unwritten(item, condition)

    def forget(self, path: str) -> None:
        """Cancel the write: the object has its condition, or is gone."""
        self._unwritten.pop(path, None)
        self._settled(path)

    async def run(self) -> None:
        """Write the wanted conditions, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(self._write_each())

    async def _write_each(self) -> NoReturn:
        while True:
            path = await self._queue.get()
            await self._until_not_paused()
            unwritten = self._unwritten.pop(path, None)
            if unwritten is not None:
                next_s = time.monotonic() + WRITE_EVERY_S
                await self._write(path, unwritten)
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))

    async def _until_not_paused(self) -> None:
        while (pause_s := self._paused_until_s - time.monotonic()) > 0:  # noqa: ASYNC110 - a time
            await asyncio.sleep(pause_s)

    async def _write(self, path: str, unwritten: _Unwritten) -> None:
        item, condition = unwritten
        conditions = {**_conditions(item), condition["type"]: condition}
        patch = {
            "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]},
            "status": {"conditions": list(conditions.values())},
        }
        try:
            await self._api.merge(path, patch)
        except ApiError as error:
            if error.status in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
                self._settled(path)  # changed or gone meanwhile: an event follows
                return
            may_pass = error.status in _PASSING or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
            self._refused(path, _Refusal(error.status, str(error)), may_pass=may_pass)
            if may_pass:
                self._try_again(path, unwritten, error.retry_after_s or 0.0)
        except UNREACHABLE:  # the reflector of the objects reports that
            self._try_again(path, unwritten, 0.0)
        else:
            self._settled(path)
            self._failed.clear()
            self._backoff.reset()

    def _refused(self, path: str, refusal: _Refusal, *, may_pass: bool) -> None:
        is_known = any(each.status == refusal.status for each in self._refusals.values())
        if not (is_known and may_pass):
            self.error_count += 1
            _log.warning("status_not_written", path=path, problem=refusal.text)
        self._refusals[path] = refusal

    def _try_again(self, path: str, unwritten: _Unwritten, retry_after_s: float) -> None:
        backoff = self._backoffs.setdefault(path, self._new_backoff())
        if path not in self._unwritten:  # otherwise a newer condition is in the queue
            self._unwritten[path] = unwritten
            wait_s = max(backoff.next_s(), min(retry_after_s, self._retry_s[1]))
            asyncio.get_running_loop().call_later(wait_s, self._queue.put_nowait, path)
        self._failed.add(path)
        now_s = time.monotonic()
        if len(self._failed) > 1 and now_s >= self._paused_until_s:
            self._paused_until_s = now_s + self._backoff.next_s()

    def _settled(self, path: str) -> None:
        self._refusals.pop(path, None)
        self._backoffs.pop(path, None)
        self._failed.discard(path)

    def _new_backoff(self) -> Backoff:
        return Backoff(*self._retry_s, self._chance.random)


def _conditions(item: Object) -> dict[str, Mapping[str, Any]]:
    """Return the conditions in an object's status, by type."""
    status = item.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    return {
        str(condition.get("type")): condition
        for condition in conditions or ()
        if isinstance(condition, dict)
    }

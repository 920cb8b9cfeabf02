"""InferenceObjectives from Kubernetes, both API groups, and the condition Accepted in their status.

An installed group that is missing is an empty one. Whether an objective is accepted is written with
the version it was judged in: a status that somebody changed meanwhile is left, and judged anew when
the change comes by. Where writing is forbidden, that is said once and tried again much later.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NoReturn, final

import structlog

from server.sources.backoff import Backoff
from server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, Object
from server.sources.kube_watch import (
    RETRY_FIRST_S,
    RETRY_LONGEST_S,
    SILENCE_S,
    Reflector,
    are_known,
)
from server.sources.objectives import (
    GROUPS,
    KIND,
    MalformedObjectiveError,
    Objective,
    priorities_of,
    read_objective,
)

CONDITION = "Accepted"
FORBIDDEN_PAUSE_S = 600.0
"""After being forbidden to write a status, how long until it is tried again."""
WRITE_PAUSE_S = 0.02
"""Between two statuses written: at most fifty a second, however many objectives come at once."""
_log = structlog.get_logger()


@final
class KubeObjectives:
    """The objectives that a namespace declares for one pool. Owner: the loop.

    Args:
        api: whom to ask.
        pool: name of the pool.
        writes_status: whether to write the condition.
        retry_s: as a `Reflector` has it.
        silence_s: likewise.
    """

    def __init__(
        self,
        api: KubeApi,
        pool: str,
        *,
        writes_status: bool,
        retry_s: tuple[float, float] = (RETRY_FIRST_S, RETRY_LONGEST_S),
        silence_s: float = SILENCE_S,
    ) -> None:
        self._malformed: dict[str, str] = {}
        self._api = api
        self._pool = pool
        self._writes_status = writes_status
        self._own_errors = 0
        self._paths = {group: _path(group, api.namespace) for group in GROUPS}
        self._groups = {
            group: Reflector(api, path, retry_s=retry_s, silence_s=silence_s)
            for group, path in self._paths.items()
        }
        self._told: Mapping[str, int] | None = None
        self._unwritten: dict[str, tuple[Object, dict[str, Any]]] = {}
        """Conditions to write, by path."""
        self._has_unwritten = asyncio.Event()
        self._may_write_from_s = 0.0
        self._refused_as: int | None = None
        """How writing was refused last, until it works again."""
        self._backoff = Backoff(*retry_s, random.Random().random)  # noqa: S311 - no secret

    @property
    def error_count(self) -> int:
        """Mistakes and failures met since the start."""
        return self._own_errors + sum(each.error_count for each in self._groups.values())

    @property
    def problems(self) -> Mapping[str, str]:
        """The mistakes and failures that now stand, by what they are about."""
        failed = {g: each.problem for g, each in self._groups.items() if each.problem is not None}
        return {**self._malformed, **failed}

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Tell the whole set whenever it differs from what was told before, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in self._groups.values():
                group.create_task(reflector.follow(lambda: self._look(changed)))
            if self._writes_status:
                group.create_task(self._write_statuses())

    def _look(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Judge everything anew, once both groups are known, or one and the other is refused."""
        if not are_known(self._groups.values()):
            return
        problems: dict[str, str] = {}
        objectives: list[tuple[Objective, Object]] = []
        for group, reflector in self._groups.items():
            for name, item in reflector.objects.items():
                document = {**item, "apiVersion": group, "kind": KIND}  # lists leave them out
                try:
                    objective = read_objective(document, self._pool)
                except MalformedObjectiveError as error:
                    problems[f"{group} {name}"] = str(error)
                    self._judge(group, item, "Invalid", str(error), is_accepted=False)
                else:
                    if objective is not None:
                        objectives.append((objective, item))
        priorities = priorities_of(objective for objective, _item in objectives)
        newest = {objective.name for objective, _item in objectives if objective.group == GROUPS[0]}
        for objective, item in objectives:
            is_chosen = objective.group == GROUPS[0] or objective.name not in newest
            text = f"priority {objective.priority} in pool {self._pool}"
            if is_chosen:
                self._judge(objective.group, item, CONDITION, text, is_accepted=True)
            else:
                text = f"{GROUPS[0]} declares the same name"
                self._judge(objective.group, item, "Overridden", text, is_accepted=False)
        self._complain(problems)
        if priorities != self._told:
            self._told = priorities
            changed(priorities)

    def _complain(self, problems: dict[str, str]) -> None:
        for name, problem in problems.items():
            if self._malformed.get(name) != problem:
                self._own_errors += 1
                _log.error("objective_rejected", objective=name, problem=problem)
        self._malformed = problems

    def _judge(
        self, group: str, item: Object, reason: str, message: str, *, is_accepted: bool
    ) -> None:
        """Have a condition written, unless it stands there already."""
        metadata = item["metadata"]
        path = f"{self._paths[group]}/{metadata['name']}/status"
        condition = {
            "type": CONDITION,
            "status": str(is_accepted),
            "reason": reason,
            "message": message[:32768],  # as long as the schema lets it be
            "observedGeneration": metadata.get("generation", 0),
        }
        standing = _conditions(item).get(CONDITION, {})
        if all(standing.get(key) == value for key, value in condition.items()):
            self._unwritten.pop(path, None)
            return
        is_turn = standing.get("status") != condition["status"]
        since = None if is_turn else standing.get("lastTransitionTime")
        condition["lastTransitionTime"] = since or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._unwritten[path] = (item, condition)
        self._has_unwritten.set()

    async def _write_statuses(self) -> NoReturn:
        while True:
            await self._has_unwritten.wait()
            await asyncio.sleep(max(WRITE_PAUSE_S, self._may_write_from_s - time.monotonic()))
            if not self._unwritten:
                self._has_unwritten.clear()
                continue
            path = next(iter(self._unwritten))
            item, condition = self._unwritten.pop(path)
            pause_s = await self._write(path, item, condition)
            if pause_s:
                self._unwritten.setdefault(path, (item, condition))
                self._may_write_from_s = time.monotonic() + pause_s

    async def _write(self, path: str, item: Object, condition: Mapping[str, Any]) -> float:
        """Write a condition; return how long to wait before trying again, 0 if that is done."""
        conditions = {**_conditions(item), CONDITION: condition}
        patch = {
            "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]},
            "status": {"conditions": list(conditions.values())},
        }
        try:
            await self._api.merge(path, patch)
        except ApiError as error:
            if error.status in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
                return 0.0  # changed or gone meanwhile: that comes by
            if error.status != self._refused_as:
                _log.warning("status_not_written", path=path, problem=str(error))
            self._refused_as = error.status
            is_forbidden = error.status == HTTPStatus.FORBIDDEN
            return FORBIDDEN_PAUSE_S if is_forbidden else self._backoff.next_s()
        except UNREACHABLE:  # which following the objectives has said already
            return self._backoff.next_s()
        self._refused_as = None
        self._backoff.reset()
        return 0.0


def _path(group: str, namespace: str) -> str:
    return f"/apis/{group}/namespaces/{namespace}/inferenceobjectives"


def _conditions(item: Object) -> dict[str, Mapping[str, Any]]:
    """Return the conditions in an object's status, by type."""
    status = item.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    return {
        str(condition.get("type")): condition
        for condition in conditions or ()
        if isinstance(condition, dict)
    }

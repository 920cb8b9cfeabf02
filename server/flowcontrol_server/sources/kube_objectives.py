"""InferenceObjectives from Kubernetes, both API groups, and the condition Accepted in their status.

An API group that is not installed counts as empty. Only changed objects are read again: each
written status comes back as a change, so reading all objects would be quadratic in their number.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import final

import structlog

from flowcontrol_server.sources.kube_api import KubeApi, Object
from flowcontrol_server.sources.kube_status import StatusWriter
from flowcontrol_server.sources.kube_watch import (
    RETRY_FIRST_S,
    RETRY_LONGEST_S,
    SILENCE_S,
    Debounced,
    Reflector,
    are_known,
)
from flowcontrol_server.sources.objectives import (
    GROUPS,
    KIND,
    MalformedObjectiveError,
    Objective,
    read_objective,
)

CONDITION = "Accepted"
_log = structlog.get_logger()


@final
class KubeObjectives:
    """The objectives that a namespace declares for one pool. Owner: the loop.

    Args:
        api: of the cluster.
        pool: name of the pool.
        writes_status: whether to write the condition.
        retry_s: of the `Reflector`s and the `StatusWriter`.
        silence_s: of the `Reflector`s.
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
        self._pool = pool
        self._own_errors = 0
        self._paths = {group: _path(group, api.namespace) for group in GROUPS}
        self._groups = {
            group: Reflector(api, path, retry_s=retry_s, silence_s=silence_s)
            for group, path in self._paths.items()
        }
        self._status = StatusWriter(api, retry_s) if writes_status else None
        self._malformed: dict[str, str] = {}
        """Errors in objectives, by group and name."""
        self._priorities: dict[str, int] = {}
        self._reported: Mapping[str, int] | None = None

    @property
    def error_count(self) -> int:
        """Errors and failures since the start."""
        status = 0 if self._status is None else self._status.error_count
        return self._own_errors + status + sum(each.error_count for each in self._groups.values())

    @property
    def problems(self) -> Mapping[str, str]:
        """Current problems, by their subject."""
        failed = {g: each.problem for g, each in self._groups.items() if each.problem is not None}
        if self._status is not None and self._status.problem is not None:
            failed["status"] = self._status.problem
        return {**self._malformed, **failed}

    async def follow(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Report the whole set whenever it changes, until cancelled."""
        batch = Debounced(lambda: self._read_changes(changed))
        async with asyncio.TaskGroup() as group:
            group.create_task(batch.run())
            for reflector in self._groups.values():
                group.create_task(reflector.follow(batch.ask))
            if self._status is not None:
                group.create_task(self._status.run())

    def _read_changes(self, changed: Callable[[Mapping[str, int]], None]) -> None:
        """Read the changes, once both groups are known, or one is known and the other refused."""
        if not are_known(self._groups.values()):
            return
        names = set[str]().union(*(each.changes for each in self._groups.values()))
        for name in names:
            self._read(name)
        for reflector in self._groups.values():
            reflector.changes.clear()
        if self._priorities != self._reported:
            self._reported = dict(self._priorities)
            changed(self._reported)

    def _read(self, name: str) -> None:
        """Read the objectives of one name; the one of the first group is used."""
        chosen: Objective | None = None
        for group, reflector in self._groups.items():
            item = reflector.objects.get(name)
            objective = self._objective(group, name, item)
            if objective is not None and item is not None:
                if chosen is None:
                    chosen = objective
                    text = f"priority {objective.priority} in pool {self._pool}"
                    self._judge(group, item, CONDITION, text, is_accepted=True)
                else:
                    text = f"{chosen.group} declares the same name"
                    self._judge(group, item, "Overridden", text, is_accepted=False)
        if chosen is None:
            self._priorities.pop(name, None)
        else:
            self._priorities[name] = chosen.priority

    def _objective(self, group: str, name: str, item: Object | None) -> Objective | None:
        """Return the objective that an object declares for this pool; None: none."""
        about = f"{group} {name}"
        objective = None
        try:
            if item is not None:  # lists leave out apiVersion and kind
                document = {**item, "apiVersion": group, "kind": KIND}
                objective = read_objective(document, self._pool)
        except MalformedObjectiveError as error:
            assert item is not None, "an absent object is not malformed"
            problem = str(error)
            if self._malformed.get(about) != problem:
                self._own_errors += 1
                _log.error("objective_rejected", objective=about, problem=problem)
            self._malformed[about] = problem
            self._judge(group, item, "Invalid", problem, is_accepted=False)
            return None
        self._malformed.pop(about, None)
        if objective is None and self._status is not None:
            self._status.forget(self._status_path(group, name))
        return objective

    def _judge(
        self, group: str, item: Object, reason: str, message: str, *, is_accepted: bool
    ) -> None:
        """Have a condition written, unless the object already has it."""
        if self._status is None:
            return
        condition = {
            "type": CONDITION,
            "status": str(is_accepted),
            "reason": reason,
            "message": message,
        }
        self._status.want(self._status_path(group, item["metadata"]["name"]), item, condition)

    def _status_path(self, group: str, name: str) -> str:
        return f"{self._paths[group]}/{name}/status"


def _path(group: str, namespace: str) -> str:
    return f"/apis/{group}/namespaces/{namespace}/inferenceobjectives"

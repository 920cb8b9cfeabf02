"""Endpoints from Kubernetes: the ready pods that an InferencePool selects, at its target ports.

A pod is ready when its condition Ready says so and it is not being deleted. Its label
llm-d.ai/role says what it does, where prefill and decode run apart.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

import structlog

from server.addresses import Address
from server.settings_sources import KubernetesEndpoints
from server.sources.endpoints import ROLE_LABEL, Endpoint, role_of_label
from server.sources.kube_api import KubeApi, Object
from server.sources.kube_watch import (
    RETRY_FIRST_S,
    RETRY_LONGEST_S,
    SILENCE_S,
    Reflector,
    are_known,
)

POOL_GROUPS = ("inference.networking.k8s.io/v1", "inference.networking.x-k8s.io/v1alpha2")
"""The API groups an InferencePool is looked for in; the first that has it counts."""
_PORT_MAX = 65_535
_log = structlog.get_logger()


class _Selection(NamedTuple):
    """Which pods, and at which ports."""

    labels: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]


@final
class KubeEndpoints:
    """The endpoints of one pool. Owner: the loop.

    Args:
        api: whom to ask.
        pool: name of the InferencePool.
        settings: labels and ports in its place, if any.
        retry_s: as a `Reflector` has it.
        silence_s: likewise.
    """

    def __init__(
        self,
        api: KubeApi,
        pool: str,
        settings: KubernetesEndpoints,
        *,
        retry_s: tuple[float, float] = (RETRY_FIRST_S, RETRY_LONGEST_S),
        silence_s: float = SILENCE_S,
    ) -> None:
        self._api = api
        self._pool = pool
        self._settings = settings
        self._retry_s, self._silence_s = retry_s, silence_s
        self._selection: _Selection | None = None
        self._pods: Reflector | None = None
        self._following: asyncio.Task[Any] | None = None
        self._pools: tuple[Reflector, ...] = ()
        self._past_errors = 0
        self._told: tuple[Endpoint, ...] | None = None

    @property
    def error_count(self) -> int:
        """Failures since the start."""
        return self._past_errors + sum(each.error_count for each in self._reflectors())

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong now, by what it is about."""
        named = {"pods": self._pods, **dict(zip(POOL_GROUPS, self._pools, strict=False))}
        return {name: each.problem for name, each in named.items() if each and each.problem}

    async def follow(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Tell the endpoints whenever they differ from what was told before, until cancelled."""
        self._begin_anew()
        async with asyncio.TaskGroup() as group:
            if self._settings.selector:
                labels = tuple(sorted(self._settings.selector.items()))
                self._select(_Selection(labels, self._settings.ports), group, changed)
                return
            selection = {"fieldSelector": f"metadata.name={self._pool}"}
            namespace = self._api.namespace
            self._pools = tuple(
                self._reflector(f"/apis/{each}/namespaces/{namespace}/inferencepools", selection)
                for each in POOL_GROUPS
            )
            for reflector in self._pools:
                group.create_task(reflector.follow(lambda: self._look_at_pools(group, changed)))

    def _begin_anew(self) -> None:
        """Drop the copies that an earlier following has left, but not what was told."""
        self._drop_pods()
        self._past_errors += sum(each.error_count for each in self._pools)
        self._selection, self._pools = None, ()

    def _reflectors(self) -> Iterator[Reflector]:
        yield from self._pools
        if self._pods is not None:
            yield self._pods

    def _reflector(self, path: str, selection: Mapping[str, str]) -> Reflector:
        return Reflector(
            self._api, path, selection, retry_s=self._retry_s, silence_s=self._silence_s
        )

    def _look_at_pools(
        self, group: asyncio.TaskGroup, changed: Callable[[tuple[Endpoint, ...]], None]
    ) -> None:
        """Take the pool's selection, once it is known in which group it is, if any."""
        if not are_known(self._pools):
            return
        pools = [each.objects[self._pool] for each in self._pools if self._pool in each.objects]
        selection = None
        if pools:
            try:
                selection = _selection(pools[0].get("spec", {}))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                _log.error("pool_rejected", pool=self._pool, problem=repr(error))
                self._past_errors += 1
                return
        else:
            _log.warning("pool_absent", pool=self._pool, namespace=self._api.namespace)
        self._select(selection, group, changed)

    def _select(
        self,
        selection: _Selection | None,
        group: asyncio.TaskGroup,
        changed: Callable[[tuple[Endpoint, ...]], None],
    ) -> None:
        """Follow other pods; what was known stays until the new ones are."""
        if selection is None:
            self._selection = None
            self._drop_pods()
            self._tell((), changed)
            return
        if selection == self._selection:
            return
        are_others = self._selection is None or selection.labels != self._selection.labels
        self._selection = selection
        if not are_others:
            self._look_at_pods(changed)
            return
        self._drop_pods()
        labels = ",".join(f"{key}={value}" for key, value in selection.labels)
        path = f"/api/v1/namespaces/{self._api.namespace}/pods"
        self._pods = self._reflector(path, {"labelSelector": labels})
        self._following = group.create_task(self._pods.follow(lambda: self._look_at_pods(changed)))

    def _drop_pods(self) -> None:
        if self._following is not None and self._pods is not None:
            self._past_errors += self._pods.error_count
            self._following.cancel()
        self._following = self._pods = None

    def _look_at_pods(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        if self._pods is None or self._selection is None or not self._pods.is_known:
            return
        endpoints = [
            endpoint
            for _name, pod in sorted(self._pods.objects.items())
            for endpoint in _endpoints(pod, self._selection.ports)
        ]
        self._tell(tuple(endpoints), changed)

    def _tell(
        self, endpoints: tuple[Endpoint, ...], changed: Callable[[tuple[Endpoint, ...]], None]
    ) -> None:
        if endpoints != self._told:
            self._told = endpoints
            changed(endpoints)


def _selection(spec: Mapping[str, Any]) -> _Selection:
    """Read an InferencePool's spec, of either group."""
    labels = spec["selector"]
    labels = labels.get("matchLabels", labels)
    if "targetPorts" in spec:
        ports = tuple(int(port["number"]) for port in spec["targetPorts"])
    else:
        ports = (int(spec["targetPortNumber"]),)
    if not labels or not ports or not all(0 < port <= _PORT_MAX for port in ports):
        message = "must select by labels and have target ports"
        raise ValueError(message)
    return _Selection(tuple(sorted((str(k), str(v)) for k, v in labels.items())), ports)


def _endpoints(pod: Object, ports: tuple[int, ...]) -> Iterator[Endpoint]:
    metadata, status = pod.get("metadata", {}), pod.get("status") or {}
    conditions = status.get("conditions") or ()
    is_ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    role = role_of_label((metadata.get("labels") or {}).get(ROLE_LABEL, ""))
    if is_ready and status.get("podIP") and not metadata.get("deletionTimestamp") and role:
        for port in ports:
            yield Endpoint(str(Address(status["podIP"], port)), role)

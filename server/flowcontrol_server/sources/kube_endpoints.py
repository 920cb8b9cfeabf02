"""Endpoints from Kubernetes: the ready pods that an InferencePool selects, at its target ports.

A pod is ready if its condition Ready is True and it is not being deleted. With disaggregated
prefill and decode, its label llm-d.ai/role names its role.
"""

import asyncio
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

import structlog

from flowcontrol.events import Endpoint
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.sources import KubernetesEndpoints
from flowcontrol_server.sources.endpoints import ROLE_LABEL, role_of_label
from flowcontrol_server.sources.kube_api import KubeApi, Object
from flowcontrol_server.sources.kube_watch import (
    RETRY_FIRST_S,
    RETRY_LONGEST_S,
    SILENCE_S,
    Debounced,
    Reflector,
    are_known,
)

POOL_GROUPS = ("inference.networking.k8s.io/v1", "inference.networking.x-k8s.io/v1alpha2")
"""The API groups that may have the InferencePool; the first that has it is used."""
_PORT_MAX = 65_535
_VALUE_LENGTH_MAX = 200
"""Characters of a value that an error quotes."""
_log = structlog.get_logger()


class _MalformedPoolError(Exception):
    """An InferencePool cannot be followed."""

    def __init__(self, where: str, rule: str, value: object) -> None:
        super().__init__(f"{where} {rule}, got {textwrap.shorten(repr(value), _VALUE_LENGTH_MAX)}")


class _Selection(NamedTuple):
    """The pods of a pool, and their ports."""

    labels: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]


@final
class KubeEndpoints:
    """The endpoints of one pool. Owner: the loop.

    Args:
        api: of the cluster.
        pool: name of the InferencePool.
        settings: labels and ports to use instead of the pool's, if any.
        retry_s: of the `Reflector`s.
        silence_s: of the `Reflector`s.
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
        self._reported: tuple[Endpoint, ...] | None = None
        self._endpoints: dict[str, tuple[Endpoint, ...]] = {}
        """Endpoints of each ready pod, by its name."""
        self._pool_problem: str | None = None
        """Problem of the InferencePool itself; None: no problem."""

    @property
    def error_count(self) -> int:
        """Failures since the start."""
        return self._past_errors + sum(each.error_count for each in self._reflectors())

    @property
    def problems(self) -> Mapping[str, str]:
        """Current problems, by their subject."""
        named = {"pods": self._pods, **dict(zip(POOL_GROUPS, self._pools, strict=False))}
        problems = {name: each.problem for name, each in named.items() if each and each.problem}
        if self._pool_problem is not None:
            problems[f"InferencePool {self._pool}"] = self._pool_problem
        return problems

    async def follow(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Report the endpoints whenever they change, until cancelled."""
        self._restart()
        batch = Debounced(lambda: self._read_pods(changed))
        async with asyncio.TaskGroup() as group:
            group.create_task(batch.run())
            if self._settings.selector:
                labels = tuple(sorted(self._settings.selector.items()))
                self._select(_Selection(labels, self._settings.ports), group, batch)
                return
            selection = {"fieldSelector": f"metadata.name={self._pool}"}
            namespace = self._api.namespace
            self._pools = tuple(
                self._reflector(f"/apis/{each}/namespaces/{namespace}/inferencepools", selection)
                for each in POOL_GROUPS
            )
            for reflector in self._pools:
                group.create_task(reflector.follow(lambda: self._read_pools(group, batch)))

    def _restart(self) -> None:
        """Drop the copies of an earlier call of `follow`, but not the reported endpoints."""
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

    def _read_pools(self, group: asyncio.TaskGroup, batch: Debounced) -> None:
        """Take the pool's selection, once it is known which group has the pool, if any."""
        if not are_known(self._pools):
            return
        pools = [each.objects[self._pool] for each in self._pools if self._pool in each.objects]
        if not pools:
            groups = " or ".join(POOL_GROUPS)
            self._report_problem(
                f"must exist in namespace {self._api.namespace} ({groups}), got none"
            )
            self._select(None, group, batch)
            return
        try:
            selection = _selection(pools[0].get("spec"))
        except _MalformedPoolError as error:  # the last selection stays
            self._report_problem(str(error))
            return
        self._pool_problem = None
        self._select(selection, group, batch)

    def _report_problem(self, problem: str) -> None:
        if problem != self._pool_problem:
            self._past_errors += 1
            _log.error("pool_unusable", pool=self._pool, problem=problem)
        self._pool_problem = problem

    def _select(
        self, selection: _Selection | None, group: asyncio.TaskGroup, batch: Debounced
    ) -> None:
        """Follow other pods; the old endpoints stay until the new pods are known."""
        if selection == self._selection and selection is not None:
            return
        are_others = (
            selection is None
            or self._selection is None
            or selection.labels != self._selection.labels
        )
        self._selection = selection
        self._endpoints.clear()
        if are_others:
            self._drop_pods()
            if selection is not None:
                self._pods = self._reflector_of_pods(selection)
                self._following = group.create_task(self._pods.follow(batch.ask))
        elif self._pods is not None:
            self._pods.changes |= self._pods.objects.keys()  # they have other ports now
        batch.ask()

    def _reflector_of_pods(self, selection: _Selection) -> Reflector:
        labels = ",".join(f"{key}={value}" for key, value in selection.labels)
        path = f"/api/v1/namespaces/{self._api.namespace}/pods"
        return self._reflector(path, {"labelSelector": labels})

    def _drop_pods(self) -> None:
        if self._following is not None and self._pods is not None:
            self._past_errors += self._pods.error_count
            self._following.cancel()
        self._following = self._pods = None

    def _read_pods(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Read the changed pods; without a pool there are no endpoints."""
        pods = self._pods
        if self._selection is not None and pods is not None:
            if not pods.is_known:
                return
            for name in pods.changes:
                pod = pods.objects.get(name)
                endpoints = () if pod is None else tuple(_endpoints(pod, self._selection.ports))
                if endpoints:
                    self._endpoints[name] = endpoints
                else:
                    self._endpoints.pop(name, None)
            pods.changes.clear()
        present = tuple(each for name in sorted(self._endpoints) for each in self._endpoints[name])
        if present != self._reported:
            self._reported = present
            changed(present)


def _selection(spec: object) -> _Selection:
    """Read an InferencePool's spec, of either group.

    Raises:
        _MalformedPoolError: it has no valid labels or ports.
    """
    selector = _field(spec, "spec", "selector")
    labels = selector
    if isinstance(selector, Mapping) and "matchLabels" in selector:
        labels = selector["matchLabels"]
    if not isinstance(labels, Mapping) or not labels:
        where = "spec.selector"
        raise _MalformedPoolError(where, "must have labels to match", selector)
    pairs = tuple(sorted((str(key), str(value)) for key, value in labels.items()))
    return _Selection(pairs, tuple(_ports(spec)))


def _ports(spec: object) -> Iterator[int]:
    if isinstance(spec, Mapping) and "targetPortNumber" in spec:
        yield _port(spec["targetPortNumber"], "spec.targetPortNumber")
        return
    ports = _field(spec, "spec", "targetPorts")
    where = "spec.targetPorts"
    if not isinstance(ports, list) or not ports:
        raise _MalformedPoolError(where, "must be a list of at least one port", ports)
    for index, port in enumerate(ports):
        yield _port(_field(port, f"{where}[{index}]", "number"), f"{where}[{index}].number")


def _field(value: object, where: str, name: str) -> object:
    if not isinstance(value, Mapping) or name not in value:
        raise _MalformedPoolError(where, f"must have {name}", value)
    return value[name]


def _port(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _PORT_MAX:
        raise _MalformedPoolError(where, f"must be a number from 1 to {_PORT_MAX}", value)
    return value


def _endpoints(pod: Object, ports: tuple[int, ...]) -> Iterator[Endpoint]:
    metadata, status = pod.get("metadata", {}), pod.get("status") or {}
    conditions = status.get("conditions") or ()
    is_ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    role = role_of_label((metadata.get("labels") or {}).get(ROLE_LABEL, ""))
    if is_ready and status.get("podIP") and not metadata.get("deletionTimestamp") and role:
        for port in ports:
            yield Endpoint(str(Address(status["podIP"], port)), role)

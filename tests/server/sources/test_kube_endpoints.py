"""Endpoints from Kubernetes: an InferencePool's ready pods at its target ports."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flowcontrol.config import Role
from flowcontrol.events import Endpoint
from flowcontrol_server.config.sources import Kubernetes, KubernetesEndpoints
from flowcontrol_server.sources.kube_api import KubeApi
from flowcontrol_server.sources.kube_endpoints import KubeEndpoints
from tests.support.kubernetes_api import FakeApiServer, api_server
from tests.support.told import Told, eventually, following

POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
OLD_POOLS = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/models/inferencepools"
PODS = "/api/v1/namespaces/models/pods"
FAST = (0.01, 0.05)
APP = {"app": "vllm"}
FROM_THE_POOL = KubernetesEndpoints()
Endpoints = tuple[Endpoint, ...]


def pool(ports: Sequence[int] = (8000,), name: str = "llama", **labels: str) -> dict[str, Any]:
    """An InferencePool."""
    return {
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels or {"app": "vllm"}},
            "targetPorts": [{"number": port} for port in ports],
        },
    }


def pod(
    name: str, address: str | None, *, ready: bool | None = True, **labels: str
) -> dict[str, Any]:
    """A pod, at an address or none yet, ready or not or not yet judged."""
    conditions = [{"type": "PodScheduled", "status": "True"}]
    if ready is not None:
        conditions.append({"type": "Ready", "status": str(ready)})
    status: dict[str, Any] = {"phase": "Running", "conditions": conditions}
    if address is not None:
        status["podIP"] = address
    return {"metadata": {"name": name, "labels": {"app": "vllm", **labels}}, "status": status}


def at(*addresses: str) -> Endpoints:
    """Endpoints that do everything."""
    return tuple(Endpoint(address) for address in addresses)


@pytest.fixture(name="fake")
async def _fake(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    """A server with pools and pods."""
    async with api_server(tmp_path) as (fake, _kubeconfig):
        fake.serve(POOLS)
        fake.serve(PODS)
        yield fake


@asynccontextmanager
async def connected(
    tmp_path: Path, settings: KubernetesEndpoints
) -> AsyncIterator[tuple[KubeEndpoints, Told[Endpoints]]]:
    """The endpoints of the pool llama, not yet followed."""
    api = await KubeApi.connect(Kubernetes(kubeconfig=tmp_path / "kubeconfig"))
    try:
        yield KubeEndpoints(api, "llama", settings, retry_s=FAST), Told[Endpoints]()
    finally:
        await api.close()


@asynccontextmanager
async def followed(
    tmp_path: Path, settings: KubernetesEndpoints = FROM_THE_POOL
) -> AsyncIterator[tuple[KubeEndpoints, Told[Endpoints]]]:
    """The same, followed."""
    async with connected(tmp_path, settings) as (source, told), following(source, told):
        yield source, told


class TestPods:
    """Which pods are endpoints."""

    async def test_live(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """A pod is an endpoint from ready to no longer ready, or to the begin of its deletion."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", PODS, watch="1")
            fake.put(PODS, pod("b", None, ready=None))
            fake.put(PODS, pod("b", "10.0.0.6", ready=False))
            fake.put(PODS, pod("b", "10.0.0.6"))
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))
            fake.put(PODS, pod("a", "10.0.0.5", ready=False))
            await told.until_equal(at("10.0.0.6:8000"))
            fake.put(PODS, pod("a", "10.0.0.5"))
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))
            ending = pod("b", "10.0.0.6")
            ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            fake.put(PODS, ending)
            await told.until_equal(at("10.0.0.5:8000"))
            fake.delete(PODS, "b")
            fake.delete(PODS, "a")
            await told.until_equal(())

            assert told.news[:2] == [at("10.0.0.5:8000"), at("10.0.0.5:8000", "10.0.0.6:8000")]

    async def test_ports(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Each pod counts at each target port, an IPv6 address in brackets."""
        fake.put(POOLS, pool(ports=(8000, 8001)))
        fake.put(PODS, pod("a", "10.0.0.5"))
        fake.put(PODS, pod("b", "fd00::6"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(
                at("10.0.0.5:8000", "10.0.0.5:8001", "[fd00::6]:8000", "[fd00::6]:8001")
            )

    async def test_labels(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Only pods with all of the labels count, and only as long as they have them."""
        fake.put(POOLS, pool(app="vllm", model="llama"))
        fake.put(PODS, pod("a", "10.0.0.5", model="llama"))
        fake.put(PODS, pod("b", "10.0.0.6", model="qwen"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", PODS, watch="1", labelSelector="app=vllm,model=llama")
            fake.put(PODS, pod("b", "10.0.0.6", model="llama"))
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))
            fake.put(PODS, pod("a", "10.0.0.5", model="qwen"))
            await told.until_equal(at("10.0.0.6:8000"))

    @pytest.mark.parametrize(
        ("label", "role"),
        [
            ("prefill", Role.PREFILL),
            ("encode-prefill", Role.PREFILL),
            ("decode", Role.DECODE),
            ("both", Role.BOTH),
            ("prefill-decode", Role.BOTH),
            ("something-new", Role.BOTH),
            ("encode", None),
        ],
    )
    async def test_roles(
        self, fake: FakeApiServer, tmp_path: Path, label: str, role: Role | None
    ) -> None:
        """The label says what a pod does; one that only encodes answers no requests."""
        fake.put(POOLS, pool())
        labelled = pod("a", "10.0.0.5")
        labelled["metadata"]["labels"]["llm-d.ai/role"] = label
        fake.put(PODS, labelled)
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(() if role is None else (Endpoint("10.0.0.5:8000", role),))


class TestPool:
    """Which pods are asked for."""

    async def test_it_changes(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Other ports and other labels count at once; in between nothing is empty."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        fake.put(PODS, pod("b", "10.0.0.6", app="sglang"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", POOLS, watch="1")
            fake.put(POOLS, pool(ports=(9000,)))
            await told.until_equal(at("10.0.0.5:9000"))
            fake.put(POOLS, pool(ports=(9000,), app="sglang"))
            await told.until_equal(at("10.0.0.6:9000"))

            assert () not in told.news

    async def test_it_goes(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Without its InferencePool the pool is empty, until there is one again."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", POOLS, watch="1")
            fake.delete(POOLS, "llama")
            await told.until_equal(())
            fake.put(POOLS, pool())
            await told.until_equal(at("10.0.0.5:8000"))

    async def test_the_named_one(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Other pools of the namespace do not count."""
        fake.put(POOLS, pool(name="qwen"))
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (source, told):
            await told.until_equal(())
            problems, errors = dict(source.problems), source.error_count
            await fake.until_asked("GET", POOLS, watch="1")
            fake.put(POOLS, pool())
            await told.until_equal(at("10.0.0.5:8000"))

            assert source.problems == {}
        assert list(problems) == ["InferencePool llama"]
        assert problems["InferencePool llama"].startswith("must exist in namespace models (")
        assert errors == 1

    async def test_the_old_group(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """An InferencePool of the old group and shape counts where no new one has the name."""
        old = {
            "metadata": {"name": "llama"},
            "spec": {"selector": {"app": "vllm"}, "targetPortNumber": 8100},
        }
        fake.put(OLD_POOLS, old)
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (_source, told):
            await told.until_equal(at("10.0.0.5:8100"))
            await fake.until_asked("GET", POOLS, watch="1")
            fake.put(POOLS, pool())
            await told.until_equal(at("10.0.0.5:8000"))

    @pytest.mark.parametrize(
        ("spec", "problem"),
        [
            ({}, "spec must have selector, got {}"),
            (None, "spec must have selector, got None"),
            (
                {"selector": {}, "targetPorts": [{"number": 1}]},
                "spec.selector must have labels to match, got {}",
            ),
            (
                {"selector": {"matchLabels": 7}},
                "spec.selector must have labels to match, got {'matchLabels': 7}",
            ),
            ({"selector": APP}, "spec must have targetPorts, got {'selector': {'app': 'vllm'}}"),
            (
                {"selector": APP, "targetPorts": []},
                "spec.targetPorts must be a list of at least one port, got []",
            ),
            (
                {"selector": {"matchLabels": APP}, "targetPorts": [{"name": "http"}]},
                "spec.targetPorts[0] must have number, got {'name': 'http'}",
            ),
            (
                {"selector": APP, "targetPorts": [{"number": 1}, {"number": "http"}]},
                "spec.targetPorts[1].number must be a number from 1 to 65535, got 'http'",
            ),
            (
                {"selector": APP, "targetPortNumber": 70000},
                "spec.targetPortNumber must be a number from 1 to 65535, got 70000",
            ),
        ],
    )
    async def test_a_malformed_one(
        self, fake: FakeApiServer, tmp_path: Path, spec: object, problem: str
    ) -> None:
        """A pool that cannot be followed changes nothing; what is wrong is counted and shown."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", POOLS, watch="1")
            fake.put(POOLS, {"metadata": {"name": "llama"}, "spec": spec})
            await eventually(lambda: source.error_count == 1)
            fake.put(PODS, pod("b", "10.0.0.6"))
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))
            assert source.problems == {"InferencePool llama": problem}
            fake.put(POOLS, pool())
            await eventually(lambda: source.problems == {})

    async def test_without_a_pool(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Labels and ports of the settings need no InferencePool and ask for none."""
        fake.put(PODS, pod("a", "10.0.0.5"))
        settings = KubernetesEndpoints(selector={"app": "vllm"}, ports=(7000,))
        async with followed(tmp_path, settings) as (_source, told):
            await told.until_equal(at("10.0.0.5:7000"))

        assert {each.path for each in fake.asked} == {PODS}

    async def test_outage(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """While the server is away, the endpoints stay; afterwards they are caught up with."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            await fake.until_asked("GET", PODS, watch="1")
            fake.failing = 503
            fake.cut()
            await eventually(lambda: source.error_count >= 4)
            assert "pods" in source.problems
            assert told.news == [at("10.0.0.5:8000")]
            fake.delete(PODS, "a")
            fake.put(PODS, pod("b", "10.0.0.6"))
            fake.failing = None
            await told.until_equal(at("10.0.0.6:8000"))

    async def test_the_old_group_forbidden(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """Where only the new group's pools are permitted, that is enough."""
        fake.forbidden.add(("list", OLD_POOLS))
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        async with followed(tmp_path) as (source, told):
            await told.until_equal(at("10.0.0.5:8000"))

            assert list(source.problems) == ["inference.networking.x-k8s.io/v1alpha2"]

    async def test_forbidden(self, fake: FakeApiServer, tmp_path: Path) -> None:
        """What the service account may not do is shown, with the server's own words."""
        fake.put(POOLS, pool())
        fake.forbidden.add(("list", PODS))
        async with followed(tmp_path) as (source, told):
            await eventually(lambda: "pods" in source.problems)

            assert source.problems["pods"] == f'403: cannot list resource at "{PODS}"'
            assert told.news == []


class TestFollowedAgain:
    """What nobody thought of ends the following; then it is followed again."""

    @pytest.mark.parametrize(
        "settings",
        [FROM_THE_POOL, KubernetesEndpoints(selector={"app": "vllm"}, ports=(8000,))],
        ids=["pool", "selector"],
    )
    async def test_after_a_failure(
        self, fake: FakeApiServer, tmp_path: Path, settings: KubernetesEndpoints
    ) -> None:
        """Everything is listed anew; what was told and counted before stays."""
        fake.put(POOLS, pool())
        fake.put(PODS, pod("a", "10.0.0.5"))
        fake.failing, fake.failures_left = 500, 1
        odd = pod("odd", "10.0.0.6")
        odd["status"]["conditions"] = ["odd"]
        async with connected(tmp_path, settings) as (source, told):

            async def break_it() -> None:
                await told.until_equal(at("10.0.0.5:8000"))
                await fake.until_asked("GET", PODS, watch="1")
                fake.put(PODS, odd)

            breaking = asyncio.create_task(break_it())
            with pytest.raises(ExceptionGroup) as failure:
                await source.follow(told.changed)
            await breaking
            assert failure.group_contains(AttributeError)
            assert source.error_count == 1
            fake.put(PODS, pod("odd", "10.0.0.6"))
            async with following(source, told):
                await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))

            assert source.error_count == 1
            assert told.news == [at("10.0.0.5:8000"), at("10.0.0.5:8000", "10.0.0.6:8000")]

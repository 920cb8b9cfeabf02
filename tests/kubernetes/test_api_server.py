"""The sources against a real API server: RBAC, schemas, versions, compaction, expiry."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from flowcontrol.events import EndpointsChanged, Fact, ObjectivesChanged
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources import kube_api
from flowcontrol_server.sources.feed import Feed
from flowcontrol_server.sources.kube_status import WRITE_EVERY_S, WRITERS
from tests.kubernetes.conftest import Place
from tests.support.control_plane import RefusedError
from tests.support.told import Told, eventually

MANIFESTS = Path(__file__).parents[2] / "envoy" / "kubernetes"
NEW, OLD = "llm-d.ai/v1alpha2", "inference.networking.x-k8s.io/v1alpha2"
SEEN_S = 20.0
"""A change is seen in a tenth of a second, and after an outage of the server in 10 s."""
MANY = 5_000
pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]
Json = dict[str, Any]


def documents(name: str) -> list[Json]:
    """The manifests of the project."""
    return [each for each in yaml.safe_load_all((MANIFESTS / name).read_text()) if each]


def objective(name: str, priority: int, version: str = NEW, pool: str = "llama") -> Json:
    """An InferenceObjective."""
    return {
        "apiVersion": version,
        "kind": "InferenceObjective",
        "metadata": {"name": name},
        "spec": {"priority": priority, "poolRef": {"name": pool}},
    }


def pool(port: int = 8000, app: str = "vllm") -> Json:
    """The InferencePool."""
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": "llama"},
        "spec": {
            "selector": {"matchLabels": {"app": app}},
            "targetPorts": [{"number": port}],
            "endpointPickerRef": {"name": "flowcontrol", "port": {"number": 9002}},
        },
    }


def pod(name: str, app: str = "vllm") -> Json:
    """A pod that nobody runs."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": app}},
        "spec": {"containers": [{"name": "server", "image": "server"}]},
    }


def running(address: str, *, ready: bool = True) -> Json:
    """The status of a pod at an address."""
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": str(ready)}],
    }


class Followed:
    """A feed of everything from the API, and what it has told."""

    def __init__(self, feed: Feed, told: Told[Fact]) -> None:
        self.feed = feed
        self._told = told

    @property
    def objectives(self) -> Mapping[str, int] | None:
        """The objectives now in force."""
        facts = [fact for fact in self._told.news if isinstance(fact, ObjectivesChanged)]
        return facts[-1].priorities if facts else None

    @property
    def endpoints(self) -> tuple[str, ...] | None:
        """The endpoints now in force."""
        facts = [fact for fact in self._told.news if isinstance(fact, EndpointsChanged)]
        return facts[-1].addresses if facts else None

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong now."""
        return {f"{source} {about}": problem for source, about, problem in self.feed.problems()}

    async def until(self, is_so: Callable[[], Any], within_s: float = SEEN_S) -> Any:
        """Wait until something is so."""
        return await eventually(is_so, within_s)


async def permitted(place: Place) -> None:
    """Apply the service's own manifests: its service account may do what they say."""
    for document in documents("flowcontrol.yaml"):
        await place.cluster.apply(document, place.namespace)


@asynccontextmanager
async def following(
    place: Place, directory: Path, user: Json | None = None
) -> AsyncIterator[Followed]:
    """The sources, with the permissions that the manifests give."""
    if user is None:
        await permitted(place)
        user = {"token": await place.cluster.token("flowcontrol", place.namespace)}
    kubeconfig = place.running.kubeconfig(directory, user, place.namespace)
    settings = Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"kubernetes": {}},
            "endpoints": {"kubernetes": {}},
            "kubernetes": {"kubeconfig": str(kubeconfig)},
        }
    )
    told: Told[Fact] = Told()
    feed = Feed(told.changed)
    await feed.start(settings)
    try:
        yield Followed(feed, told)
    finally:
        await feed.stop()


async def condition(place: Place, document: Json) -> Json | None:
    """The condition Accepted of an objective, of its present generation."""
    item = await place.cluster.get(document, place.namespace)
    for each in item.get("status", {}).get("conditions", []):
        is_current = each.get("observedGeneration") == item["metadata"]["generation"]
        if each["type"] == "Accepted" and is_current:
            found: Json = each
            return found
    return None


async def until_condition(place: Place, document: Json, status: str, reason: str) -> Json:
    """Wait until an objective's condition says so."""
    async with asyncio.timeout(SEEN_S):
        while True:
            found = await condition(place, document)
            if found and (found["status"], found["reason"]) == (status, reason):
                return found
            await asyncio.sleep(0.02)


class TestManifests:
    """What is shipped."""

    @pytest.mark.parametrize("name", ["flowcontrol.yaml", "pool.yaml"])
    async def test_they_apply(self, place: Place, name: str) -> None:
        """The API server knows every field of every manifest."""
        for document in documents(name):
            applied = await place.cluster.apply(document, place.namespace)

            assert applied["metadata"]["name"] == document["metadata"]["name"]

    async def test_permissions(self, place: Place) -> None:
        """The service account may do what the sources do, and nothing beside it."""
        await permitted(place)
        token = await place.cluster.token("flowcontrol", place.namespace)

        async def may(verb: str, group: str, resource: str, namespace: str) -> bool:
            resource, _, subresource = resource.partition("/")
            attributes = {
                "verb": verb,
                "group": group,
                "resource": resource,
                "subresource": subresource,
                "namespace": namespace,
            }
            review = await place.cluster.call(
                "POST",
                "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
                {
                    "apiVersion": "authorization.k8s.io/v1",
                    "kind": "SelfSubjectAccessReview",
                    "spec": {"resourceAttributes": attributes},
                },
                token=token,
            )
            return bool(review["status"]["allowed"])

        new, old = "llm-d.ai", "inference.networking.x-k8s.io"
        pools = "inference.networking.k8s.io"
        here = place.namespace
        asked = [
            *((verb, "", "pods", here) for verb in ("list", "watch")),
            *((verb, pools, "inferencepools", here) for verb in ("list", "watch")),
            *(
                (verb, group, "inferenceobjectives", here)
                for group in (new, old)
                for verb in ("list", "watch")
            ),
            *(("patch", group, "inferenceobjectives/status", here) for group in (new, old)),
        ]
        refused = [
            ("get", "", "secrets", here),
            ("list", "", "secrets", here),
            ("list", "", "configmaps", here),
            ("get", "", "pods", here),
            ("delete", "", "pods", here),
            ("create", "", "pods", here),
            ("patch", new, "inferenceobjectives", here),
            ("update", new, "inferenceobjectives/status", here),
            ("patch", pools, "inferencepools", here),
            ("list", "", "pods", "kube-system"),
            ("list", new, "inferenceobjectives", "default"),
        ]

        assert [each for each in asked if not await may(*each)] == []
        assert [each for each in refused if await may(*each)] == []


class TestObjectives:
    """InferenceObjectives."""

    async def test_live(self, place: Place, tmp_path: Path) -> None:
        """They come, change and go in both groups, and each is told what it counts for."""
        apply, here = place.cluster.apply, place.namespace
        await apply(objective("chat", 10), here)
        async with following(place, tmp_path) as now:
            assert now.objectives == {"chat": 10}
            accepted = await until_condition(place, objective("chat", 10), "True", "Accepted")
            await apply(objective("chat", 20), here)
            await now.until(lambda: now.objectives == {"chat": 20})
            await until_condition(place, objective("chat", 20), "True", "Accepted")
            await apply(objective("chat", 5, OLD), here)
            await apply(objective("other", 5, OLD, "qwen"), here)
            await until_condition(place, objective("chat", 5, OLD), "False", "Overridden")
            assert now.objectives == {"chat": 20}
            await place.cluster.delete(objective("chat", 20), here)
            await now.until(lambda: now.objectives == {"chat": 5})
            await until_condition(place, objective("chat", 5, OLD), "True", "Accepted")
            stored = await place.cluster.get(objective("chat", 5, OLD), here)
            other = await place.cluster.get(objective("other", 5, OLD), here)

        managers = {each["manager"] for each in stored["metadata"]["managedFields"]}
        assert accepted["message"] == "priority 10 in pool llama"
        assert managers == {"tests", "flowcontrol"}
        assert "Accepted" not in str(other.get("status", {}).get("conditions", []))

    async def test_one_that_cannot_be_written(self, place: Place, tmp_path: Path) -> None:
        """A status with no room for another condition is shown, and delays no other."""
        apply, here = place.cluster.apply, place.namespace
        full, later = objective("full", 1), objective("later", 2)
        theirs = {"status": "True", "reason": "Theirs", "message": ""}
        times = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
        conditions = [{"type": f"Theirs{n}", **theirs, **times} for n in range(8)]
        await apply(full, here)
        await place.cluster.set_status(full, here, {"conditions": conditions})
        async with following(place, tmp_path) as now:
            problem = await now.until(lambda: now.problems.get("objectives.kubernetes status"))
            began_s = time.monotonic()
            await apply(later, here)
            await until_condition(place, later, "True", "Accepted")
            took_s = time.monotonic() - began_s
            await place.cluster.set_status(full, here, {"conditions": conditions[:7]})
            await until_condition(place, full, "True", "Accepted")
            await now.until(lambda: "objectives.kubernetes status" not in now.problems)

        assert problem.startswith("status of full not written: 422: ")
        assert took_s < 5, "27 s when all waited"

    async def test_many(self, place: Place, tmp_path: Path) -> None:
        """5,000 are known in seconds, and their statuses written in half a minute."""
        here = place.namespace
        half = [objective(f"o{n}", n % 7, NEW if n % 2 else OLD) for n in range(MANY)]
        for first in range(0, MANY, 8):
            each = half[first : first + 8]
            await asyncio.gather(*(place.cluster.apply(document, here) for document in each))
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        async with following(place, tmp_path) as now:
            await now.until(lambda: len(now.objectives or ()) == MANY)
            known_s = time.monotonic() - began_s
            paths = [
                (await place.cluster.path(objective("o", 0, version), here)).removesuffix("/o")
                for version in (NEW, OLD)
            ]
            await asyncio.sleep(MANY / WRITERS * WRITE_EVERY_S)  # it cannot take less
            while (  # noqa: ASYNC110 - another process
                sum([await self.written(place, path) for path in paths]) < MANY
            ):
                await asyncio.sleep(2)  # a look costs more than a hundred statuses
            written_s = time.monotonic() - began_s
            cpu_s = time.process_time() - began_cpu_s
            problems = now.problems
        # As on an idle machine, with half as much again, or in proportion where it is busy.
        busy = max(1.5, os.getloadavg()[0] / (os.cpu_count() or 1))
        print(f"known {known_s:.1f} s, written {written_s:.1f} s, CPU {cpu_s:.1f} s, {busy:.1f}")  # noqa: T201 - the figures are worth reading

        assert "objectives.kubernetes status" not in problems
        assert known_s < 3 * busy
        assert written_s < 30 * busy, "367 s when each event judged all"
        assert cpu_s < 25, "12 s; 178 s when each event judged all"

    async def written(self, place: Place, path: str) -> int:
        """How many have their condition."""
        items = (await place.cluster.call("GET", path, resourceVersion="0"))["items"]
        return sum(
            "Accepted" in str(item.get("status", {}).get("conditions"))
            and "priority" in str(item["status"]["conditions"])
            for item in items
        )


class TestEndpoints:
    """Pods of the pool."""

    async def test_live(self, place: Place, tmp_path: Path) -> None:
        """Pods come, are ready, change and go; the pool changes its port, its labels, and goes."""
        cluster, here = place.cluster, place.namespace
        async with following(place, tmp_path) as now:
            absent = now.problems["endpoints.kubernetes InferencePool llama"]
            await cluster.apply(pool(), here)
            await cluster.apply(pod("a"), here)
            await cluster.set_status(pod("a"), here, running("10.0.0.5"))
            await now.until(lambda: now.endpoints == ("10.0.0.5:8000",))
            assert "endpoints.kubernetes InferencePool llama" not in now.problems
            await cluster.apply(pod("b", "sglang"), here)
            await cluster.set_status(pod("b"), here, running("10.0.0.6"))
            await cluster.apply(pool(9000), here)
            await now.until(lambda: now.endpoints == ("10.0.0.5:9000",))
            await cluster.apply(pool(9000, "sglang"), here)
            await now.until(lambda: now.endpoints == ("10.0.0.6:9000",))
            await cluster.set_status(pod("b"), here, running("10.0.0.6", ready=False))
            await now.until(lambda: now.endpoints == ())
            await cluster.apply(pool(), here)
            await now.until(lambda: now.endpoints == ("10.0.0.5:8000",))
            await cluster.delete(pod("a"), here)
            await now.until(lambda: now.endpoints == ())
            await cluster.delete(pool(), here)
            await now.until(lambda: "endpoints.kubernetes InferencePool llama" in now.problems)

        assert absent.startswith(f"must exist in namespace {here} (")


class TestOutages:
    """What the API server goes through."""

    async def test_restart(self, place: Place, tmp_path: Path) -> None:
        """What was known stays; every watch is answered 410 afterwards, and all is seen again."""
        cluster, here = place.cluster, place.namespace
        await cluster.apply(objective("chat", 10), here)
        async with following(place, tmp_path) as now:
            place.running.stop_server()
            await now.until(lambda: len(now.problems) >= 4)
            kept = now.objectives
            await asyncio.sleep(15)  # until the longest wait is reached
            await asyncio.to_thread(place.running.start_server)
            await cluster.apply(objective("batch", -1), here)
            began_s = time.monotonic()
            await now.until(lambda: now.objectives == {"chat": 10, "batch": -1}, 60)
            took_s = time.monotonic() - began_s
            await until_condition(place, objective("batch", -1), "True", "Accepted")

        assert kept == {"chat": 10}
        assert took_s < 20, "52 s when 410 was waited for like an outage"

    async def test_compaction(self, place: Place, tmp_path: Path) -> None:
        """A version that etcd has forgotten brings a new list."""
        cluster, here = place.cluster, place.namespace
        await cluster.apply(objective("chat", 10), here)
        for name in ("gone", "gone-too"):
            await cluster.apply(objective(name, 10), here)
        with capture_logs() as lines:
            async with following(place, tmp_path) as now:
                place.running.stop_server()
                # Two: etcd still has the last change, and could tell of one.
                for name in ("gone", "gone-too"):
                    place.running.delete_stored(f"llm-d.ai/inferenceobjectives/{here}/{name}")
                place.running.compact()
                await asyncio.to_thread(place.running.start_server, "--watch-cache=false")
                await now.until(lambda: now.objectives == {"chat": 10}, 60)
        place.running.stop_server()
        await asyncio.to_thread(place.running.start_server)

        # 404 while the API server does not serve its custom resources yet brings a list, too.
        assert "kubernetes_relisted" in str(lines) or "404: " in str(lines)

    async def test_permission_taken_and_given_back(self, place: Place, tmp_path: Path) -> None:
        """Without permission what was known stays, and the server's words are shown."""
        cluster, here = place.cluster, place.namespace
        await cluster.apply(objective("chat", 10), here)
        (binding,) = (d for d in documents("flowcontrol.yaml") if d["kind"] == "RoleBinding")
        async with following(place, tmp_path) as now:
            await cluster.delete(binding, here)
            place.running.stop_server()  # a watch that is open lives on
            await asyncio.to_thread(place.running.start_server)
            await now.until(lambda: "403" in str(now.problems), 60)
            kept, problems = now.objectives, dict(now.problems)
            await cluster.apply(objective("batch", -1), here)
            await cluster.apply(binding, here)
            await now.until(lambda: now.objectives == {"chat": 10, "batch": -1}, 60)
            await until_condition(place, objective("batch", -1), "True", "Accepted")
            await now.until(lambda: "403" not in str(now.problems), 60)

        assert kept == {"chat": 10}
        assert "cannot" in str(problems)

    async def test_token_renewed(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token that is of no use any more is read again from its file."""
        monkeypatch.setattr(kube_api, "RENEWAL_PAUSE_S", 0.0)
        cluster, here = place.cluster, place.namespace
        await permitted(place)
        file = tmp_path / "token"
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bound"}}
        uid = (await cluster.apply(secret, here))["metadata"]["uid"]
        bound = {"apiVersion": "v1", "kind": "Secret", "name": "bound", "uid": uid}
        file.write_text(await cluster.token("flowcontrol", here, bound))
        async with following(place, tmp_path, {"tokenFile": str(file)}) as now:
            await cluster.delete(secret, here)
            old = file.read_text()
            async with asyncio.timeout(60):
                while not await self.is_refused(place, old):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.5)
            file.write_text(await cluster.token("flowcontrol", here))
            place.running.stop_server()
            await asyncio.to_thread(place.running.start_server)
            await cluster.apply(objective("chat", 10), here)
            await now.until(lambda: now.objectives == {"chat": 10}, 60)
            await until_condition(place, objective("chat", 10), "True", "Accepted")
            await now.until(lambda: "401" not in str(now.problems))

    async def is_refused(self, place: Place, token: str) -> bool:
        """Whether a token is of no use."""
        try:
            await place.cluster.call("GET", "/version", token=token)
            path = f"/api/v1/namespaces/{place.namespace}/pods"
            await place.cluster.call("GET", path, token=token)
        except RefusedError as error:
            return error.status == 401
        return False

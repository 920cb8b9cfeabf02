"""InferenceObjectives from Kubernetes: both groups, this pool's alone, and their status."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from flowcontrol_server.config.sources import Kubernetes
from flowcontrol_server.sources import kube_objectives, kube_status
from flowcontrol_server.sources.kube_api import KubeApi
from flowcontrol_server.sources.kube_objectives import KubeObjectives
from flowcontrol_server.sources.objectives import read_objective
from tests.support.kubernetes_api import FakeApiServer, api_server
from tests.support.told import Told, eventually, following

NEW = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"
OLD = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/models/inferenceobjectives"
FAST = (0.01, 0.05)


def objective(
    name: str, priority: object = None, pool: str = "llama", **ref: str
) -> dict[str, Any]:
    """An InferenceObjective as the API gives it within a list: without kind and apiVersion."""
    spec: dict[str, Any] = {"poolRef": {"name": pool, **ref}}
    if priority is not None:
        spec["priority"] = priority
    return {"metadata": {"name": name}, "spec": spec}


@pytest.fixture(name="fake")
async def _fake(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    """A server with the new group installed."""
    async with api_server(tmp_path) as (fake, _kubeconfig):
        fake.serve(NEW)
        yield fake


@pytest.fixture(name="kubeconfig")
def _kubeconfig(fake: FakeApiServer, tmp_path: Path) -> Path:
    """What leads to it."""
    del fake  # it has written it
    return tmp_path / "kubeconfig"


@asynccontextmanager
async def followed(
    kubeconfig: Path, *, writes_status: bool = False
) -> AsyncIterator[tuple[KubeObjectives, Told[Mapping[str, int]]]]:
    """The objectives of the pool llama, followed."""
    api = await KubeApi.connect(Kubernetes(kubeconfig=kubeconfig))
    source = KubeObjectives(api, "llama", writes_status=writes_status, retry_s=FAST)
    told: Told[Mapping[str, int]] = Told()
    try:
        async with following(source, told):
            yield source, told
    finally:
        await api.close()


def conditions(fake: FakeApiServer, path: str, name: str) -> list[dict[str, Any]]:
    """The conditions in an object's status, without their times."""
    found = fake.get(path, name).get("status", {}).get("conditions", [])
    return [{k: v for k, v in each.items() if k != "lastTransitionTime"} for each in found]


class TestObjectives:
    """What is told."""

    async def test_live(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Objectives that come, change and go are told, whole sets at a time."""
        fake.put(NEW, objective("chat", 10))
        async with followed(kubeconfig) as (_source, told):
            await told.until_equal({"chat": 10})
            await fake.until_asked("GET", NEW, watch="1")
            fake.put(NEW, objective("batch", -1))
            await told.until_equal({"chat": 10, "batch": -1})
            fake.put(NEW, objective("batch", -5))
            await told.until_equal({"chat": 10, "batch": -5})
            fake.delete(NEW, "chat")
            await told.until_equal({"batch": -5})

    async def test_default_priority(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Without a priority it is 0."""
        fake.put(NEW, objective("plain"))
        async with followed(kubeconfig) as (_source, told):
            await told.until_equal({"plain": 0})

    async def test_this_pool_alone(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Objectives of other pools, and of other kinds of pool, are passed over."""
        fake.put(NEW, objective("mine", 1, group="inference.networking.k8s.io"))
        fake.put(NEW, objective("other", 2, pool="qwen"))
        fake.put(NEW, objective("service", 3, kind="Service"))
        fake.put(NEW, objective("defaulted", 4, group="llm-d.ai"))  # as the CRD fills it in
        async with followed(kubeconfig) as (source, told):
            await told.until_equal({"mine": 1, "defaulted": 4})
            await fake.until_asked("GET", NEW, watch="1")
            fake.put(NEW, objective("other", 2, pool="llama"))
            await told.until_equal({"mine": 1, "defaulted": 4, "other": 2})

            assert source.error_count == 0

    async def test_both_groups(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Of a name in both groups llm-d.ai counts, as long as it is there."""
        fake.put(OLD, objective("chat", 2))
        fake.put(OLD, objective("batch", -2))
        fake.put(NEW, objective("chat", 1))
        async with followed(kubeconfig) as (_source, told):
            await told.until_equal({"chat": 1, "batch": -2})
            await fake.until_asked("GET", NEW, watch="1")
            fake.delete(NEW, "chat")
            await told.until_equal({"chat": 2, "batch": -2})

            assert told.news[0] == {"chat": 1, "batch": -2}, "half of it is never told"

    async def test_only_the_old_group(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Where only the old group is installed, that is enough."""
        fake.unserve(NEW)
        fake.put(OLD, objective("chat", 2))
        async with followed(kubeconfig) as (source, told):
            await told.until_equal({"chat": 2})

            assert source.error_count == 0

    @pytest.mark.parametrize("refused", [NEW, OLD])
    async def test_one_group_forbidden(
        self, fake: FakeApiServer, kubeconfig: Path, refused: str
    ) -> None:
        """Where only one group is permitted, that is enough; of the other it is shown."""
        fake.serve(OLD)
        fake.forbidden |= {("list", refused), ("watch", refused)}
        permitted = OLD if refused == NEW else NEW
        fake.put(permitted, objective("chat", 10))
        async with followed(kubeconfig) as (source, told):
            await told.until_equal({"chat": 10})
            assert list(source.problems.values()) == [f'403: cannot list resource at "{refused}"']
            fake.forbidden.clear()
            fake.put(refused, objective("batch", -1))
            await told.until_equal({"chat": 10, "batch": -1})

            assert source.problems == {}

    async def test_both_groups_forbidden(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Where nothing is permitted, nothing is told: that is not the same as no objectives."""
        fake.forbidden |= {("list", NEW), ("list", OLD)}
        async with followed(kubeconfig) as (source, told):
            await eventually(lambda: len(source.problems) == 2)

            assert told.news == []

    async def test_a_bad_one(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """One that no schema has checked does not take the others down; it is counted and said."""
        fake.put(NEW, objective("bad", "high"))
        fake.put(NEW, objective("good", 1))
        with capture_logs() as lines:
            async with followed(kubeconfig) as (source, told):
                await told.until_equal({"good": 1})
                await fake.until_asked("GET", NEW, watch="1")
                fake.put(NEW, objective("another", 2))
                await told.until_equal({"good": 1, "another": 2})

                assert source.error_count == 1
                problem = "spec.priority must be a whole number, got 'high'"
                assert source.problems == {"llm-d.ai/v1alpha2 bad": problem}
                fake.put(NEW, objective("bad", 3))
                await told.until_equal({"good": 1, "another": 2, "bad": 3})
                assert source.problems == {}
        said = [line for line in lines if line["event"] == "objective_rejected"]
        assert [line["objective"] for line in said] == ["llm-d.ai/v1alpha2 bad"]

    async def test_outage(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """While the server is away nothing is told: what was known stays in force."""
        fake.put(NEW, objective("chat", 10))
        async with followed(kubeconfig) as (source, told):
            await told.until_equal({"chat": 10})
            await fake.until_asked("GET", NEW, watch="1")
            fake.failing = 503
            fake.cut()
            await eventually(lambda: source.error_count >= 4)
            assert told.news == [{"chat": 10}]
            fake.delete(NEW, "chat")
            fake.failing = None
            await told.until_equal({})

    async def test_followed_again(
        self, fake: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After what nobody thought of all is listed and told again, also what was not told yet."""

        def odd(*_arguments: object) -> None:
            raise ZeroDivisionError

        fake.put(NEW, objective("chat", 10))
        api = await KubeApi.connect(Kubernetes(kubeconfig=kubeconfig))
        source = KubeObjectives(api, "llama", writes_status=False, retry_s=FAST)
        told: Told[Mapping[str, int]] = Told()
        try:
            with monkeypatch.context() as oddity:
                oddity.setattr(kube_objectives, "read_objective", odd)
                with pytest.raises(ExceptionGroup) as failure:
                    await source.follow(told.changed)
            assert failure.group_contains(ZeroDivisionError)
            assert told.news == []
            async with following(source, told):
                await told.until_equal({"chat": 10})
        finally:
            await api.close()


class TestStatus:
    """The condition Accepted."""

    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody waits between two statuses."""
        monkeypatch.setattr(kube_status, "WRITE_EVERY_S", 0.0)

    async def test_accepted(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """It says what was understood, of which generation; once, and anew when that changes."""
        fake.put(NEW, objective("chat", 10))
        async with followed(kubeconfig, writes_status=True):
            await fake.until_asked("PATCH", f"{NEW}/chat/status")
            expected = {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "priority 10 in pool llama",
                "observedGeneration": 1,
            }
            await eventually(lambda: conditions(fake, NEW, "chat") == [expected])
            written = await fake.until_asked("PATCH", f"{NEW}/chat/status")
            written_at = fake.get(NEW, "chat")["status"]["conditions"][0]["lastTransitionTime"]
            changed = fake.get(NEW, "chat")
            changed["spec"]["priority"] = 20
            fake.put(NEW, changed)
            expected |= {"message": "priority 20 in pool llama", "observedGeneration": 2}
            await eventually(lambda: conditions(fake, NEW, "chat") == [expected])
            standing = fake.get(NEW, "chat")["status"]["conditions"][0]
            fake.put(NEW, objective("last", 1))
            await fake.until_asked("PATCH", f"{NEW}/last/status")

        assert written.query["fieldManager"] == "flowcontrol"
        assert written.agent.startswith("flowcontrol/")
        assert standing["lastTransitionTime"] == written_at, "Accepted it was all the time"
        patched = [each.path for each in fake.asked if each.method == "PATCH"]
        assert patched == [f"{NEW}/chat/status"] * 2 + [f"{NEW}/last/status"]

    async def test_others_conditions_stay(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """What others say in the status is left alone."""
        theirs = {"type": "Audited", "status": "True", "reason": "Audited", "message": ""}
        fake.put(NEW, {**objective("chat", 10), "status": {"conditions": [theirs]}})
        async with followed(kubeconfig, writes_status=True):
            await eventually(lambda: len(conditions(fake, NEW, "chat")) == 2)

        assert conditions(fake, NEW, "chat")[0] == theirs

    async def test_not_accepted(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """A wrong one and one that another overrides are told why they do not count."""
        fake.put(NEW, objective("bad", 1.5))
        fake.put(NEW, objective("chat", 1))
        fake.put(OLD, objective("chat", 2))
        async with followed(kubeconfig, writes_status=True):
            await eventually(lambda: conditions(fake, NEW, "bad") and conditions(fake, OLD, "chat"))
            await eventually(lambda: conditions(fake, NEW, "chat"))

        (bad,), (new,), (old,) = (
            conditions(fake, *which) for which in ((NEW, "bad"), (NEW, "chat"), (OLD, "chat"))
        )
        assert (bad["status"], bad["reason"]) == ("False", "Invalid")
        assert bad["message"] == "spec.priority must be a whole number, got 1.5"
        assert (new["status"], new["reason"]) == ("True", "Accepted")
        assert (old["status"], old["reason"]) == ("False", "Overridden")
        assert old["message"] == "llm-d.ai/v1alpha2 declares the same name"

    async def test_not_ours(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Objectives of other pools are for others to judge."""
        fake.put(NEW, objective("other", 1, pool="qwen"))
        fake.put(NEW, objective("zebra", 1))
        async with followed(kubeconfig, writes_status=True):
            await fake.until_asked("PATCH", f"{NEW}/zebra/status")

        assert conditions(fake, NEW, "other") == []

    async def test_forbidden(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """Where writing is forbidden that is said once; objectives are followed all the same."""
        fake.forbidden.add(("patch", NEW))
        fake.put(NEW, objective("chat", 10))
        with capture_logs() as lines:
            async with followed(kubeconfig, writes_status=True) as (source, told):
                await fake.until_asked("PATCH", f"{NEW}/chat/status")
                fake.put(NEW, objective("batch", -1))
                await told.until_equal({"chat": 10, "batch": -1})
                await eventually(lambda: " and 1 others not written" in source.problems["status"])

                assert source.error_count == 1
        said = [line for line in lines if line["event"] == "status_not_written"]
        assert len(said) == 1
        assert said[0]["problem"].startswith("403: ")

    async def test_forbidden_for_a_while(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """It is shown, tried again soon, and written when that is allowed."""
        names = [f"o{index}" for index in range(20)]
        fake.forbidden.add(("patch", NEW))
        for name in names:
            fake.put(NEW, objective(name, 10))
        async with followed(kubeconfig, writes_status=True) as (source, _told):
            await eventually(lambda: "status" in source.problems)
            problem = source.problems["status"]
            await eventually(lambda: [each.method for each in fake.asked].count("PATCH") > 5)
            fake.forbidden.clear()
            await eventually(lambda: all(conditions(fake, NEW, name) for name in names))
            await eventually(lambda: source.problems == {})

        assert problem.startswith("status of o")
        assert f'403: cannot patch resource at "{NEW}"' in problem

    async def test_one_refused(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """A status that is invalid is not repeated until the object changes; others go on."""
        fake.put(NEW, objective("bad", 1))
        fake.unwritable["bad"] = 422
        async with followed(kubeconfig, writes_status=True) as (source, _told):
            await fake.until_asked("PATCH", f"{NEW}/bad/status")
            for index in range(10):
                fake.put(NEW, objective(f"good{index}", 1))
                await eventually(partial(conditions, fake, NEW, f"good{index}"))
            tries = [each.path for each in fake.asked].count(f"{NEW}/bad/status")
            problems = dict(source.problems)
            del fake.unwritable["bad"]
            fake.put(NEW, objective("bad", 2))
            await eventually(lambda: conditions(fake, NEW, "bad"))
            await eventually(lambda: source.problems == {})

        assert tries == 1
        assert problems == {"status": 'status of bad not written: 422: status of "bad" is invalid'}

    async def test_one_forbidden(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """One that an admission webhook refuses waits for itself alone."""
        fake.put(NEW, objective("bad", 1))
        fake.unwritable["bad"] = 403
        api = await KubeApi.connect(Kubernetes(kubeconfig=kubeconfig))
        source = KubeObjectives(api, "llama", writes_status=True, retry_s=(600.0, 600.0))
        async with following(source, Told[Mapping[str, int]]()):
            await fake.until_asked("PATCH", f"{NEW}/bad/status")
            fake.put(NEW, objective("good", 1))
            await eventually(lambda: conditions(fake, NEW, "good"))
        await api.close()

    async def test_work_is_linear(
        self, fake: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each objective is read when it arrives and when its status comes back."""
        read: list[str] = []
        reads = read_objective

        def counted(document: Any, pool: str) -> Any:
            read.append(document["metadata"]["name"])
            return reads(document, pool)

        monkeypatch.setattr(kube_objectives, "read_objective", counted)
        names = [f"o{index}" for index in range(100)]
        for name in names:
            fake.put(NEW, objective(name, 10))
        async with followed(kubeconfig, writes_status=True):
            await eventually(lambda: all(conditions(fake, NEW, name) for name in names))
            await eventually(lambda: len(read) >= 2 * len(names))

        assert len(read) <= 3 * len(names)

    async def test_an_outage(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """A status that could not be written is written when the server is back; said once."""
        fake.forbidden.add(("patch", NEW))
        fake.put(NEW, objective("chat", 10))
        fake.refusal = 503
        with capture_logs() as lines:
            async with followed(kubeconfig, writes_status=True):
                await fake.until_asked("PATCH", f"{NEW}/chat/status", 4)
                fake.forbidden.clear()
                await eventually(lambda: conditions(fake, NEW, "chat"))
        said = [line["problem"] for line in lines if line["event"] == "status_not_written"]
        assert len(said) == 1
        assert said[0].startswith("503: ")

    async def test_conflict(self, fake: FakeApiServer, kubeconfig: Path) -> None:
        """A status of an older version is not forced upon a newer object: that is judged itself."""
        fake.forbidden |= {("watch", NEW), ("patch", NEW)}  # so that the change comes in between
        fake.put(NEW, objective("chat", 10))
        async with followed(kubeconfig, writes_status=True) as (_source, told):
            await told.until_equal({"chat": 10})
            await fake.until_asked("PATCH", f"{NEW}/chat/status")
            fake.put(NEW, objective("chat", 20))
            fake.forbidden.discard(("patch", NEW))
            count = [each.method for each in fake.asked].count("PATCH")
            await fake.until_asked("PATCH", f"{NEW}/chat/status", count + 1)
            assert conditions(fake, NEW, "chat") == []
            fake.forbidden.clear()
            await told.until_equal({"chat": 20})
            await eventually(lambda: conditions(fake, NEW, "chat"))

        assert [each["message"] for each in conditions(fake, NEW, "chat")] == [
            "priority 20 in pool llama"
        ]

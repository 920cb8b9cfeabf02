"""A copy of a Kubernetes collection, against a server over real HTTP that fails in every way."""

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes_asyncio.config import incluster_config, kube_config
from structlog.testing import capture_logs

from flowcontrol.errors import FlowControlError
from flowcontrol_server.config.sources import Kubernetes
from flowcontrol_server.sources import kube_api
from flowcontrol_server.sources.kube_api import KubeApi
from flowcontrol_server.sources.kube_watch import Reflector
from tests.support.certificates import Authority
from tests.support.kubernetes_api import TOKEN, FakeApiServer, api_server, kubeconfig_for
from tests.support.told import Told, eventually, following

PATH = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"
FAST = (0.01, 0.05)
EXEC_VERSION = "client.authentication.k8s.io/v1"
"""Waits after failures, so that no test takes long."""
WHOLE = """
{apiVersion: v1, kind: Config, current-context: a,
contexts: [{name: a, context: {cluster: a, user: a}}], users: [{name: a, user: {token: x}}],
clusters: [{name: a, cluster: {server: https://127.0.0.1:1}}]}
"""
Names = tuple[str, ...]


def item(name: str, **more: Any) -> dict[str, Any]:
    """An object."""
    return {"metadata": {"name": name}, **more}


def in_pod(monkeypatch: pytest.MonkeyPatch, folder: Path, kubeconfig: Path) -> None:
    """Have the files and variables of a pod's service account, which leads where another does."""
    server = urlsplit(yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
    (folder / "namespace").write_text("models")
    (folder / "token").write_text(TOKEN)
    monkeypatch.setattr(kube_api, "_NAMESPACE_FILE", folder / "namespace")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(server.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))


@asynccontextmanager
async def connected(kubeconfig: Path | None) -> AsyncIterator[KubeApi]:
    """A connection with the credentials of a kubeconfig, or of the pod."""
    settings = Kubernetes(kubeconfig=kubeconfig) if kubeconfig else Kubernetes()
    api = await KubeApi.connect(settings)
    try:
        yield api
    finally:
        await api.close()


@asynccontextmanager
async def reflected(
    kubeconfig: Path | None, path: str = PATH, silence_s: float = 5.0, **selection: str
) -> AsyncIterator[tuple[Reflector, Told[Names]]]:
    """A copy that is followed, and the names it has had."""
    async with connected(kubeconfig) as api:
        reflector = Reflector(api, path, selection, retry_s=FAST, silence_s=silence_s)
        told: Told[Names] = Told()

        class _Named:
            async def follow(self, changed: Any) -> None:
                await reflector.follow(lambda: changed(tuple(sorted(reflector.objects))))

        async with following(_Named(), told):
            yield reflector, told


@pytest.fixture(name="server")
async def _server(tmp_path: Path) -> AsyncIterator[tuple[FakeApiServer, Path]]:
    """A server that has the collection, and the kubeconfig that leads there."""
    async with api_server(tmp_path) as (fake, kubeconfig):
        fake.serve(PATH)
        yield fake, kubeconfig


Served = tuple[FakeApiServer, Path]


class TestFollowing:
    """While all is well."""

    async def test_list_and_watch(self, server: Served) -> None:
        """What is there is listed once; what comes, changes and goes is watched."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(("a",))
            await fake.until_asked("GET", PATH, watch="1")
            fake.put(PATH, item("b", spec=1))
            await told.until_equal(("a", "b"))
            fake.put(PATH, item("b", spec=2))
            await eventually(lambda: reflector.objects["b"]["spec"] == 2)
            fake.delete(PATH, "a")
            await told.until_equal(("b",))

        assert fake.list_count == 1
        assert reflector.error_count == 0
        assert reflector.problem is None

    async def test_empty(self, server: Served) -> None:
        """An empty collection is told once, too: it is known now."""
        async with reflected(server[1]) as (reflector, told):
            await told.until_equal(())

            assert reflector.is_known
            assert not reflector.is_absent

    async def test_pages(self, server: Served) -> None:
        """A long list comes in pages, and is told whole."""
        fake, kubeconfig = server
        fake.page_max = 3
        names = tuple(f"n{index}" for index in range(10))
        for name in names:
            fake.put(PATH, item(name))
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(names)

            assert told.news == [names]
        assert [each.query.get("continue") for each in fake.asked][:4] == [None, "3", "6", "9"]

    async def test_what_is_asked(self, server: Served) -> None:
        """The selection goes with both; a watch asks for bookmarks, from the list's version on."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        async with reflected(kubeconfig, fieldSelector="metadata.name=a"):
            watch = await fake.until_asked("GET", PATH, watch="1")

        assert fake.asked[0].query["fieldSelector"] == "metadata.name=a"
        assert watch.query["fieldSelector"] == "metadata.name=a"
        assert watch.query["allowWatchBookmarks"] == "true"
        assert watch.query["resourceVersion"] == "101"
        assert 240 <= int(watch.query["timeoutSeconds"]) <= 360


class TestInterruptions:
    """What ends a watch."""

    async def test_bookmarks_move_the_version_on(self, server: Served) -> None:
        """After a bookmark and a cut, the watch goes on from the bookmark, without a list."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(("a",))
            await fake.until_asked("GET", PATH, watch="1")
            for _ in range(3):
                fake.bookmark()
            fake.put(PATH, item("b"))
            await told.until_equal(("a", "b"))
            fake.bookmark()
            fake.forget_history()  # all before the bookmark, almost
            fake.bookmark()
            fake.put(PATH, item("c"))
            await told.until_equal(("a", "b", "c"))
            fake.cut()
            again = await fake.until_asked("GET", PATH, 2, watch="1")
            fake.put(PATH, item("d"))
            await told.until_equal(("a", "b", "c", "d"))

        assert int(again.query["resourceVersion"]) == 109
        assert fake.list_count == 1

    @pytest.mark.parametrize("end", ["cut", "end_watches"])
    async def test_nothing_is_missed(self, server: Served, end: str) -> None:
        """What happens while no watch is open comes with the next one."""
        fake, kubeconfig = server
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            getattr(fake, end)()
            fake.put(PATH, item("meanwhile"))
            await told.until_equal(("meanwhile",))

        assert fake.list_count == 1

    async def test_gone_within_the_watch(self, server: Served) -> None:
        """An ERROR event with 410 brings a new list: what was deleted unseen is missing in it."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        fake.put(PATH, item("b"))
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(("a", "b"))
            await fake.until_asked("GET", PATH, watch="1")
            fake.cut()
            fake.delete(PATH, "a")
            fake.forget_history()
            await told.until_equal(("b",))

        assert fake.list_count == 2
        assert reflector.error_count <= 1, "the cut, if anything"

    async def test_gone_as_a_status(self, server: Served) -> None:
        """410 as the answer to the watch itself does the same."""
        fake, kubeconfig = server
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            fake.failing = 410
            fake.cut()
            await fake.until_asked("GET", PATH, 2, watch="1")
            fake.failing = None
            fake.put(PATH, item("a"))
            await told.until_equal(("a",))

            assert fake.list_count == 2

    @pytest.mark.slow
    async def test_gone_after_an_outage(self, server: Served) -> None:
        """A server that is back is listed at once, however long the waits have become."""
        fake, kubeconfig = server
        async with connected(kubeconfig) as api:
            reflector = Reflector(api, PATH, retry_s=(0.01, 600.0))
            following = asyncio.create_task(reflector.follow(lambda: None))
            await fake.until_asked("GET", PATH, watch="1")
            fake.failing, fake.failures_left = 503, 7
            fake.cut()
            fake.forget_history()
            await fake.until_asked("GET", PATH, 9, watch="1")  # waits add up to 1.3 to 2.6 s
            await eventually(lambda: fake.list_count == 2, 1.0)  # the next would be 1.3 to 2.6 s
            following.cancel()

    async def test_gone_again_and_again(self, server: Served) -> None:
        """A server that answers nothing but 410 is listed more and more seldom."""
        fake, kubeconfig = server
        fake.forget_history()
        async with connected(kubeconfig) as api:
            reflector = Reflector(api, PATH, retry_s=(0.01, 600.0))
            following = asyncio.create_task(reflector.follow(lambda: None))
            await fake.until_asked("GET", PATH, watch="1")
            fake.watches_are_gone = True
            fake.cut()
            started_s = time.monotonic()
            await eventually(lambda: fake.list_count == 8)
            following.cancel()

        assert time.monotonic() - started_s > 0.01 * (2**6 - 1) / 2

    async def test_pages_expire(self, server: Served) -> None:
        """A list that is compacted away between its pages is read whole, and counted."""
        fake, kubeconfig = server
        fake.page_max, fake.pages_expire = 3, True
        names = tuple(f"n{index}" for index in range(10))
        for name in names:
            fake.put(PATH, item(name))
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(names)

            assert (reflector.error_count, reflector.problem) == (1, None)
        assert [each.query.get("limit") for each in fake.asked[:3]] == ["100", "100", None]

    async def test_a_long_line(self, server: Served) -> None:
        """A watch line beyond what is read brings a new list; the following goes on."""
        fake, kubeconfig = server
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            fake.say(b'"' + b"x" * (5 << 20) + b'"\n')
            await eventually(lambda: fake.list_count == 2)
            await fake.until_asked("GET", PATH, 2, watch="1")
            fake.put(PATH, item("a"))
            await told.until_equal(("a",))

            assert reflector.error_count == 1

    async def test_cut_in_the_middle_of_a_line(self, server: Served) -> None:
        """Half an event is none: it comes again whole."""
        fake, kubeconfig = server
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            fake.say(b'{"type": "ADDED", "object": {"metadata": {"na')
            fake.end_watches()
            fake.put(PATH, item("a"))
            await told.until_equal(("a",))

        assert fake.list_count == 1

    async def test_a_mistake_of_ours(self, server: Served) -> None:
        """What the told one makes of it is no mistake of the server's: it is not taken for one."""

        def odd() -> None:
            int("odd")

        async with connected(server[1]) as api:
            reflector = Reflector(api, PATH, retry_s=FAST)
            with pytest.raises(ValueError, match="invalid literal"):
                await asyncio.wait_for(reflector.follow(odd), 5)

        assert (reflector.error_count, reflector.problem) == (0, None)

    @pytest.mark.parametrize(
        "line",
        [
            b"garbage\n",
            b"[]\n",
            b'{"type": "ADDED"}\n',
            b'{"type": "ADDED", "object": {"metadata": 7}}\n',
            b'{"type": "ERROR", "object": {"code": "x"}}\n',
            b'{"type": "ERROR", "object": {"code": 500, "message": "PrevKv=nil"}}\n',
            b'{"type": "ERROR", "object": {"code": 1e999}}\n',
            b"[" * 50_000 + b"\n",
        ],
    )
    async def test_nonsense(self, server: Served, line: bytes) -> None:
        """An event that is none makes the copy doubtful: it is listed anew."""
        fake, kubeconfig = server
        async with reflected(kubeconfig) as (_reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            fake.say(line)
            await eventually(lambda: fake.list_count == 2)
            await fake.until_asked("GET", PATH, 2, watch="1")
            fake.put(PATH, item("a"))
            await told.until_equal(("a",))

    async def test_silence(self, server: Served) -> None:
        """A connection on which nothing comes is given up, and what is there listed again."""
        fake, kubeconfig = server
        with capture_logs() as lines:
            async with reflected(kubeconfig, silence_s=0.1) as (_reflector, told):
                await told.until_equal(())
                await fake.until_asked("GET", PATH, 3, watch="1")
                fake.put(PATH, item("a"))
                await told.until_equal(("a",))

        assert fake.list_count >= 3
        assert [line for line in lines if line["log_level"] == "warning"] == []

    async def test_restored(self, server: Served) -> None:
        """What has come and gone with an old backup of etcd is seen, though no watch tells."""
        fake, kubeconfig = server
        fake.put(PATH, item("lost"))
        async with reflected(kubeconfig, silence_s=0.1) as (_reflector, told):
            await told.until_equal(("lost",))
            await fake.until_asked("GET", PATH, watch="1")
            fake.restore()
            fake.put(PATH, item("a"))
            await told.until_equal(("a",))

    async def test_no_answer(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that takes connections and says nothing is shown to be a problem."""
        monkeypatch.setattr(kube_api, "ANSWER_S", 0.2)
        fake, kubeconfig = server
        async with reflected(kubeconfig, silence_s=0.1) as (reflector, told):
            await told.until_equal(())
            await fake.until_asked("GET", PATH, watch="1")
            fake.is_mute = True
            fake.cut()
            await eventually(lambda: reflector.problem == "TimeoutError")
            fake.is_mute = False
            await eventually(lambda: reflector.problem is None)


class TestOutages:
    """The last known copy stays; recovery needs nobody."""

    @pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
    async def test_refusals(self, server: Served, status: int) -> None:
        """Whatever it answers, what was known stays, and is caught up with afterwards."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        with capture_logs() as lines:
            async with reflected(kubeconfig) as (reflector, told):
                await told.until_equal(("a",))
                await fake.until_asked("GET", PATH, watch="1")
                fake.failing = status
                fake.cut()
                await fake.until_asked("GET", PATH, 4, watch="1")

                assert tuple(reflector.objects) == ("a",)
                problems = [reflector.problem]
                fake.put(PATH, item("b"))
                fake.failing = None
                await told.until_equal(("a", "b"))
                problems.append(reflector.problem)

        assert problems == [f"{status}: told to fail", None]
        events = [line["event"] for line in lines]
        assert events.count("kubernetes_watch_failed") == 1, "said once, however long it lasts"
        assert events[-1] == "kubernetes_watch_recovered"
        assert told.news == [("a",), ("a", "b")]

    async def test_not_there_yet(self, server: Served) -> None:
        """A server that is out of reach at the start is asked until it is there."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        fake.failing = 503
        async with reflected(kubeconfig) as (reflector, told):
            await fake.until_asked("GET", PATH, 3)
            assert not reflector.is_known
            assert told.news == []
            fake.failing = None
            await told.until_equal(("a",))

    async def test_nobody_listens(self, tmp_path: Path) -> None:
        """Neither is a refused connection an end."""
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(kubeconfig_for("http://127.0.0.1:1"))
        async with reflected(kubeconfig) as (reflector, told):
            await eventually(lambda: reflector.error_count >= 3)

            assert told.news == []
            assert reflector.problem is not None
            assert "127.0.0.1:1" in reflector.problem

    async def test_waits_grow(self, server: Served) -> None:
        """A server in trouble is left in peace: each wait is longer."""
        fake, kubeconfig = server
        fake.failing = 500
        async with connected(kubeconfig) as api:
            reflector = Reflector(api, PATH, retry_s=(0.02, 10.0))
            begun_s = time.monotonic()
            task = asyncio.create_task(reflector.follow(lambda: None))
            await fake.until_asked("GET", PATH, 5)
            task.cancel()

        assert time.monotonic() - begun_s >= 0.01 + 0.02 + 0.04 + 0.08

    async def test_retry_after(self, server: Served) -> None:
        """When the server says when to come back, nobody comes earlier."""
        fake, kubeconfig = server
        fake.failing, fake.retry_after = 429, "1"
        async with connected(kubeconfig) as api:
            reflector = Reflector(api, PATH, retry_s=FAST)
            task = asyncio.create_task(reflector.follow(lambda: None))
            await fake.until_asked("GET", PATH)
            asked_s = time.monotonic()
            await fake.until_asked("GET", PATH, 2)
            task.cancel()

        assert time.monotonic() - asked_s >= 0.9


class TestAbsence:
    """Collections that the server does not know."""

    OTHER = PATH.replace("llm-d.ai", "inference.networking.x-k8s.io")

    async def test_absent(self, server: Served) -> None:
        """A collection that was never there is empty at once, and no mistake; it may come later."""
        fake, kubeconfig = server
        async with reflected(kubeconfig, self.OTHER) as (reflector, told):
            await told.until_equal(())
            absences = [reflector.is_absent]
            assert reflector.problem is None
            fake.put(self.OTHER, item("later"))
            await told.until_equal(("later",))
            absences.append(reflector.is_absent)

            assert absences == [True, False]

    async def test_briefly_absent(self, server: Served) -> None:
        """One that was there is believed gone only after some tries.

        A server that starts says so of everything.
        """
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(("a",))
            await fake.until_asked("GET", PATH, watch="1")
            fake.failing, fake.failures_left = 404, 2
            fake.end_watches()
            await eventually(lambda: len(told.news) == 2)

            assert told.news == [("a",), ("a",)]
            assert fake.list_count == 2
            assert reflector.error_count == 2

    async def test_removed(self, server: Served) -> None:
        """When its CRD is deleted, so are the objects."""
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        async with reflected(kubeconfig) as (reflector, told):
            await told.until_equal(("a",))
            await fake.until_asked("GET", PATH, watch="1")
            fake.unserve(PATH)
            fake.end_watches()
            await told.until_equal(())

            assert reflector.is_absent


class TestCredentials:
    """Where they come from, and what is said when there are none."""

    @pytest.mark.parametrize("kind", ["tokenFile", "exec"])
    async def test_renewed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """Expired ones of a kubeconfig are loaded again, and nothing is missed."""
        monkeypatch.setattr(kube_api, "RENEWAL_PAUSE_S", 0.0)
        token = tmp_path / "token"
        token.write_text(TOKEN)
        plugin = tmp_path / "plugin"
        plugin.write_text(
            "#!/bin/sh\n"
            f"""printf '{{"kind": "ExecCredential", "apiVersion": "{EXEC_VERSION}", """
            f""""status": {{"token": "%s"}}}}' "$(cat {token})"\n"""
        )
        plugin.chmod(0o755)
        users: dict[str, dict[str, Any]] = {
            "tokenFile": {"tokenFile": str(token)},
            "exec": {"exec": {"command": str(plugin), "apiVersion": EXEC_VERSION}},
        }
        async with api_server(tmp_path, users[kind]) as (fake, kubeconfig):
            fake.serve(PATH)
            async with reflected(kubeconfig) as (reflector, told):
                await told.until_equal(())
                await fake.until_asked("GET", PATH, watch="1")
                for index in range(3):
                    fake.token = f"renewed-{index}"
                    token.write_text(fake.token)
                    fake.cut()
                    fake.put(PATH, item(f"a{index}"))
                    await told.until(lambda names: len(names) == index + 1)  # noqa: B023 - awaited
                problem = reflector.problem

        assert problem is None

    async def test_not_renewed(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kubeconfig that is of no use any more is said, and what was known stays."""
        monkeypatch.setattr(kube_api, "RENEWAL_PAUSE_S", 0.0)
        fake, kubeconfig = server
        fake.put(PATH, item("a"))
        with capture_logs() as lines:
            async with reflected(kubeconfig) as (reflector, told):
                await told.until_equal(("a",))
                await fake.until_asked("GET", PATH, watch="1")
                fake.token = "another"
                kubeconfig.write_text("{}")
                fake.cut()
                await eventually(lambda: reflector.problem == "401: Unauthorized")
                assert tuple(reflector.objects) == ("a",)
        events = [line["event"] for line in lines]
        assert "kubernetes_credentials_not_renewed" in events

    @pytest.mark.parametrize("is_pod", [True, False], ids=["pod", "kubeconfig"])
    async def test_authority_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_pod: bool
    ) -> None:
        """A certificate of another authority is accepted once the file has that authority."""
        monkeypatch.setattr(kube_api, "RENEWAL_PAUSE_S", 0.0)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        first, second = Authority(), Authority()
        first.root.issue_cert("127.0.0.1").configure_cert(context)
        (tmp_path / "ca.crt").write_bytes(first.pem)
        async with api_server(tmp_path, context=context) as (fake, kubeconfig):
            fake.serve(PATH)
            if is_pod:
                in_pod(monkeypatch, tmp_path, kubeconfig)
            async with reflected(None if is_pod else kubeconfig) as (reflector, told):
                await told.until_equal(())
                await fake.until_asked("GET", PATH, watch="1")
                second.root.issue_cert("127.0.0.1").configure_cert(context)
                fake.cut()
                refused = "ClientConnectorCertificateError: "
                await eventually(lambda: (reflector.problem or "").startswith(refused))
                fake.put(PATH, item("a"))
                (tmp_path / "ca.crt").write_bytes(second.pem)
                await told.until_equal(("a",))
                problem = reflector.problem

        assert problem is None

    async def test_no_service_account(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pod without a token is said to have none, not to have a wrong kubeconfig."""
        monkeypatch.setattr(kube_api, "_NAMESPACE_FILE", tmp_path / "namespace")
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))

        with pytest.raises(FlowControlError) as caught:
            await KubeApi.connect(Kubernetes())
        rule = f"no service account in {tmp_path}, and no kubeconfig {tmp_path / 'config'}; set"
        assert rule in str(caught.value)

    async def test_namespace(self, tmp_path: Path) -> None:
        """The context's namespace counts, unless the settings name one."""
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(kubeconfig_for("http://127.0.0.1:1", namespace="models"))
        async with connected(kubeconfig) as api:
            assert api.namespace == "models"
        named = Kubernetes(kubeconfig=kubeconfig, namespace="other")
        api = await KubeApi.connect(named)
        await api.close()

        assert api.namespace == "other"

    @pytest.mark.parametrize(
        ("text", "context"),
        [
            ("", None),
            ("clusters: []", None),
            ("nonsense", None),
            (kubeconfig_for("http://127.0.0.1:1"), "nobody"),
            ("[", None),
            ("a: &a [*a]", None),
            (WHOLE.replace("server:", "certificate-authority-data: eA==, server:"), None),
            (WHOLE.replace("server: https://127.0.0.1:1", "server: 5"), None),
        ],
    )
    async def test_no_use(self, tmp_path: Path, text: str, context: str | None) -> None:
        """A kubeconfig that is none, or without that context, is said to be of no use."""
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(text)
        settings = Kubernetes(kubeconfig=kubeconfig)

        with pytest.raises(FlowControlError, match="kubernetes: no usable credentials: ") as caught:
            await KubeApi.connect(settings.model_copy(update={"context": context}))
        said = str(caught.value)
        assert str(kubeconfig) in said or "certificates: " in said
        assert "object does not" not in said, "of Python, not of the file"

    async def test_nowhere(self, tmp_path: Path) -> None:
        """Neither in a pod nor with a kubeconfig: what was looked for, and what to set."""
        kubeconfig = tmp_path / "kubeconfig"
        rule = f"and no kubeconfig {kubeconfig}; set kubernetes.kubeconfig"
        with pytest.raises(FlowControlError, match=re.escape(rule)):
            await KubeApi.connect(Kubernetes().model_copy(update={"kubeconfig": kubeconfig}))

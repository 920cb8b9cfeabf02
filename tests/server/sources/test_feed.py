"""The sources together: what becomes of what they tell, and of other settings."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from flowcontrol.config import Role
from flowcontrol.errors import FlowControlError
from flowcontrol.events import EndpointsChanged, Fact, LoadObserved, ObjectivesChanged
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.config.sources import Load
from flowcontrol_server.sources import feed as feed_module
from flowcontrol_server.sources import health
from flowcontrol_server.sources.feed import Feed
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.sources.health import FAILURES_MAX
from flowcontrol_server.sources.objective_store import ObjectiveStore
from flowcontrol_server.sources.orca import HEADERS
from tests.support.kubernetes_api import api_server, kubeconfig_for
from tests.support.ports import free_port
from tests.support.told import Told, eventually

PLAIN: dict[str, Any] = {
    "apiVersion": "flowcontrol/v1alpha1",
    "kind": "FlowControlConfig",
    "pool": "llama",
    "objectives": {"api": {}},
    "endpoints": {"static": ["127.0.0.1:8000"]},
}
OBJECTIVES = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"


def settings(**changes: Any) -> Settings:
    """Settings that differ from the plain ones in whole sections."""
    return Settings.model_validate({**PLAIN, **changes})


def manifest(directory: Path, name: str, priority: int) -> None:
    """An InferenceObjective in a folder."""
    (directory / f"{name}.yaml").write_text(
        "apiVersion: llm-d.ai/v1alpha2\nkind: InferenceObjective\n"
        f"metadata: {{name: {name}}}\nspec: {{priority: {priority}, poolRef: {{name: llama}}}}\n"
    )


@asynccontextmanager
async def feeding(first: Settings) -> AsyncIterator[tuple[Feed, Told[Fact]]]:
    """A feed that has started, and the facts it has posted."""
    told: Told[Fact] = Told()
    feed = Feed(told.changed)
    await feed.start(first)
    try:
        yield feed, told
    finally:
        await feed.stop()


def latest(told: Told[Fact]) -> tuple[tuple[str, ...] | None, Mapping[str, int] | None]:
    """The endpoints and objectives now in force."""
    endpoints = [fact.addresses for fact in told.news if isinstance(fact, EndpointsChanged)]
    objectives = [fact.priorities for fact in told.news if isinstance(fact, ObjectivesChanged)]
    return endpoints[-1] if endpoints else None, objectives[-1] if objectives else None


class TestStart:
    """What is known when the doors open."""

    async def test_all_is_known(self, tmp_path: Path) -> None:
        """The start returns when every source has told."""
        manifest(tmp_path, "chat", 10)
        (tmp_path / "endpoints").write_text("- 127.0.0.1:8001")
        first = settings(
            objectives={"directory": str(tmp_path)},
            endpoints={"static": ["127.0.0.1:8000"], "file": str(tmp_path / "endpoints")},
        )
        async with feeding(first) as (feed, told):
            assert latest(told) == (("127.0.0.1:8000", "127.0.0.1:8001"), {"chat": 10})
            assert feed.store is None
            assert [*feed.problems()] == []

    async def test_an_empty_pool(self) -> None:
        """An empty list is told as what it is."""
        async with feeding(settings(endpoints={"static": []})) as (_feed, told):
            assert latest(told) == ((), {})

    async def test_patience(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A source that does not tell does not keep the service from starting; that is said."""
        monkeypatch.setattr(feed_module, "PATIENCE_S", 0.1)
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(kubeconfig_for("http://127.0.0.1:1"))
        first = settings(objectives={"kubernetes": {}}, kubernetes={"kubeconfig": str(kubeconfig)})
        with capture_logs() as lines:
            async with feeding(first) as (feed, told):
                assert latest(told) == (("127.0.0.1:8000",), None)
                assert "objectives.kubernetes" in feed.error_counts()
        unknown = [line for line in lines if line["event"] == "sources_not_ready"]
        assert [line["sources"] for line in unknown] == [["objectives.kubernetes"]]

    async def test_what_is_logged(self, tmp_path: Path) -> None:
        """A change logs what has changed and how many there are, not the whole set."""
        for index in range(100):
            manifest(tmp_path, f"o{index:02}", 1)
        first = settings(
            objectives={"directory": str(tmp_path)}, endpoints={"static": ["127.0.0.1:1"]}
        )
        with capture_logs() as lines:
            async with feeding(first) as (feed, told):
                manifest(tmp_path, "o07", 9)
                await told.until(lambda _fact: (latest(told)[1] or {})["o07"] == 9)
                (tmp_path / "o08.yaml").unlink()
                await told.until(lambda _fact: "o08" not in (latest(told)[1] or {}))
                await feed.apply(
                    settings(
                        objectives={"directory": str(tmp_path)},
                        endpoints={"static": ["127.0.0.1:2"]},
                    )
                )
        objectives = [line for line in lines if line["event"] == "objectives_changed"]
        endpoints = [line for line in lines if line["event"] == "endpoints_changed"]
        plain = {"event", "log_level"}

        assert objectives[0]["count"] == 100
        assert len(objectives[0]["added"]) == 20
        assert objectives[0]["not_logged"] == 80
        assert [{k: v for k, v in line.items() if k not in plain} for line in objectives[1:]] == [
            {"count": 100, "changed": {"o07": 9}},
            {"count": 99, "removed": ["o08"]},
        ]
        assert [{k: v for k, v in line.items() if k not in plain} for line in endpoints] == [
            {"count": 1, "added": ["127.0.0.1:1"]},
            {"count": 1, "added": ["127.0.0.1:2"], "removed": ["127.0.0.1:1"]},
        ]

    async def test_no_credentials(self, tmp_path: Path) -> None:
        """A source that cannot be had at all is said at once, and nothing is left running."""
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text("{}")
        first = settings(objectives={"kubernetes": {}}, kubernetes={"kubeconfig": str(kubeconfig)})
        told: Told[Fact] = Told()

        with pytest.raises(FlowControlError, match="no usable credentials"):
            await Feed(told.changed).start(first)
        assert told.news == []


class TestApply:
    """Other settings while running."""

    async def test_endpoints(self, tmp_path: Path) -> None:
        """Static endpoints change at once; a source that is no longer named is forgotten."""
        file = tmp_path / "endpoints"
        file.write_text("- 127.0.0.1:8009")
        async with feeding(settings()) as (feed, told):
            await feed.apply(settings(endpoints={"static": ["127.0.0.1:1", "127.0.0.1:2"]}))
            assert latest(told)[0] == ("127.0.0.1:1", "127.0.0.1:2")
            await feed.apply(settings(endpoints={"static": ["127.0.0.1:1"], "file": str(file)}))
            await told.until(lambda _fact: latest(told)[0] == ("127.0.0.1:1", "127.0.0.1:8009"))
            await feed.apply(settings(endpoints={"file": str(file)}))
            assert latest(told)[0] == ("127.0.0.1:8009",)
            await feed.apply(settings())

            assert latest(told)[0] == ("127.0.0.1:8000",)

    async def test_host_names_in_a_file(self, tmp_path: Path) -> None:
        """They are endpoints as long as this service does not pick: with the picker, a problem."""
        file = tmp_path / "endpoints"
        file.write_text("[vllm.test:1, 127.0.0.1:8009]")
        endpoints = {"file": str(file)}
        async with feeding(settings(endpoints=endpoints)) as (feed, told):
            assert latest(told)[0] == ("127.0.0.1:8009", "vllm.test:1")
            await feed.apply(settings(endpoints=endpoints, picker="least-loaded"))
            await told.until(lambda _fact: latest(told)[0] == ("127.0.0.1:8009",))

            [(source, about, problem)] = feed.problems()
            assert (source, about) == ("endpoints.file", "endpoints")
            assert problem.endswith("unless picker is off, got vllm.test:1")
            assert feed.error_counts()["endpoints.file"] == 1

    async def test_what_stays_is_not_disturbed(self) -> None:
        """A source whose settings are the same goes on, with what it holds."""
        async with feeding(settings()) as (feed, told):
            store = feed.store
            assert isinstance(store, ObjectiveStore)
            await store.put("chat", 10)
            await feed.apply(settings(picker="least-loaded", endpoints={"static": []}))

            assert feed.store is store
            assert latest(told) == ((), {"chat": 10})

    async def test_objectives_that_begin_to_be_kept(self, tmp_path: Path) -> None:
        """Those set by the API count on when they get a file, and when they lose it."""
        kept = settings(objectives={"api": {"file": str(tmp_path / "kept.yaml")}})
        async with feeding(settings()) as (feed, told):
            for change in (kept, settings()):
                assert feed.store is not None
                await feed.store.put("chat", 10)
                told.news.clear()
                await feed.apply(change)
                await told.until(lambda _fact: latest(told)[1] == {"chat": 10})

    async def test_objectives(self, tmp_path: Path) -> None:
        """What an old source knew stays in force until the new one tells; counts are kept."""
        manifest(tmp_path, "chat", 10)
        (tmp_path / "bad.yaml").write_text("[")
        async with feeding(settings(objectives={"directory": str(tmp_path)})) as (feed, told):
            assert latest(told)[1] == {"chat": 10}
            (problem,) = feed.problems()
            assert problem[:2] == ("objectives.directory", "bad.yaml")
            errors = feed.error_counts()["objectives.directory"]
            assert errors >= 1
            await feed.apply(settings())
            await told.until(lambda _fact: latest(told)[1] == {})

            assert feed.error_counts() == {"objectives.directory": errors, "objectives.api": 0}
            assert [*feed.problems()] == []

    async def test_kubernetes(self, tmp_path: Path) -> None:
        """Objectives from a folder, then from Kubernetes, without a moment with none."""
        manifest(tmp_path, "chat", 10)
        async with api_server(tmp_path) as (fake, kubeconfig):
            spec = {"priority": 20, "poolRef": {"name": "llama"}}
            fake.put(OBJECTIVES, {"metadata": {"name": "gold"}, "spec": spec})
            async with feeding(settings(objectives={"directory": str(tmp_path)})) as (feed, told):
                await feed.apply(
                    settings(
                        objectives={"kubernetes": {"writeStatus": False}},
                        kubernetes={"kubeconfig": str(kubeconfig)},
                    )
                )
                await told.until(lambda _fact: latest(told)[1] == {"gold": 20})
        sets = [fact.priorities for fact in told.news if isinstance(fact, ObjectivesChanged)]
        assert sets == [{"chat": 10}, {"gold": 20}]

    async def test_all_or_nothing(self, tmp_path: Path) -> None:
        """When one source cannot be had, nothing has changed."""
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text("{}")
        async with feeding(settings()) as (feed, told):
            store, facts = feed.store, len(told.news)
            with pytest.raises(FlowControlError):
                await feed.apply(
                    settings(
                        objectives={"kubernetes": {}},
                        endpoints={"static": []},
                        kubernetes={"kubeconfig": str(kubeconfig)},
                    )
                )

            assert feed.store is store
            assert len(told.news) == facts

    async def test_roles(self, tmp_path: Path) -> None:
        """What an endpoint does comes from its source, unless the settings say otherwise."""
        file = tmp_path / "endpoints"
        file.write_text("- {address: '127.0.0.1:1', role: prefill}\n- 127.0.0.1:2\n- 127.0.0.1:3\n")
        roles = {"127.0.0.1:2": "decode"}
        first = settings(endpoints={"file": str(file), "roles": roles})
        async with feeding(first) as (_feed, told):
            fact = next(fact for fact in told.news if isinstance(fact, EndpointsChanged))

        assert fact.roles == {"127.0.0.1:1": Role.PREFILL, "127.0.0.1:2": Role.DECODE}

    async def test_other_roles(self, tmp_path: Path) -> None:
        """Other roles in the settings are told at once, also of endpoints that stay the same."""
        file = tmp_path / "endpoints"
        file.write_text("- 127.0.0.1:1\n- 127.0.0.1:2\n")
        endpoints = {"file": str(file)}
        async with feeding(settings(endpoints=endpoints)) as (feed, told):
            count = len(told.news)
            others = {**endpoints, "roles": {"127.0.0.1:1": "prefill"}}
            await feed.apply(settings(endpoints=others))
            both = ("127.0.0.1:1", "127.0.0.1:2")
            news = [EndpointsChanged(both, {"127.0.0.1:1": Role.PREFILL})]
            assert told.news[count:] == news
            await feed.apply(settings(picker="least-loaded", endpoints=others))

            assert told.news[count:] == news, "nothing more has changed"

    async def test_other_roles_of_nobody_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While no source has told its endpoints, the pool is not empty but unknown."""
        monkeypatch.setattr(feed_module, "PATIENCE_S", 0.01)
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(kubeconfig_for("http://127.0.0.1:1"))
        kubernetes = {"kubeconfig": str(kubeconfig)}
        first = settings(endpoints={"kubernetes": {}}, kubernetes=kubernetes)
        async with feeding(first) as (feed, told):
            endpoints = {"kubernetes": {}, "roles": {"127.0.0.1:1": "decode"}}
            await feed.apply(settings(endpoints=endpoints, kubernetes=kubernetes))

            assert latest(told)[0] is None

    async def test_a_detector_that_needs_load(self) -> None:
        """Endpoints are asked for their load where a detector goes by it, said or not."""
        needed = settings(saturation={"detector": "utilization"})
        assert settings().scraping is None
        assert needed.scraping == Load()
        async with feeding(needed) as (feed, _told):
            assert feed.snapshot().scrapes is not None

    async def test_load_reports(self) -> None:
        """A load report among the headers of a response is a load; half of one is none."""
        async with feeding(settings()) as (feed, told):
            count = len(told.news)
            feed.load_reported("127.0.0.1:8000", {"content-type": "text/plain"})
            feed.load_reported("127.0.0.1:8000", {HEADERS[0]: "TEXT kv_cache_usage_perc=0.5"})
            assert len(told.news) == count
            feed.load_reported("127.0.0.1:8000", {HEADERS[0]: "TEXT num_requests_waiting=3"})

        assert told.news[-1] == LoadObserved("127.0.0.1:8000", 3, running=None, kv_usage=None)

    async def test_load(self) -> None:
        """Scraping begins and ends with its section, and follows the endpoints."""

        async def page(_request: web.Request) -> web.Response:
            return web.Response(body=b"tgi_queue_size 4\ntgi_batch_current_size 2\n")

        application = web.Application()
        application.router.add_get("/metrics", page)
        async with TestServer(application) as server, feeding(settings()) as (feed, told):
            address = f"{server.host}:{server.port}"
            assert feed.snapshot().scrapes is None
            await feed.apply(settings(load={"interval": "10ms"}))
            await feed.apply(settings(load={"interval": "10ms"}, endpoints={"static": [address]}))
            await told.until(lambda fact: isinstance(fact, LoadObserved))
            fact = next(fact for fact in told.news if isinstance(fact, LoadObserved))
            assert (fact.address, fact.waiting, fact.running) == (address, 4, 2)
            await feed.apply(settings())

            assert feed.snapshot().scrapes is None


class TestDown:
    """Who is known to be down is not in the pool."""

    async def test_unreachable(self) -> None:
        """An endpoint at which nobody listens leaves the pool, and is back when somebody does."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        first = settings(load={"interval": "10ms"}, endpoints={"static": [address]})
        async with feeding(first) as (feed, told):
            await told.until(lambda _fact: latest(told)[0] == ())
            assert feed.down == {address}
            async with TestServer(web.Application(), port=port):
                await told.until(lambda _fact: latest(told)[0] == (address,))

            assert feed.down == frozenset()

    @pytest.mark.parametrize("load", [None, {"interval": "10ms", "port": 1}])
    async def test_nobody_looks_any_more(self, load: Any) -> None:
        """When nobody asks there any more, an unreachable endpoint is back, as it was before."""
        address = f"127.0.0.1:{free_port()}"
        endpoints = {"static": [address]}
        first = settings(load={"interval": "10ms"}, endpoints=endpoints)
        async with feeding(first) as (feed, told):
            await told.until(lambda _fact: latest(told)[0] == ())
            await feed.apply(settings(load={"interval": "20ms"}, endpoints=endpoints))
            assert feed.down == {address}, "it is asked still"
            changes = {} if load is None else {"load": load}
            await feed.apply(settings(endpoints=endpoints, **changes))

            assert feed.down == frozenset()
            assert latest(told)[0] == (address,)

    async def test_stopping_is_no_news(self) -> None:
        """A feed that stops looks no more, either, but does not tell that all are up."""
        endpoints = {"static": [f"127.0.0.1:{free_port()}"]}
        async with feeding(settings(load={"interval": "10ms"}, endpoints=endpoints)) as (
            feed,
            told,
        ):
            await told.until(lambda _fact: latest(told)[0] == ())

        assert latest(told)[0] == ()
        assert feed.snapshot().scrapes is None

    async def test_failing(self) -> None:
        """An endpoint that fails request after request leaves the pool for a while."""
        both = ["127.0.0.1:8000", "127.0.0.1:8001"]
        async with feeding(settings(endpoints={"static": both})) as (feed, told):
            for _ in range(FAILURES_MAX):
                feed.outcome(both[0], 0.0, is_failure=True)

            assert latest(told)[0] == (both[1],)

    async def test_failing_and_nobody_scrapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is back when the while is over, also where nobody asks for loads; the next is longer.

        Where the engine picks, no request goes to it meanwhile, whose outcome could be told.
        """
        monkeypatch.setattr(health, "EJECTED_FIRST_S", 0.02)
        four = [f"127.0.0.1:800{index}" for index in range(4)]
        async with feeding(settings(endpoints={"static": four})) as (feed, told):
            assert feed.snapshot().scrapes is None
            for address in four[:2]:
                for _ in range(FAILURES_MAX):
                    feed.outcome(address, time.monotonic(), is_failure=True)
            assert feed.down == set(four[:2])
            await told.until(lambda _fact: latest(told)[0] == tuple(four))
            began_s = time.monotonic()
            feed.outcome(four[0], began_s, is_failure=True)
            assert feed.down == {four[0]}
            await told.until(lambda _fact: latest(told)[0] == tuple(four))

            assert time.monotonic() - began_s >= 0.04


class TestFaults:
    """A source that fails in a way nobody thought of."""

    async def test_shown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as it is not at work that is a problem that stands."""
        monkeypatch.setattr(feed_module, "PATIENCE_S", 0.01)

        async def failing(_self: Any, _changed: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(ObjectiveFolder, "follow", failing)
        async with feeding(settings(objectives={"directory": str(tmp_path)})) as (feed, _told):
            problem = "failed and is restarted: ZeroDivisionError()"
            assert list(feed.problems()) == [("objectives.directory", "source", problem)]

    async def test_started_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is started again; that is said and counted, and the others go on."""
        monkeypatch.setattr(feed_module, "RESTART_FIRST_S", 0.01)
        manifest(tmp_path, "chat", 10)
        follow = ObjectiveFolder.follow
        failures = 2

        async def failing(self: Any, changed: Any) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise ZeroDivisionError
            await follow(self, changed)

        monkeypatch.setattr(ObjectiveFolder, "follow", failing)
        with capture_logs() as lines:
            async with feeding(settings(objectives={"directory": str(tmp_path)})) as (feed, told):
                assert latest(told) == (("127.0.0.1:8000",), {"chat": 10})
                assert feed.error_counts() == {"objectives.directory": 2}
        assert [line["event"] for line in lines].count("source_failed") == 2

    async def test_nothing_is_left_running(self, tmp_path: Path) -> None:
        """When it is stopped no task of it is left."""
        (tmp_path / "endpoints").write_text("[]")
        before = asyncio.all_tasks()
        first = settings(
            objectives={"directory": str(tmp_path)},
            endpoints={
                "file": str(tmp_path / "endpoints"),
                "static": ["127.0.0.1:1"],
                "dns": {"names": ["localhost:1"], "servers": ["127.0.0.1:1"]},
            },
            load={},
        )
        async with feeding(first):
            assert len(asyncio.all_tasks() - before) > 3

        await eventually(lambda: asyncio.all_tasks() == before)

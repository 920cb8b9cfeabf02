"""Endpoints, objectives, load and settings that come and change while requests wait and run."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.config.difference import settings_hash
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.sources.health import FAILURES_MAX
from tests.e2e.backend import Backend
from tests.e2e.gateway import Gateway
from tests.e2e.harness import ADMIN_TOKEN, POOL, Spec, Stack, eventually
from tests.support.dns_server import SERVFAIL, name_server
from tests.support.kubernetes_api import api_server
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

Start = Callable[[Spec], Awaitable[Gateway]]
SEEN_S = 3.0
"""How long a change may take from being made to being in force."""
PAGE = b"vllm:num_requests_waiting 0\nvllm:num_requests_running 0\nvllm:kv_cache_usage_perc 0.1\n"
OBJECTIVES = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
PODS = "/api/v1/namespaces/models/pods"


def addresses(snapshot: api.Snapshot) -> set[str]:
    """Return the endpoints in the pool."""
    return {endpoint.address for endpoint in snapshot.endpoints}


def objectives(snapshot: api.Snapshot) -> dict[str, int]:
    """Return the objectives in force."""
    return {objective.name: objective.priority for objective in snapshot.objectives}


def spec(settings: dict[str, Any], endpoints: int = 2) -> Spec:
    """Backends of one slot each, picked by the service, which at first knows of none."""
    return Spec(
        endpoints=endpoints,
        picker="least-loaded",
        original_dst=True,
        settings=settings,
        prepare=list_endpoints,
    )


def list_endpoints(stack: Stack, *which: int) -> None:
    """Write the file of endpoints, all at once."""
    new = stack.directory / "endpoints.new"
    new.write_text(yaml.safe_dump([str(stack.endpoints[index]) for index in which]))
    new.rename(stack.directory / "endpoints.yaml")


class TestEndpointFile:
    """Endpoints from a file."""

    async def test_under_load(self, start: Start) -> None:
        """Endpoints come and go while requests wait and run; none is lost, none sent astray."""
        gateway = await start(spec({"endpoints": {"file": "./endpoints.yaml"}}))
        first, second = gateway.stack.endpoints
        await gateway.call(name="early")
        await gateway.until(waiting=1)
        list_endpoints(gateway.stack, 0)
        early = await gateway.next_call()
        await gateway.call(name="next")
        await gateway.until(waiting=1, in_flight=1)
        list_endpoints(gateway.stack, 0, 1)
        following = await gateway.next_call()
        list_endpoints(gateway.stack, 1)
        await gateway.until_so(lambda now: addresses(now) == {str(second)}, SEEN_S)
        last = await gateway.call(name="last")
        await gateway.until(waiting=1)
        await early.respond()  # its endpoint has left the pool: it goes on, and frees no slot
        await gateway.until(waiting=1)
        await following.respond()
        final = await gateway.next_call()
        await final.respond()
        status = await last.head()

        assert (early.name, early.endpoint) == ("early", first)
        assert (following.name, following.endpoint) == ("next", second)
        assert (final.name, final.endpoint, status) == ("last", second, 200)
        assert await gateway.outcomes("early", "next", "last") == ["dispatched"] * 3

    async def test_mistakes(self, start: Start) -> None:
        """A bad file changes nothing; it is counted, said and shown."""
        gateway = await start(spec({"endpoints": {"file": "./endpoints.yaml"}}))
        gateway.expected_complaints.add("endpoints_rejected")
        list_endpoints(gateway.stack, 0)
        before = await gateway.until_so(lambda now: len(now.endpoints) == 1, SEEN_S)
        (gateway.stack.directory / "endpoints.yaml").write_text("- nonsense")
        metric = 'flowcontrol_source_problems{source="endpoints.file"}'

        async def is_shown() -> bool:
            return await gateway.metric(metric) == 1.0

        await eventually(is_shown, SEEN_S)
        kept = await gateway.snapshot()
        list_endpoints(gateway.stack, 1)
        await gateway.until_so(lambda now: addresses(now) != addresses(before), SEEN_S)

        assert addresses(kept) == addresses(before)
        assert await gateway.metric(metric) == 0.0


class TestRefusingPool:
    """A pool of which nobody listens, and no metrics pages to tell."""

    async def test_queue_is_kept(self, start: Start) -> None:
        """After a few refusals nothing is dispatched: what waits is served when one is back."""
        port = free_port()
        wanted = spec(
            {"endpoints": {"static": [f"127.0.0.1:{port}"]}, "picker": "least-loaded"}, endpoints=1
        )
        gateway = await start(wanted)
        gateway.expected_complaints |= {"endpoint_down", "endpoint_up"}
        callers = [await gateway.call(name=f"r{number}") for number in range(60)]
        # Each has the slot for a second: ten attempts of Envoy's, with nowhere else to go.
        await eventually(lambda: gateway.stack.events("endpoint_down"), 5 * SEEN_S)
        waiting = (await gateway.snapshot()).waiting
        assert waiting >= 40, "a dozen were sent into refusals, not all"
        for caller in callers:
            await caller.hang_up()


class TestNames:
    """Endpoints by DNS."""

    async def test_a_name(self, start: Start) -> None:
        """The addresses of a name are endpoints; while nobody answers for it they stay."""
        async with name_server() as (fake, server):
            fake.address("vllm.test", [])
            dns = {"servers": [str(server)], "interval": "1s"}

            def name_it(stack: Stack) -> None:
                dns["names"] = [f"vllm.test:{stack.endpoints[0].port}"]

            wanted = spec({"endpoints": {"dns": dns}}, endpoints=1)
            gateway = await start(replace(wanted, prepare=name_it))
            await gateway.call(name="early")
            await gateway.until(waiting=1)
            fake.address("vllm.test", ["127.0.0.1"])
            call = await gateway.next_call()
            gateway.expected_complaints.add("name_not_resolved")
            fake.codes["vllm.test"] = SERVFAIL
            await eventually(lambda: gateway.stack.events("name_not_resolved"), SEEN_S)
            kept = await gateway.snapshot()
            await call.respond()

        assert addresses(kept) == {str(gateway.stack.endpoints[0])}


class TestKubernetes:
    """Everything from the Kubernetes API."""

    async def test_under_load(self, start: Start, tmp_path: Path) -> None:
        """What waits goes on waiting, what runs on running; each change counts once it is seen.

        Objectives are edited, pods come, go and are not ready, and the API server is away.
        """
        async with api_server(tmp_path) as (fake, kubeconfig):
            fake.serve(PODS)
            fake.put(OBJECTIVES, objective("chat", 10))
            wanted = spec(
                {
                    "objectives": {"kubernetes": {}},
                    "endpoints": {"kubernetes": {}},
                    "kubernetes": {"kubeconfig": str(kubeconfig)},
                },
                endpoints=1,
            )
            gateway = await start(wanted)
            (endpoint,) = gateway.stack.endpoints
            selector = {"matchLabels": {"app": "vllm"}}
            ports = [{"number": endpoint.port}]
            gateway.expected_complaints |= {
                "pool_unusable",
                "kubernetes_watch_failed",
                "status_not_written",
            }
            early = await gateway.call(name="early", objective="chat")
            await gateway.until(waiting=1)
            fake.put(
                POOLS,
                {"metadata": {"name": POOL}, "spec": {"selector": selector, "targetPorts": ports}},
            )
            fake.put(PODS, pod(ready=False))
            fake.put(PODS, pod(ready=True))
            first = await gateway.next_call()
            fake.put(OBJECTIVES, objective("gold", 70))
            await gateway.until_so(lambda now: objectives(now) == {"chat": 10, "gold": 70}, SEEN_S)
            fake.failing = 503
            fake.cut()
            fake.put(PODS, pod(ready=False))
            fake.delete(OBJECTIVES, "chat")
            gone = await gateway.call(name="while-away", objective="chat")
            golden = await gateway.call(name="golden", objective="gold")
            away = await gateway.until(waiting=2, in_flight=1)
            await first.respond()
            second = await gateway.next_call()
            await second.respond()
            third = await gateway.next_call()
            fake.failing = None
            back = await gateway.until_so(
                lambda now: objectives(now) == {"gold": 70} and not now.endpoints, SEEN_S * 4
            )
            await third.respond()
            statuses = [await caller.head() for caller in (early, gone, golden)]

            def conditions() -> list[dict[str, str]]:
                status: dict[str, list[dict[str, str]]]
                status = fake.get(OBJECTIVES, "gold").get("status", {})
                return status.get("conditions", [])

            (condition,) = await eventually(conditions, SEEN_S * 4)

        assert first.endpoint == endpoint
        assert [second.name, third.name] == ["golden", "while-away"]
        assert objectives(away) == {"chat": 10, "gold": 70}
        assert back.in_flight == 1
        assert statuses == [200] * 3
        assert (condition["type"], condition["status"]) == ("Accepted", "True")


def objective(name: str, priority: int) -> dict[str, Any]:
    """An InferenceObjective."""
    spec = {"priority": priority, "poolRef": {"name": POOL}}
    return {"metadata": {"name": name}, "spec": spec}


def pod(*, ready: bool) -> dict[str, Any]:
    """A pod on this machine."""
    return {
        "metadata": {"name": "a", "labels": {"app": "vllm"}},
        "status": {
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


class TestApi:
    """Objectives by flowcontrol.v1."""

    async def test_put_and_delete(self, start: Start) -> None:
        """An objective that was put counts for the next request, and after a restart."""
        proof = (("authorization", f"Bearer {ADMIN_TOKEN}"),)
        gateway = await start(Spec(settings={"objectives": {"api": {"file": "./kept.yaml"}}}))
        async with grpc.aio.insecure_channel(str(gateway.stack.grpc)) as channel:
            stub = api_grpc.FlowControlStub(channel)  # type: ignore[no-untyped-call]  # generated
            gold = api.Objective(name="gold", priority=70)
            await stub.PutObjective(api.PutObjectiveRequest(objective=gold), metadata=proof)
            await gateway.call(name="golden", objective="gold")
            await (await gateway.next_call()).respond()
            line = await gateway.decided("golden")
            iron = api.Objective(name="iron", priority=-1)
            await stub.PutObjective(api.PutObjectiveRequest(objective=iron), metadata=proof)
            await stub.DeleteObjective(api.DeleteObjectiveRequest(name="gold"), metadata=proof)
        gateway.stack.service.stop()
        await gateway.stack.start_service()
        after = await gateway.until_so(lambda now: bool(now.objectives), SEEN_S)

        assert (line["priority"], line["objective"]) == (70, "gold")
        assert objectives(after) == {"iron": -1}


class TestLoad:
    """Scraping."""

    async def test_broken_and_gone(self, start: Start) -> None:
        """A broken page costs an endpoint its freshness; that nobody listens, its place."""
        gateway = await start(
            Spec(
                endpoints=2,
                picker="least-loaded",
                settings={"load": {"interval": "20ms", "timeout": "200ms"}},
            )
        )
        gateway.expected_complaints |= {
            *("endpoint_scrape_failed", "endpoint_down", "endpoint_up"),
        }
        first, second = gateway.backends
        both = {str(backend.address) for backend in gateway.backends}
        await gateway.until_so(lambda now: addresses(now) == both, SEEN_S)
        first.page = second.page = PAGE
        scraped = 'flowcontrol_scrapes_total{{result="{}"}}'

        async def is_heard() -> bool:
            return await gateway.metric(scraped.format("ok")) > 6

        await eventually(is_heard, SEEN_S)
        age = f'flowcontrol_endpoint_load_age_seconds{{endpoint="{first.address}"}}'
        heard_s = await gateway.metric(age)
        first.page = b"\0garbage"

        async def is_broken() -> bool:
            return await gateway.metric(scraped.format("no-load")) > 3

        await eventually(is_broken, SEEN_S)
        kept = await gateway.snapshot()
        await second.close()
        alone = await gateway.until_so(lambda now: addresses(now) == {str(first.address)}, SEEN_S)
        await gateway.call(name="one")
        await gateway.call(name="two")
        one = await gateway.next_call()
        await gateway.until(waiting=1, in_flight=1)
        async with Backend(second.address, gateway.arrived):
            two = await gateway.next_call()
            back = await gateway.snapshot()
            await one.respond()
            await two.respond()
            await gateway.until(in_flight=0)

        assert 0 <= heard_s < SEEN_S
        assert addresses(kept) == addresses(back) == both
        assert addresses(alone) == {str(first.address)}
        assert (one.endpoint, two.endpoint) == (first.address, second.address)


class TestOutcomes:
    """What becomes of requests."""

    async def test_an_endpoint_that_fails(self, start: Start) -> None:
        """One that fails request after request looks idle; it leaves the pool for a while."""
        gateway = await start(Spec(endpoints=2, picker="least-loaded"))
        gateway.expected_complaints |= {"endpoint_down", "endpoint_up"}
        first, second = gateway.backends
        callers = []
        for _ in range(2 * FAILURES_MAX):
            callers.append(await gateway.call())
            call = await gateway.next_call()
            await call.respond(status=500 if call.endpoint == first.address else 200)
            await gateway.until(in_flight=0)
        left = await gateway.until_so(lambda now: addresses(now) == {str(second.address)}, SEEN_S)
        statuses = [await caller.head() for caller in callers]

        assert len(left.endpoints) == 1
        assert statuses.count(500) >= FAILURES_MAX
        assert gateway.stack.events("endpoint_down")[0]["endpoint"] == str(first.address)


class TestEverything:
    """All of it at once."""

    async def test_nothing_is_lost(self, start: Start) -> None:
        """Endpoints, objectives, pages and settings change under load: each request is answered."""
        wanted = spec(
            {
                "endpoints": {"file": "./endpoints.yaml"},
                "load": {"interval": "20ms", "timeout": "200ms"},
            },
            endpoints=3,
        )
        gateway = await start(wanted)
        gateway.expected_complaints |= {
            *("endpoint_scrape_failed", "objective_rejected"),
            "objective_unknown",  # gold, by whoever comes before it is declared
        }
        for backend in gateway.backends:
            backend.is_answering = True
            backend.page = PAGE
        is_over = asyncio.Event()
        statuses: list[int] = []

        async def come_again(number: int) -> None:
            while not is_over.is_set():
                objective = ("chat", "batch", "gold", None)[number % 4]
                caller = await gateway.call(objective=objective, flow_id=f"tenant-{number % 5}")
                statuses.append(await caller.head())

        clients = [asyncio.ensure_future(come_again(number)) for number in range(16)]
        for which in ((0,), (0, 1), (1, 2), (2,), (), (0, 1, 2)):
            list_endpoints(gateway.stack, *which)
            expected = {str(gateway.stack.endpoints[index]) for index in which}
            await gateway.until_so(lambda now, e=expected: addresses(now) == e, SEEN_S)  # type: ignore[misc]  # e is bound here
            gateway.stack.declare("gold", 10 * len(which) + 5)
            gateway.backends[0].page = PAGE if len(which) % 2 else b"\0garbage"
            gateway.stack.write_manifest("bad.yaml", "[" if len(which) % 2 else "")
            gateway.stack.configure(saturation={"maxConcurrency": 1 + len(which)})
            seen = len(statuses)
            if which:
                await eventually(lambda n=seen: len(statuses) > n + 40, 10.0)  # type: ignore[misc]  # likewise
        is_over.set()
        await asyncio.gather(*clients)
        gateway.stack.remove_manifest("bad.yaml")
        gateway.stack.remove_manifest("gold.yaml")
        total = sum(len(backend.calls) for backend in gateway.backends)

        assert set(statuses) == {200}
        assert len(statuses) == total > 200


class TestReload:
    """The service's own configuration."""

    async def test_a_change(self, start: Start) -> None:
        """Another configuration counts for what comes; what waits stays where it is."""
        gateway = await start(Spec())
        _, occupying = await gateway.occupy()
        await gateway.call(name="before")
        await gateway.until(waiting=1)
        before = await gateway.metric("flowcontrol_config_hash")
        gateway.stack.configure(requests={"exemptPaths": ["POST /hello"]})
        await eventually(lambda: gateway.stack.events("configuration_changed"), SEEN_S)
        passing = await gateway.call("/hello", name="exempt")
        exempt = await gateway.next_call()
        await exempt.respond()
        status = await passing.head()
        await gateway.until(waiting=1, in_flight=1)
        await occupying.respond()
        waited = await gateway.next_call()
        await waited.respond()
        hashed = await gateway.metric("flowcontrol_config_hash")

        assert (exempt.name, status, waited.name) == ("exempt", 200, "before")
        assert hashed == int(settings_hash(load_settings(gateway.stack.config)), 16) != before

    async def test_the_engine(self, start: Start) -> None:
        """Another limit counts at once for what waits, which keeps its place."""
        gateway = await start(Spec())
        _, first = await gateway.occupy()
        for name in ("second", "third", "fourth"):
            await gateway.call(name=name)
        await gateway.until(waiting=3, in_flight=1)
        gateway.stack.configure(saturation={"maxConcurrency": 3})
        calls = [first, *[await gateway.next_call() for _ in range(2)]]
        await gateway.until(waiting=1, in_flight=3)
        gateway.stack.configure(saturation={"maxConcurrency": 1})
        await eventually(lambda: len(gateway.stack.events("configuration_changed")) == 2, SEEN_S)
        for call in calls[:2]:
            await call.respond()
        await gateway.until(waiting=1, in_flight=1)
        await calls[2].respond()
        last = await gateway.next_call()
        await last.respond()

        assert [call.name for call in (*calls[1:], last)] == ["second", "third", "fourth"]

    async def test_rejected(self, start: Start) -> None:
        """A bad file, or one that needs a restart, leaves what was in force; both are shown."""
        gateway = await start(Spec())
        gateway.expected_complaints.add("configuration_rejected")
        before = await gateway.metric("flowcontrol_config_hash")
        successful = "flowcontrol_config_last_reload_successful"
        seen = [await gateway.metric(successful)]
        gateway.stack.configure(pool="other", requests={"exemptPaths": ["POST /hello"]})
        await eventually(lambda: len(gateway.stack.events("configuration_rejected")) == 1, SEEN_S)
        seen.append(await gateway.metric(successful))
        gateway.stack.config.write_text("pool: [")
        await eventually(lambda: len(gateway.stack.events("configuration_rejected")) == 2, SEEN_S)
        await gateway.call("/hello", name="still-gated")
        await (await gateway.next_call()).respond()
        outcomes = await gateway.outcomes("still-gated")
        first, second = gateway.stack.events("configuration_rejected")
        hashed = await gateway.metric("flowcontrol_config_hash")
        gateway.stack.configure()

        async def is_mended() -> bool:
            return await gateway.metric(successful) == 1.0

        await eventually(is_mended, SEEN_S)
        await asyncio.sleep(0)

        assert seen == [1.0, 0.0]
        assert first["problems"][0].startswith("pool cannot change while the service runs")
        assert "is not YAML" in second["problems"][0]
        assert (outcomes, hashed) == (["dispatched"], before)

"""When something of the service's own fails."""

import asyncio
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from aiohttp import ClientError, ClientSession
from aiohttp.test_utils import TestServer

from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.service import JOIN_TIMEOUT_S
from flowcontrol_server.tools.model_server import model_application
from tests.support import faulty
from tests.support.kubernetes_api import api_server
from tests.support.ports import free_ports
from tests.support.streams import PATIENCE_S, Running, Streams, running
from tests.support.told import eventually

FOUR_WAIT = 'flowcontrol_waiting_requests{priority="0"} 4.0'
OBJECTIVES = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"
pytestmark = pytest.mark.slow


async def ask_before_fault(
    fault: str, streams: Streams, session: ClientSession, service: Running
) -> list[asyncio.Task[int]]:
    """Park three requests, then one whose end is the fault, and end it; return the three."""
    asking = [asyncio.create_task(streams.ask("tenant")) for _ in range(3)]
    culprit = asyncio.create_task(streams.ask(fault))
    async with asyncio.timeout(PATIENCE_S):
        while FOUR_WAIT not in await metrics(session, service.http):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
    culprit.cancel()
    return asking


@pytest.mark.parametrize(
    ("on_fault", "status", "logged"), [("refuse", 500, 500), ("continue", 200, None)]
)
async def test_a_callback_that_fails_ends_the_service(
    tmp_path: Path, on_fault: str, status: int, logged: int | None
) -> None:
    """Who is parked is answered at once, as is logged; it is said, and the exit status is 1."""
    settings: dict[str, Any] = {
        "endpoints": {"static": []},
        "requests": {"onFault": on_fault},
    }
    program = (faulty.__file__,)
    async with (
        running(tmp_path, settings, {}, program=program) as service,
        ClientSession() as session,
    ):
        streams = Streams(service.grpc)
        asking = await ask_before_fault(faulty.FAULT, streams, session, service)
        async with asyncio.timeout(JOIN_TIMEOUT_S / 2):
            statuses = await asyncio.gather(*asking)
        exit_status = await service.ended()
        await streams.close()
        lines = service.lines("request_decided")

        assert statuses == [status] * 3
        assert exit_status == 1
        assert len(service.lines("processor_failed")) == 1
        assert [line["outcome"] for line in lines] == ["internal"] * 3
        assert [line["http_status"] for line in lines] == [logged] * 3
        assert all(line["waited_ms"] > 0 for line in lines)


async def test_a_callback_of_a_library_that_fails(tmp_path: Path) -> None:
    """It is logged and counted; who waits goes on waiting, and the drain is as ever."""
    settings: dict[str, Any] = {"endpoints": {"static": []}, "flowControl": {"drainBudget": "1s"}}
    program = (faulty.__file__,)
    async with (
        running(tmp_path, settings, {}, program=program) as service,
        ClientSession() as session,
    ):
        streams = Streams(service.grpc)
        asking = await ask_before_fault(faulty.LIBRARY_FAULT, streams, session, service)
        await eventually(lambda: "library_callback_failed" in service.log)
        counted = "flowcontrol_library_faults_total 1.0" in await metrics(session, service.http)
        are_waiting = not any(each.done() for each in asking)
        exit_status = await service.stopped()
        statuses = await asyncio.gather(*asking)
        await streams.close()
        (line,) = service.lines("library_callback_failed")

        assert counted
        assert are_waiting
        assert statuses == [503] * 3
        assert exit_status == 0
        assert line["exception"][0]["exc_type"] == "JSONDecodeError"


async def test_a_task_that_fails_is_said(tmp_path: Path) -> None:
    """At once, with where it failed; the service goes on without it."""
    settings: dict[str, Any] = {"endpoints": {"static": []}}
    program = (faulty.__file__,)
    async with running(tmp_path, settings, {}, program=program, PLANTED="sample") as service:
        await eventually(lambda: "planted" in service.log)
        (line,) = service.lines("dashboard_not_sampled")

        assert line["exception"][0]["exc_type"] == "ValueError"
        assert await service.stopped() == 0


@pytest.mark.parametrize("bound_s", [60.0, 0.5])
async def test_ready_once_the_kubernetes_api_is_listed(tmp_path: Path, bound_s: float) -> None:
    """Until then a replica is live and not ready; after a bound it is ready and says why not."""
    code = (
        "from flowcontrol_server.cli import main\n"
        "from flowcontrol_server.sources import feed\n"
        f"feed.PATIENCE_S, feed.READY_WITHIN_S = 0.1, {bound_s}\n"
        "main()"
    )
    async with api_server(tmp_path) as (fake, kubeconfig), ClientSession() as session:
        fake.serve(OBJECTIVES)
        fake.failing = 503
        ports = free_ports(2)
        own = {"objectives": {"kubernetes": {}}, "endpoints": {"static": []}}
        configure(tmp_path, ports, kubeconfig, own)
        service = Running(tmp_path, ports, {}, ("-c", code))
        starting = asyncio.create_task(service.start(session))
        try:
            while await status(session, service.http, "healthz") != 200:  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.01)
            early = await status(session, service.http, "readyz")
            if bound_s > 1:
                await fake.until_asked("GET", OBJECTIVES, 2)
                early = await status(session, service.http, "readyz")
                fake.failing = None
            await starting
            problems = await metrics(session, service.http)
        finally:
            assert await service.stopped() == 0

    problem = 'flowcontrol_source_problems{source="objectives.kubernetes"}'
    assert early == 503
    assert f"{problem} {'0' if bound_s > 1 else '3'}.0" in problems
    assert len(service.lines("sources_not_ready")) == (1 if bound_s > 1 else 2)


async def test_what_is_wrong_now(tmp_path: Path) -> None:
    """Each kind of fault is shown while it stands: in the metric that the alert watches."""
    silent = socket.create_server(("127.0.0.1", 0))
    ports = [silent.getsockname()[1], *free_ports(1)]
    settings: dict[str, Any] = {
        "endpoints": {"static": [f"127.0.0.1:{port}" for port in ports]},
        "load": {"timeout": "100ms"},
    }
    async with running(tmp_path, settings, {"chat": 10}) as service, ClientSession() as session:
        streams = Streams(service.grpc)
        before = await standing(session, service.http)
        await streams.ask("tenant", objective="undeclared")
        manifests = tmp_path / "objectives"
        (manifests / "bad.yaml").write_text("kind: InferenceObjective")
        config = tmp_path / "config.yaml"
        good = config.read_text()
        config.write_text(f"{good}\nunknown: 1\n")
        kinds = {"configuration", "source", "endpoint-down", "objective", "load"}
        await until_standing(session, service.http, kinds)
        config.write_text(good)
        (manifests / "bad.yaml").unlink()
        await until_standing(session, service.http, kinds - {"configuration", "source"})
        declared = (manifests / "chat.yaml").read_text().replace("chat", "undeclared")
        (manifests / "undeclared.yaml").write_text(declared)
        await until_standing(session, service.http, {"endpoint-down", "load"})
        silent.close()
        page = model_application("demo", ModelServerConfig())
        async with AsyncExitStack() as servers:
            for port in ports:
                await servers.enter_async_context(TestServer(page, host="127.0.0.1", port=port))
            await until_standing(session, service.http, set())
        await streams.close()

    assert before <= {"endpoint-down", "load"}


async def test_a_standby_does_not_say_what_passes_by_the_gate(tmp_path: Path) -> None:
    """It has dispatched nothing: all that model servers work on would seem to have passed by it."""
    page = model_application("demo", ModelServerConfig())
    async with (
        api_server(tmp_path) as (_, kubeconfig),  # which has no leases: nobody is elected
        TestServer(page, host="127.0.0.1") as model_server,
        ClientSession() as session,
    ):
        ports = free_ports(2)
        own = {
            "objectives": {"api": {}},
            "endpoints": {"static": [f"127.0.0.1:{model_server.port}"]},
            "load": {},
            "availability": {"election": "kubernetes"},
        }
        configure(tmp_path, ports, kubeconfig, own)
        service = Running(tmp_path, ports, {}, ("-m", "flowcontrol_server"))
        starting = asyncio.create_task(service.start(session))
        said = ""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while "\nflowcontrol_engine_requests{" not in said:
                    await asyncio.sleep(0.01)
                    if await status(session, service.http, "healthz") == 200:
                        said = await metrics(session, service.http)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
                stub = api_grpc.FlowControlStub(channel)  # type: ignore[no-untyped-call]  # generated
                snapshot = await stub.GetSnapshot(api.GetSnapshotRequest())
        finally:
            starting.cancel()
            assert await service.stopped() == 0

    assert snapshot.standby
    assert "\nflowcontrol_deciding 0.0\n" in said
    assert "flowcontrol_in_flight_drift_requests" not in said


async def test_lost_ledger_turns(tmp_path: Path) -> None:
    """They are a problem while the ledger cannot be written, and for a while after."""
    code = (
        "from flowcontrol_server.cli import main\n"
        "from flowcontrol_server.ledger import ledger\n"
        "ledger.LATELY_S = 0.5\n"
        "main()"
    )
    file = tmp_path / "ledger.jsonl"
    settings: dict[str, Any] = {
        "endpoints": {"static": ["10.0.0.5:8000"]},
        "ledger": {"file": str(file), "maxBytes": 1},
    }
    program = ("-c", code)
    async with (
        running(tmp_path, settings, {}, program=program) as service,
        ClientSession() as session,
    ):
        streams = Streams(service.grpc)
        before = await standing(session, service.http)
        in_the_way = file.with_name("ledger.jsonl.new")
        in_the_way.mkdir()
        async with asyncio.timeout(PATIENCE_S):
            while await standing(session, service.http) != {"ledger"}:
                await streams.ask("tenant")
        async with grpc.aio.insecure_channel(service.grpc) as channel:
            stub = api_grpc.FlowControlStub(channel)  # type: ignore[no-untyped-call]  # generated
            snapshot = await stub.GetSnapshot(api.GetSnapshotRequest())
        in_the_way.rmdir()
        async with asyncio.timeout(PATIENCE_S):
            while await standing(session, service.http):
                await streams.ask("tenant")
        await streams.close()

    assert before == set()
    (problem,) = snapshot.problems
    assert (problem.kind, problem.about) == ("ledger", "ledger")
    assert re.fullmatch(
        r"[1-9]\d* turns since the start are not in the ledger; "
        r"it cannot be written: \[Errno 21\] Is a directory: '.*'",
        problem.text,
    )


async def standing(session: ClientSession, address: str) -> set[str]:
    """Return the kinds of which a problem stands."""
    family = re.compile(r'^flowcontrol_problems\{kind="(.*)"\} [1-9]', re.MULTILINE)
    return set(family.findall(await metrics(session, address)))


async def until_standing(session: ClientSession, address: str, kinds: set[str]) -> None:
    """Wait until problems of exactly these kinds stand."""
    async with asyncio.timeout(PATIENCE_S):
        while await standing(session, address) != kinds:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


def configure(
    directory: Path, ports: Sequence[int], kubeconfig: Path, own: Mapping[str, Any]
) -> None:
    """Write the configuration of a service that asks a Kubernetes API.

    Args:
        directory: gets the file.
        ports: for gRPC and for HTTP.
        kubeconfig: says where the API is.
        own: sections beside these.
    """
    settings = {
        "apiVersion": "flowcontrol/v1alpha1",
        "kind": "FlowControlConfig",
        "pool": "llama",
        "listen": {
            "extProc": "off",
            "grpc": f"127.0.0.1:{ports[0]}",
            "http": f"127.0.0.1:{ports[1]}",
        },
        "kubernetes": {"kubeconfig": str(kubeconfig)},
        **own,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))


async def status(session: ClientSession, address: str, page: str) -> int | None:
    """What a probe is answered; None if nobody listens yet."""
    try:
        async with session.get(f"{address}/{page}") as answer:
            return answer.status
    except ClientError:
        return None


async def metrics(session: ClientSession, address: str) -> str:
    """What Prometheus would read."""
    async with session.get(f"{address}/metrics") as answer:
        return await answer.text()

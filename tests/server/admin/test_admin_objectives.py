"""flowcontrol.v1's methods about objectives, through a real gRPC server and channel."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from flowcontrol.config import ControllerConfig
from flowcontrol.events import DrainBegan, ObjectivesChanged
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin.api import FlowControlServicer
from flowcontrol_server.admin.objectives import FROM_ELSEWHERE, ObjectiveAccess
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.sources.objective_store import ObjectiveStore
from tests.support.silent_log import silent_log
from tests.support.told import Told

TIMEOUT_S = 10.0
PROBLEM = ("objectives.directory", "bad.yaml", "is not YAML")


class Served(NamedTuple):
    """A running service, and where its objectives are."""

    stub: api_grpc.FlowControlStub
    gate: FlowGate

    async def objectives(self) -> dict[str, int]:
        """What is in force."""
        reply = await self.stub.ListObjectives(api.ListObjectivesRequest(), timeout=TIMEOUT_S)
        return {objective.name: objective.priority for objective in reply.objectives}

    async def put(self, name: str, priority: int) -> None:
        """Declare an objective."""
        objective = api.Objective(name=name, priority=priority)
        await self.stub.PutObjective(
            api.PutObjectiveRequest(objective=objective), timeout=TIMEOUT_S
        )

    async def delete(self, name: str) -> None:
        """Take one back."""
        await self.stub.DeleteObjective(api.DeleteObjectiveRequest(name=name), timeout=TIMEOUT_S)


@asynccontextmanager
async def served(access: ObjectiveAccess, store: ObjectiveStore | None) -> AsyncIterator[Served]:
    """The service of a pool called llama."""
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    gate = FlowGate(ControllerConfig(), 100, lambda _parked, _decision: None, ended.set_result)
    gate.start()
    server = grpc.aio.server()
    api_grpc.add_FlowControlServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        FlowControlServicer(gate, "llama", silent_log(gate), lambda: 0, access), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = api_grpc.FlowControlStub(channel)  # type: ignore[no-untyped-call]  # generated
            if store is None:
                yield Served(stub, gate)
            else:
                told: Told[object] = Told()

                def changed(priorities: dict[str, int]) -> None:
                    gate.post(ObjectivesChanged(priorities))
                    told.changed(priorities)

                task = asyncio.ensure_future(store.follow(changed))  # type: ignore[arg-type]  # a dict it is
                await told.until(lambda _news: True)
                yield Served(stub, gate)
                task.cancel()
                await asyncio.wait((task,))
    finally:
        await server.stop(None)
        gate.post(DrainBegan(0))
        await asyncio.wait_for(ended, TIMEOUT_S)
        assert gate.join(TIMEOUT_S)


@asynccontextmanager
async def with_store(file: Path | None = None) -> AsyncIterator[Served]:
    """A service whose objectives come from the API."""
    store = ObjectiveStore(file, "llama")
    access = ObjectiveAccess(lambda: store, lambda: [PROBLEM])
    async with served(access, store) as running:
        yield running


class TestChanges:
    """Where objectives come from the API."""

    async def test_put_and_delete(self) -> None:
        """A change is in force when it is answered."""
        async with with_store() as service:
            assert await service.objectives() == {}
            await service.put("chat", 10)
            assert await service.objectives() == {"chat": 10}
            await service.put("chat", -2147483648)
            await service.put("batch", 2147483647)
            assert await service.objectives() == {"chat": -2147483648, "batch": 2147483647}
            await service.delete("chat")

            assert await service.objectives() == {"batch": 2147483647}

    async def test_list(self) -> None:
        """The list says whether it can be changed, and what is wrong."""
        async with with_store() as service:
            reply = await service.stub.ListObjectives(api.ListObjectivesRequest())

        assert reply.writable
        (problem,) = reply.problems
        assert (problem.source, problem.about, problem.problem) == PROBLEM

    @pytest.mark.parametrize("name", ["", "a\nb", "a" * 254])
    async def test_a_bad_name(self, name: str) -> None:
        """A name that cannot be is refused."""
        async with with_store() as service:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.put(name, 1)
            assert await service.objectives() == {}

        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "name must be printable" in str(caught.value.details())

    async def test_nobody_there(self) -> None:
        """What is not there cannot be deleted."""
        async with with_store() as service:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.delete("chat")

        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    async def test_not_kept(self, tmp_path: Path) -> None:
        """A change that cannot be kept is not made, and that is said."""
        file = tmp_path / "objectives.yaml"
        async with with_store(file) as service:
            await service.put("chat", 10)
            file.unlink()
            file.mkdir()
            (file / "in the way").touch()
            codes = []
            for change in (service.put("chat", 20), service.delete("chat")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await change
                codes.append(caught.value.code())

            assert await service.objectives() == {"chat": 10}
        assert codes == [grpc.StatusCode.UNAVAILABLE] * 2


class TestElsewhere:
    """Where they come from somewhere else."""

    async def test_a_file_name_that_is_no_text(self) -> None:
        """It is listed as far as it can be shown: one such file does not hide all the others."""
        odd = "objectives.directory", "\udcff.yaml", "/objectives/\udcff.yaml:1: is not YAML"
        access = ObjectiveAccess(lambda: None, lambda: [odd, PROBLEM])
        async with served(access, None) as service:
            reply = await service.stub.ListObjectives(api.ListObjectivesRequest())

        first, second = reply.problems
        assert first.about == r"\udcff.yaml"
        assert first.problem == r"/objectives/\udcff.yaml:1: is not YAML"
        assert second.about == "bad.yaml"

    async def test_not_writable(self) -> None:
        """They are listed, and must be changed there."""
        async with served(FROM_ELSEWHERE, None) as service:
            service.gate.post(ObjectivesChanged({"chat": 10}))
            reply = await service.stub.ListObjectives(api.ListObjectivesRequest())
            codes = []
            for change in (service.put("chat", 20), service.delete("chat")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await change
                codes.append(caught.value.code())

            assert await service.objectives() == {"chat": 10}
        assert not reply.writable
        assert codes == [grpc.StatusCode.FAILED_PRECONDITION] * 2

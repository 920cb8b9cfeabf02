"""A whole service in a separate process, and requests as Envoy sends them, without Envoy."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, final

import grpc
import yaml
from aiohttp import ClientError, ClientSession

from flowcontrol_server.common import envoy_messages as ext_proc
from tests.support.ports import free_ports

PATIENCE_S = 20.0
ROOT = Path(__file__).parents[2]
_PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


@final
class Running:
    """A running service.

    Attributes:
        grpc: its gRPC address.
        http: root URL of its pages.
        directory: directory of its configuration and log.
    """

    def __init__(
        self,
        directory: Path,
        ports: Sequence[int],
        environment: Mapping[str, str],
        program: Sequence[str],
    ) -> None:
        self.directory = directory
        self.grpc = f"127.0.0.1:{ports[0]}"
        self.http = f"http://127.0.0.1:{ports[1]}"
        self._environment = environment
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, session: ClientSession) -> None:
        """Start it, and wait until it is ready."""
        command = [sys.executable, *self._program, "serve", "--config", "config.yaml"]
        with (self.directory / "service.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                command,
                cwd=self.directory,
                stderr=log,
                env={**os.environ, **self._environment, "PYTHONPATH": f"{ROOT}:{ROOT}/server"},
            )
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_ready(session):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)

    async def _is_ready(self, session: ClientSession) -> bool:
        assert self._process is not None, "it has been started"
        assert self._process.poll() is None, self.log
        try:
            async with session.get(f"{self.http}/readyz") as answer:
                return answer.status == 200
        except ClientError:
            return False

    async def stopped(self) -> int:
        """Drain it; return its exit status."""
        assert self._process is not None, "it has been started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Wait until it ends; return its exit status."""
        assert self._process is not None, "it has been started"
        try:
            return await asyncio.to_thread(self._process.wait, PATIENCE_S)
        finally:
            self._process.kill()

    @property
    def log(self) -> str:
        """Its whole log."""
        return (self.directory / "service.log").read_text()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return its log lines of one event."""
        lines = [json.loads(line) for line in self.log.splitlines()]
        return [line for line in lines if line["event"] == event]


@asynccontextmanager
async def running(
    directory: Path,
    settings: Mapping[str, Any],
    objectives: Mapping[str, int],
    *,
    program: Sequence[str] = ("-m", "flowcontrol_server"),
    **environment: str,
) -> AsyncIterator[Running]:
    """A service with these settings, drained at the end.

    Args:
        directory: directory for its files.
        settings: settings beside those of the doors.
        objectives: objectives with their priorities.
        program: module or script that Python runs.
        environment: environment of the process beside ours.
    """
    ports = free_ports(2)
    manifests = directory / "objectives"
    manifests.mkdir()
    for name, priority in objectives.items():
        manifest = {
            "apiVersion": "llm-d.ai/v1alpha2",
            "kind": "InferenceObjective",
            "metadata": {"name": name},
            "spec": {"priority": priority, "poolRef": {"name": "llama"}},
        }
        (manifests / f"{name}.yaml").write_text(yaml.safe_dump(manifest))
    config = {
        "apiVersion": "flowcontrol/v1alpha1",
        "kind": "FlowControlConfig",
        "pool": "llama",
        "listen": {
            "extProc": "off",
            **{
                name: f"127.0.0.1:{port}"
                for name, port in zip(("grpc", "http"), ports, strict=True)
            },
        },
        "objectives": {"directory": "objectives"},
        **settings,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    service = Running(directory, ports, environment, program)
    async with ClientSession() as session:
        await service.start(session)
        try:
            yield service
        finally:
            await service.stopped()


@final
class Streams:
    """Requests at a service's gRPC port, each on a separate stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._process: Any = self._channel.stream_stream(
            _PROCESS,
            request_serializer=ext_proc.ProcessingRequest.SerializeToString,
            response_deserializer=ext_proc.ProcessingResponse.FromString,
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def ask(
        self,
        flow_id: str,
        *,
        objective: str = "",
        client_id: str = "",
        hold_s: float = 0.0,
        until: "asyncio.Event | None" = None,
        servers: "Mapping[str, asyncio.Semaphore] | None" = None,
    ) -> int:
        """Send a request; return its status: 200 once its response has ended.

        Args:
            flow_id: the tenant.
            objective: name of the objective.
            client_id: its x-request-id.
            hold_s: how long the model server takes.
            until: the model server also takes until this is set.
            servers: concurrent requests of each endpoint; further ones wait inside it.
        """
        request = ext_proc.ProcessingRequest()
        headers = {
            ":method": "POST",
            ":path": "/v1/completions",
            "content-length": "2000",
            "x-llm-d-inference-fairness-id": flow_id,
            "x-llm-d-inference-objective": objective,
            "x-request-id": client_id,
        }
        for name, value in headers.items():
            if value:
                request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        call = self._process()
        await call.write(request)
        answer = await call.read()
        if not isinstance(answer, ext_proc.ProcessingResponse):
            return 0
        if answer.HasField("immediate_response"):
            return int(answer.immediate_response.status.code)
        async with _place(answer, servers):
            await asyncio.sleep(hold_s)
        if until is not None:
            await until.wait()
        await call.done_writing()
        await call.read()
        return 200


def _place(
    answer: ext_proc.ProcessingResponse, servers: "Mapping[str, asyncio.Semaphore] | None"
) -> AbstractAsyncContextManager[None]:
    """Return the semaphore of the picked endpoint."""
    if servers is None:
        return nullcontext()
    mutation = answer.request_headers.response.header_mutation
    headers = {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}
    return servers[headers["x-gateway-destination-endpoint"]]

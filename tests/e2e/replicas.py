"""Two replicas of the service behind one Envoy, with a Redis server for state and election."""

import asyncio
import copy
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import yaml

from flowcontrol_server.common.addresses import Address
from tests.e2e.backend import Backend, Call
from tests.e2e.client import CHAT, Caller, call, fetch
from tests.e2e.harness import Edit, Process, Spec, Stack, eventually
from tests.support.ports import HOST, free_port
from tests.support.valkey_server import ValkeyServer

READY_S = 60.0


def with_replicas(configuration: dict[str, Any], other: Address) -> None:
    """Add a replica to both clusters of a generated Envoy configuration."""
    clusters = {each["name"]: each for each in configuration["static_resources"]["clusters"]}
    for name in ("ext_proc", "access_log"):
        endpoints = clusters[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoints.append(copy.deepcopy(endpoints[0]))
        socket = endpoints[1]["endpoint"]["address"]["socket_address"]
        socket |= {"address": other.host, "port_value": other.port}


@final
class Replicas:
    """Two replicas, one Envoy, one Redis, one model server that a test answers for.

    Args:
        directory: for configurations and logs.
        limit: requests in flight.
        settings: more sections of the services' configuration.
        shape: changes the Envoy configuration in place, before the other replica is added.
    """

    def __init__(
        self,
        directory: Path,
        limit: int,
        settings: Mapping[str, Any] | None = None,
        shape: Edit | None = None,
    ) -> None:
        self.directory = directory
        self.redis = ValkeyServer(directory)
        self._others = {name: Address(HOST, free_port()) for name in ("extProc", "grpc", "http")}
        state = {"valkey": {"url": self.redis.url}}
        sections = {"state": state, "availability": {"election": "valkey"}, **(settings or {})}

        def edit(configuration: dict[str, Any]) -> None:
            if shape is not None:
                shape(configuration)
            with_replicas(configuration, self._others["extProc"])

        self.stack = Stack(
            Spec(
                max_concurrency=limit,
                picker="least-loaded",
                settings=sections,
                edit_envoy=edit,
            ),
            directory,
        )
        self.arrived: asyncio.Queue[Call] = asyncio.Queue()
        self.backend = Backend(self.stack.endpoints[0], self.arrived)
        self.services: list[Process] = []
        self._callers: list[Caller] = []

    async def __aenter__(self) -> Self:
        self.redis.start()
        await self.backend.__aenter__()
        try:
            await self.stack.start()
            self.services = [self.stack.service, self._start_other()]
            await self.until_up(1)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for caller in self._callers:
            await caller.hang_up()
        await self.backend.close()
        self.stack.stop()
        for process in self.services:
            process.stop()
        self.redis.stop()

    def _start_other(self) -> Process:
        configuration = yaml.safe_load(self.stack.config.read_text())
        configuration["listen"] = {name: str(each) for name, each in self._others.items()}
        path = self.directory / "other.yaml"
        path.write_text(yaml.safe_dump(configuration))
        self._starts = getattr(self, "_starts", 0) + 1
        command = (*self.stack.spec.service, "serve", "--config", str(path))
        return Process(command, self.directory / f"other-{self._starts}.log")

    async def restart(self, number: int) -> None:
        """Start a replica that has ended, and wait until it is up."""
        if number == 1:
            self.services[1] = self._start_other()
        else:
            command = (*self.stack.spec.service, "serve", "--config", str(self.stack.config))
            self._starts += 1
            log = self.directory / f"again-{self._starts}.log"
            self.services[0] = Process(command, log)
        await self.until_up(number)

    def http(self, number: int) -> Address:
        """Return where a replica serves its pages."""
        return self.stack.http if number == 0 else self._others["http"]

    async def until_up(self, number: int) -> None:
        """Wait until a replica lives, leader or not."""

        async def is_up() -> bool:
            assert self.services[number].exit_status() is None, self.logs(number)
            return await self._is(number, "/healthz")

        await eventually(is_up, READY_S, f"replica {number} up")

    async def leader(self, within_s: float = READY_S, *, but: int | None = None) -> int:
        """Wait until one replica is ready; return its number."""

        async def find() -> list[int]:
            numbers = [each for each in (0, 1) if each != but]
            return [each for each in numbers if await self._is(each, "/readyz")]

        return int((await eventually(find, within_s, "a leader"))[0])

    async def _is(self, number: int, path: str) -> bool:
        try:
            return (await fetch(self.http(number), path)).status == 200
        except OSError:
            return False

    async def explained(self, number: int, name: str) -> str:
        """Return what a replica's dashboard says of a request."""
        return (await fetch(self.http(number), f"/api/explain?request={name}")).body.decode()

    async def metric(self, number: int, name: str) -> float:
        """Return the value of a metric, named with its labels, of a replica; 0 if it has none."""
        reply = await fetch(self.http(number), "/metrics")
        lines = [line.split(" ") for line in reply.body.decode().splitlines()]
        return next((float(line[1]) for line in lines if line[0] == name), 0.0)

    async def call(
        self,
        name: str,
        flow_id: str = "tenant",
        body: bytes | None = b"{}",
        **headers: str,
    ) -> Caller:
        """Send a request through Envoy.

        Args:
            name: its x-request-id.
            flow_id: its fairness id.
            body: None for none yet.
            headers: more of them, with underscores for hyphens.
        """
        sent = {"x-request-id": name, "x-llm-d-inference-fairness-id": flow_id}
        sent |= {each.replace("_", "-"): value for each, value in headers.items()}
        caller = await call(self.stack.gateway, CHAT, method="POST", headers=sent, body=body)
        self._callers.append(caller)
        return caller

    async def next_call(self, within_s: float) -> Call:
        """Wait for the next request to reach the model server."""
        async with asyncio.timeout(within_s):
            return await self.arrived.get()

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> float:
        """Send a replica a signal; return when, on the monotonic clock."""
        self.services[number].send_signal(how)
        return time.monotonic()

    def logs(self, number: int) -> str:
        """Return what a replica has logged since its last start."""
        return self.services[number].log.read_text()

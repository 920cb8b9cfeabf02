"""What a fault is planted in: model servers, one or two gates, Envoy, and Redis for two gates."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

import yaml

from flowcontrol_server.common.addresses import Address
from tests.e2e.client import fetch
from tests.e2e.harness import Process, Spec, Stack, eventually
from tests.e2e.replicas import with_replicas
from tests.faults.accounts import Dispatch, Served, read_dispatches, read_ledger
from tests.faults.link import Link, Namespace
from tests.faults.wire import Wire
from tests.support.ports import HOST, free_port
from tests.support.valkey_server import ValkeyServer

MODEL_SERVERS: Final = 2
LIMIT: Final = 12
"""Requests in flight at a model server."""
QUIET_WITHIN_S: Final = 20.0
_TROUBLE: Final = ("Traceback (most recent call last)", '"exception"', "Caught Segmentation fault")


@final
class Site:
    """Starts everything and ends it.

    Args:
        directory: for configurations, ledgers and logs.
        is_pair: whether there are two gates.
        has_network: whether Redis is in a network of its own.
        has_leases: whether two gates elect by a Kubernetes Lease; else Redis does that, too.
        command: of the gate, up to `serve`.
        settings: more sections of the gates' configuration.
        tries: of Envoy to find a single gate.
    """

    def __init__(
        self,
        directory: Path,
        *,
        is_pair: bool,
        has_network: bool = False,
        has_leases: bool = False,
        command: Sequence[str],
        settings: Mapping[str, Any],
        tries: int = 100,
    ) -> None:
        self.directory = directory
        self.is_pair = is_pair
        self._namespace = Namespace() if has_network else None
        self._has_leases = has_leases
        self._lease_server: Process | None = None
        self._tries = tries
        self.redis, self.wires = self._make_redis(2 if is_pair else 0)
        """From each of two gates to Redis."""
        self._deaths: dict[int, list[float]] = {number: [] for number in range(MODEL_SERVERS)}
        self._others = {name: Address(HOST, free_port()) for name in ("extProc", "grpc", "http")}
        self.stack = Stack(
            Spec(
                max_concurrency=LIMIT,
                endpoints=MODEL_SERVERS,
                picker="least-loaded",
                settings=self._sections() | {**settings},
                service=command,
                edit_envoy=self._edit_envoy,
            ),
            directory,
        )
        self.gates: list[Process] = []
        self.logs: list[Path] = []
        self._envoys: list[Process] = []
        self._servers: list[Process] = []
        self._starts = 0

    def _make_redis(self, count: int) -> tuple[ValkeyServer, Sequence[Wire | Link]]:
        network = self._namespace
        if network is None:
            redis = ValkeyServer(self.directory)
            return redis, [Wire(redis.port) for _ in range(count)]
        port = free_port()
        links = [Link(network, port) for _ in range(count)]
        host, wrap = links[0].address.host, network.command
        return ValkeyServer(self.directory, wrap=wrap, host=host, port=port), links

    def _sections(self) -> dict[str, Any]:
        common: dict[str, Any] = {"load": {}}
        if not self.is_pair:
            (self.directory / "state").mkdir()
            return {**common, "state": {"directory": str(self.directory / "state")}}
        url = f"redis://{self.wires[0].address}"
        election = "kubernetes" if self._has_leases else "valkey"
        if self._has_leases:
            common["kubernetes"] = {"kubeconfig": str(self._kubeconfig)}
        return {**common, "state": {"valkey": {"url": url}}, "availability": {"election": election}}

    @property
    def _kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    def _edit_envoy(self, configuration: dict[str, Any]) -> None:
        """Let the model servers see the tickets, and Envoy look for a gate often."""
        if self.is_pair:
            with_replicas(configuration, self._others["extProc"])
        listener = configuration["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        ticket = {"key": "x-ticket", "value": "%DYNAMIC_METADATA(flowcontrol:ticket)%"}
        action = "OVERWRITE_IF_EXISTS_OR_ADD"
        for host in manager["route_config"]["virtual_hosts"]:
            host.setdefault("request_headers_to_add", []).append(
                {"header": ticket, "append_action": action}
            )
        if not self.is_pair:
            (processor,) = (
                each["typed_config"]
                for each in manager["http_filters"]
                if each["name"] == "envoy.filters.http.ext_proc"
            )
            policy = processor["grpc_service"]["retry_policy"]
            policy["num_retries"] = self._tries
            policy["retry_back_off"] = {"base_interval": "0.05s", "max_interval": "0.5s"}

    async def __aenter__(self) -> Self:
        try:
            if self.is_pair:
                self.redis.start()
            if self._has_leases:
                script = ("-m", "tests.faults.lease_server", str(self.directory))
                self._lease_server = Process(
                    (sys.executable, *script), self.directory / "lease-server.log"
                )
                await eventually(self._kubeconfig.exists, 60.0, "an API server")
            for wire in self.wires:
                await wire.open()
            for number in range(MODEL_SERVERS):
                self._servers.append(self._server(number))
            for number in range(MODEL_SERVERS):
                await eventually(partial(self.slow_down, number, 1.0), what="model servers")
            await self.stack.start()
            self.gates.append(self.stack.service)
            self._envoys.append(self.stack.envoy)
            self.logs.append(self.stack.service.log)
            if self.is_pair:
                self.gates.append(self._gate(1))
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
        for wire in self.wires:
            await wire.close()
        self.stack.stop()
        for process in (*self.gates, *self._envoys, *self._servers):
            process.stop()
        self.redis.stop()
        if self._lease_server is not None:
            self._lease_server.stop()
        if self._namespace is not None:
            self._namespace.remove()

    # Model servers

    def _server(self, number: int) -> Process:
        address = self.stack.endpoints[number]
        script = Path(__file__).with_name("model_server.py")
        command = (sys.executable, str(script), str(address.port), str(self._ledger(number)))
        return Process(command, self.directory / f"model-{number}-{time.monotonic_ns()}.log")

    def _ledger(self, number: int) -> Path:
        return self.directory / f"model-{number}.ledger"

    async def slow_down(self, number: int, factor: float) -> bool:
        """Make every pause of a model server longer."""
        address = self.stack.endpoints[number]
        return (await fetch(address, f"/slow/{factor}")).status == 200

    def signal_server(self, number: int, how: signal.Signals) -> None:
        """Send a model server a signal."""
        self._servers[number].send_signal(how)

    def kill_server(self, number: int) -> None:
        """Kill a model server."""
        self._servers[number].stop()
        self._deaths[number].append(time.monotonic())

    def start_server(self, number: int) -> None:
        """Start a model server again."""
        self._servers[number] = self._server(number)

    def served(self) -> list[Served]:
        """Return what all model servers wrote down."""
        served = []
        for number in range(MODEL_SERVERS):
            path = self._ledger(number)
            lines = path.read_text().splitlines() if path.exists() else []
            served += read_ledger(lines, str(number), self._deaths[number])
        return sorted(served, key=lambda each: each.arrived_s)

    # Gates

    def _gate(self, number: int) -> Process:
        path = self.stack.config
        if number:
            configuration = yaml.safe_load(path.read_text())
            configuration["state"]["valkey"]["url"] = f"redis://{self.wires[1].address}"
            configuration["listen"] = {name: str(each) for name, each in self._others.items()}
            path = self.directory / "other.yaml"
            path.write_text(yaml.safe_dump(configuration))
        self._starts += 1
        log = self.directory / f"gate-{number}-{self._starts}.log"
        self.logs.append(log)
        command = (*self.stack.spec.service, "serve", "--config", str(path))
        return Process(command, log)

    def http(self, number: int) -> Address:
        """Return where a gate serves its pages."""
        return self._others["http"] if number else self.stack.http

    def signal_gate(self, number: int, how: signal.Signals) -> None:
        """Send a gate a signal."""
        self.gates[number].send_signal(how)

    async def start_gate(self, number: int) -> None:
        """Start a gate again once it has ended, and wait until it is up."""
        await self.gates[number].exited(60.0)
        self.gates[number] = self._gate(number)
        await self.until_up(number)

    async def until_up(self, number: int) -> None:
        """Wait until a gate lives; where it is the only one, until it decides."""
        path = "/healthz" if self.is_pair else "/readyz"
        await eventually(lambda: self.is_ok(number, path), 60.0, f"gate {number} up")

    async def is_ok(self, number: int, path: str) -> bool:
        """Whether a gate answers 200."""
        async with asyncio.timeout(2.0):
            return (await fetch(self.http(number), path)).status == 200

    async def decides(self, number: int) -> bool:
        """Whether a gate decides; False if it is not there."""
        try:
            return await self.is_ok(number, "/readyz")
        except (OSError, EOFError, TimeoutError):
            return False

    async def leader(self, *, but: int | None = None) -> int:
        """Wait until a gate decides; return its number."""

        async def find() -> list[int]:
            others = [number for number in range(len(self.gates)) if number != but]
            return [number for number in others if await self.decides(number)]

        leader: int = (await eventually(find, 60.0, "a leader"))[0]
        return leader

    async def held(self) -> dict[str, float]:
        """Return what the deciding gate believes to be waiting and in flight."""
        number = await self.leader()
        reply = await fetch(self.http(number), "/metrics")
        names = ("waiting_requests", "in_flight_requests", "recovered_leases")
        sums = dict.fromkeys(names, 0.0)
        for line in reply.body.decode().splitlines():
            name = line.partition(" ")[0].partition("{")[0].removeprefix("flowcontrol_")
            if name in sums:
                sums[name] += float(line.rpartition(" ")[2])
        return sums

    # Envoy

    async def restart_envoy(self) -> None:
        """Kill Envoy, and start it again."""
        self._envoys[-1].stop()
        await self.stack.start_envoy(self.directory / f"envoy-{len(self._envoys)}.log")
        self._envoys.append(self.stack.envoy)

    def started(self) -> dict[str, float]:
        """Return when Envoy saw each request, seconds since 1970, as far as it was logged."""
        started = {}
        for envoy in self._envoys:
            for line in envoy.stdout.read_text().splitlines():
                if line[:1] == "{" and line[-1:] == "}":
                    entry = json.loads(line)
                    at = datetime.fromisoformat(entry["start"]).timestamp()
                    started[entry["request_id"]] = at
        return started

    # What was logged

    def dispatches(self) -> dict[str, Dispatch]:
        """Return what the gates logged of their dispatches; the first of a request counts."""
        dispatches: dict[str, Dispatch] = {}
        for log in self.logs:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            dispatches = read_dispatches(lines, log.name) | dispatches
        return dispatches

    def tracebacks(self) -> int:
        """Return how many lines of all logs tell of an exception that was not foreseen."""
        return sum(1 for _ in self.troubles())

    def troubles(self) -> Iterator[str]:
        """Yield those lines."""
        for log in (*self.logs, *(envoy.log for envoy in self._envoys)):
            for path in (log, log.with_suffix(".stdout")):
                text = path.read_text(errors="replace") if path.exists() else ""
                yield from (line for line in text.splitlines() if any(x in line for x in _TROUBLE))

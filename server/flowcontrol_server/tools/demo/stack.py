"""The processes of the demo, on loopback: model servers, the service, Envoy."""

import asyncio
import contextlib
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import aiohttp
import yaml

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.tools.envoy.binary import envoy_binary
from flowcontrol_server.tools.envoy.config import EnvoyOptions, bootstrap

HOST = "127.0.0.1"
TOKEN_FILE = "admin-token"  # noqa: S105 - a name, no secret
"""Holds the admin token, a new one for each run."""
START_TIMEOUT_S = 60.0  # On a busy machine the imports of five processes have taken over 20 s.
STOP_TIMEOUT_S = 5.0
_PORT_MAX = 65_535

_CONFIG = """\
# Written by `flowcontrol demo`: the configuration it runs with.
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
listen: {{extProc: "{ext_proc}", grpc: "{grpc}", http: "{http}"}}
admin: {{tokenFile: ./admin-token}}
objectives: {{directory: ./objectives}}
endpoints: {{static: {endpoints}}}
load: {{}}                          # scrape each model server: its load, and whether it is up
picker: least-loaded
flowControl:
  requestTTL: 60s
  bands:
    - match: {{maxPriority: -1}}     # batch: long waits, but a bounded queue
      maxRequests: 200
      requestTTL: 300s
"""
_OBJECTIVE = """\
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {{name: {name}}}
spec: {{priority: {priority}, poolRef: {{name: llama}}}}
"""
OBJECTIVES = {"chat": 10, "batch": -1}


class DemoError(FlowControlError):
    """The demo cannot run; the message gives the reason and the remedy."""


@final
@dataclass(frozen=True, slots=True)
class Ports:
    """Every port the demo listens on."""

    gated: int = 8080
    bare: int = 8081
    """Envoy alone: the same routes without the external processor."""
    admin: int = 9901
    ext_proc: int = 9002
    grpc: int = 9003
    http: int = 9090
    servers: tuple[int, ...] = (8000, 8001, 8002)

    def shifted(self, offset: int) -> "Ports":
        """Return the ports, each increased by `offset`.

        Raises:
            DemoError: a port would be outside of 1 to 65535.
        """
        least, most = 1 - min(self.all()), _PORT_MAX - max(self.all())
        if not least <= offset <= most:
            message = f"--port-offset must be from {least} to {most}, got {offset}"
            raise DemoError(message)
        return Ports(
            gated=self.gated + offset,
            bare=self.bare + offset,
            admin=self.admin + offset,
            ext_proc=self.ext_proc + offset,
            grpc=self.grpc + offset,
            http=self.http + offset,
            servers=tuple(port + offset for port in self.servers),
        )

    def all(self) -> tuple[int, ...]:
        """Return every port."""
        doors = (self.ext_proc, self.grpc, self.http)
        return (self.gated, self.bare, self.admin, *doors, *self.servers)


@contextlib.asynccontextmanager
async def running_stack(ports: Ports, directory: Path) -> AsyncIterator[None]:
    """Start all processes, wait until they answer, and stop them at the end, whatever ends it.

    Args:
        ports: must be free.
        directory: for the configurations and the logs.

    Raises:
        DemoError: a port is taken, Envoy is missing, or a process does not become ready.
    """
    taken = [port for port in ports.all() if _is_taken(port)]
    if taken:
        numbers = ", ".join(map(str, taken))
        message = f"in use already: port {numbers}; stop the process there or use --port-offset"
        raise DemoError(message)
    envoy = envoy_binary()
    _write_configuration(ports, directory)
    us = (sys.executable, "-m", "flowcontrol_server")
    commands: dict[str, tuple[str, ...]] = {
        f"model-server-{port}": (*us, "simulate-server", "--host", HOST, "--port", str(port))
        for port in ports.servers
    }
    commands["flowcontrol"] = (*us, "serve", "--config", str(directory / "flowcontrol.yaml"))
    commands["envoy"] = (
        *(str(envoy), "--config-path", str(directory / "envoy.yaml")),
        *("--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"),
    )
    probes = [f"http://{HOST}:{port}/health" for port in ports.servers]
    probes += [f"http://{HOST}:{ports.http}/readyz", f"http://{HOST}:{ports.admin}/ready"]
    processes: dict[str, asyncio.subprocess.Process] = {}
    try:
        for name, command in commands.items():
            processes[name] = await _start(command, directory / f"{name}.log")
        await _until_ready(probes, processes, directory)
        yield
    finally:
        await _stop(list(processes.values()))


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _write_configuration(ports: Ports, directory: Path) -> None:
    objectives = directory / "objectives"
    objectives.mkdir(parents=True, exist_ok=True)
    for name, priority in OBJECTIVES.items():
        text = _OBJECTIVE.format(name=name, priority=priority)
        (objectives / f"{name}.yaml").write_text(text)
    token = directory / TOKEN_FILE
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(16))
    config = directory / "flowcontrol.yaml"
    config.write_text(
        _CONFIG.format(
            ext_proc=Address(HOST, ports.ext_proc),
            grpc=Address(HOST, ports.grpc),
            http=Address(HOST, ports.http),
            endpoints=[str(Address(HOST, port)) for port in ports.servers],
        )
    )
    options = EnvoyOptions(listen=Address(HOST, ports.gated), admin=Address(HOST, ports.admin))
    gated = yaml.safe_load(bootstrap(load_settings(config), options))
    resources = gated["static_resources"]
    resources["listeners"].append(_without_gate(resources["listeners"][0], ports.bare))
    (directory / "envoy.yaml").write_text(yaml.safe_dump(gated, sort_keys=False))


def _without_gate(listener: dict[str, Any], port: int) -> dict[str, Any]:
    """Return a copy of the listener on another port, without flow control."""
    bare: dict[str, Any] = yaml.safe_load(yaml.safe_dump(listener))
    bare["name"] = "without-flow-control"
    bare["address"]["socket_address"]["port_value"] = port
    manager = bare["filter_chains"][0]["filters"][0]["typed_config"]
    filters = manager["http_filters"]
    gate = ("ext_proc", "rbac")
    manager["http_filters"] = [each for each in filters if not each["name"].endswith(gate)]
    return bare


async def _start(command: tuple[str, ...], log: Path) -> asyncio.subprocess.Process:
    with log.open("wb") as output:
        # A separate session, so that ctrl-C reaches only the demo, which stops the others in order.
        return await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, start_new_session=True
        )


async def _until_ready(
    probes: list[str], processes: dict[str, asyncio.subprocess.Process], directory: Path
) -> None:
    probe = ""
    try:
        async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
            for probe in probes:
                while not await _answers(session, probe):
                    for name, process in processes.items():
                        if process.returncode is not None:
                            log = (directory / f"{name}.log").read_text()[-500:]
                            message = f"{name} ended with status {process.returncode}: {log}"
                            raise DemoError(message)
                    await asyncio.sleep(0.05)
    except TimeoutError as error:
        message = f"{probe} not ready within {START_TIMEOUT_S:.0f} s; the logs are in {directory}"
        raise DemoError(message) from error


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.ok
    except aiohttp.ClientError:
        return False


async def _stop(processes: list[asyncio.subprocess.Process]) -> None:
    """Terminate every process, the last one started first; kill those that do not end in time."""
    for process in reversed(processes):
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()

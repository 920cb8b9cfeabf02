"""Real processes for the end-to-end tests: Envoy and the service, from start to end.

Everything listens on 127.0.0.1 alone, on ports below those the kernel gives to clients. Whatever is
started is ended by its process id, however the test ends.
"""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import yaml

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.admin import TOKEN_VARIABLE
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.tools.envoy.binary import envoy_binary
from tests.e2e.client import fetch
from tests.support.ports import HOST, free_port

ROOT = Path(__file__).parents[2]
POOL = "llama"
ADMIN_TOKEN = "say-friend-and-enter"
"""What the service's environment holds; with it the API may change things."""
OBJECTIVES: Mapping[str, int] = {"chat": 10, "batch": -1}
Edit = Callable[[dict[str, Any]], None]
_POLL_S = 0.01
_START_S = 20.0
_STOP_S = 10.0
_MANIFEST = """\
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {{name: {name}}}
spec: {{priority: {priority}, poolRef: {{name: {pool}}}}}
"""


async def eventually(ask: Callable[[], Any], within_s: float = 5.0, what: str = "") -> Any:
    """Ask again and again until the answer is true in Python's sense; return it.

    The one way in which these tests wait for another process. A refused connection counts as no.

    Args:
        ask: returns an answer, or an awaitable of one.
        within_s: when to give up.
        what: is waited for, in words.

    Raises:
        AssertionError: with the last answer, when the time is over.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            answer = ask()
            given = await answer if inspect.isawaitable(answer) else answer
        except OSError as error:
            given, last = None, repr(error)
        else:
            last = repr(given)
        if given:
            return given
        assert time.monotonic() < deadline, f"not within {within_s} s: {what or ask}, last: {last}"
        await asyncio.sleep(_POLL_S)


@final
@dataclass(frozen=True)
class Spec:
    """What a stack is to look like. The rest is as the product writes it."""

    max_concurrency: int = 1
    endpoints: int = 1
    is_pool_empty: bool = False
    """Whether the service is told of no endpoint at all."""
    picker: str = "off"
    picker_fallbacks: int = 0
    original_dst: bool = False
    """Whether Envoy sends requests wherever the picker says, known to it or not."""
    is_http2: bool = False
    """Whether Envoy speaks HTTP/2 to the model servers."""
    flow_control: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the service's configuration in place of those that the rest makes."""
    prepare: "Callable[[Stack], None] | None" = None
    """Called before anything starts: writes files that the settings name."""
    settlement: Mapping[str, Any] = field(default_factory=dict)
    listen: Mapping[str, Any] = field(default_factory=dict)
    """Of that section, what is no address."""
    log_level: str = "info"
    edit_envoy: Edit | None = None
    """Changes the generated Envoy configuration, parsed, in place."""
    service: Sequence[str] = (str(Path(sys.executable).with_name("flowcontrol")),)
    """The command that is told `serve --config ...`."""
    door: str = "direct"
    """The port that Envoy's ext_proc streams use: direct or grpcio; then there is no other."""
    is_socket: bool = False
    """Whether Envoy's port is a Unix socket."""
    pems: Path | None = None
    """A folder for mutual TLS: the service's certificate.pem and key.pem, Envoy's client.pem and
    client.key, and ca.pem."""


@final
class Process:
    """A real process, its output in files.

    Args:
        command: what to run.
        log: where its standard error goes; standard output goes beside it.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.stdout = log.with_suffix(".stdout")
        self.is_told_to_end = False
        """Whether a test has sent it a signal."""
        environment = os.environ | {TOKEN_VARIABLE: ADMIN_TOKEN}
        environment |= {"PYTHONWARNINGS": "default"}  # to be seen in the log
        with log.open("wb") as err, self.stdout.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """Return how it ended; None while it runs."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        self.is_told_to_end = True
        self._process.send_signal(number)

    async def exited(self, within_s: float = _STOP_S) -> int:
        """Wait for its end; return its exit status."""
        await eventually(lambda: self.exit_status() is not None, within_s, f"{self.log.name} ended")
        status = self.exit_status()
        assert status is not None
        return status

    def stop(self) -> None:
        """End it at once; how it ends when asked is what the tests of the drain are about."""
        self._process.kill()
        self._process.wait()

    def resident_bytes(self) -> int:
        """Return its resident memory now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


@final
class Stack:
    """A service and an Envoy in front of it, with ports of their own.

    Args:
        spec: how they are to be.
        directory: gets their configurations and logs.
    """

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.spec = spec
        self.directory = directory
        self.gateway, self.admin, self.grpc, self.http = (
            Address(HOST, free_port()) for _ in range(4)
        )
        self.ext_proc = directory / "door.sock" if spec.is_socket else Address(HOST, free_port())
        self.endpoints = [Address(HOST, free_port()) for _ in range(spec.endpoints)]
        self.objectives = directory / "objectives"
        self.config = directory / "flowcontrol.yaml"
        self._envoy_yaml = directory / "envoy.yaml"
        self._starts = 0
        self._service: Process | None = None
        self._envoy: Process | None = None
        self._others: list[Process] = []

    @property
    def door(self) -> Address | Path:
        """Where Envoy finds the service: the one place that has to know doors."""
        return {"direct": self.ext_proc, "grpcio": self.grpc}[self.spec.door]

    @property
    def service(self) -> Process:
        """The service, as started last."""
        assert self._service is not None, "start first"
        return self._service

    @property
    def envoy(self) -> Process:
        """Envoy."""
        assert self._envoy is not None, "start first"
        return self._envoy

    async def start(self) -> None:
        """Start both and wait until they are ready."""
        self.objectives.mkdir()
        for name, priority in OBJECTIVES.items():
            self.declare(name, priority)
        if self.spec.prepare is not None:
            self.spec.prepare(self)
        self.configure()
        await self.start_service()
        await self.start_envoy(self.directory / "envoy.log")

    def configure(self, **changes: Any) -> None:
        """Write the service's configuration, all at once, with other sections in place."""
        new = self.config.with_suffix(".new")
        new.write_text(yaml.safe_dump({**self._settings(), **changes}, sort_keys=False))
        new.rename(self.config)

    async def start_service(self) -> None:
        """Start the service, again perhaps, and wait until it is ready."""
        self._starts += 1
        options = ("--config", str(self.config), "--log-level", self.spec.log_level)
        command = (*self.spec.service, "serve", *options)
        self._service = Process(command, self.directory / f"service-{self._starts}.log")
        if self._starts == 1:
            self._configure_envoy()  # meanwhile
        await self._until_ready(self._service, self.http, "/readyz")

    def stop(self) -> None:
        """End whatever runs."""
        for process in (*self._others, self._envoy, self._service):
            if process is not None:
                process.stop()

    # Objectives

    def declare(self, name: str, priority: int) -> None:
        """Write the manifest of an objective, new or changed."""
        text = _MANIFEST.format(name=name, priority=priority, pool=POOL)
        self.write_manifest(f"{name}.yaml", text)

    def write_manifest(self, file_name: str, text: str) -> None:
        """Write a file into the objectives folder, all at once."""
        new = self.objectives / f"{file_name}.new"
        new.write_text(text)
        new.rename(self.objectives / file_name)

    def remove_manifest(self, file_name: str) -> None:
        """Remove a file from the objectives folder."""
        (self.objectives / file_name).unlink()

    # What they have written

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the service's log lines of one kind, since its last start."""
        return [line for line in self._log_lines() if line["event"] == name]

    def complaints(self) -> list[dict[str, Any]]:
        """Return the service's log lines that say something is wrong; advice on settings apart."""
        return [
            line
            for line in self._log_lines()
            if line["level"] not in {"debug", "info"} and line["event"] != "configuration_warning"
        ]

    def stray_lines(self) -> list[str]:
        """Return what the service has written beside its log: warnings and tracebacks."""
        lines = [*_whole_lines(self.service.log), *_whole_lines(self.service.stdout)]
        return [line for line in lines if line[:1] != "{"]

    def access_log(self) -> list[dict[str, Any]]:
        """Return Envoy's access log."""
        return [json.loads(line) for line in _whole_lines(self.envoy.stdout) if line[:1] == "{"]

    def _log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in _whole_lines(self.service.log) if line[:1] == "{"]

    # How they are made

    def _settings(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": POOL,
            "listen": self._listen(),
            "objectives": {"directory": "./objectives"},
            "endpoints": {"static": [] if spec.is_pool_empty else [*map(str, self.endpoints)]},
            "picker": spec.picker,
            "pickerFallbacks": spec.picker_fallbacks,
            "saturation": {"maxConcurrency": spec.max_concurrency},
            "flowControl": {"ceilings": {"policy": "static"}, **spec.flow_control},
            "requests": dict(spec.requests),
            "settlement": dict(spec.settlement),
            "tls": self._tls(),
            **spec.settings,
        }

    def _tls(self) -> dict[str, str]:
        files = {"certificate": "certificate.pem", "key": "key.pem", "clientCa": "ca.pem"}
        pems = self.spec.pems
        return {name: str(pems / file) for name, file in files.items()} if pems else {}

    def _listen(self) -> dict[str, str]:
        door = f"unix:{self.ext_proc}" if isinstance(self.ext_proc, Path) else str(self.ext_proc)
        addresses = {
            "extProc": "off" if self.spec.door == "grpcio" else door,
            "grpc": str(self.grpc),
            "http": str(self.http),
        }
        return {**addresses, **self.spec.listen}

    def _configure_envoy(self) -> None:
        """Write the configuration that fits the service's, with the changes of the spec."""
        configuration = self._envoy_configuration(self.gateway, self.admin, self.spec.edit_envoy)
        self._envoy_yaml.write_text(yaml.safe_dump(configuration, sort_keys=False))

    def _envoy_configuration(
        self, gateway: Address, admin: Address, edit: Edit | None
    ) -> dict[str, Any]:
        with warnings.catch_warnings():
            # pydantic has deprecated something that envoy-data-plane does as it is imported.
            warnings.filterwarnings(
                "ignore", category=DeprecationWarning, module="envoy_data_plane"
            )
            from flowcontrol_server.tools.envoy.config import (  # noqa: PLC0415 - it warns
                EnvoyOptions,
                EnvoyTls,
                bootstrap,
            )
        names = ("ca.pem", "client.pem", "client.key")
        files = [str(self.spec.pems / name) for name in names] if self.spec.pems else []
        options = EnvoyOptions(
            listen=gateway,
            admin=admin,
            tls=EnvoyTls(*files) if files else None,
            original_dst=self.spec.original_dst,
            http2=self.spec.is_http2,
        )
        configuration: dict[str, Any] = yaml.safe_load(
            bootstrap(load_settings(self.config), options)
        )
        if edit is not None:
            edit(configuration)
        return configuration

    async def start_envoy(self, log: Path) -> None:
        """Start Envoy, again perhaps, and wait until it is ready."""
        self._envoy = _run_envoy(self._envoy_yaml, log)
        await self._until_ready(self._envoy, self.admin, "/ready")

    async def start_other_envoy(self, edit: Edit) -> Address:
        """Start another Envoy beside the first; return where it listens.

        Args:
            edit: changes its configuration in place, in the place of the spec's.
        """
        gateway, admin = Address(HOST, free_port()), Address(HOST, free_port())
        path = self.directory / f"envoy-{gateway.port}.yaml"
        configuration = self._envoy_configuration(gateway, admin, edit)
        path.write_text(yaml.safe_dump(configuration, sort_keys=False))
        envoy = _run_envoy(path, path.with_suffix(".log"))
        self._others.append(envoy)
        await self._until_ready(envoy, admin, "/ready")
        return gateway

    async def _until_ready(self, process: Process, address: Address, path: str) -> None:
        async def is_ready() -> bool:
            assert process.exit_status() is None, process.log.read_text()
            return (await fetch(address, path)).status == 200

        await eventually(is_ready, _START_S, f"{process.log.name} ready")


def _run_envoy(configuration: Path, log: Path) -> Process:
    command = (
        *(str(envoy_binary()), "--config-path", str(configuration)),
        *("--concurrency", "1", "--use-dynamic-base-id", "--disable-hot-restart"),
        *("--log-level", "warning", "--file-flush-interval-msec", "50"),
    )
    return Process(command, log)


def _whole_lines(path: Path) -> Iterator[str]:
    """Yield the finished lines of a file that somebody is writing."""
    text = path.read_text()
    yield from text[: text.rfind("\n") + 1].splitlines()

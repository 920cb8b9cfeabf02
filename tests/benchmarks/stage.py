"""What the benchmarks stand on: processes on loopback, what they cost, and where results go.

CPU time is what the kernel says of all threads of a process (/proc/PID/task/*/schedstat, in
nanoseconds), so it does not matter who waits for whom. Linux only.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop
import yaml

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.tools.envoy.binary import envoy_binary
from tests.support.ports import HOST, free_ports

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from flowcontrol_server.tools.envoy.config import EnvoyOptions, bootstrap

HERE = Path(__file__).parent
RESULTS = HERE / "results"
START_S = 120.0
_GPP = ("g++", "-O2", "-std=c++17")
ROOT = HERE.parents[1]
COMPILED = ROOT / "build" / "compiled"
"""The wheel that `make build/compiled/ready` makes and unpacks."""


@dataclass(frozen=True)
class Running:
    """A process."""

    pid: int

    def cpu_ns(self) -> int:
        """CPU time of all its threads so far."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                total += int((task / "schedstat").read_text().split()[0])
        return total

    def resident_bytes(self) -> int:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")


def python(*, is_compiled: bool) -> tuple[str, ...]:
    """Return how to run Python on the sources, or on what was compiled of them."""
    if not is_compiled:
        return (sys.executable,)
    return ("env", f"PYTHONPATH={COMPILED}:{ROOT}", sys.executable, "-P")


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, is_ready: Callable[[], bool]) -> Iterator[Running]:
    """Run a process until the end of the block; it is ready when the block begins."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        deadline = time.monotonic() + START_S
        while not is_ready():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, f"{command[0]} is not ready"
            time.sleep(0.02)
        yield Running(process.pid)
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> Callable[[], bool]:
    """Return what says whether somebody listens there."""

    def ask() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    return ask


def answers(port: int, path: str) -> Callable[[], bool]:
    """Return what says whether a page answers with 200."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{path}") as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    return ask


def native(directory: Path) -> tuple[str, str]:
    """Build the C++ programs; return the no-op processor and the backend.

    Needs Debian's g++, protobuf-compiler, protobuf-compiler-grpc, libgrpc++-dev, pkg-config.
    """
    source, plugin = HERE / "native", shutil.which("grpc_cpp_plugin")
    if plugin is None:
        sys.exit("missing: apt-get install g++ pkg-config protobuf-compiler-grpc libgrpc++-dev wrk")
    processor = directory / "noop"
    out, proto = str(directory), str(source / "ext_proc.proto")
    _do(
        "protoc",
        "-I",
        str(source),
        "--cpp_out",
        out,
        "--grpc_out",
        out,
        proto,
        f"--plugin=protoc-gen-grpc={plugin}",
    )
    flags = _do("pkg-config", "--cflags", "--libs", "grpc++", "protobuf").split()
    generated = [str(directory / f"ext_proc.{kind}.cc") for kind in ("pb", "grpc.pb")]
    _do(*_GPP, "-I", out, "-o", str(processor), str(source / "noop.cc"), *generated, *flags)
    return str(processor), model_server(directory)


def model_server(directory: Path) -> str:
    """Build the C++ backend alone, which needs g++ and nothing else."""
    backend = str(directory / "backend")
    _do(*_GPP, "-o", backend, str(HERE / "native" / "backend.cc"))
    return backend


@dataclass(frozen=True)
class Service:
    """flowcontrol, with both doors open."""

    process: Running
    ext_proc: int
    grpc: int
    http: int
    config: Path


@contextlib.contextmanager
def service(
    directory: Path,
    name: str,
    *,
    endpoints: Sequence[int],
    is_compiled: bool = False,
    before: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Service]:
    """Run the whole service, as the product starts it, with its log written to a file.

    Args:
        directory: gets its configuration and its log.
        name: of its files.
        endpoints: ports of the model servers.
        is_compiled: run what was compiled.
        before: what its command stands behind.
        settings: more of its configuration.
    """
    ext_proc, grpc_port, http = free_ports(3)
    objectives = directory / "objectives"
    objectives.mkdir(exist_ok=True)
    (objectives / "chat.yaml").write_text(
        "apiVersion: llm-d.ai/v1alpha2\nkind: InferenceObjective\nmetadata: {name: chat}\n"
        "spec: {priority: 10, poolRef: {name: llama}}\n"
    )
    ports = {"extProc": ext_proc, "grpc": grpc_port, "http": http}
    content = {
        "apiVersion": "flowcontrol/v1alpha1",
        "kind": "FlowControlConfig",
        "pool": "llama",
        "listen": {door: f"{HOST}:{port}" for door, port in ports.items()},
        "objectives": {"directory": str(objectives)},
        "endpoints": {"static": [f"{HOST}:{port}" for port in endpoints]},
        **settings,
    }
    config = directory / f"{name}.config" / "flowcontrol.yaml"
    config.parent.mkdir(exist_ok=True)  # of its own: its folder is watched, and logs change
    config.write_text(yaml.safe_dump(content))
    interpreter = python(is_compiled=is_compiled)
    command = (*before, *interpreter, "-m", "flowcontrol_server", "serve", "--config", str(config))
    with running(command, directory / f"{name}.log", answers(http, "/readyz")) as process:
        yield Service(process, ext_proc, grpc_port, http, config)


@dataclass(frozen=True)
class Gateway:
    """An Envoy with one worker."""

    process: Running
    port: int


@contextlib.contextmanager
def envoy(
    directory: Path,
    name: str,
    config: Path,
    processor: int | None,
    edit: Callable[[Any], None] | None = None,
    *,
    is_bare: bool = False,
    before: Sequence[str] = (),
) -> Iterator[Gateway]:
    """Run Envoy with the configuration the product generates.

    Args:
        directory: gets its configuration and its log.
        name: of its files.
        config: the service's configuration.
        processor: port of the external processor; None for Envoy without one.
        edit: changes the configuration in place.
        is_bare: without what serves flowcontrol alone: reading of bodies, access log.
        before: what its command stands behind.
    """
    listen, admin = (Address(HOST, port) for port in free_ports(2))
    target = Address(HOST, processor or 1)
    options = EnvoyOptions(listen=listen, admin=admin, ext_proc=target)
    content = yaml.safe_load(bootstrap(load_settings(config), options))
    resources = content["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    if is_bare or processor is None:  # no reading of bodies, no access log for settlement
        needed = ("envoy.filters.http.router", "envoy.filters.http.ext_proc")[: 1 + bool(processor)]
        manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] in needed]
        manager["access_log"] = [f for f in manager["access_log"] if "grpc" not in f["name"]]
    for each in resources["clusters"]:
        each.pop("health_checks", None)  # the C++ processor has no health
    if edit is not None:
        edit(content)
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    command = (
        *before,
        *(str(envoy_binary()), "--config-path", str(path), "--concurrency", "1"),
        *("--use-dynamic-base-id", "--disable-hot-restart", "--log-level", "error"),
    )
    with running(command, directory / f"{name}.log", answers(admin.port, "/ready")) as process:
        yield Gateway(process, listen.port)


def dumped(pid: int, into: Path) -> Path:
    """Have a process under callgrind write what it has counted into a folder; return where."""
    before = set(into.iterdir())
    _do("callgrind_control", "-d", str(pid))
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for path in set(into.iterdir()) - before:
            if path.name.startswith("callgrind") and "\ntotals: " in path.read_text():
                return path
        time.sleep(0.2)
    message = f"callgrind has written nothing into {into}"
    raise TimeoutError(message)


def told(values: Sequence[float], digits: int = 0) -> str:
    """Return median and spread."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def machine() -> str:
    """Return what the numbers were measured on."""
    model = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = f"Python {platform.python_version()}, grpcio {grpc.__version__}"
    return f"{model}, {os.cpu_count()} CPUs, {versions}, uvloop {uvloop.__version__}, Envoy 1.40.0"


def keep(name: str, text: str, figures: Mapping[str, float] | None = None) -> None:
    """Print a result and keep it as text; with the figures that table.py asks for, if any."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text(text + "\n")
    if figures:
        keep_figures(name, figures)


def keep_figures(name: str, figures: Mapping[str, float]) -> None:
    """Keep figures for table.py, with the day."""
    rounded = {key: round(value, 3) for key, value in figures.items()}
    kept = {"day": time.strftime("%Y-%m-%d"), "figures": rounded}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n")


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

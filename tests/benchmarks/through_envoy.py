"""What does a gate cost a request that need not wait?

Question: requests/s, latency and CPU per request through a real Envoy (one worker), for Envoy
alone, a C++ gRPC ext_proc that does nothing, and flowcontrol at each of its doors, and at the
direct one compiled, doing its whole job: classify, queue, dispatch, hold the slot, log line,
metrics. With small requests and with prompts of 220 KB; with 64 connections, and with one for the
latency that is added.

Method: wrk against an Envoy for each contender, with the configuration that `flowcontrol
envoy-config` writes (health checks off, because the C++ processor answers none) and a model server
in C++ that answers at once. The filters are the same for all processors: bodies are read, and every
request is reported in the access log, which the C++ processor takes and forgets; RBAC alone is left
out for it, because it marks no request as admitted. Envoy alone has
none of that, nor has the Envoy that reads nothing, in front of the C++ processor. Contenders take
turns in every round; medians with their spread. CPU is of all threads of a process, from the
kernel.

Caveats: load, Envoy, service and model server share the machine, so the processor that takes less
CPU leaves more to Envoy: requests/s compare whole systems of this size, CPU per request compares
processors. Envoy writes an access log line per request. flowcontrol has one slot per request here.

    python tests/benchmarks/through_envoy.py [--rounds 5] [--seconds 5]

Needs Debian's wrk, g++, pkg-config, protobuf-compiler-grpc and libgrpc++-dev.
"""

import argparse
import contextlib
import functools
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tests.benchmarks import stage
from tests.support.ports import HOST, free_ports

CONTENDERS = ("Envoy alone", "reads nothing", "C++ no-op", "grpcio door", "direct door", "compiled")
"""Behind the second stands the C++ processor, too, without the filters that serve flowcontrol."""
LOADS = {"small": (64, 0), "one connection": (1, 0), "220 KB": (64, 220_000)}
"""Connections, and bytes of prompt beyond the few of a small request."""
SCRIPT = """\
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["content-type"] = "application/json"
wrk.headers["x-llm-d-inference-objective"] = "chat"
wrk.headers["x-llm-d-inference-fairness-id"] = "tenant-a"
local prompt = string.rep("x", {size})
wrk.body = '{{"model": "llama", "messages": [{{"role": "user", "content": "' .. prompt .. '"}}]}}'
"""
_UNIT_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class Figures:
    """One run of one contender."""

    per_s: float
    p50_ms: float
    p99_ms: float
    processor_us: float
    """CPU per request."""
    envoy_us: float


@dataclass(frozen=True)
class Contender:
    """An Envoy and what stands behind it."""

    envoy: stage.Gateway
    processor: stage.Running | None


@contextlib.contextmanager
def contenders(directory: Path) -> Iterator[dict[str, Contender]]:
    """Start them all."""
    noop, backend = stage.native(directory)
    noop_port, backend_port = free_ports(2)
    unreported = {"settlement": {"accessLog": False}}  # grpcio serves no access log
    endless = {"saturation": {"maxConcurrency": 1_000_000}, "endpoints": [backend_port]}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(
            stage.running(
                (backend, str(backend_port)), directory / "backend.log", stage.listens(backend_port)
            )
        )
        plain = enter(
            stage.running((noop, str(noop_port)), directory / "noop.log", stage.listens(noop_port))
        )
        at_grpcio = enter(stage.service(directory, "at-grpcio", **endless, **unreported))
        at_direct = enter(stage.service(directory, "at-direct", **endless))
        compiled = enter(stage.service(directory, "compiled", is_compiled=True, **endless))
        behind: dict[str, tuple[Path, int | None, stage.Running | None]] = {
            "Envoy alone": (at_direct.config, None, None),
            "reads nothing": (at_direct.config, noop_port, plain),
            "C++ no-op": (at_direct.config, noop_port, plain),
            "grpcio door": (at_grpcio.config, at_grpcio.grpc, at_grpcio.process),
            "direct door": (at_direct.config, at_direct.ext_proc, at_direct.process),
            "compiled": (compiled.config, compiled.ext_proc, compiled.process),
        }
        edits = {"C++ no-op": functools.partial(reported, port=noop_port)}
        yield {
            name: Contender(
                enter(
                    stage.envoy(
                        directory,
                        f"envoy-{name}".replace(" ", "-"),
                        config,
                        port,
                        edits.get(name),
                        is_bare=name == "reads nothing",
                    )
                ),
                process,
            )
            for name, (config, port, process) in behind.items()
        }


def reported(configuration: Any, port: int) -> None:
    """Have every request pass and be reported there, not only those that flowcontrol has marked."""
    resources = configuration["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [f for f in manager["http_filters"] if "rbac" not in f["name"]]
    (log,) = (each for each in manager["access_log"] if "grpc" in each["name"])
    del log["filter"]
    (cluster,) = (each for each in resources["clusters"] if each["name"] == "access_log")
    (where,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    where["endpoint"]["address"]["socket_address"]["port_value"] = port


def wrk(contender: Contender, connections: int, script: Path, seconds: float) -> Figures:
    """Load one contender; every answer must be 200."""
    target = f"http://{HOST}:{contender.envoy.port}"
    arguments = ("-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency")
    processes = [contender.envoy.process, *([contender.processor] if contender.processor else [])]
    before = [each.cpu_ns() for each in processes]
    said = subprocess.run(
        ("wrk", *arguments, "-s", str(script), target), check=True, capture_output=True, text=True
    ).stdout
    spent = [each.cpu_ns() - was for each, was in zip(processes, before, strict=True)]
    assert "Non-2xx" not in said, said
    assert "Socket errors" not in said, said
    count = int(_found(r"(\d+) requests in", said)[0])
    p50, p99 = (
        float(number) * _UNIT_MS[unit]
        for number, unit in (
            _found(rf"{percent}%\s+([\d.]+)(us|ms|s)", said) for percent in (50, 99)
        )
    )
    (per_s,) = _found(r"Requests/sec:\s+([\d.]+)", said)
    processor_us = spent[1] / 1000 / count if contender.processor else 0.0
    return Figures(float(per_s), p50, p99, processor_us, spent[0] / 1000 / count)


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match is not None, text
    return match.groups()


def report(load: str, figures: dict[str, list[Figures]]) -> list[str]:
    """One load as lines of a table."""
    connections, size = LOADS[load]
    lines = [f"{load}: {connections} connections, {size or 'small'} bytes of prompt"]
    lines.append(
        f"  {'':13} {'requests/s':>24} {'p50 ms':>22} {'p99 ms':>22}"
        f" {'processor us':>24} {'Envoy us':>22}"
    )
    for name, runs in figures.items():
        cells = (
            (stage.told([run.per_s for run in runs]), 24),
            (stage.told([run.p50_ms for run in runs], 2), 22),
            (stage.told([run.p99_ms for run in runs], 2), 22),
            (stage.told([run.processor_us for run in runs], 1), 24),
            (stage.told([run.envoy_us for run in runs]), 22),
        )
        lines.append(f"  {name:13} " + " ".join(f"{text:>{width}}" for text, width in cells))
    return lines


def ratios(figures: dict[str, dict[str, list[Figures]]]) -> list[str]:
    """What the issue asks for, as ratios of medians."""

    def median(load: str, name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in figures[load][name])

    lines = ["direct door, whole job, against"]
    for own, load in product(("direct door", "compiled"), ("small", "220 KB")):
        for other in ("C++ no-op", "grpcio door"):
            speed = median(load, own, "per_s") / median(load, other, "per_s")
            cpu = median(load, own, "processor_us") / median(load, other, "processor_us")
            lines.append(
                f"  {own:12} {load:8} {other:12} {speed:.2f} x the requests/s, {cpu:.2f} x the CPU"
            )
    one = "one connection"
    for name in CONTENDERS[1:]:
        added = median(one, name, "p50_ms") - median(one, "Envoy alone", "p50_ms")
        lines.append(f"  added p50 at one connection, {name}: {added:.2f} ms")
    return lines


def asked(figures: dict[str, dict[str, list[Figures]]]) -> dict[str, float]:
    """Return the figures of table.py."""

    def median(load: str, name: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in figures[load][name])

    def added(name: str, field: str) -> float:
        one = "one connection"
        return median(one, name, field) - median(one, "Envoy alone", field)

    own, other = "compiled", "C++ no-op"
    return {
        "requests_per_s": median("small", own, "per_s") / median("small", other, "per_s"),
        "cpu": median("small", own, "processor_us") / median("small", other, "processor_us"),
        "added_p50": added(own, "p50_ms") / added(other, "p50_ms"),
        "added_p99": added(own, "p99_ms") / added(other, "p99_ms"),
        "envoy_cpu_220_kb": median("220 KB", own, "envoy_us")
        / median("220 KB", "reads nothing", "envoy_us"),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[Figures]]] = {load: defaultdict(list) for load in LOADS}
    with tempfile.TemporaryDirectory() as folder, contenders(Path(folder)) as all_of_them:
        for load, (connections, size) in LOADS.items():
            script = Path(folder) / f"{size}.lua"
            script.write_text(SCRIPT.format(size=size))
            for contender in all_of_them.values():
                wrk(contender, connections, script, 1)
            for _ in range(options.rounds):
                for name, contender in all_of_them.items():
                    seconds = options.seconds
                    figures[load][name].append(wrk(contender, connections, script, seconds))
    lines = [
        stage.machine(),
        f"{options.rounds} rounds of {options.seconds} s; median (least to most)",
    ]
    for load in LOADS:
        lines += ["", *report(load, figures[load])]
    lines += ["", *ratios(figures)]
    stage.keep("through_envoy", "\n".join(lines), asked(figures))


if __name__ == "__main__":
    main()

"""How does the gate fare beside the reference's, each behind a real Envoy?

Question: requests/s, latency, CPU per request of processor and of Envoy, and resident memory, for
flowcontrol (direct door) and for the endpoint picker of llm-d-router, the reference, with its flow
control on: with prompts of 1 KB and of 220 KB; on one connection, for the latency that is added;
with slots for an eighth of the connections, so that requests wait their turn in both; and with 200
connections on which the answer is 100 server-sent events, one every 10 ms.

Method: the reference as its tree builds it, in its mode without Kubernetes (file discovery), plain
gRPC, tracing off, log level as it comes. An Envoy of one worker for each, with listener, limits and
access log as `flowcontrol envoy-config` writes them. For the reference the filters that serve
flowcontrol alone are taken out, and its filter and upstream cluster are those of its documentation:
bodies both ways FULL_DUPLEX_STREAMED, the endpoint taken from the header that it sets. In both a
request in flight is a slot, counted by the gate (the reference: concurrency-detector); the same two
model servers in C++ answer at once. Load is wrk's; every answer must be 200. Every load has fresh
processes; the two take turns in every round; medians with their spread. CPU is of all threads of a
process, memory is what is resident after a round, both from the kernel.

Caveats: load, Envoy, processor and model servers share the machine: requests/s compare whole
systems of this size, CPU per request compares processors. They do not do the same. The reference
is sent every body and parses it, which lets it pick by prompt; here it picks at random, the least
it can do. flowcontrol has Envoy parse bodies, which shows in Envoy's CPU, and leaves the pick to
Envoy. For each request it writes one line of log, the reference three. Without Kubernetes the
reference knows one priority. Under load it lets a request or two more through than it has slots. It
listens on all interfaces.

    git clone https://github.com/llm-d/llm-d-router  # measured: ebab68792, after v0.10.0
    (cd llm-d-router && go build -o epp ./cmd/epp)
    python tests/benchmarks/beside_epp.py llm-d-router/epp [--rounds 3] [--seconds 3]

Needs what through_envoy.py needs, from the root of the project, with PYTHONPATH=.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks import stage
from tests.benchmarks.through_envoy import SCRIPT, Contender, wrk
from tests.support.ports import HOST, free_ports

_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Load:
    """What both are put under."""

    connections: int
    prompt: int
    """Bytes."""
    slots: int = 1_000_000
    """Of one model server."""
    path: str = _PATH


BACKENDS = 2
LOADS = {
    "1 KB": Load(64, 1_000),
    "220 KB": Load(64, 220_000),
    "1 KB, one connection": Load(1, 1_000),
    "1 KB, waiting": Load(64, 1_000, slots=4),
    "1 KB, 100 events": Load(200, 1_000, path=f"{_PATH}?stream"),
}
MEASURES = {
    "requests/s": 0,
    "p50 ms": 2,
    "p99 ms": 2,
    "processor us/request": 0,
    "Envoy us/request": 0,
    "processor MB": 0,
    "Envoy MB": 0,
}
"""With digits to print."""


@contextlib.contextmanager
def reference(
    directory: Path, binary: Path, endpoints: Sequence[int], slots: int
) -> Iterator[tuple[int, stage.Running]]:
    """Run the endpoint picker of the reference; give its port."""
    listing = directory / "endpoints.yaml"
    where = [{"name": f"server-{port}", "address": HOST, "port": str(port)} for port in endpoints]
    listing.write_text(yaml.safe_dump({"endpoints": where}))
    content = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "featureGates": ["flowControl"],
        "plugins": [
            {"type": "file-discovery", "parameters": {"path": str(listing)}},
            {"type": "concurrency-detector", "parameters": {"maxConcurrency": slots}},
            {"type": "random-picker"},
            {"type": "single-profile-handler"},
        ],
        "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "random-picker"}]}],
        "dataLayer": {"injectDefaults": False, "discovery": {"pluginRef": "file-discovery"}},
        "flowControl": {"saturationDetector": {"pluginRef": "concurrency-detector"}},
    }
    config = directory / "epp.yaml"
    config.write_text(yaml.safe_dump(content))
    door, health, metrics = free_ports(3)
    command = (
        *(str(binary), "--config-file", str(config), "--grpc-port", str(door)),
        *("--grpc-health-port", str(health), "--metrics-port", str(metrics)),
        *("--pool-name", "llama", "--secure-serving=false", "--tracing=false"),
    )
    with stage.running(command, directory / "epp.log", stage.listens(door)) as process:
        yield door, process


def for_the_reference(content: Any) -> None:
    """Make Envoy's configuration what the reference asks for."""
    resources = content["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (gate,) = (each for each in manager["http_filters"] if each["name"].endswith("ext_proc"))
    # The reference does not set the mark without which the next filter denies a request.
    manager["http_filters"] = [f for f in manager["http_filters"] if not f["name"].endswith("rbac")]
    own = gate["typed_config"]
    gate["typed_config"] = {
        "@type": own["@type"],
        "message_timeout": own["message_timeout"],
        "grpc_service": {"envoy_grpc": own["grpc_service"]["envoy_grpc"]},
        "processing_mode": {
            f"{side}_{part}_mode": "FULL_DUPLEX_STREAMED" if part == "body" else "SEND"
            for side in ("request", "response")
            for part in ("header", "body", "trailer")
        },
    }
    (servers,) = (each for each in resources["clusters"] if each["name"] == "model_servers")
    for key in ("load_assignment", "load_balancing_policy", "common_lb_config"):
        del servers[key]
    header = "x-gateway-destination-endpoint"
    servers |= {
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": header},
    }


@contextlib.contextmanager
def contenders(
    directory: Path, backend: str, options: argparse.Namespace, slots: int
) -> Iterator[list[Contender]]:
    """Start flowcontrol and the reference, and what stands around them."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        ports = free_ports(BACKENDS)
        for port in ports:
            log = directory / f"backend-{port}.log"
            enter(stage.running((backend, str(port)), log, stage.listens(port)))
        ours = enter(
            stage.service(
                directory,
                "flowcontrol",
                endpoints=ports,
                is_compiled=options.compiled,
                saturation={"maxConcurrency": slots},
            )
        )
        door, theirs = enter(reference(directory, options.epp, ports, slots))
        at_ours = enter(stage.envoy(directory, "envoy-ours", ours.config, ours.ext_proc))
        at_theirs = enter(
            stage.envoy(
                directory, "envoy-theirs", ours.config, door, for_the_reference, is_bare=True
            )
        )
        yield [Contender(at_ours, ours.process), Contender(at_theirs, theirs)]


def measured(contender: Contender, load: Load, script: Path, seconds: int) -> tuple[float, ...]:
    """One run of one contender: the measures, in their order."""
    run = wrk(contender, load.connections, script, seconds)
    assert contender.processor is not None
    resident = [each.resident_bytes() for each in (contender.processor, contender.envoy.process)]
    taken = (run.per_s, run.p50_ms, run.p99_ms, run.processor_us, run.envoy_us)
    return (*taken, *(size / 1e6 for size in resident))


def report(name: str, ours: list[tuple[float, ...]], theirs: list[tuple[float, ...]]) -> list[str]:
    """One load as lines of a table."""
    load = LOADS[name]
    lines = [f"{name}: {load.connections} connections, {load.slots * BACKENDS:,} slots"]
    lines.append(f"  {'':20} {'flowcontrol':>26} {'reference':>26} {'reference / flowcontrol':>24}")
    columns = (list(zip(*runs, strict=True)) for runs in (ours, theirs))
    for (measure, digits), own, other in zip(MEASURES.items(), *columns, strict=True):
        ratio = statistics.median(other) / statistics.median(own)
        cells = f"{stage.told(own, digits):>26} {stage.told(other, digits):>26} {ratio:>24.2f}"
        lines.append(f"  {measure:20} {cells}")
    return lines


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("epp", type=Path, help="the reference's binary")
    parser.add_argument("--compiled", action="store_true", help="run what was compiled of ours")
    parser.add_argument("--loads", default="", help="only those whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    lines = [
        f"{stage.machine()}, flowcontrol {'compiled' if options.compiled else 'interpreted'}",
        f"{options.rounds} rounds of {options.seconds} s; median (least to most)",
    ]
    with tempfile.TemporaryDirectory() as folder:
        _, backend = stage.native(Path(folder))
        for name, load in LOADS.items():
            if options.loads not in name:
                continue
            script = Path(folder) / "load.lua"
            script.write_text(SCRIPT.format(size=load.prompt).replace(_PATH, load.path))
            with contenders(Path(folder), backend, options, load.slots) as both:
                rounds = [
                    [measured(each, load, script, seconds) for each in both]
                    for seconds in [options.seconds] * (options.rounds + 1)
                ][1:]  # the first warms up
            ours, theirs = (list(runs) for runs in zip(*rounds, strict=True))
            lines += ["", *report(name, ours, theirs)]
    stage.keep("beside_epp", "\n".join(lines))


if __name__ == "__main__":
    main()

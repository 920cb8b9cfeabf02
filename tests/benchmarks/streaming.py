"""What does a gate cost a streamed response?

Question: CPU of the service for each response of 100 server-sent events, at 200 connections:
flowcontrol at its direct door, which holds the slot to the end of the response without seeing it,
beside a processor that is sent the body in FULL_DUPLEX_STREAMED mode and echoes it, as a picker
that reads token usage from bodies has to. That processor is in C++ and does nothing else.

Method: wrk against an Envoy for each, a model server in C++ that sends an event every 10 ms. They
take turns; medians with their spread. CPU is of all threads of a process, from the kernel.

Caveats: load, Envoy, processor and model server share the machine. What a processor would do with
the body is not in it.

    python tests/benchmarks/streaming.py [--rounds 3] [--seconds 6]
"""

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import stage
from tests.benchmarks.through_envoy import Contender, Figures, wrk
from tests.support.ports import free_ports

CONNECTIONS = 200
_SCRIPT = 'wrk.method = "POST"\nwrk.path = "/stream"\nwrk.body = "{}"\n'


def full_duplex(content: Any) -> None:
    """Have Envoy send the response's body to the processor, and wait for it to come back."""
    manager = content["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    for each in manager["typed_config"]["http_filters"]:
        mode = each["typed_config"].get("processing_mode")
        if mode is not None:
            mode["response_header_mode"] = "SEND"
            mode["response_body_mode"] = "FULL_DUPLEX_STREAMED"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        directory, enter = Path(folder), stack.enter_context
        noop, backend = stage.native(directory)
        noop_port, port = free_ports(2)
        enter(stage.running((backend, str(port)), directory / "backend.log", stage.listens(port)))
        echo = enter(
            stage.running((noop, str(noop_port)), directory / "noop.log", stage.listens(noop_port))
        )
        slots = {"maxConcurrency": 1_000_000}
        gate = enter(stage.service(directory, "gate", endpoints=[port], saturation=slots))
        compiled = enter(
            stage.service(
                directory, "compiled", is_compiled=True, endpoints=[port], saturation=slots
            )
        )
        at_gate = enter(stage.envoy(directory, "envoy-gate", gate.config, gate.ext_proc))
        at_compiled = enter(
            stage.envoy(directory, "envoy-compiled", compiled.config, compiled.ext_proc)
        )
        at_echo = enter(
            stage.envoy(directory, "envoy-echo", gate.config, noop_port, full_duplex, is_bare=True)
        )
        contenders = {
            "direct door": Contender(at_gate, gate.process),
            "compiled": Contender(at_compiled, compiled.process),
            "FULL_DUPLEX echo": Contender(at_echo, echo),
        }
        script = directory / "stream.lua"
        script.write_text(_SCRIPT)
        figures: dict[str, list[Figures]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                figures[name].append(wrk(contender, CONNECTIONS, script, options.seconds))
    lines = [
        stage.machine(),
        f"{options.rounds} rounds of {options.seconds} s, {CONNECTIONS} connections",
    ]
    for name, runs in figures.items():
        cpu = stage.told([run.processor_us for run in runs])
        envoy = stage.told([run.envoy_us for run in runs])
        lines.append(f"  {name:18} processor us per response {cpu}, Envoy us {envoy}")
    medians = {
        name: statistics.median(run.processor_us for run in runs) for name, runs in figures.items()
    }
    echo_us = medians.pop("FULL_DUPLEX echo")
    for name, own_us in medians.items():
        lines.append(f"  FULL_DUPLEX echo / {name} = {echo_us / own_us:.0f}")
    stage.keep("streaming", "\n".join(lines))


if __name__ == "__main__":
    main()

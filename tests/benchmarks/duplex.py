"""What does a request cost whose bodies pass through its endpoint picker?

Question: CPU per request of flowcontrol, wired as Istio wires the endpoint picker of an
InferencePool (both bodies FULL_DUPLEX_STREAMED), with prompts of 1 KB and of 220 KB, and with
answers of 100 server-sent events, one every 10 ms; the same where Istio lets it choose the mode
(`allow_mode_override`); and llm-d-router's endpoint picker, the reference, in the same wiring.

Method: the fixtures of tests/e2e/gateway_shapes.py on a real Envoy of one worker; a model server in
C++; load is wrk's, and every answer must be 200. Fresh processes for every load; the contenders
take turns in every round; medians with their spread. CPU is of all threads of a process, from the
kernel. The reference as in beside_epp.py.

Caveats: load, Envoy, processor and model server share the machine. Both keep a slot for a request
in flight, read a prompt's first fields and a response's usage; the reference parses the whole
prompt, and picks at random. flowcontrol writes one line of log a request, the reference three.

    PYTHONPATH=. python tests/benchmarks/duplex.py [--epp llm-d-router/epp] [--compiled]
        [--rounds 3] [--seconds 3]
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import stage
from tests.benchmarks.beside_epp import BACKENDS, LOADS, MEASURES, Load, measured, reference
from tests.benchmarks.through_envoy import SCRIPT, Contender
from tests.e2e.gateway_shapes import istio, istio_with_override
from tests.support.ports import free_ports

_NAMES = ("1 KB", "220 KB", "1 KB, 100 events")
_PATH = "/v1/chat/completions"


@contextlib.contextmanager
def contenders(
    directory: Path, backend: str, options: argparse.Namespace, load: Load
) -> Iterator[dict[str, Contender]]:
    """Start them all, each behind an Envoy of its own."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        ports = free_ports(BACKENDS)
        for port in ports:
            log = directory / f"backend-{port}.log"
            enter(stage.running((backend, str(port)), log, stage.listens(port)))
        running = {}
        for name, shape in (("flowcontrol", istio), ("with override", istio_with_override)):
            ours = enter(
                stage.service(
                    directory,
                    name.replace(" ", "-"),
                    endpoints=ports,
                    is_compiled=options.compiled,
                    picker="least-loaded",
                    saturation={"maxConcurrency": load.slots},
                    settlement={"accessLog": False},
                )
            )
            envoy = stage.envoy(directory, f"envoy-{name}", ours.config, ours.ext_proc, shape)
            running[name] = Contender(enter(envoy), ours.process)
        if options.epp is not None:
            door, process = enter(reference(directory, options.epp, ports, load.slots))
            envoy = stage.envoy(directory, "envoy-reference", ours.config, door, istio)
            running["reference"] = Contender(enter(envoy), process)
        yield running


def report(name: str, runs: dict[str, list[tuple[float, ...]]]) -> list[str]:
    """One load as lines of a table."""
    lines = [f"{name}: {LOADS[name].connections} connections"]
    lines.append(f"  {'':20}" + "".join(f" {each:>26}" for each in runs))
    for index, (measure, digits) in enumerate(MEASURES.items()):
        cells = (stage.told([run[index] for run in each], digits) for each in runs.values())
        lines.append(f"  {measure:20}" + "".join(f" {cell:>26}" for cell in cells))
    if "reference" in runs:
        at = list(MEASURES).index("processor us/request")
        own, other = (
            statistics.median(run[at] for run in runs[each])
            for each in ("flowcontrol", "reference")
        )
        lines.append(f"  flowcontrol / reference, processor us/request: {own / other:.2f}")
    return lines


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epp", type=Path, help="the reference's binary")
    parser.add_argument("--compiled", action="store_true", help="run what was compiled of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    lines = [
        f"{stage.machine()}, flowcontrol {'compiled' if options.compiled else 'interpreted'}",
        f"{options.rounds} rounds of {options.seconds} s; median (least to most)",
    ]
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        backend = stage.model_server(Path(folder))
        for name in _NAMES:
            load = LOADS[name]
            script = Path(folder) / "load.lua"
            script.write_text(SCRIPT.format(size=load.prompt).replace(_PATH, load.path))
            with contenders(Path(folder), backend, options, load) as all_of_them:
                runs: dict[str, list[tuple[float, ...]]] = {each: [] for each in all_of_them}
                for turn in range(options.rounds + 1):
                    for each, contender in all_of_them.items():
                        run = measured(contender, load, script, options.seconds)
                        if turn:  # the first warms up
                            runs[each].append(run)
            lines += ["", *report(name, runs)]
            at = list(MEASURES).index("processor us/request")
            medians[name] = {
                each: statistics.median(run[at] for run in of_it) for each, of_it in runs.items()
            }
    stage.keep("duplex", "\n".join(lines), asked(medians) if options.epp else None)


def asked(cpu_us: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the figures of table.py: ours over the reference's."""
    small, large, events = (cpu_us[name] for name in _NAMES)
    own, other = "flowcontrol", "reference"
    return {
        "request_1_kb": small[own] / small[other],
        "request_220_kb": large[own] / large[other],
        "event": (events[own] - small[own]) / (events[other] - small[other]),
    }


if __name__ == "__main__":
    main()

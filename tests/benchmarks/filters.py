"""What does each filter of the generated configuration cost Envoy for a request?

Question: how many instructions does Envoy run for a request of 1 KB and for one of 220 KB, with the
configuration that `flowcontrol envoy-config` writes, and with one thing of it taken out at a time?

Method: Envoy (one worker) under valgrind's callgrind, which counts the instructions of all its
threads in user space; flowcontrol at its direct door and a model server in C++ that answers `{}` at
once, both as they are. A client sends requests one after the other on four
connections; counting begins after a warm-up. The difference between the whole configuration and one
without a thing is what that costs. Instructions do not depend on what else the machine does.

Caveats: no kernel: system calls are not in it. valgrind makes Envoy 50 times as slow, so timers and
the access log's buffers fire more often for a request than they would.

    PYTHONPATH=. python tests/benchmarks/filters.py [--requests 200] [--picker least-loaded]
        [--only "as generated" Lua]

Needs Debian's valgrind and g++.
"""

import argparse
import asyncio
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import stage
from tests.support.ports import HOST, free_ports

SIZES = {"1 KB": 1_000, "220 KB": 220_000}
CONNECTIONS = 4
_CALLGRIND = ("valgrind", "--tool=callgrind", "--instr-atstart=no")
_PROMPT: Final = b"It was the best of times, it was the worst of times. "


def _manager(configuration: Any) -> Any:
    (listener,) = configuration["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def without_filter(name: str) -> Callable[[Any], None]:
    """Return what takes out the HTTP filters of that name."""

    def edit(configuration: Any) -> None:
        manager = _manager(configuration)
        kept = [each for each in manager["http_filters"] if name not in each["name"]]
        assert len(kept) < len(manager["http_filters"]), name
        manager["http_filters"] = kept

    return edit


def without_log(name: str) -> Callable[[Any], None]:
    """Return what takes out an access log."""

    def edit(configuration: Any) -> None:
        manager = _manager(configuration)
        kept = [each for each in manager["access_log"] if name not in each["name"]]
        assert len(kept) < len(manager["access_log"]), name
        manager["access_log"] = kept

    return edit


def without(name: str) -> Callable[[Any], None]:
    """Return what takes out a setting of the connection manager."""

    def edit(configuration: Any) -> None:
        del _manager(configuration)[name]

    return edit


def without_further_attempts(configuration: Any) -> None:
    """Take out the filter that asks before each further attempt, and no other."""
    (cluster,) = (
        each
        for each in configuration["static_resources"]["clusters"]
        if any(
            "http_filters" in options
            for options in each.get("typed_extension_protocol_options", {}).values()
        )
    )
    (options,) = cluster["typed_extension_protocol_options"].values()
    del options["http_filters"]


def without_response_headers(configuration: Any) -> None:
    """Take out the headers that are made of our metadata."""
    for host in _manager(configuration)["route_config"]["virtual_hosts"]:
        del host["response_headers_to_add"]


def ext_proc_alone(configuration: Any) -> None:
    """Take out all that is not ext_proc."""
    manager = _manager(configuration)
    needed = ("ext_proc", "router")
    manager["http_filters"] = [
        each for each in manager["http_filters"] if each["name"].endswith(needed)
    ]
    manager["access_log"] = []
    for name in ("local_reply_config", "early_header_mutation_extensions"):
        del manager[name]
    without_response_headers(configuration)


def router_alone(configuration: Any) -> None:
    """Take out ext_proc, too."""
    ext_proc_alone(configuration)
    without_filter("ext_proc")(configuration)


FURTHER: Final = "asking before a further attempt"
"""Where this service picks alone."""
VARIANTS: dict[str, Callable[[Any], None]] = {
    "as generated": lambda _configuration: None,
    "json_to_metadata": without_filter("match_delegate"),
    "Lua": without_filter("lua"),
    "RBAC": without_filter("rbac"),
    "access log over gRPC": without_log("http_grpc"),
    "access log on standard output": without_log("stdout"),
    "local replies (CEL)": without("local_reply_config"),
    "header mutation": without("early_header_mutation_extensions"),
    "response headers": without_response_headers,
    FURTHER: without_further_attempts,
    "all but ext_proc": ext_proc_alone,
    "ext_proc, too": router_alone,
}
"""By what is taken out."""


async def ask(port: int, body: bytes, count: int) -> None:
    """Send so many requests on a connection; every answer must be 200."""
    reader, writer = await asyncio.open_connection(HOST, port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: models\r\ncontent-type: application/json\r\n"
        "x-llm-d-inference-objective: chat\r\nx-llm-d-inference-fairness-id: tenant-a\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    for _ in range(count):
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        length = re.search(rb"content-length: (\d+)", answer)
        assert length is not None, answer
        await reader.readexactly(int(length[1]))
    writer.close()


def send(port: int, size: int, count: int) -> None:
    """Send requests on all connections."""
    text = (_PROMPT * (size // len(_PROMPT) + 1))[:size]
    body = b'{"messages": [{"role": "user", "content": "%s"}], "model": "llama"}' % text

    async def run() -> None:
        each = -(-count // CONNECTIONS)
        await asyncio.gather(*(ask(port, body, each) for _ in range(CONNECTIONS)))
        await asyncio.sleep(1.0)  # for the last access log

    asyncio.run(run())


def counted(pid: int, into: Path, work: Callable[[], None]) -> int:
    """Return the instructions of a process under callgrind while something is done."""

    def control(*arguments: str) -> None:
        subprocess.run(["callgrind_control", *arguments, str(pid)], check=True, capture_output=True)

    control("-i", "on")
    control("-z")
    work()
    path = stage.dumped(pid, into)
    control("-i", "off")
    found = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
    assert found is not None, path
    return int(found[1])


def measure(directory: Path, name: str, service: stage.Service, count: int) -> dict[str, float]:
    """Return the instructions of a request by its size, for one variant."""
    into = directory / name.replace(" ", "-").replace("/", "-")
    into.mkdir()
    before = (*_CALLGRIND, f"--callgrind-out-file={into}/callgrind")
    edit = VARIANTS[name]
    with stage.envoy(
        directory, into.name, service.config, service.ext_proc, edit, before=before
    ) as gateway:
        found = {}
        for said, size in SIZES.items():
            some = count if size < 10_000 else max(CONNECTIONS, count // 5)
            send(gateway.port, size, CONNECTIONS * 5)
            total = counted(
                gateway.process.pid,
                into,
                lambda size=size, some=some: send(gateway.port, size, some),  # type: ignore[misc]  # bound now
            )
            found[said] = total / (-(-some // CONNECTIONS) * CONNECTIONS)
        return found


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return what each thing costs as lines."""
    whole = found["as generated"]
    lines = ["| Envoy, instructions a request | " + " | ".join(whole) + " |"]
    lines.append("|---|" + "---:|" * len(whole))
    for name, each in found.items():
        is_total = name in {"as generated", "all but ext_proc", "ext_proc, too"}
        values = (each[size] if is_total else whole[size] - each[size] for size in whole)
        what = {"all but ext_proc": "ext_proc alone", "ext_proc, too": "nothing but the router"}
        lines.append(
            f"| {what.get(name, name)} | " + " | ".join(f"{v:,.0f}" for v in values) + " |"
        )
    return lines


def main() -> None:
    """Count, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--picker", default="off", help="as in the service's configuration")
    parser.add_argument("--only", nargs="*", choices=VARIANTS)
    options = parser.parse_args()
    chosen = options.only or [
        name for name in VARIANTS if name != FURTHER or options.picker != "off"
    ]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        backend = stage.model_server(directory)
        (port,) = free_ports(1)
        log = directory / "backend.log"
        settings = {
            "saturation": {"maxConcurrency": 1_000_000},
            "endpoints": [port],
            "picker": options.picker,
        }
        with (
            stage.running((backend, str(port)), log, stage.listens(port)),
            stage.service(directory, "service", **settings) as service,
        ):
            for name in chosen:
                found[name] = measure(directory, name, service, options.requests)
                print(name, found[name], flush=True)
    if "as generated" in found:
        stage.keep(
            "filters" if options.picker == "off" else f"filters_{options.picker}",
            "\n".join([stage.machine(), "", *table(found)]),
        )


if __name__ == "__main__":
    main()

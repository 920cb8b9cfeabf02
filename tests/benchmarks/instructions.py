"""How many instructions does a request take, and in which part of the service?

Question: from the first byte of a request's stream to its settlement by the access log: how many
instructions does each part of the service run, with 64 requests at a time and with one alone?

Method: the whole service, compiled, under valgrind's callgrind, which counts the instructions of
all its threads in user space; a client of raw frames stands in for Envoy. It opens streams as Envoy
does with the generated configuration, ends each when its answer has come, and reports it in the
access log, 40 entries to a message. Counting begins after a warm-up. A part is one or more of our
modules; what C libraries and the interpreter do counts for whoever called them, by the number of
calls, four callers deep. Instructions do not depend on what else the machine does, so two versions
can be compared where times cannot.

Caveats: no kernel: system calls are not in it. valgrind runs one thread at a time and 50 times as
slow, while the client runs at full speed: batches are as large as 64 requests can make them, and
with one alone both threads sleep and wake for each. The C++ processor does the same for the same
frames, and nothing else. Interpreted modules count for their compiled callers.

    PYTHONPATH=. python tests/benchmarks/instructions.py [--requests 2000] [--functions 30]
        [--interpreted] [--read callgrind.out]

Needs Debian's valgrind; for the C++ processor what through_envoy.py needs.
"""

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from hpack import Encoder

from flowcontrol_server.common.envoy_messages import (
    ProcessingRequest,
    ProcessingResponse,
    StreamAccessLogsMessage,
)
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.requests.codec import METADATA_NAMESPACE, SERVICE, TICKET
from flowcontrol_server.requests.log_codec import REPORT_TAG
from flowcontrol_server.requests.log_codec import SERVICE as LOG_SERVICE
from tests.benchmarks import stage
from tests.benchmarks.doors import GREETING
from tests.support.ports import HOST, free_ports

LOADS = {"64 at a time": 64, "one alone": 1}
LOG_ENTRIES = 40
"""In a message: what fits into 64 KiB, which is when Envoy sends it."""
HEADERS = {
    ":path": "/v1/chat/completions",
    ":method": "POST",
    "content-type": "application/json",
    "x-llm-d-inference-objective": "chat",
    "x-llm-d-inference-fairness-id": "tenant-a",
    "content-length": "1001",
    "x-request-id": "1abe090f-44b9-4448-809c-46e66c0622f1",
}
PARTS = {
    "HTTP/2": ("flowcontrol_server.doors.http2",),
    "connection and call": ("flowcontrol_server.doors",),
    "Envoy's messages": (
        "flowcontrol_server.requests.codec",
        "flowcontrol_server.requests.wire",
        "flowcontrol_server.requests.splice",
        "flowcontrol_server.requests.tickets",
        "flowcontrol_server.requests.replies",
    ),
    "conversation, classify": (
        "flowcontrol_server.requests.exchange",
        "flowcontrol_server.requests.classify",
        "flowcontrol_server.requests.rules",
        "flowcontrol_server.common",
    ),
    "gate": (
        "flowcontrol_server.requests.gate",
        "flowcontrol_server.requests.arrival",
        "flowcontrol_server.requests.recent",
        "flowcontrol_server.requests.dialects",
    ),
    "log line": (
        "flowcontrol_server.requests.log_line",
        "flowcontrol_server.requests.request_log",
    ),
    "settlement": (
        "flowcontrol_server.requests.log_codec",
        "flowcontrol_server.requests.log_join",
        "flowcontrol_server.requests.usage",
    ),
    "inbox and thread": ("flowcontrol.inbox", "flowcontrol.processor", "flowcontrol.histogram"),
    "engine": ("flowcontrol",),
}
"""Modules by the beginning of their names; the longest that fits counts."""
LOOP = "event loop"
OTHER = "collector, other"
_LOOPS = ("uvloop", "_asyncio")
_DEPTH = 4
_ROUNDS = 60


@dataclass
class Function:
    """What callgrind says of a function as called by certain others."""

    own: int = 0
    callers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By name, how often."""


class Profile:
    """What callgrind has written, line by line."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = defaultdict(Function)
        self._names: dict[str, str] = {}
        """By what they are of, and their number."""
        self._here = {"ob": "", "fn": ""}
        self._called = {"ob": "", "fn": ""}
        self._is_call = False

    def take(self, line: str) -> None:
        """Read a line."""
        key, _, text = line.partition("=")
        if key in {"ob", "fn"}:
            self._here[key] = self._named(key, text)
        elif key in {"cob", "cfn"}:
            self._called[key[1:]] = self._named(key[1:], text)
        elif key == "calls":
            called = self._called["ob"] or self._here["ob"], self._called["fn"]
            self.functions["|".join(called)].callers[self._at] += int(text.split()[0])
            self._is_call, self._called["ob"] = True, ""
        elif line[:1].isdigit() or line[:1] in {"+", "-", "*"}:
            if not self._is_call:
                self.functions[self._at].own += int(line.split()[1])
            self._is_call = False

    @property
    def _at(self) -> str:
        return "|".join(self._here.values())

    def _named(self, kind: str, text: str) -> str:
        number, _, said = text.partition(" ")
        if said:
            self._names[kind + number] = said
        return self._names[kind + number]


def read(path: Path) -> dict[str, Function]:
    """Read what callgrind has written."""
    profile = Profile()
    for line in path.read_text().splitlines():
        profile.take(line)
    return profile.functions


def modules() -> list[str]:
    """Return our modules, the longest names first."""
    roots = {"flowcontrol": stage.ROOT, "flowcontrol_server": stage.ROOT / "server"}
    found = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for package, root in roots.items()
        for path in (root / package).rglob("*.py")
    ]
    return sorted(found, key=len, reverse=True)


def owner(function: str, known: dict[str, str]) -> str | None:
    """Return the part that a function belongs to by itself, if any."""
    library, _, name = function.partition("|")
    if any(each in library for each in _LOOPS) and "uvloop" in library:
        return LOOP
    match = re.match(r"CPy(?:Def|Py)_(.*)", name.partition("'")[0])
    if match is None:
        return None
    words = match[1].split("___")
    for length in range(len(words), 0, -1):
        part = known.get("___".join(words[:length]))
        if part is not None:
            return part
    return None


def parts_by_name() -> dict[str, str]:
    """Return the part of each module, by every name that mypyc may give it in C."""
    found: dict[str, str] = {}
    for module in modules():
        fitting = [
            (len(prefix), part)
            for part, prefixes in PARTS.items()
            for prefix in prefixes
            if f"{module}.".startswith(f"{prefix}.")
        ]
        words = module.split(".")
        for start in range(len(words)):
            found.setdefault("___".join(words[start:]), max(fitting, default=(0, OTHER))[1])
    return found


def shares(functions: dict[str, Function]) -> dict[str, float]:
    """Return the instructions of each part."""
    known = parts_by_name()
    owners = {name: owner(name, known) for name in functions}
    spread: dict[str, dict[str, float]] = {
        name: {part: 1.0} if (part := owners[name]) is not None else {} for name in functions
    }
    for _ in range(_ROUNDS):
        for name, function in functions.items():
            total = sum(function.callers.values())
            if owners[name] is None and total:
                mixed: dict[str, float] = defaultdict(float)
                for caller, calls in function.callers.items():
                    for part, share in spread.get(caller, {}).items():
                        mixed[part] += share * calls / total
                spread[name] = mixed
    found: dict[str, float] = defaultdict(float)
    for name, function in functions.items():
        rest = 1.0
        for part, share in spread[name].items():
            found[part] += function.own * share
            rest -= share
        found[OTHER] += function.own * rest
    return found


class Envoy(asyncio.Protocol):
    """Raw frames: one connection with streams of ext_proc, or with one of the access log."""

    def __init__(self) -> None:
        self.tickets: asyncio.Queue[str] = asyncio.Queue()
        self.opened = 0
        self._rest = b""
        self._encoder = Encoder()
        request = ProcessingRequest()
        for name, value in HEADERS.items():
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        found = request.metadata_context.filter_metadata["flowcontrol.request"].fields
        found["model"].string_value, found["stream"].string_value = "llama", "0"
        found["max_tokens"].number_value = 100
        attributes = request.attributes["envoy.filters.http.ext_proc"].fields
        attributes["request.time"].string_value = "2026-11-28T22:43:48.907289+00:00"
        attributes["request.id"].string_value = HEADERS["x-request-id"]
        attributes["request.size"].number_value = 1001
        attributes["request.total_size"].number_value = 1286
        request.protocol_config.SetInParent()
        self._message = framed(request.SerializeToString())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Greet."""
        self.transport = transport
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        """Take the answers, and end their streams."""
        data = self._rest + data
        at, out = 0, []
        while len(data) - at >= frames.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = frames.unpack_header(data, at)
            begin = at + frames.FRAME_HEADER_BYTES
            end = begin + (high << 8 | low)
            if end > len(data):
                break
            if kind == frames.DATA and end > begin + 5:
                response = ProcessingResponse.FromString(data[begin + 5 : end])
                own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value
                self.tickets.put_nowait(own.fields[TICKET].string_value)
                out.append(frames.frame(frames.DATA, frames.END_STREAM, stream_id, b""))
                out.append(frames.rst_stream(stream_id, 0))
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                out.append(frames.SETTINGS_ACK)
            elif kind == frames.PING and not flags & frames.ACK:
                out.append(frames.frame(frames.PING, frames.ACK, 0, data[begin:end]))
            at = end
        self._rest = data[at:]
        if out:
            self.transport.write(b"".join(out))

    def open(self, service: str, method: str) -> int:
        """Open a stream."""
        stream_id = 2 * self.opened + 1
        self.opened += 1
        fields = [
            *((":method", "POST"), (":path", f"/{service}/{method}"), (":authority", "ext_proc")),
            *((":scheme", "http"), ("te", "trailers"), ("content-type", "application/grpc")),
            *(("x-envoy-internal", "true"), ("x-forwarded-for", "192.0.2.2")),
        ]
        block = self._encoder.encode(fields)
        self.transport.write(frames.header_frames(stream_id, block, 16_384, is_end=False))
        return stream_id

    def ask(self) -> None:
        """Send a request."""
        stream_id = self.open(SERVICE, "Process")
        self.transport.write(frames.frame(frames.DATA, 0, stream_id, self._message))

    def report(self, stream_id: int, tickets: Iterable[str]) -> None:
        """Send a message of the access log."""
        message = StreamAccessLogsMessage()
        for ticket in tickets:
            entry = message.http_logs.log_entry.add()
            _fill(entry, ticket)
        data = framed(message.SerializeToString())
        for start in range(0, len(data), 16_384):
            part = data[start : start + 16_384]
            self.transport.write(frames.frame(frames.DATA, 0, stream_id, part))


def _fill(entry: Any, ticket: str) -> None:
    """Write an entry as Envoy does, with what it adds of its own accord."""
    properties = entry.common_properties
    for name in ("downstream_remote_address", "downstream_local_address", "upstream_local_address"):
        address = getattr(properties, name).socket_address
        address.address, address.port_value = HOST, 40_000
    for name in ("time_to_last_rx_byte", "time_to_first_upstream_tx_byte", "duration"):
        getattr(properties, name).nanos = 470_609
    own = properties.metadata.filter_metadata[METADATA_NAMESPACE].fields
    own[TICKET].string_value = ticket
    for name in ("queue_ms", "priority", "position", "headroom"):
        own[name].number_value = 1
    usage = properties.metadata.filter_metadata["flowcontrol.usage"].fields
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        usage[name].number_value = 290
    properties.custom_tags[REPORT_TAG] = (
        f"{ticket} via_upstream - 200 4165 31 30470 250 - 40 - - 290 - - 1001 138 127.0.0.1:45391"
    )
    entry.request.path = HEADERS[":path"]
    entry.request.request_id = HEADERS["x-request-id"]
    entry.response.response_code.value = 200


async def load(port: int, count: int, at_once: int) -> None:
    """Send requests, so many at once, and report them."""
    loop = asyncio.get_running_loop()
    _, asking = await loop.create_connection(Envoy, HOST, port)
    _, reporting = await loop.create_connection(Envoy, HOST, port)
    log_stream = reporting.open(LOG_SERVICE, "StreamAccessLogs")
    for _ in range(min(count, at_once)):
        asking.ask()
    left = count - min(count, at_once)
    ended: list[str] = []
    for _ in range(count):
        ended.append(await asking.tickets.get())
        if left:
            asking.ask()
            left -= 1
        if len(ended) == LOG_ENTRIES:
            reporting.report(log_stream, ended)
            ended.clear()
    await asyncio.sleep(2.0)  # what is left is written, read and settled
    asking.transport.abort()
    reporting.transport.abort()


def counted(pid: int, port: int, count: int, at_once: int, into: Path) -> dict[str, Function]:
    """Return what a process under callgrind did for so many requests."""

    def control(*arguments: str) -> None:
        subprocess.run(["callgrind_control", *arguments, str(pid)], check=True, capture_output=True)

    uvloop.run(load(port, 300, at_once))
    control("-i", "on")
    control("-z")
    uvloop.run(load(port, count, at_once))
    path = stage.dumped(pid, into)
    control("-i", "off")
    return read(path)


def under_callgrind(into: Path) -> tuple[str, ...]:
    """Return what a command is to stand behind."""
    options = ("--instr-atstart=no", f"--separate-callers={_DEPTH}", "--dump-line=no")
    out = f"--callgrind-out-file={into}/callgrind"
    return ("valgrind", "--tool=callgrind", "--trace-children=yes", *options, out)


def processors(
    directory: Path, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, dict[str, Function]]]]:
    """Yield each processor with what it did under each load."""
    settings = {"saturation": {"maxConcurrency": 1_000_000}, "endpoints": [45_391]}
    with stage.service(
        directory,
        "service",
        is_compiled=not options.interpreted,
        before=under_callgrind(directory),
        **settings,
    ) as service:
        yield (
            "flowcontrol",
            {
                name: counted(
                    service.process.pid, service.ext_proc, options.requests, at_once, directory
                )
                for name, at_once in LOADS.items()
            },
        )
    if options.interpreted or shutil.which("grpc_cpp_plugin") is None:
        return
    directory /= "noop"
    directory.mkdir()
    noop, _ = stage.native(directory)
    (port,) = free_ports(1)
    command = (*under_callgrind(directory), noop, str(port))
    with stage.running(command, directory / "noop.log", stage.listens(port)) as process:
        yield (
            "C++ no-op",
            {
                name: counted(process.pid, port, options.requests, at_once, directory)
                for name, at_once in LOADS.items()
            },
        )


def table(found: dict[str, dict[str, Function]], requests: int) -> list[str]:
    """Return the instructions of each part as lines."""
    parts = {load: shares(functions) for load, functions in found.items()}
    lines = ["| part | " + " | ".join(f"{load}" for load in parts) + " |"]
    lines.append("|---|" + "---:|" * len(parts))
    is_ours = any(each[part] for each in parts.values() for part in PARTS)
    for part in (*PARTS, LOOP, OTHER) if is_ours else ():
        cells = (f"{each[part] / requests:,.0f}" for each in parts.values())
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    cells = (f"{sum(each.values()) / requests:,.0f}" for each in parts.values())
    return [*lines, "| all | " + " | ".join(cells) + " |"]


def costliest(functions: dict[str, Function], requests: int, count: int) -> list[str]:
    """Return the functions that run the most instructions themselves."""
    own: dict[str, int] = defaultdict(int)
    for name, function in functions.items():
        library, _, symbol = name.partition("|")
        own[f"{symbol.partition(chr(39))[0]} ({Path(library).name})"] += function.own
    first = sorted(own.items(), key=lambda item: -item[1])[:count]
    return [f"  {instructions / requests:8,.0f}  {name}" for name, instructions in first]


def main() -> None:
    """Count, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--functions", type=int, default=0, help="print so many of the costliest")
    parser.add_argument("--interpreted", action="store_true")
    parser.add_argument("--read", type=Path, help="only read what callgrind has written")
    parser.add_argument("--into", type=Path, help="keep what callgrind writes in this folder")
    options = parser.parse_args()
    if options.read is not None:
        functions = read(options.read)
        print("\n".join(table({"": functions}, options.requests)))
        print("\n".join(costliest(functions, options.requests, options.functions)))
        return
    lines = [stage.machine(), f"instructions a request, of {options.requests:,}", ""]
    with tempfile.TemporaryDirectory() as folder:
        for name, found in processors(options.into or Path(folder), options):
            lines += [name, *table(found, options.requests), ""]
            if options.functions:
                for each, functions in found.items():
                    print(each)
                    print("\n".join(costliest(functions, options.requests, options.functions)))
    stage.keep("instructions", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())

"""What does a request cost at each of the two doors, without Envoy?

Question: CPU per request and resident memory per parked request of the whole service, grpcio door
beside direct door. The service does its whole job: decode, classify, queue, dispatch, slot, answer,
log line.

Method: a server process per door, with uvloop and a real gate and processor. A client of raw frames
keeps 64 streams open on 4 connections, as Envoy does: it sends the request headers, waits for
the answer, ends its side, waits for the trailers. The server's CPU time is what the kernel says of
all its threads (/proc, nanoseconds), so the client's slowness does not matter. Then, with an empty
pool, a number of streams is parked on one connection and the growth of resident memory divided by
it. Doors take turns; medians are given with their spread.

Caveats: client and server share the machine, so requests/s say nothing beyond this table. With a
slow client batches are small, which flatters neither door. Memory is of a process that did nothing
before. A request has 12 headers and 480 bytes, about what Envoy sends for a chat completion.

    python tests/benchmarks/doors.py [--rounds 5] [--requests 20000] [--parked 10000]

Needs nothing beyond the project's own environment, and Linux.
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Literal

import grpc
import uvloop
from hpack import Encoder

from flowcontrol.config import Concurrency, ControllerConfig, Limits
from flowcontrol.events import EndpointsChanged
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.direct.door import DirectDoor
from flowcontrol_server.doors.ext_proc import ExtProcDoor
from flowcontrol_server.doors.grpc_ports import GRPC_OPTIONS
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.requests.codec import SERVICE
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.service import ARRIVALS_MAX, SWITCH_INTERVAL_S
from flowcontrol_server.telemetry import logs

Kind = Literal["grpcio", "direct"]
KINDS: tuple[Kind, ...] = ("grpcio", "direct")
CONNECTIONS = 4
STREAMS = 16
GREETING = (
    frames.PREFACE
    + frames.settings({frames.INITIAL_WINDOW_SIZE: frames.WINDOW_MAX})
    + frames.window_update(0, frames.WINDOW_MAX - frames.WINDOW_DEFAULT)
)
"""What a client begins with that never waits for a window of its own to open."""
HEADERS = {
    ":method": "POST",
    ":path": "/v1/chat/completions",
    ":scheme": "https",
    ":authority": "models.example.org",
    "user-agent": "OpenAI/Python 1.60.0",
    "accept": "application/json",
    "content-type": "application/json",
    "content-length": "1843",
    "x-request-id": "2f6ac5d4-6a43-4b8b-9a51-0c2a3f0f6b5e",
    "x-forwarded-for": "10.20.30.40",
    "x-llm-d-inference-fairness-id": "tenant-a",
    "x-llm-d-inference-objective": "chat",
}


async def serve(kind: Kind, *, has_pool: bool) -> None:
    """Open one door, say its port and serve until the process is ended."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logs.configure("info")
    config = ControllerConfig(
        limits=Limits(requests_max=None), detectors=(Concurrency(requests_max=1_000_000),)
    )
    loop = asyncio.get_running_loop()
    log = logs.request_log(lambda write: loop.call_later(logs.WRITE_WITHIN_S, write))
    gate = FlowGate(config, ARRIVALS_MAX, log.request_ended, lambda _fault: None)
    gate.start()
    gate.post(EndpointsChanged(("127.0.0.1:8000",) if has_pool else ()))
    if kind == "direct":
        context = CallContext(gate=gate)
        port = await DirectDoor(context).listen(("127.0.0.1", 0))
    else:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        door = ExtProcDoor(CallContext(gate=gate))
        server.add_generic_rpc_handlers((door.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


@dataclass(frozen=True)
class Server:
    """A server process."""

    port: int
    pid: int

    def cpu_ns(self) -> int:
        """CPU time of all its threads so far."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")


@contextmanager
def server(kind: Kind, *, has_pool: bool) -> Iterator[Server]:
    """Run a server process."""
    command = [sys.executable, __file__, "--serve", kind, *([] if has_pool else ["--no-pool"])]
    with Popen(command, stdout=PIPE, stderr=DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield Server(int(process.stdout.readline()), process.pid)
        finally:
            process.kill()


class Client(asyncio.Protocol):
    """Raw frames: opens streams as told and ends each when its answer has come.

    Args:
        target: streams to open in all.
        at_once: streams open at a time.
    """

    def __init__(self, target: int, at_once: int) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._target = target
        self._at_once = at_once
        self._opened = self._ended = 0
        self._window = frames.WINDOW_DEFAULT
        self._rest = b""
        request = envoy_messages.ProcessingRequest()
        for name, value in HEADERS.items():
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        self._message = framed(request.SerializeToString())
        fields = [
            *((":method", "POST"), (":scheme", "http"), (":path", f"/{SERVICE}/Process")),
            *((":authority", "ext_proc"), ("te", "trailers"), ("content-type", "application/grpc")),
            *(("x-envoy-internal", "true"), ("x-forwarded-for", "10.1.2.3")),
        ]
        encoder = Encoder()
        self._blocks = [encoder.encode(fields), encoder.encode(fields)]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Greet and begin."""
        self._transport = transport
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        """Follow the streams."""
        data = self._rest + data
        out = []
        position = 0
        while len(data) - position >= frames.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = frames.unpack_header(data, position)
            end = position + frames.FRAME_HEADER_BYTES + (high << 8 | low)
            if end > len(data):
                break
            payload = data[position + frames.FRAME_HEADER_BYTES : end]
            position = end
            if kind == frames.DATA:
                out.append(frames.frame(frames.DATA, frames.END_STREAM, stream_id, b""))
            elif kind == frames.HEADERS and flags & frames.END_STREAM:
                self._ended += 1
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                out.append(frames.SETTINGS_ACK)
            elif kind == frames.PING and not flags & frames.ACK:
                out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
            elif kind == frames.WINDOW_UPDATE and not stream_id:
                self._window += frames.read_word(payload)
        self._rest = data[position:]
        out += self._open()
        self._transport.write(b"".join(out))
        if self._ended == self._target and not self.done.done():
            self.done.set_result(None)

    def _open(self) -> list[bytes]:
        out = []
        size = len(self._message)
        while (
            self._opened < self._target
            and self._opened - self._ended < self._at_once
            and self._window >= size
        ):
            stream_id = 2 * self._opened + 1
            block = self._blocks[min(self._opened, 1)]
            out.append(frames.header_frames(stream_id, block, 16_384, is_end=False))
            out.append(frames.frame(frames.DATA, 0, stream_id, self._message))
            self._window -= size
            self._opened += 1
        return out


async def requests(port: int, count: int) -> float:
    """Send that many requests; return the seconds it took."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    waits = []
    for _ in range(CONNECTIONS):
        _, client = await loop.create_connection(
            lambda: Client(count // CONNECTIONS, STREAMS), "127.0.0.1", port
        )
        waits.append(client.done)
    await asyncio.gather(*waits)
    return loop.time() - begin


def cost(kind: Kind, count: int) -> tuple[float, float]:
    """CPU microseconds per request, and requests per second."""
    with server(kind, has_pool=True) as each:
        uvloop.run(requests(each.port, count // 10))
        before_ns = each.cpu_ns()
        seconds = uvloop.run(requests(each.port, count))
        return (each.cpu_ns() - before_ns) / 1000 / count, count / seconds


async def park(each: Server, count: int) -> float:
    """Park that many; return the bytes that each of them takes."""
    loop = asyncio.get_running_loop()
    await requests_cancelled(each.port, 100)
    before = each.resident_bytes()
    transport, _ = await loop.create_connection(
        lambda: Client(count, count), "127.0.0.1", each.port
    )
    idle_ns = -1
    while each.cpu_ns() != idle_ns:  # parked is when the server has gone quiet
        idle_ns = each.cpu_ns()
        await asyncio.sleep(0.5)
    after = each.resident_bytes()
    transport.abort()
    return (after - before) / count


async def requests_cancelled(port: int, count: int) -> None:
    """Park some and break off, so that what is only loaded once has been."""
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: Client(count, count), "127.0.0.1", port
    )
    await asyncio.sleep(0.5)
    transport.abort()
    await asyncio.sleep(0.5)


def memory(kind: Kind, count: int) -> float:
    """Resident bytes per parked request."""
    with server(kind, has_pool=False) as each:
        return uvloop.run(park(each, count))


def told(values: list[float], digits: int = 0) -> str:
    """Median and spread."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--parked", type=int, default=10_000)
    parser.add_argument("--serve", choices=KINDS, help="be the server, not the measurement")
    parser.add_argument("--no-pool", action="store_true")
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve, has_pool=not options.no_pool))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()},", end=""
    )
    print(f" grpcio {grpc.__version__}, uvloop {uvloop.__version__}, {options.rounds} rounds")
    costs: dict[Kind, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    sizes: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            costs[kind].append(cost(kind, options.requests))
            sizes[kind].append(memory(kind, options.parked))
    print(f"{'door':8}{'CPU us/request':>28}{'requests/s':>28}{'bytes/parked request':>30}")
    for kind in KINDS:
        cpu, rate = zip(*costs[kind], strict=True)
        print(f"{kind:8}{told([*cpu], 1):>28}{told([*rate]):>28}{told(sizes[kind]):>30}")
    ratios = [statistics.median(cpu for cpu, _ in costs[kind]) for kind in KINDS]
    print(f"CPU per request: grpcio / direct = {ratios[0] / ratios[1]:.1f}")


if __name__ == "__main__":
    main()

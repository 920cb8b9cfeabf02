"""What does a queue of thousands cost, and how fast does it move?

Question: with 5,000 and 50,000 requests waiting at the direct door: resident memory of each; time
from a slot's end to CONTINUE for the next request; decisions/s; and how long it takes to release,
cancel or expire all of them at once. The grpcio door, with 5,000, stands beside.

Method: one server process with uvloop, gate, processor and door, doing the whole job of a request,
log line included; one client of raw frames, on one connection, as Envoy's. Slots are freed one at a
time, 250 a second, by ending the stream of a request in flight; the clock runs from the client's
write to its read of the next answer. All at once means: the pool gets its first endpoint
(release), the client resets every stream (cancel), one deadline for all (expire); the clock runs
until the client has the last answer or the gate has let the last request go. CPU is of all threads
of the server, from the kernel. A server of its own for every run; medians with their spread.

Caveats: client and server share the machine, and the client is in Python: its reading is part of
every time. No Envoy, which needs some 40 KiB for each request it holds, and more time than we do.

    python tests/benchmarks/saturated.py [--rounds 3] [--waiting 5000,50000]
        [--only compiled]
"""

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

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
from flowcontrol_server.service import ARRIVALS_MAX, SWITCH_INTERVAL_S, tune_garbage_collection
from flowcontrol_server.telemetry import logs
from tests.benchmarks import stage
from tests.benchmarks.doors import GREETING, HEADERS
from tests.support.ports import HOST

DOORS = ("grpcio", "direct", "compiled")
"""The last is the direct door again."""
SLOTS = 64
FREED = 1_000
FREED_PER_S = 250
POOL = EndpointsChanged(("127.0.0.1:8000",))


async def serve(door: str, slots: int) -> None:
    """Be the server: print the port, then answer `state` and `open` on standard input."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logs.configure("info")
    loop = asyncio.get_running_loop()
    log = logs.request_log(lambda write: loop.call_later(logs.WRITE_WITHIN_S, write))
    config = ControllerConfig(
        limits=Limits(requests_max=None), detectors=(Concurrency(requests_max=slots),)
    )
    gate = FlowGate(config, ARRIVALS_MAX, log.request_ended, lambda _fault: None)
    gate.start()
    if door != "grpcio":
        context = CallContext(gate=gate)
        port = await DirectDoor(context).listen((HOST, 0))
    else:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        handler = ExtProcDoor(CallContext(gate=gate)).handler()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
    tune_garbage_collection()
    print(port, flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line == b"open\n":
            gate.post(POOL)
            continue
        snapshot = await gate.snapshot()
        state = {"waiting": snapshot.waiting, "in_flight": snapshot.in_flight}
        print(json.dumps(state), flush=True)


class Server(stage.Running):
    """A server process, and what is said to it."""

    process: "asyncio.subprocess.Process"
    port: int

    async def state(self) -> dict[str, int]:
        """Return how many wait and are in flight."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"state\n")
        return dict(json.loads(await self.process.stdout.readline()))

    async def until(self, **wanted: int) -> None:
        """Wait until it is in this state."""
        state: dict[str, int] = {}
        while {name: state.get(name) for name in wanted} != wanted:
            state = await self.state()

    def open(self) -> None:
        """Give the pool its first endpoint."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"open\n")


@contextlib.asynccontextmanager
async def running(door: str, slots: int) -> AsyncIterator[Server]:
    """Run a server."""
    process = await asyncio.create_subprocess_exec(
        *stage.python(is_compiled=door == "compiled"),
        *(__file__, "--serve", door, "--slots", str(slots)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    server = Server(process.pid)
    object.__setattr__(server, "process", process)
    object.__setattr__(server, "port", int(await process.stdout.readline()))
    try:
        yield server
    finally:
        process.kill()
        await process.wait()


class Client(asyncio.Protocol):
    """Raw frames on one connection: opens streams, ends or resets them, hears their answers."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
        """Streams in the order of their answers, with the time."""
        self.answered = 0
        self.waiting_for = 0
        self.all_answered = asyncio.Event()
        self.opened = 0
        self._window = frames.WINDOW_DEFAULT
        self._widened = asyncio.Event()
        self._rest = b""
        fields = [
            *((":method", "POST"), (":scheme", "http"), (":path", f"/{SERVICE}/Process")),
            *((":authority", "ext_proc"), ("te", "trailers"), ("content-type", "application/grpc")),
        ]
        encoder = Encoder()
        self._blocks = [encoder.encode(fields), encoder.encode(fields)]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Greet."""
        self.transport = transport
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        """Note the answers."""
        now_s = time.perf_counter()
        data = self._rest + data
        at = 0
        while len(data) - at >= frames.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = frames.unpack_header(data, at)
            end = at + frames.FRAME_HEADER_BYTES + (high << 8 | low)
            if end > len(data):
                break
            if kind == frames.DATA:
                self.answered += 1
                self.heard.put_nowait((stream_id, now_s))
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                self.transport.write(frames.SETTINGS_ACK)
            elif kind == frames.PING and not flags & frames.ACK:
                payload = data[at + frames.FRAME_HEADER_BYTES : end]
                self.transport.write(frames.frame(frames.PING, frames.ACK, 0, payload))
            elif kind == frames.WINDOW_UPDATE and not stream_id:
                self._window += frames.read_word(data[end - 4 : end])
                self._widened.set()
            at = end
        self._rest = data[at:]
        if self.answered >= self.waiting_for:
            self.all_answered.set()

    async def park(self, count: int, deadline_s: float | None = None) -> list[int]:
        """Open so many streams, with a request each; return their ids.

        Args:
            count: of them.
            deadline_s: when all of them have waited too long, by perf_counter; None: never.
        """
        ids = []
        for number in range(count):
            request = envoy_messages.ProcessingRequest()
            fields = HEADERS
            if deadline_s is not None:
                left_s = deadline_s - time.perf_counter()
                fields = fields | {"x-llm-d-inference-ttl": f"{left_s:.6f}s"}
            for name, value in fields.items():
                request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
            message = framed(request.SerializeToString())
            while self._window < len(message):
                self._widened.clear()
                await self._widened.wait()
            stream_id = 2 * self.opened + 1
            block = self._blocks[min(self.opened, 1)]
            head = frames.header_frames(stream_id, block, 16_384, is_end=False)
            self.transport.write(head + frames.frame(frames.DATA, 0, stream_id, message))
            self._window -= len(message)
            self.opened += 1
            ids.append(stream_id)
            if number % 200 == 0:
                await asyncio.sleep(0)
        return ids

    def end(self, stream_id: int) -> None:
        """End a request, as Envoy does."""
        ended = frames.frame(frames.DATA, frames.END_STREAM, stream_id, b"")
        self.transport.write(ended + frames.rst_stream(stream_id, 0))

    def cancel(self, ids: list[int]) -> None:
        """Reset streams."""
        self.transport.write(b"".join(frames.rst_stream(stream_id, 8) for stream_id in ids))

    async def answers(self, count: int) -> None:
        """Wait until so many answers have come in all."""
        self.waiting_for = count
        self.all_answered.clear()
        if self.answered < count:
            await self.all_answered.wait()


async def connect(server: Server) -> Client:
    """Connect, and have everything loaded that is only loaded once."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, HOST, server.port)
    ids = await client.park(100)
    await asyncio.sleep(0.3)
    client.cancel(ids)
    await server.until(waiting=0, in_flight=0)
    while not client.heard.empty():
        client.heard.get_nowait()
    return client


async def moving(door: str, count: int) -> dict[str, float]:
    """With so many waiting: their memory, slots freed one at a time, then all in turn."""
    async with running(door, SLOTS) as server:
        server.open()
        client = await connect(server)
        before = server.resident_bytes()
        begin_s, begin_ns = time.perf_counter(), server.cpu_ns()
        await client.park(count + SLOTS)
        await server.until(waiting=count)
        found = {
            "park: wall s": time.perf_counter() - begin_s,
            "park: CPU us each": (server.cpu_ns() - begin_ns) / 1000 / (count + SLOTS),
            "memory: bytes each": (server.resident_bytes() - before) / (count + SLOTS),
        }
        in_flight = [(await client.heard.get())[0] for _ in range(SLOTS)]
        waits = []
        due_s = time.perf_counter()
        for _ in range(FREED):
            due_s += 1 / FREED_PER_S
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            freed_s = time.perf_counter()
            client.end(in_flight.pop(0))
            stream_id, heard_s = await client.heard.get()
            waits.append((heard_s - freed_s) * 1000)
            in_flight.append(stream_id)
        waits.sort()
        found["slot free to CONTINUE: p50 ms"] = statistics.median(waits)
        found["slot free to CONTINUE: p99 ms"] = waits[int(len(waits) * 0.99)]
        begin_s, begin_ns = time.perf_counter(), server.cpu_ns()
        for stream_id in in_flight:
            client.end(stream_id)
        for _ in range(count - FREED):
            client.end((await client.heard.get())[0])
        took_s = time.perf_counter() - begin_s
        found["one after the other: decisions/s"] = (count - FREED) / took_s
        found["one after the other: CPU us each"] = (
            (server.cpu_ns() - begin_ns) / 1000 / (count - FREED)
        )
        return found


async def all_at_once(door: str, count: int, how: str) -> dict[str, float]:
    """Release, cancel or expire everybody."""
    async with running(door, 1_000_000) as server:
        client = await connect(server)
        answered = client.answered
        patience_s = 1.0 + count / 2_000
        deadline_s = time.perf_counter() + patience_s if how == "expire" else None
        ids = await client.park(count, deadline_s)
        await server.until(waiting=count)
        if deadline_s is not None:
            await asyncio.sleep(deadline_s - 0.05 - time.perf_counter())
        begin_ns, begin_s = server.cpu_ns(), time.perf_counter()
        if how == "release":
            server.open()
        elif how == "cancel":
            client.cancel(ids)
        else:
            assert deadline_s is not None
            begin_s = deadline_s
        if how == "cancel":
            await server.until(waiting=0)
        else:
            await client.answers(answered + count)
        wall_s = time.perf_counter() - begin_s
        await asyncio.sleep(0.1)  # the log's
        cpu_s = (server.cpu_ns() - begin_ns) / 1e9
        return {f"{how} all: wall s": wall_s, f"{how} all: CPU s": cpu_s}


def measure(door: str, count: int) -> dict[str, float]:
    """Do everything once."""

    async def run() -> dict[str, float]:
        found = await moving(door, count)
        for how in ("release", "cancel", "expire"):
            found |= await all_at_once(door, count, how)
        return found

    gc.collect()
    return uvloop.run(run())


def main() -> None:
    """Measure, print and keep; or be the server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waiting", default="5000,50000")
    parser.add_argument("--only", choices=DOORS[1:], help="one of the doors")
    parser.add_argument("--serve", choices=DOORS, help="be the server")
    parser.add_argument("--slots", type=int)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve, options.slots))
        return
    gc.disable()  # of the client
    counts = [int(count) for count in options.waiting.split(",")]
    doors = [door for door in DOORS[1:] if options.only in {None, door}]
    cases = [*product(doors, counts)]
    if options.only is None:
        cases.insert(0, ("grpcio", min(counts)))
    found: dict[tuple[str, int], dict[str, list[float]]] = {
        case: defaultdict(list) for case in cases
    }
    for _ in range(options.rounds):
        for case in cases:
            for name, value in measure(*case).items():
                found[case][name].append(value)
    names: list[str] = [*found[cases[0]]]
    lines: list[str] = [stage.machine(), f"{options.rounds} rounds; median (least to most)", ""]
    heads = [f"{door}, {count:,} waiting" for door, count in cases]
    lines.append(" " * 34 + "".join(f"{head:>32}" for head in heads))
    for name in names:
        cells: list[Any] = [stage.told(found[case][name], _digits(name)) for case in cases]
        lines.append(f"{name:34}" + "".join(f"{cell:>32}" for cell in cells))
    stage.keep("saturated", "\n".join(lines), asked(found[cases[-1]]) if 50_000 in counts else None)


def asked(found: dict[str, list[float]]) -> dict[str, float]:
    """Return the figures of table.py."""
    figures = {
        f"{how}_cpu_s": statistics.median(found[f"{how} all: CPU s"])
        for how in ("release", "cancel", "expire")
    }
    return figures | {"memory_kib": statistics.median(found["memory: bytes each"]) / 1024}


def _digits(name: str) -> int:
    return 0 if "/s" in name or "bytes" in name else 2


if __name__ == "__main__":
    main()

"""How long does an honest request take while somebody attacks Envoy's port?

Question: p50 and p99 of the time from a request's headers to its decision, at the direct door, with
free slots, beside each attack of the list below. Wanted: a p99 below 50 ms in each.

Method: three processes. The server is the direct door with a real gate and processor, uvloop and
the service's switch interval. The honest client opens one connection and sends a request at fixed
times, 100 a second, whether or not the one before was answered. Of each it measures the time, and
the CPU time of the server until its answer is there, all threads together, as the kernel counts it:
what the server did first. On a machine with nothing else to do the two are the same while the
server is busy; where others run, the second is the server's own part. The attacker
connects with `--connections` connections and writes what the attack is made of as fast as the
server takes it; where the server ends a connection it opens another. Each attack lasts `--seconds`,
which the honest client measures from its second second on.

Attacks:
    none            what a request takes by itself
    pairs           HEADERS and RST_STREAM, nothing between
    silent          100,000 streams on each connection that never say anything
    abandoned       requests that are parked and then reset, as Envoy passes on its clients' leaving
    health unread   health checks whose answers are never read
    log             messages of the access log with as many entries as fit
    large fields    streams with a field of 60 KiB in Huffman code, as `tracestate` may be

Caveats: all three share the machine, on two cores with whatever else runs there, and the attacker
takes a core for itself: the server has what is left. Where p50 and p99 of "none" are high, read the
columns of CPU time alone. They tell whether one connection's work is cut into small enough pieces.
The server is not compiled unless the environment's package is. Many connections that attack at once
each get their turn: latency grows with their number, which `listen.maxConnections` bounds.

    python tests/benchmarks/attacks.py [--seconds 6] [--connections 1 4]

Needs nothing beyond the project's own environment, and Linux.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Final

import uvloop
from hpack import Encoder

from flowcontrol.config import Concurrency, ControllerConfig, Limits
from flowcontrol.events import EndpointsChanged
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.access_log import MESSAGE_BYTES_MAX, AccessLog
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.direct.calls import HealthCall, LogCall, ProcessCall
from flowcontrol_server.doors.direct.door import DirectDoor
from flowcontrol_server.doors.health import Health
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import LogJoin
from flowcontrol_server.service import ARRIVALS_MAX, SWITCH_INTERVAL_S, tune_garbage_collection
from flowcontrol_server.telemetry import logs

HOST: Final = "127.0.0.1"
ATTACKS: Final = (
    *("none", "pairs", "silent", "abandoned", "health unread"),
    *("log", "large fields"),
)
RATE: Final = 100
"""Honest requests a second."""
WARM_S: Final = 2.0
SILENT_STREAMS: Final = 100_000
CHUNK_FRAMES: Final = 200
"""Streams that an attack opens with one write."""
PATIENCE_S: Final = 10.0


async def serve() -> None:
    """Open the door, say its port and serve until the process is ended."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    tune_garbage_collection()
    logs.configure("info")
    config = ControllerConfig(
        limits=Limits(requests_max=None), detectors=(Concurrency(requests_max=1_000_000),)
    )
    loop = asyncio.get_running_loop()
    log = logs.request_log(lambda write: loop.call_later(logs.WRITE_WITHIN_S, write))
    gate = FlowGate(config, ARRIVALS_MAX, log.request_ended, lambda _fault: None)
    gate.start()
    gate.post(EndpointsChanged(("127.0.0.1:8000",)))
    health = Health()
    await health.set("", is_serving=True)
    join = LogJoin(60_000_000_000, gate.claim_in_flight, gate.post)
    context = CallContext(gate=gate, health=health, access_log=AccessLog(join))
    print(await DirectDoor(context).listen((HOST, 0)), flush=True)
    await asyncio.Event().wait()


def request_message() -> bytes:
    """The headers of a request, as Envoy sends them."""
    request = envoy_messages.ProcessingRequest()
    for name, value in {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        ":scheme": "https",
        ":authority": "models.example.org",
        "content-length": "1843",
        "x-request-id": "2f6ac5d4-6a43-4b8b-9a51-0c2a3f0f6b5e",
        "x-llm-d-inference-fairness-id": "tenant-a",
    }.items():
        request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    return framed(request.SerializeToString())


def log_message() -> bytes:
    """A message of the log, as large as it may be, of entries that say nothing."""
    log = envoy_messages.StreamAccessLogsMessage()
    for _ in range(10_000):
        log.http_logs.log_entry.add()
    message: bytes = log.SerializeToString()
    assert len(message) <= MESSAGE_BYTES_MAX
    return framed(message)


def fields(path: bytes) -> list[tuple[str, str]]:
    """What a call begins with."""
    return [
        *((":method", "POST"), (":scheme", "http"), (":path", path.decode())),
        *((":authority", "ext_proc"), ("te", "trailers"), ("content-type", "application/grpc")),
    ]


def block_of(path: bytes, *more: tuple[str, str, bool]) -> bytes:
    """A field block that needs no table."""
    plain = [(name, value, True) for name, value in fields(path)]
    return Encoder().encode([*plain, *more])


class Honest(asyncio.Protocol):
    """Sends requests at fixed times, and measures each until its decision.

    Args:
        seconds: how long.
        server_pid: of the process whose CPU time is read.
    """

    def __init__(self, seconds: float, server_pid: int) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self.times_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self._pid = server_pid
        self._sent: dict[int, tuple[float, float]] = {}
        """By stream: when, and the server's CPU time then."""
        self._end_s = loop.time() + seconds
        self._warm_s = loop.time() + WARM_S
        self._rest = b""
        self._stream_id = 1
        encoder = Encoder()
        self._blocks = [encoder.encode(fields(ProcessCall.PATH)) for _ in range(2)]
        self._message = request_message()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Greet and begin."""
        self._transport = transport
        wide = frames.window_update(0, 2**30)
        transport.write(frames.PREFACE + frames.settings({}) + wide)
        self._next_s = asyncio.get_running_loop().time()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail: an honest connection must stay."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server ended the connection"))

    def _send(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if now_s >= self._end_s:
            loop.call_later(PATIENCE_S if self._sent else 0, self._finish)
            return
        block = self._blocks[min(self._stream_id - 1, 1)]
        self._sent[self._stream_id] = self._next_s, cpu_ms(self._pid)
        self._transport.write(
            frames.header_frames(self._stream_id, block, 16_384, is_end=False)
            + frames.frame(frames.DATA, 0, self._stream_id, self._message)
        )
        self._stream_id += 2
        self._next_s += 1 / RATE
        loop.call_at(self._next_s, self._send)

    def _finish(self) -> None:
        if not self.done.done():
            self.times_ms += [PATIENCE_S * 1000] * len(self._sent)  # never answered
            self.done.set_result(None)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Note the answers."""
        now_s = asyncio.get_running_loop().time()
        data = self._rest + data
        position = 0
        out = []
        while len(data) - position >= frames.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = frames.unpack_header(data, position)
            end = position + frames.FRAME_HEADER_BYTES + (high << 8 | low)
            if end > len(data):
                break
            if kind == frames.DATA and stream_id in self._sent:
                sent_s, sent_cpu_ms = self._sent.pop(stream_id)
                if sent_s >= self._warm_s:
                    self.times_ms.append((now_s - sent_s) * 1000)
                    self.cpu_ms.append(cpu_ms(self._pid) - sent_cpu_ms)
                out.append(frames.frame(frames.DATA, frames.END_STREAM, stream_id, b""))
            elif kind == frames.SETTINGS and not flags & frames.ACK:
                out.append(frames.SETTINGS_ACK)
            elif kind == frames.PING and not flags & frames.ACK:
                payload = data[position + frames.FRAME_HEADER_BYTES : end]
                out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
            position = end
        self._rest = data[position:]
        if out:
            self._transport.write(b"".join(out))
        if now_s >= self._end_s and not self._sent:
            self._finish()


def cpu_ms(pid: int) -> float:
    """CPU time of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


async def honest(port: int, seconds: float, server_pid: int) -> Honest:
    """Return what each honest request took."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Honest(seconds, server_pid), HOST, port)
    await client.done
    return client


def bursts(name: str) -> Iterator[bytes]:
    """What an attacker writes on one connection, without end."""
    process, health = block_of(ProcessCall.PATH), block_of(HealthCall.PATH)
    large = block_of(ProcessCall.PATH, ("tracestate", "a0-=" * 15_000, True))
    arrival, question, entries = request_message(), framed(b""), log_message()
    stream_id = 1
    if name == "log":
        yield frames.header_frames(1, block_of(LogCall.PATH), 16_384, is_end=False)
        while True:
            for at in range(0, len(entries), 16_384):
                yield frames.frame(frames.DATA, 0, 1, entries[at : at + 16_384])
    while stream_id < frames.STREAM_ID_MAX:
        out = []
        for _ in range(1 if name == "large fields" else CHUNK_FRAMES):
            block = {"health unread": health, "large fields": large}.get(name, process)
            out.append(frames.header_frames(stream_id, block, 16_384, is_end=False))
            if name == "abandoned":
                out.append(frames.frame(frames.DATA, 0, stream_id, arrival))
            if name in {"abandoned", "pairs"}:
                out.append(frames.rst_stream(stream_id, 8))
            if name == "health unread":
                out.append(frames.frame(frames.DATA, frames.END_STREAM, stream_id, question))
            stream_id += 2
        yield b"".join(out)
        if name == "silent" and stream_id > 2 * SILENT_STREAMS:
            return


async def attack_once(port: int, name: str, done: Counter[str]) -> None:
    """Attack on one connection until the server ends it, or the attack is complete."""
    reader, writer = await asyncio.open_connection(HOST, port)
    is_read = name not in {"health unread", "log"}  # the log's is read for its windows
    drinking = asyncio.ensure_future(drink(reader)) if is_read else None
    try:
        writer.write(frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK)
        window = 65_535
        for burst in bursts(name):
            writer.write(burst)
            await writer.drain()
            done["bytes"] += len(burst)
            if writer.is_closing():
                return
            if name == "log":  # the server's window is that of the stream: in its own time
                window -= len(burst)
                if window < 32_768:
                    window += await returned(reader)
            await asyncio.sleep(0)
        await asyncio.sleep(PATIENCE_S)
    finally:
        if drinking is not None:
            drinking.cancel()
        writer.transport.abort()


async def drink(reader: asyncio.StreamReader) -> None:
    """Read and forget."""
    with contextlib.suppress(OSError):
        while await reader.read(65_536):
            pass


async def returned(reader: asyncio.StreamReader) -> int:
    """Wait for more window of stream 1; return how much."""
    while True:
        high, low, kind, _, stream_id = frames.unpack_header(await reader.readexactly(9), 0)
        payload = await reader.readexactly(high << 8 | low)
        if kind == frames.WINDOW_UPDATE and stream_id == 1:
            return frames.read_word(payload)


async def attack(port: int, name: str, connections: int, seconds: float) -> Counter[str]:
    """Attack on so many connections for so long; return what was done."""
    done = Counter[str]()

    async def one() -> None:
        while True:
            done["connections"] += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await attack_once(port, name, done)
            await asyncio.sleep(0.01)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            print("begun", flush=True)
            await asyncio.gather(*(one() for _ in range(connections)))
    return done


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Popen[bytes]]:
    """Run this script in another role."""
    command = [sys.executable, __file__, *arguments]
    with Popen(command, stdout=PIPE, stderr=DEVNULL) as each:
        try:
            yield each
        finally:
            each.kill()


def measure(name: str, connections: int, seconds: float) -> tuple[Honest, str]:
    """Return what honest requests took beside an attack, and how much of an attack it was."""
    with process("--serve") as server, contextlib.ExitStack() as stack:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        seconds += WARM_S
        if name == "none":
            return uvloop.run(honest(port, seconds, server.pid)), ""
        attacker = stack.enter_context(
            process("--attack", name, str(port), str(connections), str(seconds))
        )
        assert attacker.stdout is not None
        attacker.stdout.readline()
        found = uvloop.run(honest(port, seconds, server.pid))
        return found, attacker.stdout.readline().decode().strip()


def told(times_ms: list[float]) -> str:
    """Median, 99th percentile and largest."""
    ordered = sorted(times_ms)
    figures = (statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1])
    return "".join(f"{each:>9.1f}" for each in figures)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", choices=ATTACKS, nargs="+", default=ATTACKS)
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument(
        "--attack", nargs=4, help="be the attacker: which, port, connections, seconds"
    )
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve())
        return
    if options.attack:
        name, port, connections, seconds = options.attack
        done = asyncio.run(attack(int(port), name, int(connections), float(seconds)))
        print(f"{done['bytes'] / 1e6:.1f} MB on {done['connections']}", flush=True)
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}, load before {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':39}{'ms':>27}{'ms of CPU':>27}")
    columns = f"{'p50':>9}{'p99':>9}{'max':>9}"
    print(f"{'attack':16}{'connections':>12}{'requests':>11}{columns * 2}  attack")
    for name in options.only:
        for connections in options.connections if name != "none" else [0]:
            found, done = measure(name, connections, options.seconds)
            figures = told(found.times_ms) + told(found.cpu_ms)
            count = len(found.times_ms)
            print(f"{name:16}{connections:>12}{count:>11}{figures}  {done}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()

"""What memory does a request take that waits with a body of 220 KB?

Question: resident memory per waiting request, of flowcontrol and of Envoy, behind gateways that
stream bodies through their endpoint picker (FULL_DUPLEX_STREAMED): without a body, and with one of
220 KB. Here it is to be 64 KiB at most beyond what a request without a body takes.

Method: the wirings of tests/e2e/gateway_shapes.py on a real Envoy of one worker: Istio's, which
reads 32 KiB at a time, and Envoy AI Gateway's, which reads 1 MiB. One request keeps the only slot,
its model server never answers; then so many clients send theirs, each on a connection of its own.
Resident memory from the kernel, before them and when all of them wait, every client has written all
of its body, and neither process has grown for 2 s. Fresh processes for each row.

Caveats: the growth of a process, divided by the requests: what grows once, and what an allocator
keeps, are in it: with a window that is full, 2 to 6 KiB. Envoy's part has the connections of the
clients. One run of each row. Everything shares the machine; time is not measured.

    PYTHONPATH=. python tests/benchmarks/parked_bodies.py [--compiled] [--waiting 1000,4000]
"""

import argparse
import asyncio
import contextlib
import functools
import re
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.benchmarks import stage
from tests.e2e.gateway_shapes import Shape, ai_gateway, istio
from tests.support.ports import HOST, free_ports

SHAPES: dict[str, Shape] = {"Istio": istio, "Envoy AI Gateway": ai_gateway}
BODY = b"".join(b"%08x" % number for number in range(27_500))
"""Of 220,000 bytes."""
SETTLED_S = 2.0
PATIENCE_S = 300.0
AT_ONCE = 200


async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be a model server that takes its time."""
    with contextlib.suppress(asyncio.CancelledError):  # the benchmark is over
        await reader.read()
    writer.close()


async def send(port: int, body: bytes) -> asyncio.StreamWriter:
    """Send a request; return when the system has taken all of it."""
    _, writer = await asyncio.open_connection(HOST, port)
    writer.transport.set_write_buffer_limits(0)
    method = "POST" if body else "GET"
    head = f"{method} /v1/chat/completions HTTP/1.1\r\nhost: models\r\n"
    head += f"content-length: {len(body)}\r\n\r\n" if body else "\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return writer


def waiting(http: int) -> int:
    """Return how many requests wait, by the service's metrics."""
    with urllib.request.urlopen(f"http://{HOST}:{http}/metrics") as reply:
        page = reply.read().decode()
    found = re.findall(r"^flowcontrol_waiting_requests\{.*\} (\S+)$", page, re.MULTILINE)
    return int(sum(float(each) for each in found))


async def settled(*processes: stage.Running) -> None:
    """Wait until none of them has grown for a while."""
    last = [0] * len(processes)
    async with asyncio.timeout(PATIENCE_S):
        while (now := [each.resident_bytes() for each in processes]) > last:
            last = now
            await asyncio.sleep(SETTLED_S)


@contextlib.asynccontextmanager
async def occupied(
    directory: Path, shape: Shape, options: argparse.Namespace
) -> AsyncIterator[tuple[stage.Service, stage.Gateway, int]]:
    """A service and an Envoy whose only slot is taken, and the port of the service's pages."""
    (model_server,) = free_ports(1)
    server = await asyncio.start_server(never_answer, HOST, model_server)
    start = functools.partial(
        stage.service,
        directory,
        "flowcontrol",
        endpoints=[model_server],
        is_compiled=options.compiled,
        picker="least-loaded",
        saturation={"maxConcurrency": 1},
        flowControl={"maxRequests": 100_000, "maxBytes": "10Gi", "requestTTL": "600s"},
        settlement={"accessLog": False},
        tls={"selfSigned": True},
    )
    with contextlib.ExitStack() as stack:
        ours = await asyncio.to_thread(stack.enter_context, start())
        envoy = stage.envoy(directory, "envoy", ours.config, ours.ext_proc, shape)
        gateway = await asyncio.to_thread(stack.enter_context, envoy)
        occupant = await send(gateway.port, b"")
        yield ours, gateway, ours.http
        occupant.transport.abort()
        server.close()


async def measured(
    shape: Shape, body: bytes, count: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Return how much memory each of so many waiting requests takes: here, and in Envoy."""
    with tempfile.TemporaryDirectory() as folder:
        async with occupied(Path(folder), shape, options) as (ours, gateway, http):
            processes = (ours.process, gateway.process)
            await settled(*processes)
            before = [each.resident_bytes() for each in processes]
            clients: list[Any] = []
            while len(clients) < count:
                some = min(AT_ONCE, count - len(clients))
                clients += await asyncio.gather(*(send(gateway.port, body) for _ in range(some)))
            async with asyncio.timeout(PATIENCE_S):
                while await asyncio.to_thread(waiting, http) != count:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)
            await settled(*processes)
            after = [each.resident_bytes() for each in processes]
            for client in clients:
                client.transport.abort()
            here, there = ((end - begin) / count for begin, end in zip(before, after, strict=True))
            return here, there


async def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="run what was compiled of ours")
    parser.add_argument("--waiting", default="1000,4000")
    options = parser.parse_args()
    lines = [
        f"{stage.machine()}, flowcontrol {'compiled' if options.compiled else 'interpreted'}",
        "KiB of resident memory per waiting request",
        "",
        f"{'wiring':18} {'body':>8} {'waiting':>8} {'flowcontrol':>12} {'Envoy':>8}",
    ]
    beyond: list[float] = []
    """What a body takes, by wiring, with the most that wait."""
    counts = [int(each) for each in options.waiting.split(",")]
    for name, shape in SHAPES.items():
        each: list[float] = []
        for body in (b"", BODY):
            for count in counts:
                here, there = await measured(shape, body, count, options)
                size = f"{len(body) // 1000} KB" if body else "none"
                lines.append(
                    f"{name:18} {size:>8} {count:>8,} {here / 1024:>12.1f} {there / 1024:>8.1f}"
                )
                print(lines[-1])
            each.append(here / 1024)
        beyond.append(each[1] - each[0])
    stage.keep("parked_bodies", "\n".join(lines), {"body_kib": max(beyond)})


if __name__ == "__main__":
    asyncio.run(main())

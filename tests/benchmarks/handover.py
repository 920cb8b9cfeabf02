"""What does it cost to hand one request to another thread and its answer back, by each primitive?

Question: with one request alone, two sleeping threads are woken: the processor's by the loop, and
the loop by the processor. How long does that take, and how much CPU, where the processor's thread
sleeps in a lock (a futex, as it does), in a read of a pipe, in a read of an eventfd; and where it
looks for a while before it sleeps? And what does a thread cost that waits for nothing?

Method: a uvloop event loop hands a number over, waits on a future for it to come back, and rests a
while; the other thread gives it back with `call_soon_threadsafe`, as the processor does. The
switch interval is the service's. The ways take turns in every round; medians of the rounds. CPU is
of the process, the rest between requests included; last, the CPU of the process over wall time
while 50 requests a second come.

Caveats: no engine and no door. With the interpreter lock a thread that looks keeps the other from
running: what it waits for cannot come before it lets go.

    PYTHONPATH=. python tests/benchmarks/handover.py [--rounds 5] [--requests 2000]
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from threading import Lock, Thread
from typing import Protocol

import uvloop

from flowcontrol_server.service import SWITCH_INTERVAL_S
from tests.benchmarks import stage

REST_S = 0.0005
"""Between two requests: both threads are asleep by then."""


class Bell(Protocol):
    """How a thread sleeps until it is wanted."""

    def ring(self) -> None:
        """Wake it."""

    def wait(self) -> None:
        """Sleep until it rings."""

    def close(self) -> None:
        """Give back what it needs."""


class LockBell:
    """A lock that is held until it is rung."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Let go of it."""
        if self._lock.locked():
            self._lock.release()

    def wait(self) -> None:
        """Take it."""
        self._lock.acquire()

    def close(self) -> None:
        """Nothing."""


class SpinningBell(LockBell):
    """The same, looked at for a while before sleeping; the interpreter lock is let go each time."""

    def __init__(self, spin_ns: int) -> None:
        super().__init__()
        self._spin_ns = spin_ns

    def wait(self) -> None:
        """Look, then sleep."""
        end_ns = time.monotonic_ns() + self._spin_ns
        while time.monotonic_ns() < end_ns:
            if self._lock.acquire(blocking=False):
                return
            time.sleep(0)
        self._lock.acquire()


class PipeBell:
    """A byte in a pipe."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def ring(self) -> None:
        """Write one."""
        os.write(self._writer, b"x")

    def wait(self) -> None:
        """Read all there are."""
        os.read(self._reader, 64)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._reader)
        os.close(self._writer)


class EventBell:
    """A count in the kernel."""

    def __init__(self) -> None:
        self._event = os.eventfd(0)

    def ring(self) -> None:
        """Count one."""
        os.eventfd_write(self._event, 1)

    def wait(self) -> None:
        """Take the count."""
        os.eventfd_read(self._event)

    def close(self) -> None:
        """Close it."""
        os.close(self._event)


WAYS: dict[str, Callable[[], Bell]] = {
    "lock (futex)": LockBell,
    "pipe": PipeBell,
    "eventfd": EventBell,
    "look for 20 us, lock": lambda: SpinningBell(20_000),
    "look for 100 us, lock": lambda: SpinningBell(100_000),
    "look for 1 ms, lock": lambda: SpinningBell(1_000_000),
}


class Run:
    """One way, once."""

    def __init__(self, bell: Bell, count: int, rest_s: float) -> None:
        self._bell = bell
        self._count = count
        self._rest_s = rest_s
        self._box: deque[asyncio.Future[None] | None] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.waits_us: list[float] = []
        self.cpu_us = 0.0
        self.busy = 0.0
        """CPU over wall time."""

    def _serve(self) -> None:
        assert self._loop is not None
        while True:
            self._bell.wait()
            while self._box:
                future = self._box.popleft()
                if future is None:
                    return
                self._loop.call_soon_threadsafe(future.set_result, None)

    async def run(self) -> None:
        """Hand over, and rest."""
        loop = self._loop = asyncio.get_running_loop()
        thread = Thread(target=self._serve)
        thread.start()
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for _ in range(self._count):
            begin_s = time.perf_counter()
            future = loop.create_future()
            self._box.append(future)
            self._bell.ring()
            await future
            self.waits_us.append((time.perf_counter() - begin_s) * 1e6)
            await asyncio.sleep(self._rest_s)
        spent_s = time.process_time() - cpu_s
        self.cpu_us = spent_s / self._count * 1e6
        self.busy = spent_s / (time.perf_counter() - wall_s)
        self._box.append(None)
        self._bell.ring()
        thread.join()
        self._bell.close()


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, make in WAYS.items():
            run = Run(make(), options.requests, REST_S)
            uvloop.run(run.run())
            waits = sorted(run.waits_us)
            quiet = Run(make(), 100, 0.02)
            uvloop.run(quiet.run())
            p99 = waits[int(len(waits) * 0.99)]
            found[name].append((statistics.median(waits), p99, run.cpu_us, quiet.busy * 100))
    lines = [
        f"{stage.machine()}, load {os.getloadavg()[0]:.1f}",
        f"{options.rounds} rounds of {options.requests} requests; medians",
        "",
        f"{'':24} {'p50 us':>8} {'p99 us':>8} {'CPU us':>8} {'busy at 50/s':>13}",
    ]
    for name, runs in found.items():
        p50, p99, cpu, busy = (statistics.median(column) for column in zip(*runs, strict=True))
        lines.append(f"{name:24} {p50:8.0f} {p99:8.0f} {cpu:8.1f} {busy:11.2f} %")
    stage.keep("handover", "\n".join(lines))


if __name__ == "__main__":
    main()

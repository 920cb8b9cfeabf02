"""The faults: what each does while clients ask, and what may come of it."""

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flowcontrol_server.common.addresses import Address
from tests.e2e import faulty_service
from tests.e2e.client import CHAT, call
from tests.e2e.harness import OBJECTIVES
from tests.faults.link import TOOL
from tests.faults.site import MODEL_SERVERS, Site

MEMORY: Final = Path("/sys/fs/cgroup/memory")
"""The memory controller of cgroups, version 1."""
FAULTY: Final = (sys.executable, str(Path(faulty_service.__file__)))
GATE: Final = (str(Path(sys.executable).with_name("flowcontrol")),)
FAKETIME: Final = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
_STOPPED_S: Final = 3.0
_LEASE_PASSED_S: Final = 4.0
_DISK_FULL_S: Final = 3.0
_IDLE: Final = 1500
_DESCRIPTORS: Final = 256
_LOOK_S: Final = 0.02
_KILLED_WITHIN_S: Final = 10.0
_RESET: Final = struct.pack("ii", 1, 0)
Act = Callable[[Site, random.Random], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        name: in the table.
        act: does it once; done again and again at random times.
        times: how often.
        is_pair: whether there are two gates.
        excess: requests beyond the limit of a model server that are stated to be possible. Two by
            clients that leave: they free their slots before the model server knows. That is also
            the bound after a kill: of what is dispatched within the last batch, few requests are
            still under way when the next gate decides.
        excess_s: for how long in all.
        may_cut: whether answers may be cut off, and clients lose their connection.
        is_ordered: whether order within a flow is promised throughout.
        tries: of Envoy to find a single gate, within some 0.25 s each.
        command: of the gate, made for a directory.
        settings: of the gate, made for a directory.
        around: a context in which all of it happens.
        has_network: whether Redis is in a network of its own.
        has_leases: whether two gates elect by a Kubernetes Lease.
        is_root: whether it can be done by root alone.
        is_own: whether the fault is an exception of the gate, which its log has to tell.
    """

    name: str
    act: Act
    times: int = 2
    is_pair: bool = False
    excess: int = 2
    excess_s: float = 1.0
    may_cut: bool = False
    is_ordered: bool = True
    tries: int = 100
    command: Callable[[Path], tuple[str, ...]] = lambda _directory: GATE
    settings: Callable[[Path], Mapping[str, Any]] = field(default=lambda _directory: {})
    around: "Callable[[Site], contextlib.AbstractAsyncContextManager[None]] | None" = None
    has_network: bool = False
    has_leases: bool = False
    is_root: bool = False
    is_own: bool = False
    needs: str | None = None
    """A file without which it cannot be done."""


async def nothing(_site: Site, _chance: random.Random) -> None:
    """Plant no fault: what the suite itself sees."""


async def kill(site: Site, _chance: random.Random) -> None:
    """Kill the only gate; start it again."""
    site.signal_gate(0, signal.SIGKILL)
    await site.start_gate(0)


async def starve(site: Site, _chance: random.Random) -> None:
    """Leave the only gate no more memory, so that the kernel kills it; start it again."""
    cage = MEMORY / f"flowcontrol-{site.gates[0].pid}"
    cage.mkdir()
    try:
        (cage / "memory.limit_in_bytes").write_text("16384")
        (cage / "cgroup.procs").write_text(str(site.gates[0].pid))
        status = await site.gates[0].exited(_KILLED_WITHIN_S)
        assert status == -signal.SIGKILL, status
    finally:
        site.gates[0].stop()
        cage.rmdir()
    await site.start_gate(0)


async def fail(site: Site, _chance: random.Random) -> None:
    """Let the engine of the only gate raise an exception; start the gate again."""
    headers = {"x-llm-d-inference-fairness-id": faulty_service.FAULT}
    caller = await call(site.stack.gateway, CHAT, headers=headers)
    status = await site.gates[0].exited(_KILLED_WITHIN_S)
    caller.reset()
    assert status == 1, status
    await site.start_gate(0)


async def stop(site: Site, _chance: random.Random) -> None:
    """Let the only gate be silent for a while."""
    site.signal_gate(0, signal.SIGSTOP)
    await asyncio.sleep(_STOPPED_S)
    site.signal_gate(0, signal.SIGCONT)


async def drain(site: Site, _chance: random.Random) -> None:
    """Let the only gate drain, and start it again: the upgrade without an election."""
    site.signal_gate(0, signal.SIGTERM)
    await site.start_gate(0)


async def kill_leader(site: Site, _chance: random.Random) -> None:
    """Kill whichever gate decides; start it again once the other decides."""
    leader = await site.leader()
    site.signal_gate(leader, signal.SIGKILL)
    await site.leader(but=leader)
    await site.start_gate(leader)


async def hand_over(site: Site, _chance: random.Random) -> None:
    """Upgrade: the leader hands over, and starts again as the standby."""
    leader = await site.leader()
    site.signal_gate(leader, signal.SIGTERM)
    await site.leader(but=leader)
    await site.start_gate(leader)


async def stop_leader(site: Site, _chance: random.Random) -> None:
    """Let the leader be silent past its lease."""
    leader = await site.leader()
    site.signal_gate(leader, signal.SIGSTOP)
    await asyncio.sleep(_LEASE_PASSED_S)
    await site.leader(but=leader)
    site.signal_gate(leader, signal.SIGCONT)
    await asyncio.sleep(1.0)


async def cut_off(site: Site, _chance: random.Random) -> None:
    """Part the leader from Redis for longer than a lease; it still reaches all others."""
    leader = await site.leader()
    site.wires[leader].cut()
    await site.leader(but=leader)
    await asyncio.sleep(_STOPPED_S)
    site.wires[leader].mend()
    await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def watched(site: Site) -> AsyncIterator[None]:
    """Ask both gates all the time whether they decide; never may both."""

    async def watch() -> None:
        while True:
            # The one before and after the other, or each might have been the only one in its time.
            decides = [await site.decides(number) for number in (0, 1, 0)]
            assert not all(decides), "two gates decide"
            await asyncio.sleep(_LOOK_S)

    watching = asyncio.create_task(watch())
    try:
        yield
        assert not watching.done(), watching.exception()
    finally:
        watching.cancel()


async def lose_redis(site: Site, _chance: random.Random) -> None:
    """End Redis for longer than a lease; it comes back empty."""
    site.redis.stop()
    await asyncio.sleep(_STOPPED_S)
    site.redis.start()
    await site.leader()


async def restart_envoy(site: Site, _chance: random.Random) -> None:
    """Kill Envoy and start it again."""
    await site.restart_envoy()


async def kill_server(site: Site, chance: random.Random) -> None:
    """Kill a model server, and start it again after a while."""
    number = chance.randrange(MODEL_SERVERS)
    site.kill_server(number)
    await asyncio.sleep(2.0)
    site.start_server(number)
    await asyncio.sleep(1.0)


async def stop_server(site: Site, chance: random.Random) -> None:
    """Let a model server be silent for a while."""
    number = chance.randrange(MODEL_SERVERS)
    site.signal_server(number, signal.SIGSTOP)
    await asyncio.sleep(_STOPPED_S)
    site.signal_server(number, signal.SIGCONT)


async def slow_server(site: Site, chance: random.Random) -> None:
    """Let a model server take ten times as long for a while."""
    number = chance.randrange(MODEL_SERVERS)
    await site.slow_down(number, 10.0)
    await asyncio.sleep(2.0)
    await site.slow_down(number, 1.0)


async def edit(site: Site, chance: random.Random) -> None:
    """Change configuration and objectives, good and bad, many times."""
    flow_control = {"requestTTL": f"{chance.randint(50, 90)}s", "maxRequests": 5000}
    for number in range(20):
        name = chance.choice([*OBJECTIVES])
        site.stack.declare(name, chance.randint(-5, 20))
        if number % 4 == 3:
            site.stack.write_manifest("broken.yaml", "kind: [")
        flow_control["requestTTL"] = f"{chance.randint(50, 90)}s" if number % 5 else "soon"
        site.stack.configure(flowControl=flow_control)
        await asyncio.sleep(0.1)
    site.stack.remove_manifest("broken.yaml")
    site.stack.configure()


async def fill_disk(site: Site, _chance: random.Random) -> None:
    """Let every write to a file fail: log, ledger and state."""
    pid = site.gates[0].pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
    await asyncio.sleep(_DISK_FULL_S)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def with_ledger(directory: Path) -> Mapping[str, Any]:
    """Return settings with a ledger."""
    return {"ledger": {"file": str(directory / "ledger.jsonl")}}


def without_store(_directory: Path) -> Mapping[str, Any]:
    """Return settings that record nothing: what runs is known by the endpoints' pages alone."""
    return {"state": {}}


def into_pipe(directory: Path) -> tuple[str, ...]:
    """Return a gate whose log goes to a pipe that is never read."""
    pipe = directory / "log.pipe"
    os.mkfifo(pipe)
    return ("/bin/sh", "-c", f'exec "$@" 2<>"{pipe}"', "sh", *GATE)


def with_few_descriptors(_directory: Path) -> tuple[str, ...]:
    """Return a gate that may open few files."""
    return ("/bin/sh", "-c", f'ulimit -n {_DESCRIPTORS}; exec "$@"', "sh", *GATE)


def on_a_clock(directory: Path) -> tuple[str, ...]:
    """Return a gate whose time of day a file sets."""
    clock = directory / "clock"
    clock.write_text("+0")
    return (
        *("/usr/bin/env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={clock}"),
        *("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", *GATE),
    )


async def jump(site: Site, chance: random.Random) -> None:
    """Set the gate's time of day an hour back or forth."""
    (site.directory / "clock").write_text(chance.choice(["+3600", "-3600"]))
    await asyncio.sleep(2.0)
    (site.directory / "clock").write_text("+0")


@contextlib.asynccontextmanager
async def idle_connections(site: Site) -> AsyncIterator[None]:
    """Hold connections that send nothing to every port of the gate."""
    doors = (site.stack.ext_proc, site.stack.grpc, site.stack.http)
    sockets = []
    try:
        for number in range(_IDLE):
            door = doors[number % len(doors)]
            assert isinstance(door, Address)
            with contextlib.suppress(OSError):
                sockets.append(socket.create_connection((door.host, door.port), 1.0))
        yield
    finally:
        for each in sockets:
            each.close()


async def harass(site: Site, chance: random.Random) -> None:
    """Open connections to every port, send half a preface or noise, and reset them."""
    doors = (site.stack.ext_proc, site.stack.grpc, site.stack.http)
    for _ in range(300):
        door = chance.choice(doors)
        assert isinstance(door, Address)
        with contextlib.suppress(OSError):
            noise = chance.choice(
                [b"PRI * HTTP/2.0\r\n\r\nSM", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""]
            )
            with socket.create_connection((door.host, door.port), 1.0) as each:
                each.sendall(noise + chance.randbytes(chance.randrange(200)))
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        await asyncio.sleep(0.005)


UNRECORDED: Final[Any] = {"excess": 3, "excess_s": 6.0}
"""A leader that is cut off from Redis decides on for three quarters of its lease, 1.5 s, and none
of that is recorded: the next one counts it at the model servers. What it holds by record and had
ended by then stands for some of it; Envoy may report that end once more, and free its slot."""
PAIR: Final[Any] = {"is_pair": True, "is_ordered": False}
FAULTS: Final = (
    Fault("none", nothing),
    Fault("gate killed", kill, is_ordered=False),
    Fault("gate killed, no store", kill, is_ordered=False, settings=without_store),
    Fault("gate out of memory", starve, is_ordered=False, is_root=True, needs=str(MEMORY)),
    Fault("engine fails", fail, is_ordered=False, is_own=True, command=lambda _directory: FAULTY),
    # Envoy gives up before the gate is back.
    Fault("gate killed, Envoy gives up", kill, is_ordered=False, tries=2),
    Fault("gate stopped 3 s", stop),
    Fault("gate drained", drain, is_ordered=False),
    Fault("leader killed", kill_leader, **PAIR),
    Fault("leader stopped 4 s", stop_leader, **PAIR),
    Fault("leader cut off", cut_off, **PAIR, **UNRECORDED),
    Fault(
        "leader partitioned",
        cut_off,
        has_network=True,
        is_root=True,
        needs=TOOL,
        around=watched,
        **PAIR,
        **UNRECORDED,
    ),
    Fault("hand-over", hand_over, times=3, **PAIR),
    Fault("leader killed, Lease", kill_leader, has_leases=True, **PAIR),
    Fault("leader stopped 4 s, Lease", stop_leader, has_leases=True, around=watched, **PAIR),
    Fault("hand-over, Lease", hand_over, has_leases=True, times=3, **PAIR),
    Fault("Redis lost 3 s", lose_redis, **PAIR),
    Fault("Envoy killed", restart_envoy, may_cut=True),
    Fault("model server killed", kill_server, may_cut=True, is_ordered=False),
    # It writes arrivals down when it goes on: their order is not known.
    Fault("model server stopped 3 s", stop_server, is_ordered=False),
    Fault("model server slow", slow_server),
    Fault("edits", edit),
    Fault("disk full", fill_disk, settings=with_ledger),
    Fault("log not read", nothing, command=into_pipe),
    # Envoy's own connection loses its place once: whoever is sent again is sent at random times.
    Fault(
        "256 descriptors",
        harass,
        command=with_few_descriptors,
        around=idle_connections,
        is_ordered=False,
    ),
    Fault("hostile connections", harass, times=3, around=idle_connections),
    Fault("clock jumps", jump, times=3, command=on_a_clock, needs=str(FAKETIME)),
)

"""Two replicas: one decides, the other takes over, and never both."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.backend import Call
from tests.e2e.client import Caller
from tests.e2e.harness import eventually
from tests.e2e.replicas import Replicas
from tests.support.valkey_server import BINARY

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server"),
]

LIMIT = 2
HEALTH_S = 0.5
"""Between Envoy's health checks, and their timeout."""
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(20)]


@pytest.fixture(name="replicas")
async def _replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    async with Replicas(tmp_path, LIMIT) as replicas:
        yield replicas


async def fill(replicas: Replicas) -> tuple[list[Caller], list[Call]]:
    """Take every slot with a response that has begun."""
    callers, calls = [], []
    for number in range(LIMIT):
        callers.append(await replicas.call(f"early-{number}"))
        calls.append(await replicas.next_call(10))
        await calls[-1].stream(*EVENTS[:5])
        await callers[-1].head()
    return callers, calls


async def finish(caller: Caller, call: Call) -> bytes:
    """End a response; return what the client got of it."""
    await call.send(*EVENTS[5:])
    await call.end()
    return await caller.rest()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_take_over(replicas: Replicas, how: signal.Signals) -> None:
    """Responses go on, who waits moves, and the limit holds at the next leader."""
    leader = await replicas.leader()
    callers, calls = await fill(replicas)
    waiting = [await replicas.call(f"waiting-{number}") for number in range(3)]
    await eventually(lambda: _is_recorded(replicas, leader), what="the records")
    replicas.kill(leader, how)
    other = await replicas.leader(but=leader)
    await eventually(lambda: _has_waiting(replicas, other, 3), what="who waits to move")
    recovered = await replicas.metric(other, "flowcontrol_recovered_leases")
    at_take_over = replicas.arrived.qsize()
    bodies = [await finish(*each) for each in zip(callers, calls, strict=True)]
    for _ in waiting:
        await (await replicas.next_call(10)).respond()
    replies = [await caller.reply() for caller in waiting]

    assert recovered == LIMIT
    assert at_take_over == 0, "the limit was exceeded"
    assert bodies == [b"".join(EVENTS)] * LIMIT
    assert [reply.status for reply in replies] == [200] * 3


async def test_a_leader_that_was_stopped_decides_no_more(replicas: Replicas) -> None:
    """SIGSTOP past its lease, then SIGCONT: what waits there moves, and none of it is dispatched.

    It wakes to free slots of its own and requests that wait; the next leader has filled the slots.
    """
    leader = await replicas.leader()
    callers, calls = await fill(replicas)
    waiting = [await replicas.call(f"waiting-{number}") for number in range(3)]
    await eventually(lambda: _is_recorded(replicas, leader), what="the records")
    replicas.kill(leader, signal.SIGSTOP)
    other = await replicas.leader(but=leader)
    await asyncio.sleep(2 * HEALTH_S)  # Envoy must have noticed, which it does not tell
    bodies = [await finish(*each) for each in zip(callers, calls, strict=True)]
    late = [await replicas.call(f"late-{number}") for number in range(LIMIT)]
    served = [await replicas.next_call(15) for _ in late]
    replicas.kill(leader, signal.SIGCONT)
    await eventually(
        lambda: "leader_stepped_down" in replicas.logs(leader), what="the old leader to step down"
    )
    await eventually(lambda: _has_waiting(replicas, other, 3), 10, "who waits to move")
    beyond = replicas.arrived.qsize()
    for each in served:
        await each.respond()
    for _ in waiting:
        await (await replicas.next_call(10)).respond()
    replies = [await caller.reply() for caller in (*late, *waiting)]

    assert [each.name for each in served] == ["late-0", "late-1"]
    assert bodies == [b"".join(EVENTS)] * LIMIT
    assert beyond == 0, "both decided"
    assert [reply.status for reply in replies] == [200] * 5
    assert await replicas.metric(other, "flowcontrol_deciding") == 1
    assert await replicas.metric(leader, "flowcontrol_deciding") == 0


async def test_explain(replicas: Replicas) -> None:
    """Asked about a request, the standby names the leader's part, and the leader its own."""
    leader = await replicas.leader()
    ((caller, call), *_others) = zip(*await fill(replicas), strict=True)
    said = await replicas.explained(leader, "early-0")
    elsewhere = await replicas.explained(1 - leader, "early-0")
    await finish(caller, call)

    assert "This replica leads, term " in said
    assert "this replica is a standby and decides nothing: ask the one that leads" in elsewhere


async def _is_recorded(replicas: Replicas, number: int) -> bool:
    return (
        await replicas.metric(number, "flowcontrol_state_unwritten_changes") == 0
        and await replicas.metric(number, "flowcontrol_state_leases") == LIMIT
    )


async def _has_waiting(replicas: Replicas, number: int, count: int) -> bool:
    return await replicas.metric(number, 'flowcontrol_waiting_requests{priority="0"}') == count

"""The service is killed and started again: what was in flight goes on, and holds its slots."""

import signal
from collections.abc import Mapping
from contextlib import closing
from sqlite3 import connect
from typing import Any

import pytest

from flowcontrol_server.state.book import MEMORY_INTERVAL_S
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, Stack, eventually

pytestmark = pytest.mark.e2e

LIMIT = 4
FIRST = 8
"""Where a limit begins that finds itself."""
FINDING = {
    "state": {"directory": "./state"},
    "load": {"interval": "50ms"},
    "saturation": {"detector": "auto"},
}
DAMAGED = (
    '{"stages": [{"role": "both", "places": {"": {"requests": 64.0, "calm": 0.0, "tokens": NaN}}}]}'
)
LIMIT_FOUND = 'flowcontrol_detector_requests_limit{detector="auto",stage="both"}'
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(20)]
SETTLED_S = 5.0
"""Longest time from the end of a response to the access log's report of it, and a wide margin."""


def failing_open(configuration: dict[str, Any]) -> None:
    """Let responses go on when the service is gone."""
    for name, value in _mappings(configuration):
        if name == "typed_config" and "processing_mode" in value:
            value["failure_mode_allow"] = True


def _mappings(node: Any) -> Any:
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in children:
        if isinstance(child, dict):
            yield name, child
        if isinstance(child, dict | list):
            yield from _mappings(child)


def spec(settings: Mapping[str, Any] | None = None) -> Spec:
    """A gateway that records what is in flight in a folder of its own."""

    def prepare(stack: Stack) -> None:
        (stack.directory / "state").mkdir()

    return Spec(
        max_concurrency=LIMIT,
        picker="least-loaded",
        settings={"state": {"directory": "./state"}} if settings is None else settings,
        prepare=prepare,
        edit_envoy=failing_open,
    )


async def kill_and_restart(gateway: Gateway) -> None:
    """Kill the service with SIGKILL; start it again and wait until it is ready."""
    gateway.stack.service.send_signal(signal.SIGKILL)
    await gateway.stack.service.exited()
    await gateway.stack.start_service()


async def test_kill_and_restart(start: Start) -> None:
    """No response is cut, the limit holds across the restart, and each end frees a slot."""
    gateway = await start(spec())
    callers, calls = [], []
    for _ in range(LIMIT):
        callers.append(await gateway.call(flow_id="before"))
        calls.append(await gateway.next_call())
        await calls[-1].stream(*EVENTS[:5])
        await callers[-1].head()
    await eventually(lambda: _unwritten(gateway), what="the records of what is in flight")
    await kill_and_restart(gateway)
    recovered = await gateway.metric("flowcontrol_recovered_leases")
    later = [await gateway.call(flow_id="after") for _ in range(2)]
    await gateway.until(waiting=2, in_flight=0)
    await calls[0].send(*EVENTS[5:])
    await calls[0].end()
    served = await gateway.next_call(SETTLED_S)
    await gateway.until(waiting=1, in_flight=1)
    await served.respond()
    await (await gateway.next_call()).respond()
    bodies = [await callers[0].rest()]
    for caller, call in zip(callers[1:], calls[1:LIMIT], strict=True):
        await call.send(*EVENTS[5:])
        await call.end()
        bodies.append(await caller.rest())
    replies = [await caller.reply() for caller in later]
    await eventually(lambda: _has_none(gateway), SETTLED_S, "no recovered lease")

    assert recovered == LIMIT
    assert bodies == [b"".join(EVENTS)] * LIMIT
    assert [reply.status for reply in replies] == [200, 200]


async def _unwritten(gateway: Gateway) -> bool:
    return (
        await gateway.metric("flowcontrol_state_unwritten_changes") == 0
        and await gateway.metric("flowcontrol_state_leases") == LIMIT
    )


async def _has_none(gateway: Gateway) -> bool:
    return await gateway.metric("flowcontrol_recovered_leases") == 0


async def test_kill_and_restart_without_a_store(start: Start) -> None:
    """What the endpoints report as running at the start counts as in flight."""
    gateway = await start(spec({"load": {"interval": "50ms"}}))
    gateway.backends[0].page = page(0)
    for _ in range(LIMIT - 1):
        caller = await gateway.call()
        call = await gateway.next_call()
        await call.stream(*EVENTS[:5])
        await caller.head()
    gateway.backends[0].page = page(LIMIT - 1)
    await kill_and_restart(gateway)
    recovered = await gateway.metric("flowcontrol_recovered_leases")
    later = [await gateway.call() for _ in range(2)]
    await gateway.until(waiting=1, in_flight=1)
    await (await gateway.next_call()).respond()
    await (await gateway.next_call()).respond()
    gateway.backends[0].page = page(0)
    replies = [await caller.reply() for caller in later]
    await eventually(lambda: _has_none(gateway), SETTLED_S, "no recovered lease")

    assert recovered == LIMIT - 1
    assert [reply.status for reply in replies] == [200, 200]


async def test_limits_go_on(start: Start) -> None:
    """A limit that found itself is where the next process begins, not where a new one would."""
    gateway = await start(spec(FINDING))
    gateway.expected_complaints = {"endpoint_scrape_failed"}  # until there is a page
    callers = [await gateway.call() for _ in range(FIRST)]
    calls = [await gateway.next_call() for _ in range(FIRST)]
    first = await _limit(gateway)
    gateway.backends[0].page = page(FIRST)
    await eventually(lambda: _is_above(gateway, first), what="a higher limit")
    for call, caller in zip(calls, callers, strict=True):
        await call.respond()
        await caller.reply()
    found = await _limit(gateway)
    within_s = MEMORY_INTERVAL_S + 5
    await eventually(lambda: _is_kept(gateway, found), within_s, "the limit in the store")
    await kill_and_restart(gateway)

    assert (first, found) == (FIRST, 64)
    assert await _limit(gateway) == found


async def test_damaged_memory(start: Start) -> None:
    """What no engine can have learnt is left out with a warning, and nothing ends."""
    gateway = await start(spec(FINDING))
    gateway.expected_complaints = {"learnt_state_unreadable", "endpoint_scrape_failed"}
    gateway.stack.service.send_signal(signal.SIGKILL)
    await gateway.stack.service.exited()
    (file,) = (gateway.stack.directory / "state").glob("*.sqlite")
    with closing(connect(file)) as store:
        store.execute("INSERT OR REPLACE INTO memory VALUES ('', ?)", (DAMAGED,))
        store.commit()
    await gateway.stack.start_service()

    assert await _limit(gateway) == FIRST
    assert "learnt_state_unreadable" in gateway.stack.service.log.read_text()


async def _limit(gateway: Gateway) -> float:
    return (await gateway.metrics())[LIMIT_FOUND]


async def _is_above(gateway: Gateway, limit: float) -> bool:
    return await _limit(gateway) > limit


async def _is_kept(gateway: Gateway, limit: float) -> bool:
    (file,) = (gateway.stack.directory / "state").glob("*.sqlite")
    with closing(connect(f"file:{file}?mode=ro", uri=True)) as store:
        row = store.execute("SELECT value FROM memory").fetchone()
    return row is not None and f'"requests": {limit}' in row[0]


def page(running: int) -> bytes:
    """A metrics page of an engine that works on so many requests, with a cache of 512 Ki tokens."""
    return (
        f"vllm:num_requests_waiting 0\nvllm:num_requests_running {running}\n"
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="32768"} 1\n'
    ).encode()

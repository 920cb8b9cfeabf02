"""Two replicas behind one Envoy: what one of them held is parked at the other when it dies."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import OBJECTIVES, Spec, Stack, eventually

pytestmark = pytest.mark.e2e

REASON = "x-llm-d-request-dropped-reason"
TTL_S = 6.0
APART_S = 0.3
"""Between arrivals; what is closer together than 0.1 s is not told apart by Envoy's clock."""
LATE_S = 1.0
Replicas = Callable[[], Awaitable[tuple[Gateway, Gateway]]]


def _beside(stack: Stack) -> Callable[[dict[str, Any]], None]:
    """Let Envoy spread streams over that service, too."""
    door = stack.door
    if isinstance(door, Path):
        address: dict[str, Any] = {"pipe": {"path": str(door)}}
    else:
        address = {"socket_address": {"address": door.host, "port_value": door.port}}

    def edit(configuration: dict[str, Any]) -> None:
        clusters = configuration["static_resources"]["clusters"]
        cluster = next(each for each in clusters if each["name"] == "ext_proc")
        localities = cluster["load_assignment"]["endpoints"]
        localities[0]["lb_endpoints"].append({"endpoint": {"address": address}})

    return edit


@pytest.fixture
async def replicas(
    start: Start, door: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replicas]:
    """Start two services with a slot each, and an Envoy in front of both."""
    async with contextlib.AsyncExitStack() as running:

        async def begin() -> tuple[Gateway, Gateway]:
            beside = Stack(Spec(door=door), tmp_path_factory.mktemp("beside"))
            running.callback(beside.stop)
            beside.objectives.mkdir()
            for name, priority in OBJECTIVES.items():
                beside.declare(name, priority)
            beside.configure()
            await beside.start_service()
            gateway = await start(Spec(edit_envoy=_beside(beside)))
            beside.configure(endpoints={"static": [*map(str, gateway.stack.endpoints)]})
            beside.endpoints = []
            other = await running.enter_async_context(Gateway(beside))
            await other.until_so(
                lambda snapshot: (
                    [each.address for each in snapshot.endpoints]
                    == [*map(str, gateway.stack.endpoints)]
                )
            )
            return gateway, other

        yield begin


async def _kill(gateway: Gateway) -> None:
    gateway.stack.service.send_signal(signal.SIGKILL)
    await gateway.stack.service.exited()


class TestOneDies:
    """kill -9 of the one; Envoy sends its parked requests to the other by itself."""

    async def test_order_and_deadline(self, replicas: Replicas) -> None:
        """They go in the order in which they came, among those that were there; so they expire."""
        gateway, other = await replicas()
        calls = {}
        for _ in range(2):
            _, call = await gateway.occupy()
            calls[call.name] = call
        await gateway.until(in_flight=1)
        await other.until(in_flight=1)
        began_s = time.monotonic()
        ttl = {"x-llm-d-inference-ttl": f"{TTL_S:g}s"}
        late = [await gateway.call(name=name, headers=ttl) for name in ("late-1", "late-2")]
        names = [f"place-{number}" for number in range(6)]
        for place, name in enumerate(names, 3):
            await gateway.call(name=name, flow_id="tenant")
            await _waiting(gateway, other, place)
            await asyncio.sleep(APART_S)  # what Envoy's clock must be able to tell apart
        await _waiting(gateway, other, 8)
        assert (await gateway.snapshot()).waiting == 4
        await _kill(gateway)
        await other.until(waiting=8, within_s=4.0)
        moved_s = time.monotonic() - began_s
        refusals = [await each.reply() for each in late]
        ended_s = time.monotonic() - began_s
        for call in calls.values():
            with contextlib.suppress(ConnectionError):  # cut off with the service that died
                await call.respond()
        served = []
        for _ in names:
            call = await gateway.next_call()
            served.append(call.name)
            await call.respond()
        line = await other.decided("place-0")

        assert [(each.status, each.headers[REASON]) for each in refusals] == [
            (429, "rejected-ttl-expired")
        ] * 2
        assert moved_s < TTL_S - 2 * LATE_S
        assert TTL_S <= ended_s < TTL_S + LATE_S
        assert served == names
        assert line["waited_ms"] / 1000 >= TTL_S - LATE_S


async def _waiting(gateway: Gateway, other: Gateway, count: int) -> None:
    """Wait until so many wait at both together."""

    async def do_they() -> bool:
        return (await gateway.snapshot()).waiting + (await other.snapshot()).waiting == count

    await eventually(do_they)

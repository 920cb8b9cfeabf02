"""Five thousand requests parked at once through a real Envoy: none is refused by machinery."""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PARKED = 5_000
CONNECTING = 200
"""Clients that connect at the same moment: below any listen backlog."""
PATIENCE_S = 100.0
MIB = 2**20


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """File descriptors for as many connections, here and in the processes started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * PARKED:
        pytest.skip(f"needs {2 * PARKED} file descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * PARKED), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """One slot, and time enough."""
    return await start(Spec(flow_control={"requestTTL": "300s"}))


class TestFiveThousand:
    """More than any of the ceilings that Envoy and gRPC have by default."""

    async def test_all_wait_and_all_are_served(
        self, gateway: Gateway, record_property: Callable[[str, object], None]
    ) -> None:
        """With one slot 4,999 wait; when it is freed they all get 200, one after the other."""
        service, envoy = gateway.stack.service, gateway.stack.envoy
        before = service.resident_bytes(), envoy.resident_bytes()
        gate = asyncio.Semaphore(CONNECTING)

        async def client() -> int:
            async with gate:
                caller = await gateway.call()
            caller.patience_s = PATIENCE_S
            return (await caller.reply()).status

        began_s = time.monotonic()
        clients = [asyncio.ensure_future(client()) for _ in range(PARKED)]
        occupying = await gateway.next_call()
        parked = await gateway.until(waiting=PARKED - 1, in_flight=1, within_s=60)
        parked_s = time.monotonic() - began_s
        full = service.resident_bytes(), envoy.resident_bytes()
        gateway.backends[0].is_answering = True
        began_s = time.monotonic()
        await occupying.respond()
        statuses = Counter(await asyncio.gather(*clients))
        released_s = time.monotonic() - began_s
        after = service.resident_bytes(), envoy.resident_bytes()

        figures = {
            "seconds to park": round(parked_s, 2),
            "seconds to release, one at a time": round(released_s, 2),
            "service MiB before, full, after": [
                round(rss[0] / MIB) for rss in (before, full, after)
            ],
            "Envoy MiB before, full, after": [round(rss[1] / MIB) for rss in (before, full, after)],
            "service KiB per parked request": round((full[0] - before[0]) / PARKED / 1024, 1),
        }
        for name, figure in figures.items():
            record_property(name, figure)
            print(f"{name}: {figure}")  # noqa: T201 - shown by pytest -s
        assert statuses == {200: PARKED}
        assert len(gateway.backends[0].calls) == PARKED
        assert parked.inbox_refusals == 0
        codes = Counter(line["code"] for line in gateway.stack.access_log())
        assert [code for code in codes if code >= 500] == []

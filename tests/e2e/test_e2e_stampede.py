"""Thousands of refusals at about the same time, beside responses that are being streamed."""

import asyncio
from collections import Counter

import pytest

from tests.e2e.client import Caller
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STREAMING = 4
REFUSED = 2_600
"""More than the 2,000 frames for closed streams that one connection may send at once."""
TTL = "x-llm-d-inference-ttl"
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(20)]


@pytest.fixture(scope="module")
def spec() -> Spec:
    """A slot for each response that is streamed, and a queue that holds everybody else."""
    return Spec(max_concurrency=STREAMING, flow_control={"maxRequests": 2 * REFUSED})


async def status_of(caller: Caller) -> int:
    """Return the status of a whole reply, and close the connection."""
    caller.patience_s = 60.0
    return (await caller.reply()).status


class TestStampede:
    """Envoy answers the end of each of its streams with a reset; all are on one connection."""

    async def test_refusals_end_no_response(self, gateway: Gateway) -> None:
        """A batch reaches its TTL: each request is answered, and no response is cut off."""
        streaming = []
        for _ in range(STREAMING):
            caller, serving = await gateway.occupy()
            await serving.stream(*EVENTS[:10])
            await caller.head()
            streaming.append((caller, serving))
        waiting = [await gateway.call(headers={TTL: "6s"}) for _ in range(REFUSED)]
        await gateway.until(waiting=REFUSED)
        statuses = Counter(await asyncio.gather(*map(status_of, waiting)))
        bodies = []
        for caller, serving in streaming:
            await serving.send(*EVENTS[10:])
            await serving.end()
            bodies.append(await caller.rest())

        assert statuses == {429: REFUSED}
        assert bodies == [b"".join(EVENTS)] * STREAMING

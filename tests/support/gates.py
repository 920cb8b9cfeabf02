"""A gate with a real processor thread, for tests of the doors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowcontrol.config import ControllerConfig
from flowcontrol.events import Decision, DrainBegan, EndpointsChanged
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked

POOL = EndpointsChanged(("10.0.0.5:8000",))
TIMEOUT_S = 10.0


@asynccontextmanager
async def running_gate(
    config: ControllerConfig | None = None,
    *,
    has_pool: bool = True,
    ended: list[tuple[Parked, Decision]] | None = None,
) -> AsyncIterator[FlowGate]:
    """A gate that is drained and joined at the end.

    Args:
        config: configuration of its engine.
        has_pool: whether there is an endpoint; without one every request waits.
        ended: called with every request that has ended, and its decision.
    """
    over = asyncio.Event()
    requests = [] if ended is None else ended
    gate = FlowGate(
        config or ControllerConfig(),
        100_000,
        lambda parked, decision: requests.append((parked, decision)),
        lambda _fault: over.set(),
    )
    gate.start()
    if has_pool:
        gate.post(POOL)
    try:
        yield gate
    finally:
        gate.post(DrainBegan(0))
        await asyncio.wait_for(over.wait(), TIMEOUT_S)
        assert gate.join(TIMEOUT_S)

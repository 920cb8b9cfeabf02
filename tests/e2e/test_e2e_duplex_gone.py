"""When flow control dies where both bodies stream through it: what Envoy can save, and what not.

Envoy cannot fail open there once a part of a body has passed (docs/operations.md). What holds all
the same: no request reaches a model server twice or undecided, and a service that is only silent
for a while loses nothing.
"""

import asyncio
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from tests.e2e.backend import Call
from tests.e2e.client import Caller
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.gateway_shapes import SHAPES, Shape, istio_with_override, kgateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

IS_LONG = "FLOWCONTROL_LONG_TESTS" in os.environ
"""Whether to run at the size of a busy gateway."""
STREAMS, WAITING = (200, 500) if IS_LONG else (10, 20)
STALLS = ((3.0, True), (30.0, True), (30.0, False)) if IS_LONG else ((3.0, True),)
"""How long it is silent, and whether Envoy sends PINGs, as our own configuration has it do."""
GIVEN_UP_S = 20.0
"""With PINGs Envoy closes the connection by then."""
EVENTS = [b'data: {"token": %d}\n\n' % number for number in range(50)]
WIRINGS = SHAPES if IS_LONG else (istio_with_override, kgateway)
"""The gateways: at their size all of them, else one that lets us choose the mode and one that does
not, which fails open."""
FOR_LONG = 60.0
CUT = -1
"""In place of a status: no response, or none to its end."""


class Fate(NamedTuple):
    """What became of a crowd."""

    whole: int
    """Responses that had begun and came whole."""
    cut: int
    """And those that broke off."""
    told: Counter[int]
    """What those that waited were told, by status."""
    calls: Counter[str]
    """What the model server was asked, and how often."""


@dataclass
class Crowd:
    """Responses that have begun, on every slot, and requests that wait behind them."""

    gateway: Gateway
    streaming: list[Caller] = field(default_factory=list)
    serving: list[Call] = field(default_factory=list)
    parked: list[Caller] = field(default_factory=list)

    async def gather(self) -> None:
        """Begin all of it."""
        for number in range(STREAMS):
            self.streaming.append(await self.gateway.call(name=f"stream-{number}"))
        self.serving = [await self.gateway.next_call() for _ in self.streaming]
        for call in self.serving:
            await call.stream(*EVENTS[:10])
        for caller in self.streaming:
            await caller.head()
        for number in range(WAITING):
            self.parked.append(await self.gateway.call(name=f"parked-{number}"))
        await self.gateway.until(waiting=WAITING)

    async def send(self, begin: int, end: int) -> None:
        """Send more of every response."""
        for call in self.serving:
            if not call.gone.is_set():
                await call.send(*EVENTS[begin:end])

    async def fate(self) -> Fate:
        """End every response, answer all that is let on, and see what came of all."""
        answering = asyncio.create_task(self._answer())
        await self.send(20, len(EVENTS))
        for call in self.serving:
            if not call.gone.is_set():
                await call.end()
        bodies = await asyncio.gather(*(_rest(each) for each in self.streaming))
        told = await asyncio.gather(*(_status(each) for each in self.parked))
        answering.cancel()
        whole = bodies.count(b"".join(EVENTS))
        (backend,) = self.gateway.backends
        calls = Counter(call.name for call in backend.calls)
        return Fate(whole, len(bodies) - whole, Counter(told), calls)

    async def _answer(self) -> None:
        while True:
            await (await self.gateway.next_call(FOR_LONG)).respond()


async def _rest(caller: Caller) -> bytes:
    caller.patience_s = FOR_LONG
    try:
        return await caller.rest()
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        return b""


async def _status(caller: Caller) -> int:
    caller.patience_s = FOR_LONG
    try:
        return (await caller.reply()).status
    except (asyncio.IncompleteReadError, ConnectionError):
        return CUT


@pytest.fixture(params=WIRINGS, ids=lambda shape: shape.__name__)
def shape(request: pytest.FixtureRequest) -> Shape:
    """How each gateway wires its endpoint picker."""
    found: Shape = request.param
    return found


async def crowd(start: Start, shape: Shape, *, has_pings: bool = True) -> Crowd:
    """Let all slots stream, and others wait."""

    def edit(configuration: dict[str, Any]) -> None:
        shape(configuration)
        clusters = configuration["static_resources"]["clusters"]
        (cluster,) = [each for each in clusters if each["name"] == "ext_proc"]
        (protocol,) = cluster["typed_extension_protocol_options"].values()
        if not has_pings:
            http2 = protocol["explicit_http_config"]["http2_protocol_options"]
            del http2["connection_keepalive"]

    settings = {"tls": {"selfSigned": True}}
    spec = Spec(max_concurrency=STREAMS, picker="least-loaded", edit_envoy=edit, settings=settings)
    found = Crowd(await start(spec))
    await found.gather()
    return found


def once(*kinds: str) -> Counter[str]:
    """Every request of these kinds, once."""
    sizes = {"stream": STREAMS, "parked": WAITING}
    return Counter(f"{kind}-{number}" for kind in kinds for number in range(sizes[kind]))


@pytest.mark.timeout(300)
async def test_killed(start: Start, shape: Shape) -> None:
    """SIGKILL: Envoy cuts every response, and answers all that waits with its own 500.

    So it does where only the request's body passes through (`istio_with_override`).
    """
    busy = await crowd(start, shape)
    busy.gateway.stack.service.send_signal(signal.SIGKILL)
    await busy.gateway.stack.service.exited()
    await busy.send(10, 20)

    assert await busy.fate() == Fate(0, STREAMS, Counter({500: WAITING}), once("stream"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stall_s", "has_pings"), STALLS)
async def test_stopped(start: Start, shape: Shape, stall_s: float, *, has_pings: bool) -> None:
    """SIGSTOP, and SIGCONT after a while: every response is whole, and all that waits is served.

    Where Envoy closes the connection, because its PINGs are not answered, it is as if killed.
    """
    busy = await crowd(start, shape, has_pings=has_pings)
    busy.gateway.stack.service.send_signal(signal.SIGSTOP)
    try:
        await busy.send(10, 20)
        await asyncio.sleep(stall_s)  # the case itself: it is silent for so long
    finally:
        busy.gateway.stack.service.send_signal(signal.SIGCONT)
    fate = await busy.fate()

    if has_pings and stall_s > GIVEN_UP_S:
        assert fate == Fate(0, STREAMS, Counter({500: WAITING}), once("stream"))
    else:
        assert fate == Fate(STREAMS, 0, Counter({200: WAITING}), once("stream", "parked"))

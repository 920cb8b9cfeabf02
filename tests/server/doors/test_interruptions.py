"""Bodies that pass through the direct door, and something happens: any event at any moment.

The oracle: what went in has come out, once and in order, to the end; or the client is told, behind
what has come out until then, and nothing follows. The slot is free in the end.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import Concurrency, ControllerConfig, Reclaim
from flowcontrol.events import Decision, DrainBegan, ObjectivesChanged
from flowcontrol.request import DEFAULT_FLOW_ID, FlowKey, Outcome
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.connection_log import ConnectionLog
from flowcontrol_server.doors.direct.connection import Line, Turns
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.limits import Http2Limits
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked
from tests.support.direct import announcing, data
from tests.support.duplex import Echo, Peer, begun, cut, part
from tests.support.gates import POOL, TIMEOUT_S, running_gate
from tests.support.way import Pipe

BATCH = -1
CONFIG = ControllerConfig(
    detectors=(Concurrency(requests_max=1),),
    reclaim=Reclaim(is_enabled=True, is_only_before_first_byte=False),
)


class Event(Enum):
    """What happens."""

    NOTHING = "nothing"
    DRAIN = "drain"
    STAND_DOWN = "stand down"
    RECALL = "recall"
    LEAVE = "leave"


PARKED = {
    Event.NOTHING: (None, Outcome.DISPATCHED),
    Event.DRAIN: (503, Outcome.EVICTED_DRAINED),
    Event.STAND_DOWN: (503, Outcome.EVICTED_STOOD_DOWN),
    Event.RECALL: (429, Outcome.EVICTED_OPERATOR),
    Event.LEAVE: (0, Outcome.EVICTED_CANCELLED),
}
"""What the client is told while its request is parked, and what became of it. None: nothing, both
bodies pass; 0: nothing, it has gone."""
IN_FLIGHT = {
    Event.NOTHING: (None, Outcome.DISPATCHED),
    Event.DRAIN: (None, Outcome.DISPATCHED),
    Event.STAND_DOWN: (None, Outcome.DISPATCHED),
    Event.RECALL: (429, Outcome.RECLAIMED),
    Event.LEAVE: (0, Outcome.DISPATCHED),
}
"""The same of one that was dispatched."""


@final
@dataclass
class Script:
    """What is sent, and when what happens."""

    asked: list[bytes]
    told: list[bytes]
    has_trailers: bool
    """Trailers end both bodies, in place of their last part."""
    early: int
    """Messages of the request that come before its dispatch."""
    event: Event
    at: int
    """Messages behind the dispatch before the event; -1: while the request is parked."""
    order: list[bool] = field(default_factory=list)
    """Whether the next message is the request's."""
    cuts: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    window: int = 65_535
    message_bytes_max: int = 4 << 20

    def messages(self, *, is_request: bool) -> list[bytes]:
        """Return what Envoy sends, as gRPC messages."""
        bodies = self.asked if is_request else self.told
        messages = [part(each, is_request=is_request) for each in bodies]
        name = "request" if is_request else "response"
        if not is_request:
            head = envoy_messages.ProcessingRequest(response_headers={})
            messages.insert(0, framed(head.SerializeToString()))
        if self.has_trailers:
            trailers = envoy_messages.ProcessingRequest(**{f"{name}_trailers": {}})
            messages.append(framed(trailers.SerializeToString()))
        else:
            messages.append(part(b"", is_end=True, is_request=is_request))
        return messages


@final
class Conversation:
    """One request of Envoy's, on a line without a socket."""

    def __init__(
        self, script: Script, gate: FlowGate, ended: list[tuple[Parked, Decision]]
    ) -> None:
        self._script = script
        self._gate = gate
        self._ended = ended
        self._is_leader = True
        self._persons = 0
        limits = Http2Limits(message_bytes_max=script.message_bytes_max)
        self._context = CallContext(gate=gate, limits=limits, may_decide=lambda: self._is_leader)
        self._line = Line(self._context, set(), lambda: None, ConnectionLog(), Turns())
        self.peer = Peer(self._line)
        self._line.connection_made(Pipe(self.peer.written))
        hello = frames.settings({frames.INITIAL_WINDOW_SIZE: script.window})
        self._line.data_received(frames.PREFACE + hello + frames.SETTINGS_ACK)

    @property
    def echo(self) -> Echo:
        """What has come back."""
        return self.peer.echo

    @property
    def is_whole(self) -> bool:
        """Whether both bodies have come back to their ends."""
        if self._script.has_trailers:
            return {"request_trailers", "response_trailers"} <= {*self.echo.messages}
        return bool(self.echo.request_ends and self.echo.response_ends)

    async def run(self) -> None:
        """Say all of it, until the end."""
        script = self._script
        asked, told = (script.messages(is_request=each) for each in (True, False))
        self.peer.say(begun(1, announcing(objective="batch")), script.cuts)
        for message in asked[: script.early]:
            self._send(message)
        async with asyncio.timeout(TIMEOUT_S):
            while (await self._gate.snapshot()).waiting != 1:
                pass
        if script.at < 0:
            await self._happen(is_parked=True)
        if script.at >= 0 or script.event is Event.NOTHING:
            await self._dispatch()
            await self._pass_bodies(asked[script.early :], told)
        self.peer.say(frames.window_update(1, 1 << 20) + frames.window_update(0, 1 << 20), ())
        await self._until_over()

    async def _dispatch(self) -> None:
        self._gate.post(POOL)
        async with asyncio.timeout(TIMEOUT_S):
            # Each octet allowed brings DATA while there is more to say, and is a flood before.
            await self.peer.answered.wait()
            while "request_headers" not in self.echo.messages:
                self.peer.say(frames.window_update(1, 1), ())
                await asyncio.sleep(0)

    async def _pass_bodies(self, asked: list[bytes], told: list[bytes]) -> None:
        script, steps = self._script, len(asked) + len(told)
        for step in range(steps):
            if step == script.at:
                await self._happen(is_parked=False)
            is_gone = script.event is Event.LEAVE and step >= script.at
            if self.peer.is_ended or is_gone:
                return
            takes_asked = bool(asked) and (not told or script.order[step % len(script.order)])
            self._send((asked if takes_asked else told).pop(0))
            width = script.widths[step % len(script.widths)]
            self.peer.say(frames.window_update(1, width), ())
            await asyncio.sleep(0)
        if script.at >= steps:
            await self._happen(is_parked=False)

    async def _happen(self, *, is_parked: bool) -> None:
        event = self._script.event
        if event is Event.DRAIN and is_parked:
            self._gate.post(DrainBegan(0))
        elif event is Event.DRAIN:
            self._context.is_closing = True
            self._line.end_with_status()
        elif event is Event.STAND_DOWN:
            self._is_leader = False
            self._line.move_calls()
        elif event is Event.RECALL and is_parked:
            assert await self._gate.evict_flow(FlowKey(BATCH, DEFAULT_FLOW_ID)) == 1
        elif event is Event.RECALL:
            self._persons = 1
            self.peer.say(begun(3), ())
        elif event is Event.LEAVE:
            self.peer.say(frames.rst_stream(1, 0), ())
            self.peer.is_ended = True  # it says nothing from now on

    async def _until_over(self) -> None:
        expected, _ = (PARKED if self._script.at < 0 else IN_FLIGHT)[self._script.event]
        async with asyncio.timeout(TIMEOUT_S):
            while expected != 0 and not (self.is_whole if expected is None else self.echo.status):
                assert not self.peer.is_ended, "neither whole nor told"
                await self.peer.spoken.wait()
                self.peer.spoken.clear()
            if not self.peer.is_ended:
                self._line.data_received(data(1, b"", is_end=True))
            self._line.connection_lost(None)
            while len(self._ended) < 1 + self._persons:  # noqa: ASYNC110 - another thread
                await asyncio.sleep(0)

    def _send(self, message: bytes) -> None:
        self.peer.say(cut(1, message), self._script.cuts)


@asynccontextmanager
async def conversation(script: Script) -> AsyncIterator[tuple[Conversation, list[Outcome]]]:
    """Let a script run; yield what was said, and what became of the request."""
    ended: list[tuple[Parked, Decision]] = []
    async with running_gate(CONFIG, has_pool=False, ended=ended) as gate:
        gate.post(ObjectivesChanged({"batch": BATCH}))
        each = Conversation(script, gate, ended)
        await each.run()
        yield each, [decision.outcome for parked, decision in ended if parked.request_id == 1]


BODY = st.lists(st.binary(min_size=1, max_size=2000), max_size=4)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Any bodies, order, cuts of frames, windows, event and moment."""
    asked, told = draw(BODY), draw(BODY)
    steps = len(asked) + len(told) + 2
    return Script(
        asked,
        told,
        has_trailers=draw(st.booleans()),
        early=draw(st.integers(0, len(asked))),
        event=draw(st.sampled_from(Event)),
        at=draw(st.integers(-1, steps)),
        order=draw(st.lists(st.booleans(), min_size=1, max_size=6)),
        cuts=draw(st.lists(st.integers(1, 40), max_size=4)),
        widths=draw(st.lists(st.integers(1, 3000), min_size=1, max_size=6)),
        window=draw(st.sampled_from([0, 1, 100, 65_535])),
        message_bytes_max=draw(st.sampled_from([4 << 20, 300])),
    )


async def check(script: Script) -> None:
    """Hold a conversation to the oracle."""
    expected, outcome = (PARKED if script.at < 0 else IN_FLIGHT)[script.event]
    async with conversation(script) as (each, outcomes):
        echo = each.echo
        assert outcomes == [outcome]
        assert b"".join(script.asked).startswith(echo.request)
        assert b"".join(script.told).startswith(echo.response)
        assert max(echo.request_ends, echo.response_ends) <= 1
        assert echo.status == (expected or 0)
        if expected is None:
            assert each.is_whole
            assert (echo.request, echo.response) == (b"".join(script.asked), b"".join(script.told))
            assert "immediate_response" not in echo.messages
        elif expected:
            assert echo.messages.index("immediate_response") == len(echo.messages) - 1
        if script.at < 0 and expected is not None:
            assert echo.messages == ["immediate_response"] * bool(expected)
        elif echo.messages:
            assert echo.messages[0] == "request_headers"


class TestEveryMoment:
    """Whole, or told."""

    @given(scripts())
    @settings(max_examples=120)
    def test_any(self, script: Script) -> None:
        """Any event, at any moment of any conversation."""
        asyncio.run(check(script))

    @pytest.mark.parametrize("event", Event)
    @pytest.mark.parametrize("at", [-1, 0, 2, 4])
    async def test_each(self, event: Event, at: int) -> None:
        """Each event while the request is parked, before its body, in it, and in the response."""
        await check(
            Script(
                [b"a" * 1000, b"b" * 1000],
                [b"c" * 1000, b"d" * 1000],
                has_trailers=False,
                early=1,
                event=event,
                at=at,
                order=[True],
                widths=[5000],
            )
        )

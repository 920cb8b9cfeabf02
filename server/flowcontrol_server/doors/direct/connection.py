"""One connection of the direct door: bytes between a socket and its core, events to its calls.

socket ─▶ Line ─▶ Http2Connection ─▶ events ─▶ Call ─▶ Exchange ─▶ gate
            ▲                                    ▲                   │
            └── one write per turn of the loop ◀─┴──── decision ◀────┘
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from typing import Final, Protocol, final

from flowcontrol_server.doors.call_context import BODY_S, CallContext
from flowcontrol_server.doors.connection_log import ConnectionLog
from flowcontrol_server.doors.direct.calls import CALLS, Call, ProcessCall, WatchCall
from flowcontrol_server.doors.http2 import grpc_framing
from flowcontrol_server.doors.http2.connection import Http2Connection
from flowcontrol_server.doors.http2.events import Ended, Event, Opened, Received, Reset
from flowcontrol_server.doors.http2.grpc_framing import FramingError, Refusal, Status

CHECK_NS: Final = 5_000_000_000
"""Interval of the checks of time limits, which are as exact as that."""
WRITE_BUFFER_BYTES: Final = 1_048_576
"""Output not taken by the system, beyond which a connection's input is not read."""
TURN_NS: Final = 1_000_000
"""Time for reading in one turn of the loop, for all connections together. The loop itself would
read up to 32 times 256 KiB from one socket first: seconds of work in small frames. A request takes
three turns from its headers to its answer."""
SLICE_NS: Final = 500_000
"""Time that one connection reads before the others have their turn."""
DEBT_TURNS: Final = 4
"""Most turns without reading, after a turn that took longer: a large field block is read in one go,
and requests under way must not wait for one in each of their turns."""
SILENT_CHECKS: Final = 2
"""Check intervals within which the first message of a new stream must come: 10 s, and up to the
next check. Envoy sends it right after the headers."""


class Reader(Protocol):
    """A connection with input."""

    def read(self, end_ns: int) -> bool:
        """Read input until this time, some at least; return whether some is left."""


@final
class Turns:
    """Divides the time of each turn of the loop among the connections that have input.

    They read in the order in which their input came. One that is not done after its slice goes to
    the end of the line, so a connection waits for at most one slice of each other one.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Reader] = deque()
        self._left_ns = TURN_NS
        """Time left in this turn; below zero: turns must pass before anything is read."""
        self._is_turn_due = False

    def read(self, reader: Reader) -> None:
        """Let a connection read: now if no other waits and the turn has time left, else later."""
        self._waiting.append(reader)
        if len(self._waiting) == 1 and self._left_ns > 0:
            self._work()
        else:
            self._turn_soon()

    def _turn_soon(self) -> None:
        if not self._is_turn_due:
            self._is_turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turn_due = False
        self._left_ns = min(TURN_NS, max(self._left_ns, -DEBT_TURNS * TURN_NS) + TURN_NS)
        if self._left_ns < 0:
            self._turn_soon()
        elif self._waiting:
            self._work()

    def _work(self) -> None:
        """Let waiting connections read until the time is over, one of them at least."""
        self._turn_soon()  # with time again
        while True:
            reader = self._waiting.popleft()
            begin_ns = time.monotonic_ns()
            if reader.read(begin_ns + min(SLICE_NS, self._left_ns)):
                self._waiting.append(reader)
            self._left_ns -= time.monotonic_ns() - begin_ns
            if not self._waiting or self._left_ns <= 0:
                return


@final
class Line(asyncio.Protocol):
    """One connection.

    Args:
        context: shared by all calls.
        lines: all connections; this one is added when it is made, and removed when it is lost.
        lost: called when it is lost.
        log: for warnings.
        turns: schedules when it reads, and for how long.
    """

    def __init__(
        self,
        context: CallContext,
        lines: "set[Line]",
        lost: Callable[[], None],
        log: ConnectionLog,
        turns: Turns,
    ) -> None:
        self.context = context
        self._log = log
        self._lines = lines
        self._turns = turns
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._connection = Http2Connection(context.limits, time.monotonic_ns())
        self._calls: dict[int, Call] = {}
        self._refused: dict[int, Refusal] = {}
        """Requests that are not gRPC calls, answered when they end: the answer by stream id."""
        self._silent: dict[int, None] = {}
        """Streams of either kind without a message so far, in the order of their opening."""
        self._watching = 0
        """Calls that watch health."""
        self._newest_id = 0
        """Id of the newest stream."""
        self._checked_ids = deque[int](maxlen=SILENT_CHECKS)
        """The same at the previous checks."""
        self._overdue: list[int] = []
        """Streams that have been silent for too long, oldest last."""
        self._echoing: list[ProcessCall] = []
        """Calls with parts of bodies to send back."""
        self._partial_bytes = 0
        self._is_flush_due = False
        self._input = b""
        """Input that has not been passed to the core."""
        self._is_waiting = False
        """There is input to read in a later turn."""
        self._is_reading = True
        self._is_lost = False
        self._idle_ns = time.monotonic_ns()
        """Since when no stream is open, if none is."""
        self._is_used = False
        """A message has come."""
        self._half_closed_ns: int | None = None
        """When this side was closed; the client has one check interval to close its own."""
        self._stalled_ns: int | None = None
        """Since when the system takes no more output; None: it does."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Start, or reject a connection that is one too many or chose another protocol in TLS."""
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.cut_off("ALPN must be h2")
        elif self.context.is_closing:
            self.abort()
        elif not self._has_place():
            self.cut_off(f"connections must be at most {self.context.limits.connections_max}")
        else:
            self._lines.add(self)
            transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
            self._flush()

    def data_received(self, data: bytes) -> None:
        """Keep the data and read it when its turn comes, which may be at once."""
        self._input = self._input + data if self._input else data
        self._read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all calls under way."""
        del exc  # requests do not depend on the reason
        self._is_lost = True
        self._lose_calls()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read: its requests would make more output."""
        self._stalled_ns = time.monotonic_ns()
        self._pace()

    def resume_writing(self) -> None:
        """Resume reading."""
        self._stalled_ns = None
        self._read_on()

    def read(self, end_ns: int) -> bool:
        """Read input until this time; return whether some is left."""
        self._is_waiting = False
        if self._stalled_ns is None and not (self._is_lost or self._transport.is_closing()):
            data, self._input = self._input, b""
            now_ns = time.monotonic_ns()
            self._handle(self._connection.receive(data, now_ns))
            while self._connection.is_behind and (now_ns := time.monotonic_ns()) < end_ns:
                self._handle(self._connection.receive(b"", now_ns))
            self._is_waiting = self._connection.is_behind
        self._pace()
        return self._is_waiting

    def drain(self) -> None:
        """Ask the client to open no more streams."""
        self._connection.begin_drain()
        self._flush_soon()

    def end_with_status(self) -> None:
        """End the streams of requests in flight, accept no more, half-close when none is left."""
        for call in list(self._calls.values()):
            call.let_go()
        self._connection.end_drain()
        self._flush_soon()

    def move_calls(self) -> None:
        """End all calls so that another replica takes them up."""
        for call in list(self._calls.values()):
            call.move()
        self._flush_soon()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    @property
    def idleness(self) -> tuple[bool, int] | None:
        """Rank among idle connections: the lowest is closed first; None: it is not idle.

        A stream that watches health, or has sent nothing, does not count: any client may open one.
        """
        return None if self._places else (self._is_used, self._idle_ns)

    @property
    def _places(self) -> int:
        """Number of streams for which the connection must stay open."""
        return len(self._calls) + len(self._refused) - len(self._silent) - self._watching

    def _has_place(self) -> bool:
        """Return whether one more connection is allowed; an idle one is closed for it if necessary.

        Otherwise idle connections would keep out an Envoy that restarts. Connections that never had
        a message are closed first, the oldest of them first.
        """
        if len(self._lines) < self.context.limits.connections_max:
            return True
        idle = [(rank, id(line), line) for line in self._lines if (rank := line.idleness)]
        if not idle:
            return False
        _, _, line = min(idle)
        self._lines.discard(line)  # it is lost in a later turn; its place is free now
        line.cut_off("idle, and another connection needs its place")
        return True

    def cut_off(self, reason: str) -> None:
        """End the connection at once, and log why."""
        self._log.report("direct_connection_cut_off", reason=reason)
        self._transport.abort()

    def check(self, now_ns: int) -> None:
        """Check that the client keeps its time limits."""
        stall_ns = self.context.limits.write_stall_ns
        if self._half_closed_ns is not None:
            if now_ns - self._half_closed_ns >= CHECK_NS:
                self.abort()
        elif self._stalled_ns is not None and now_ns - self._stalled_ns >= stall_ns:
            self.cut_off(f"output must be read within {stall_ns / 1e9:g} s")
        else:
            self._handle(self._connection.check(now_ns))
            self._check_silent()

    def send(self, stream_id: int, message: bytes, *, is_first: bool) -> None:
        """Send one message, after the headers if it is the first."""
        if is_first:
            self._connection.send_headers(stream_id, grpc_framing.HEADERS)
        self._connection.send_data(stream_id, grpc_framing.framed(message))
        self._flush_soon()

    def end_call(self, call: Call, ending: bytes) -> None:
        """Send the end of a call and forget it."""
        self._connection.send_trailers(call.stream_id, ending)
        self._forget(call)
        self._flush_soon()

    def heard(self, call: Call) -> None:
        """Note the first message of a call."""
        self._is_used = True
        del self._silent[call.stream_id]
        self._watching += isinstance(call, WatchCall)

    def hold(self, change_bytes: int) -> None:
        """Account for parts of messages and bodies.

        Raises:
            FramingError: all calls together hold too much of them.
        """
        self._partial_bytes += change_bytes
        bytes_max = self.context.limits.partial_bytes_max
        if change_bytes > 0 and self._partial_bytes > bytes_max:
            reason = (
                f"parts of messages and bodies must be at most {bytes_max} bytes on a connection"
            )
            raise FramingError(Status.RESOURCE_EXHAUSTED, reason)

    def pause(self, stream_id: int, *, is_paused: bool) -> None:
        """Stop widening the window of a stream, or go on."""
        self._connection.hold(stream_id, is_held=is_paused)
        if not is_paused:
            self._flush_soon()

    def park_soon(self, park: Callable[[], None]) -> None:
        """Call a function at the end of this turn of the loop."""
        self._loop.call_soon(park, context=self.context.callbacks)

    def park_later(self, park: Callable[[], None]) -> None:
        """Call a function after `BODY_S`."""
        self._loop.call_later(BODY_S, park, context=self.context.callbacks)

    def echo_soon(self, call: ProcessCall) -> None:
        """Make a call send its echo before the next write."""
        self._echoing.append(call)
        self._flush_soon()

    @property
    def owes_echoes(self) -> bool:
        """Whether bodies are under way on a stream."""
        return any(isinstance(c, ProcessCall) and c.owes_echoes for c in self._calls.values())

    def _read_on(self) -> None:
        """Wait for a turn to read, if there is input and the output is not stalled."""
        has_input = bool(self._input) or self._connection.is_behind
        if has_input and not self._is_waiting and self._stalled_ns is None:
            self._is_waiting = True
            self._turns.read(self)
        self._pace()

    def _pace(self) -> None:
        """Read from the socket only if all input before was read and no output is stalled."""
        is_reading = self._stalled_ns is None and not self._is_waiting
        if is_reading == self._is_reading or self._transport.is_closing():
            return
        self._is_reading = is_reading
        if is_reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Received():
                    self._receive(event)
                case Opened():
                    self._open(event)
                case Reset():  # by position it would take five times as long
                    self._reset(event.stream_id)
                case Ended(code, reason):
                    self._log.report("direct_connection_failed", code=code.name, reason=reason)
                    self._lose_calls()
        if self._connection.is_due:
            self._flush_soon()

    def _reset(self, stream_id: int) -> None:
        call = self._calls.get(stream_id)
        if call is not None:
            self._forget(call).lose()
        elif stream_id in self._refused:
            del self._refused[stream_id], self._silent[stream_id]

    def _receive(self, received: Received) -> None:
        call = self._calls.get(received.stream_id)
        if call is not None:
            call.take(received.data, is_ended=received.is_ended)
        elif received.is_ended and received.stream_id in self._refused:
            self._refuse_now(received.stream_id)

    def _open(self, opened: Opened) -> None:
        stream_id = self._newest_id = opened.stream_id
        refusal = grpc_framing.refusal(opened.head, CALLS)
        if refusal is None:
            kind = CALLS[opened.head.path]
            refusal = kind.refusal(self.context, opened.head)
        if refusal is None:
            self._silent[stream_id] = None
            call = self._calls[stream_id] = kind(self, stream_id, opened.head)
            if opened.is_ended:
                call.take(b"", is_ended=True)
        elif refusal.is_grpc or opened.is_ended:
            self._refuse(stream_id, refusal)
        else:
            self._silent[stream_id] = None
            self._refused[stream_id] = refusal

    def _refuse_now(self, stream_id: int) -> None:
        del self._silent[stream_id]
        self._refuse(stream_id, self._refused.pop(stream_id))

    def _refuse(self, stream_id: int, refusal: Refusal) -> None:
        if refusal.body:
            self._connection.send_headers(stream_id, refusal.block)
            self._connection.send_data(stream_id, refusal.body, is_end=True)
        else:
            self._connection.send_trailers(stream_id, refusal.block)

    def _forget(self, call: Call) -> Call:
        stream_id = call.stream_id
        del self._calls[stream_id]
        if stream_id in self._silent:
            del self._silent[stream_id]
        else:
            self._watching -= isinstance(call, WatchCall)
        self._partial_bytes -= call.held_bytes
        if not self._places:
            self._idle_ns = time.monotonic_ns()
        return call

    def _check_silent(self) -> None:
        """End the streams that were opened some checks ago and have sent nothing since."""
        if len(self._checked_ids) == SILENT_CHECKS and not self._overdue:
            due_id = self._checked_ids[0]
            self._overdue = [*takewhile(lambda each: each <= due_id, self._silent)]
            self._overdue.reverse()
            self._end_overdue()
        self._checked_ids.append(self._newest_id)

    def _end_overdue(self) -> None:
        """End streams that are silent for too long, for one slice of time at once."""
        end_ns = time.monotonic_ns() + SLICE_NS
        while self._overdue:
            stream_id = self._overdue.pop()
            if stream_id not in self._silent:
                continue
            call = self._calls.get(stream_id)
            if call is None:
                self._refuse_now(stream_id)
            else:
                call.finish(Status.DEADLINE_EXCEEDED, "the first message must come within 10 s")
            if time.monotonic_ns() >= end_ns:
                self._loop.call_soon(self._end_overdue, context=self.context.callbacks)
                break
        self._flush_soon()

    def _lose_calls(self) -> None:
        """Lose all calls, for one slice of time at once.

        The latest goes first, so that the engine gives no freed slot to a request about to leave.
        """
        self._refused.clear()
        self._silent.clear()
        self._overdue.clear()
        end_ns = time.monotonic_ns() + SLICE_NS
        while self._calls:
            _, call = self._calls.popitem()
            self._partial_bytes -= call.held_bytes
            call.lose()
            if time.monotonic_ns() >= end_ns:
                self._loop.call_soon(self._lose_calls, context=self.context.callbacks)
                return
        if self._is_lost and self in self._lines:
            self._lines.discard(self)
            self._lost()

    def _flush_soon(self) -> None:
        """Write once, at the end of this turn of the loop, all output until then."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush, context=self.context.callbacks)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._echoing:
            echoing, self._echoing = self._echoing, []
            for call in echoing:
                call.send_echo()
        if self._half_closed_ns is not None or self._transport.is_closing():
            return
        data = self._connection.data_to_send()
        if data:
            self._transport.write(data)
        queued_bytes = self._connection.queued_bytes + self._transport.get_write_buffer_size()
        if self._connection.is_closed or self._connection.is_drained:
            self._half_close()
        elif queued_bytes > self.context.limits.queued_bytes_max:
            self.cut_off(f"output must be read, got {queued_bytes} bytes unread")

    def _half_close(self) -> None:
        """Close this side, and wait until the client closes its own, so that no output is lost."""
        self._half_closed_ns = time.monotonic_ns()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

"""One connection of the direct door: bytes between a socket and its core, events to its calls.

socket ─▶ Line ─▶ Http2Connection ─▶ events ─▶ Call ─▶ Exchange ─▶ gate
            ▲                                    ▲                   │
            └── one write per turn of the loop ◀─┴──── decision ◀────┘
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, final

import structlog

from server.direct_calls import CALLS, Call
from server.http2 import grpc_framing
from server.http2.connection import Http2Connection
from server.http2.events import Ended, Event, Opened, Received, Reset
from server.http2.grpc_framing import FramingError, Refusal, Status
from server.terms import Terms

CHECK_NS: Final = 5_000_000_000
"""How often connections are checked for time limits, which are kept that exactly."""
WRITE_BUFFER_BYTES: Final = 1_048_576
"""Output the system has not taken, beyond which a connection's input is not read."""
_log = structlog.get_logger()


@final
class Line(asyncio.Protocol):
    """One connection.

    Args:
        terms: what holds for every call.
        lines: all connections; it joins them as it is made and leaves them as it is lost.
        lost: called then.
    """

    def __init__(self, terms: Terms, lines: "set[Line]", lost: Callable[[], None]) -> None:
        self.terms = terms
        self._lines = lines
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._connection = Http2Connection(terms.limits, time.monotonic_ns())
        self._calls: dict[int, Call] = {}
        self._refused: dict[int, Refusal] = {}
        """Requests that are no calls, which are answered when they end: stream id to answer."""
        self._partial_bytes = 0
        self._is_flush_due = False
        self._hung_up_ns: int | None = None
        """When we said our last; the client may take one check to say its own."""
        self._stalled_ns: int | None = None
        """Since when the system takes no more output."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Greet, or turn away who is one too many or chose another protocol in TLS."""
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._cut_off("ALPN must be h2")
        elif self.terms.is_closing:
            self.abort()
        elif len(self._lines) >= self.terms.limits.connections_max:
            self._cut_off(f"connections must be at most {self.terms.limits.connections_max}")
        else:
            self._lines.add(self)
            transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
            self._flush()

    def data_received(self, data: bytes) -> None:
        """Pass on what came."""
        self._handle(self._connection.receive(data, time.monotonic_ns()))

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what was under way."""
        del exc  # why does not matter to a request
        self._lose_calls()
        self._lines.discard(self)
        self._lost()

    def pause_writing(self) -> None:
        """Read no more from a client that does not read: whatever it asks makes more output."""
        self._stalled_ns = time.monotonic_ns()
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on."""
        self._stalled_ns = None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def drain(self) -> None:
        """Ask the client to open no more streams."""
        self._connection.begin_drain()
        self._flush_soon()

    def end_politely(self) -> None:
        """Let requests in flight go, take no more, and hang up when none is left."""
        for call in list(self._calls.values()):
            call.let_go()
        self._connection.end_drain()
        self._flush_soon()

    def abort(self) -> None:
        """Cut the client off."""
        self._transport.abort()

    def check(self, now_ns: int) -> None:
        """Look whether the client keeps its time limits."""
        stall_ns = self.terms.limits.write_stall_ns
        if self._hung_up_ns is not None:
            if now_ns - self._hung_up_ns >= CHECK_NS:
                self.abort()
        elif self._stalled_ns is not None and now_ns - self._stalled_ns >= stall_ns:
            self._cut_off(f"output must be read within {stall_ns / 1e9:g} s")
        else:
            self._handle(self._connection.check(now_ns))

    def send(self, stream_id: int, message: bytes, *, is_first: bool) -> None:
        """Send one message, behind the headers if it is the first."""
        if is_first:
            self._connection.send_headers(stream_id, grpc_framing.HEADERS)
        self._connection.send_data(stream_id, grpc_framing.framed(message))
        self._flush_soon()

    def end_call(self, call: Call, ending: bytes) -> None:
        """Send the end of a call and forget it."""
        self._connection.send_trailers(call.stream_id, ending)
        self._forget(call)
        self._flush_soon()

    def hold(self, change_bytes: int) -> None:
        """Account for parts of messages.

        Raises:
            FramingError: all calls together hold too much of them.
        """
        self._partial_bytes += change_bytes
        bytes_max = self.terms.limits.partial_bytes_max
        if change_bytes > 0 and self._partial_bytes > bytes_max:
            reason = f"parts of messages must be at most {bytes_max} bytes on a connection"
            raise FramingError(Status.RESOURCE_EXHAUSTED, reason)

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Received():
                    call = self._calls.get(event.stream_id)
                    if call is not None:
                        call.take(event.data, is_ended=event.is_ended)
                    elif event.is_ended and event.stream_id in self._refused:
                        refusal = self._refused.pop(event.stream_id)
                        self._refuse(event.stream_id, refusal)
                case Opened():
                    self._open(event)
                case Reset(stream_id):
                    self._refused.pop(stream_id, None)
                    if stream_id in self._calls:
                        self._forget(self._calls[stream_id]).lose()
                case Ended(code, reason):
                    _log.warning("direct_connection_failed", code=code.name, reason=reason)
                    self._lose_calls()
        self._flush_soon()

    def _open(self, opened: Opened) -> None:
        stream_id = opened.stream_id
        refusal = grpc_framing.refusal(opened.head, CALLS)
        if refusal is None:
            call = self._calls[stream_id] = CALLS[opened.head.path](self, stream_id, opened.head)
            if opened.is_ended:
                call.take(b"", is_ended=True)
        elif refusal.is_grpc or opened.is_ended:
            self._refuse(stream_id, refusal)
        else:
            self._refused[stream_id] = refusal

    def _refuse(self, stream_id: int, refusal: Refusal) -> None:
        if refusal.body:
            self._connection.send_headers(stream_id, refusal.block)
            self._connection.send_data(stream_id, refusal.body, is_end=True)
        else:
            self._connection.send_trailers(stream_id, refusal.block)

    def _forget(self, call: Call) -> Call:
        del self._calls[call.stream_id]
        self._partial_bytes -= call.held_bytes
        return call

    def _lose_calls(self) -> None:
        for call in self._calls.values():
            call.lose()
        self._calls.clear()
        self._refused.clear()
        self._partial_bytes = 0

    def _flush_soon(self) -> None:
        """Write once, at the end of this turn of the loop, whatever comes together until then."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush, context=self.terms.context)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._hung_up_ns is not None or self._transport.is_closing():
            return
        data = self._connection.data_to_send()
        if data:
            self._transport.write(data)
        queued_bytes = self._connection.queued_bytes + self._transport.get_write_buffer_size()
        if self._connection.is_closed or self._connection.is_drained:
            self._hang_up()
        elif queued_bytes > self.terms.limits.queued_bytes_max:
            self._cut_off(f"output must be read, got {queued_bytes} bytes that are not")

    def _hang_up(self) -> None:
        """Say no more, and wait for the client to do the same: nothing on its way to it is lost."""
        self._hung_up_ns = time.monotonic_ns()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _cut_off(self, reason: str) -> None:
        _log.warning("direct_connection_cut_off", reason=reason)
        self._transport.abort()

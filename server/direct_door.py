"""The direct door: Envoy's ext_proc streams over our own HTTP/2, straight to the gate.

It carries the same conversation as the grpcio door (`ext_proc`), for Envoy alone and for a tenth
of the cost: no task and no queue per request, only callbacks on the loop.

    socket ─▶ _Line ─▶ Http2Connection ─▶ events ─▶ _Call ─▶ Exchange ─▶ gate
                ▲                                     ▲                    │
                └── one write per turn of the loop ◀──┴──── decision ◀─────┘

A call has no more states than its exchange. It ends in one of two ways, `finish` (we end it, with a
status) and `lose` (it is gone); either leaves the gate, once.
"""

import asyncio
import contextvars
import random
import ssl
import time
from pathlib import Path
from typing import final

import structlog

from flowcontrol.events import Decision
from server.classify import ExemptPaths
from server.codec import SERVICE, MalformedMessageError, decode, encode
from server.exchange import Exchange, Park, Phase, ProtocolError, Reply
from server.gate import FlowGate, Parked
from server.http2 import grpc_framing
from server.http2.connection import Http2Connection
from server.http2.events import Ended, Event, Opened, Received, Reset
from server.http2.grpc_framing import FramingError, Status
from server.http2.limits import Http2Limits
from server.listening import listen
from server.replies import answer

PROCESS = f"/{SERVICE}/Process".encode()
CHECK_S = 5.0
"""How often connections are checked for time limits, which are kept that exactly."""
WRITE_BUFFER_BYTES = 1_048_576
"""Output the system has not taken, beyond which a connection's input is not read."""
_SECOND_NS = 1_000_000_000
_log = structlog.get_logger()


@final
class DirectDoor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor/Process` over HTTP/2.

    Args:
        gate: where requests are parked.
        exempt: paths that pass ungated.
        continue_on_fault: what becomes of requests when the engine has failed.
        picks: whether the engine chooses the endpoints.
        limits: what a client may ask for.
    """

    def __init__(
        self,
        gate: FlowGate,
        exempt: ExemptPaths,
        *,
        continue_on_fault: bool,
        picks: bool = False,
        limits: Http2Limits | None = None,
    ) -> None:
        self.gate = gate
        self.exempt = exempt
        self.continue_on_fault = continue_on_fault
        self.picks = picks
        self.limits = limits or Http2Limits()
        self.chance = random.Random()  # noqa: S311 - spreads retries, keeps no secret
        self.context = contextvars.copy_context()
        """One for all callbacks: asyncio would copy one for each request."""
        self.lines: set[_Line] = set()
        self.is_closing = False
        """Requests in flight are let go, and none become so."""
        self._servers: list[asyncio.Server] = []
        self._paths: list[Path] = []
        self._loop = asyncio.get_running_loop()
        self._checking = self._loop.call_later(CHECK_S, self._check)
        self._emptied: asyncio.Future[None] | None = None

    async def listen(
        self, address: tuple[str, int] | Path, ssl_context: ssl.SSLContext | None = None
    ) -> int:
        """Open the door at one more address; return its port, 0 for a Unix socket.

        Args:
            address: host and port, or the path of a Unix socket.
            ssl_context: for TLS, and for mTLS when it asks for certificates. Its ALPN is set to h2,
                which clients must choose (RFC 9113, 3.2).

        Raises:
            ListenError: naming the address.
        """
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(["h2"])
        server = await listen(lambda: _Line(self), address, ssl_context)
        self._servers.append(server)
        if isinstance(address, Path):
            self._paths.append(address)
            return 0
        port: int = server.sockets[0].getsockname()[1]
        return port

    def begin_drain(self) -> None:
        """Ask every client to use this connection no more; what is under way goes on.

        The door stays open: who comes is told by the gate why there is no service.
        """
        for line in self.lines:
            line.drain()

    async def close(self, grace_s: float) -> None:
        """Take no more connections, end requests in flight politely, and hang up.

        A stream that breaks off makes Envoy break off the response; one that ends with OK after its
        answer leaves the response alone.

        Args:
            grace_s: how long clients may take to hang up on their side; then they are cut off.
        """
        self.is_closing = True
        for server in self._servers:
            server.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for line in list(self.lines):
            line.end_politely()
        self._checking.cancel()
        if self.lines:
            self._emptied = self._loop.create_future()
            await asyncio.wait((self._emptied,), timeout=grace_s)
            for line in list(self.lines):
                line.abort()
            await self._emptied

    def line_lost(self, line: "_Line") -> None:
        """Take note that a connection is no more."""
        self.lines.discard(line)
        if self._emptied is not None and not self.lines and not self._emptied.done():
            self._emptied.set_result(None)

    def _check(self) -> None:
        self._checking = self._loop.call_later(CHECK_S, self._check)
        now_ns = time.monotonic_ns()
        for line in list(self.lines):
            line.check(now_ns)


@final
class _Call:
    """One request of Envoy's, from its stream's beginning to its end."""

    __slots__ = (
        *("_exchange", "_is_begun", "_is_ended", "_is_gone", "_line", "_parked"),
        *("held", "stream_id"),
    )

    def __init__(self, line: "_Line", stream_id: int) -> None:
        self._line = line
        self.stream_id = stream_id
        self.held: bytearray | None = None
        """The beginning of a message."""
        self._exchange = Exchange(line.door.exempt)
        self._parked: Parked | None = None
        self._is_begun = False
        """An answer was written."""
        self._is_ended = False
        """The client has said everything."""
        self._is_gone = False
        """Nothing is to be said any more."""

    def take(self, data: bytes, *, is_ended: bool) -> None:
        """Take more of what the client says."""
        try:
            for message in self._messages(data):
                if not self._is_gone:
                    self._answer(message)
            if is_ended:
                self._end()
        except FramingError as error:
            self.finish(error.status, str(error))
        except (ProtocolError, MalformedMessageError) as error:
            self.finish(Status.INVALID_ARGUMENT, str(error))

    def let_go(self) -> None:
        """End the stream if its request is in flight: politely, so that the response goes on."""
        if self._exchange.phase is Phase.GOING:
            self.finish()

    def lose(self) -> None:
        """Take note that the stream is gone."""
        self._is_gone = True
        self._leave()

    def finish(self, status: Status = Status.OK, reason: str = "") -> None:
        """End the stream with a status."""
        if not self._is_gone:
            ending = grpc_framing.ending(status, reason, is_begun=self._is_begun)
            self._line.end_call(self, ending)
            self.lose()

    def _messages(self, data: bytes) -> list[bytes]:
        held = self.held
        held_bytes = len(held) if held else 0
        bytes_max = self._line.door.limits.message_bytes_max
        messages, self.held = grpc_framing.split(held, data, bytes_max)
        if self.held is not None or held_bytes:
            self._line.hold((len(self.held) if self.held else 0) - held_bytes)
        return messages

    def _answer(self, message: bytes) -> None:
        reply = self._exchange.receive(decode(message))
        if isinstance(reply, Park):
            door = self._line.door
            self._parked = door.gate.park(reply.facts)
            self._parked.future.add_done_callback(self._decided, context=door.context)
        else:
            self._say(reply)

    def _decided(self, future: asyncio.Future[Decision]) -> None:
        if not self._is_gone:
            door = self._line.door
            chance = door.chance.random()
            decided = answer(future.result(), chance, continue_on_fault=door.continue_on_fault)
            self._say(self._exchange.decide(decided))

    def _say(self, reply: Reply) -> None:
        door = self._line.door
        message = encode(reply, picks=door.picks)
        self._line.send(self.stream_id, message, is_first=not self._is_begun)
        self._is_begun = True
        if self._is_ended or door.is_closing or self._exchange.phase is Phase.OVER:
            self.finish()

    def _end(self) -> None:
        """Take note that the client has said everything.

        A request that is parked has ended by that, but is told its decision all the same: a stream
        that ends unanswered would let it through.
        """
        if self.held is not None:
            reason = "the last message must be whole"
            raise FramingError(Status.INTERNAL, reason)
        self._is_ended = True
        if self._exchange.phase is Phase.PARKED:
            self._leave()
        else:
            self.finish()

    def _leave(self) -> None:
        if self._parked is not None and self._parked.left_ns is None:
            self._line.door.gate.leave(self._parked)


@final
class _Line(asyncio.Protocol):
    """One connection: carries bytes between a socket and its core, events to its calls."""

    def __init__(self, door: DirectDoor) -> None:
        self.door = door
        self._loop = asyncio.get_running_loop()
        self._connection = Http2Connection(door.limits, time.monotonic_ns())
        self._calls: dict[int, _Call] = {}
        self._refused: dict[int, bytes] = {}
        """Requests that are no calls, which are answered when they end: stream id to answer."""
        self._partial_bytes = 0
        self._is_flush_due = False
        self._hung_up_ns: int | None = None
        """When we said our last; the client may take one check to say its own."""
        self._stalled_ns: int | None = None
        """Since when the system takes no more output."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Greet, or turn away who is one too many or chose another protocol in TLS."""
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._cut_off("ALPN must be h2")
        elif self.door.is_closing:
            self.abort()
        elif len(self.door.lines) >= self.door.limits.connections_max:
            self._cut_off(f"connections must be at most {self.door.limits.connections_max}")
        else:
            self.door.lines.add(self)
            transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
            self._flush()

    def data_received(self, data: bytes) -> None:
        """Pass on what came."""
        self._handle(self._connection.receive(data, time.monotonic_ns()))

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what was under way."""
        del exc  # why does not matter to a request
        self._lose_calls()
        self.door.line_lost(self)

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
        stall_s = self.door.limits.write_stall_s
        if self._hung_up_ns is not None:
            if now_ns - self._hung_up_ns >= CHECK_S * _SECOND_NS:
                self.abort()
        elif self._stalled_ns is not None and now_ns - self._stalled_ns >= stall_s * _SECOND_NS:
            self._cut_off(f"output must be read within {stall_s} s")
        else:
            self._handle(self._connection.check(now_ns))

    def send(self, stream_id: int, message: bytes, *, is_first: bool) -> None:
        """Send one message, behind the headers if it is the first."""
        if is_first:
            self._connection.send_headers(stream_id, grpc_framing.HEADERS)
        self._connection.send_data(stream_id, grpc_framing.framed(message))
        self._flush_soon()

    def end_call(self, call: _Call, ending: bytes) -> None:
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
        bytes_max = self.door.limits.partial_bytes_max
        if self._partial_bytes > bytes_max:
            reason = f"parts of messages must be at most {bytes_max} bytes on a connection"
            raise FramingError(Status.RESOURCE_EXHAUSTED, reason)

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Received(stream_id, data, is_ended):
                    self._receive(stream_id, data, is_ended=is_ended)
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
        refusal = grpc_framing.refusal(opened.head, PROCESS)
        if refusal is None:
            call = self._calls[stream_id] = _Call(self, stream_id)
            if opened.is_ended:
                call.take(b"", is_ended=True)
        elif refusal.is_grpc or opened.is_ended:
            self._connection.send_trailers(stream_id, refusal.block)
        else:
            self._refused[stream_id] = refusal.block

    def _receive(self, stream_id: int, data: bytes, *, is_ended: bool) -> None:
        call = self._calls.get(stream_id)
        if call is not None:
            call.take(data, is_ended=is_ended)
        elif is_ended and stream_id in self._refused:
            self._connection.send_trailers(stream_id, self._refused.pop(stream_id))

    def _forget(self, call: _Call) -> _Call:
        del self._calls[call.stream_id]
        self._partial_bytes -= len(call.held) if call.held else 0
        return call

    def _lose_calls(self) -> None:
        for call in self._calls.values():
            call.lose()
        self._calls.clear()
        self._refused.clear()

    def _flush_soon(self) -> None:
        """Write once, at the end of this turn of the loop, whatever comes together until then."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush, context=self.door.context)

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
        elif queued_bytes > self.door.limits.queued_bytes_max:
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

"""Pure. The server's side of one HTTP/2 connection: bytes and the time in, events and bytes out.

    events = connection.receive(data, now_ns)     events in order; while `is_behind`, call it again
    connection.send_headers / send_data / send_trailers / reset(stream_id, ...)
    bytes  = connection.data_to_send()            output to write; call it after every other call
    events = connection.check(now_ns)             every few seconds: time limits of the client

The events do not depend on how the bytes are cut. An error on a stream ends that stream. An error
after which the two ends could disagree on the state of the connection ends the connection (RFC
9113, 5.4), and nothing more is read.

The states of a stream (5.1) as they are kept here. A server's stream ends with its answer. If the
client could still send, RST_STREAM(NO_ERROR) asks it to stop (8.1), and frames that it sent before
are ignored.

    idle ──HEADERS──▶ open ──END_STREAM──▶ half-closed (remote)      both in `_streams`
                        │                     │
                        └─ the answer ends, or RST_STREAM from either side ──▶ closed: forgotten

Ids above the highest ever used are idle; all others that are not in `_streams` are closed.
"""

from collections import deque
from typing import Final, final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import (
    ConnectionFault,
    ErrorCode,
    StreamFault,
    break_protocol,
)
from flowcontrol_server.doors.http2.events import Ended, Event, Opened, Received, Reset
from flowcontrol_server.doors.http2.headers import FieldBlock, HeaderReader
from flowcontrol_server.doors.http2.limits import Budgets, Http2Limits
from flowcontrol_server.doors.http2.liveness import Liveness
from flowcontrol_server.doors.http2.outflow import Outflow
from flowcontrol_server.doors.http2.stream import Stream

_RESET_REMEMBERED_MAX: Final = 1_024
"""Reset streams that are remembered, because late frames on them are no error; then the oldest are
forgotten."""
_READ_BYTES: Final = 1_024
"""Bytes read by one call, in whole frames: tenths of a ms of work for the smallest frames."""
_PRIORITY_BYTES: Final = 5
"""Bytes of priority in HEADERS, before the field block."""
_DRAIN_PING: Final = b"draining"
_KEEPALIVE_PING: Final = b"are you?"


@final
class Http2Connection:
    """One connection with its streams; their content is opaque.

    Args:
        limits: limits for the client.
        now_ns: the time, monotonic, when the connection begins.
    """

    def __init__(self, limits: Http2Limits, now_ns: int) -> None:
        self._limits = limits
        self._outflow = Outflow()
        self._headers = HeaderReader(limits)
        self._budgets = Budgets(now_ns)
        self._liveness = Liveness(limits, now_ns)
        self._events: list[Event] = []
        self._input = b""
        self._position = 0
        """Offset of the next frame in the input."""
        self._is_preface_due = True
        self._is_first_settings_due = True
        self._is_ack_due = True
        self._open_block: FieldBlock | None = None
        self._streams: dict[int, Stream] = {}
        self._reset_ids: set[int] = set()
        self._reset_order: deque[int] = deque()
        """The same in order, including those that the client has reset, too."""
        self._highest_id = 0
        self._reset_count = 0
        self._unread = 0
        self._paid_updates = 0
        self._last_id: int | None = None
        """The highest stream that is served; None: before the second GOAWAY."""
        self.is_behind = False
        """There is input that was not read yet."""
        self.is_draining = False
        self.is_closed = False
        """Nothing more is read, and nothing sent except what `data_to_send` returns."""
        self._send(frames.settings(limits.announced()))  # must come first (3.4)
        increment = limits.connection_window_bytes - frames.WINDOW_DEFAULT
        if increment:
            self._send(frames.window_update(0, increment))

    @property
    def is_drained(self) -> bool:
        """Whether a drain is complete: no stream is open, and none will be."""
        return self._last_id is not None and not self._streams

    @property
    def is_due(self) -> bool:
        """Whether there is output, or a drain is complete."""
        return bool(self._outflow.ready) or self.is_drained

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the client's windows."""
        return self._outflow.queued_bytes

    def receive(self, data: bytes, now_ns: int) -> list[Event]:
        """Take bytes from the client; return their events, in order.

        A call does a bounded amount of work. While `is_behind`, further calls do the rest.

        Args:
            data: bytes as they came, cut anywhere; empty: read on.
            now_ns: the time, monotonic.
        """
        if self.is_closed:
            return []
        self._budgets.now_ns = now_ns
        self._liveness.heard(now_ns)
        self._events = []
        try:
            if data:
                self._input = self._input[self._position :] + data if self._input else data
                self._position = 0
            self._read()
        except ConnectionFault as fault:
            self._fail(fault)
        return self._events

    def data_to_send(self) -> bytes:
        """Return the output that can be written now, and remove it."""
        ready = self._outflow.ready
        data = b"".join(ready)
        ready.clear()
        return data

    def send_headers(self, stream_id: int, block: bytes) -> None:
        """Begin an answer. On a closed stream nothing happens, as for all sending.

        Args:
            stream_id: id of a stream that was opened.
            block: field block from `encode_block`.
        """
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._outflow.send_block(stream, block, is_end=False)

    def send_data(self, stream_id: int, data: bytes, *, is_end: bool = False) -> None:
        """Send a part of the body; bytes beyond the client's windows wait."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._outflow.send_data(stream, data, is_end=is_end)
            self._close_ended()

    def send_trailers(self, stream_id: int, block: bytes) -> None:
        """End an answer with this block: trailers, or headers if it is the whole answer."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._outflow.send_block(stream, block, is_end=True)
            self._close_ended()

    def hold(self, stream_id: int, *, is_held: bool) -> None:
        """Stop widening the window of a stream, or go on."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.is_held = is_held
            self._widen(stream)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Reset a stream."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._send_reset(stream_id, code)

    def begin_drain(self) -> None:
        """Ask the client to open no more streams, without refusing any (6.8).

        The first GOAWAY names no last stream. Once the PING after it is answered, the client has
        read it, so the second GOAWAY refuses no stream that was already on its way.
        """
        if not self.is_draining and not self.is_closed:
            self.is_draining = True
            self._send(frames.goaway(frames.STREAM_ID_MAX, ErrorCode.NO_ERROR))
            self._send(frames.frame(frames.PING, 0, 0, _DRAIN_PING))

    def end_drain(self) -> None:
        """Accept no more streams, whether or not the client has read the first GOAWAY."""
        if self._last_id is None and not self.is_closed:
            self.is_draining = True
            self._last_id = self._highest_id
            self._send(frames.goaway(self._last_id, ErrorCode.NO_ERROR))

    def check(self, now_ns: int) -> list[Event]:
        """Check the client's time limits: send a PING, or end the connection, if necessary."""
        if self.is_closed:
            return []
        self._events = []
        is_greeted = not (self._is_first_settings_due or self._is_ack_due)
        try:
            if self._liveness.check(now_ns, is_greeted=is_greeted, is_idle=not self._streams):
                self._send(frames.frame(frames.PING, 0, 0, _KEEPALIVE_PING))
        except ConnectionFault as fault:
            self._fail(fault)
        return self._events

    def _read(self) -> None:
        data, position = self._input, self._position
        if self._is_preface_due:
            position = self._read_preface(data)
        end, read_end = len(data), position + _READ_BYTES
        bytes_max = self._limits.frame_bytes_max
        self.is_behind = False
        while end - position >= frames.FRAME_HEADER_BYTES and not self._is_preface_due:
            if position >= read_end:
                self.is_behind = True
                self._position = position
                return
            # Decoded by hand: struct would return objects, which make the code below slower.
            length = data[position] << 16 | data[position + 1] << 8 | data[position + 2]
            kind, flags = data[position + 3], data[position + 4]
            high = (data[position + 5] & 0x7F) << 24 | data[position + 6] << 16
            stream_id = high | data[position + 7] << 8 | data[position + 8]
            if length > bytes_max:
                reason = f"frames must be at most {bytes_max} bytes, got {length}"
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, reason)
            begin = position + frames.FRAME_HEADER_BYTES
            if end - begin < length:
                break
            position = begin + length
            self._read_frame(kind, flags, stream_id, data[begin:position])
        self._input, self._position = data[position:], 0

    def _read_preface(self, data: bytes) -> int:
        """Return the offset of the first frame; 0: the preface is not complete (3.4)."""
        preface = frames.PREFACE
        if data[: len(preface)] != preface[: len(data)]:
            break_protocol("the preface must be that of HTTP/2")
        if len(data) < len(preface):
            return 0
        self._is_preface_due = False
        return len(preface)

    def _read_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._is_first_settings_due and (kind != frames.SETTINGS or flags & frames.ACK):
            break_protocol("the first frame must be SETTINGS")
        block = self._open_block
        if block is not None and (kind != frames.CONTINUATION or stream_id != block.stream_id):
            break_protocol("a field block must be continued before anything else")
        if kind > frames.HEADERS:
            frames.check_shape(kind, stream_id, len(payload))
        try:
            self._read_payload(kind, flags, stream_id, payload)
        except StreamFault as fault:
            if fault.is_charged:
                self._budgets.spend("stream errors", self._limits.faults)
            stream = self._streams.get(fault.stream_id)
            if stream is not None:
                self._forget(stream)
                self._events.append(Reset(fault.stream_id, fault.code))
            self._send_reset(fault.stream_id, fault.code)

    def _read_payload(  # noqa: C901 - a line for each type
        self, kind: int, flags: int, stream_id: int, payload: bytes
    ) -> None:
        match kind:
            case frames.DATA:
                self._read_data(flags, stream_id, payload)
            case frames.HEADERS:
                self._read_headers(flags, stream_id, payload)
            case frames.WINDOW_UPDATE:
                self._read_window_update(stream_id, payload)
            case frames.RST_STREAM:
                self._read_rst_stream(stream_id, payload)
            case frames.SETTINGS:
                self._read_settings(flags, payload)
            case frames.PING:
                self._read_ping(flags, payload)
            case frames.PRIORITY:
                self._read_priority(stream_id, payload)
            case frames.PUSH_PROMISE:
                break_protocol("PUSH_PROMISE must not come from a client")
            case frames.GOAWAY:  # ignored: a server opens no streams, and the client's go on (6.8)
                self._budgets.spend("GOAWAY frames", self._limits.ignored)
            case frames.CONTINUATION:
                self._read_continuation(flags, payload)
            case _:  # to be ignored (5.5)
                self._budgets.spend("frames of unknown type", self._limits.ignored)

    def _read_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._unread += len(payload)
        if self._unread * 2 >= self._limits.connection_window_bytes:
            self._free_window()
        data = frames.unpadded(payload) if flags & frames.PADDED else payload
        stream = self._streams.get(stream_id)
        if stream is None:
            self._expect_used("DATA", stream_id)
            self._ignore_late(stream_id)
            return
        is_end = bool(flags & frames.END_STREAM)
        if not data and not is_end:
            self._budgets.spend("empty DATA frames", self._limits.empty_data)
        window = self._limits.stream_window_bytes
        is_known = not self._is_ack_due
        increment = stream.take(len(data), len(payload), window, is_end=is_end, is_known=is_known)
        if increment:
            self._send(frames.window_update(stream_id, increment))
        self._events.append(Received(stream_id, data, is_end))

    def _read_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            break_protocol(f"HEADERS must be on a stream of the client's, got {stream_id}")
        fragment = frames.unpadded(payload) if flags & frames.PADDED else payload
        if flags & frames.HAS_PRIORITY:
            if len(fragment) < _PRIORITY_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS must hold its priority")
            frames.check_dependency(stream_id, fragment)
            fragment = fragment[_PRIORITY_BYTES:]
        is_end = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS:
            self._read_block(stream_id, fragment, is_end=is_end)
        else:
            self._open_block = FieldBlock(stream_id, fragment, is_end=is_end)

    def _read_continuation(self, flags: int, payload: bytes) -> None:
        block = self._open_block
        if block is None:
            break_protocol("CONTINUATION must follow an unfinished field block")
        block.add(payload, self._limits)
        if flags & frames.END_HEADERS:
            self._open_block = None
            self._read_block(block.stream_id, block.whole(), is_end=block.is_end)

    def _read_block(self, stream_id: int, block: bytes, *, is_end: bool) -> None:
        """Read a complete field block: a request, trailers, or a late one."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._read_trailers(stream, block, is_end=is_end)
        elif stream_id > self._highest_id:
            self._highest_id = stream_id
            self._budgets.stream_count += 1
            self._read_request(stream_id, block, is_end=is_end)
        elif stream_id in self._reset_ids:
            self._headers.skipped(block)
            self._ignore_late(stream_id)
        else:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, "a stream id must not come again")

    def _read_request(self, stream_id: int, block: bytes, *, is_end: bool) -> None:
        if self._last_id is not None or len(self._streams) >= self._limits.streams_max:
            self._headers.skipped(block)
            self._send_reset(stream_id, ErrorCode.REFUSED_STREAM)  # may be tried again (8.7)
            return
        head = self._headers.request(stream_id, block)
        stream = Stream(stream_id, head.content_length, is_remote_open=True)
        if is_end:
            stream.end()
        self._streams[stream_id] = stream
        self._events.append(Opened(stream_id, head, is_end))

    def _read_trailers(self, stream: Stream, block: bytes, *, is_end: bool) -> None:
        stream_id = stream.stream_id
        if not stream.is_remote_open:
            self._headers.skipped(block)
            reason = "HEADERS must not follow END_STREAM"
            raise StreamFault(stream_id, ErrorCode.STREAM_CLOSED, reason)
        self._headers.trailers(stream_id, block)
        if not is_end:
            reason = "trailers must end the stream"
            raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, reason)
        stream.end()
        self._events.append(Received(stream_id, b"", is_ended=True))

    def _read_priority(self, stream_id: int, payload: bytes) -> None:
        self._budgets.spend("PRIORITY frames", self._limits.priorities)
        frames.check_dependency(stream_id, payload)

    def _read_rst_stream(self, stream_id: int, payload: bytes) -> None:
        self._expect_used("RST_STREAM", stream_id)
        # A client may reset every stream once; Envoy does if our answer ends before its request.
        self._reset_count += 1
        if self._reset_count > self._budgets.stream_count:
            self._budgets.spend("RST_STREAM beyond one a stream", self._limits.ignored)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._reset_ids.discard(
                stream_id
            )  # the client has reset it, too: no late frame can follow
            return
        self._forget(stream)
        self._events.append(Reset(stream_id, frames.read_word(payload)))

    def _read_settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK must be empty")
            self._is_ack_due = False
            self._headers.table_bytes_acknowledged(self._limits.header_table_bytes)
            return
        self._budgets.spend("SETTINGS frames", self._limits.settings)
        settings = frames.read_settings(payload)
        self._is_first_settings_due = False
        self._send(frames.SETTINGS_ACK)
        self._outflow.apply(settings, self._streams.values())
        self._close_ended()

    def _read_ping(self, flags: int, payload: bytes) -> None:
        self._budgets.spend("PING frames", self._limits.pings)
        if not flags & frames.ACK:
            self._send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAIN_PING and self.is_draining:
            self.end_drain()

    def _read_window_update(self, stream_id: int, payload: bytes) -> None:
        if self._paid_updates < 2 * self._outflow.data_frames:
            self._paid_updates += 1  # it is for DATA that we sent, on the stream and the connection
        else:
            self._budgets.spend("WINDOW_UPDATE frames", self._limits.window_updates)
        increment = frames.read_word(payload) & frames.WINDOW_MAX
        if stream_id:
            self._expect_used("WINDOW_UPDATE", stream_id)
        if not increment:
            reason = "WINDOW_UPDATE must not be 0"
            if stream_id:
                raise StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, reason)
            break_protocol(reason)
        if not stream_id:
            self._outflow.widen(increment)
        elif stream_id in self._streams:
            self._outflow.widen_stream(self._streams[stream_id], increment)
        self._close_ended()

    def _expect_used(self, name: str, stream_id: int) -> None:
        if stream_id == 0 or stream_id > self._highest_id or not stream_id & 1:
            break_protocol(f"{name} must be on a stream that was opened, got {stream_id}")

    def _free_window(self) -> None:
        """Widen the connection's window by the bytes read, once they are half of it (6.9)."""
        window = self._limits.connection_window_bytes
        if self._unread > window:
            reason = f"DATA must keep within the connection's window of {window} bytes"
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, reason)
        self._send(frames.window_update(0, self._unread))
        self._unread = 0

    def _ignore_late(self, stream_id: int) -> None:
        """Ignore a frame on a closed stream; reset the stream, once, unless we did before."""
        self._budgets.spend("frames for closed streams", self._limits.ignored)
        if stream_id not in self._reset_ids:
            self._send_reset(stream_id, ErrorCode.STREAM_CLOSED)

    def _widen(self, stream: Stream) -> None:
        """Widen the client's window of a stream, if it is due."""
        increment = stream.increment(self._limits.stream_window_bytes)
        if increment:
            self._send(frames.window_update(stream.stream_id, increment))

    def _close_ended(self) -> None:
        drained = self._outflow.drained
        for stream in drained:
            self._widen(stream)
        drained.clear()
        ended = self._outflow.ended
        for stream in ended:
            del self._streams[stream.stream_id]
            if stream.is_remote_open:
                self._send_reset(stream.stream_id, ErrorCode.NO_ERROR)
        ended.clear()

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.stream_id]
        self._outflow.forget(stream)

    def _send(self, data: bytes) -> None:
        self._outflow.ready.append(data)

    def _send_reset(self, stream_id: int, code: ErrorCode) -> None:
        self._send(frames.rst_stream(stream_id, code))
        self._reset_ids.add(stream_id)
        self._reset_order.append(stream_id)
        if len(self._reset_order) > _RESET_REMEMBERED_MAX:
            self._reset_ids.discard(self._reset_order.popleft())

    def _fail(self, fault: ConnectionFault) -> None:
        self._send(frames.goaway(self._highest_id, fault.code, str(fault)))
        self.is_closed = True
        self.is_behind = False
        self._input, self._position = b"", 0
        self._open_block = None
        self._streams.clear()
        self._events.append(Ended(fault.code, str(fault)))

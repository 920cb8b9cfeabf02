"""Pure. The limits of one connection, and the reasons for them.

A frame is cheap to send and may be expensive to serve. Every attack on HTTP/2 servers so far was
some frame sent too often (CVE-2019-9511 to 9518, CVE-2023-44487 rapid reset, CVE-2024-27316
CONTINUATION, CVE-2025-8671 made-you-reset). So each kind of frame that does no useful work has a
`Rate`. The peer is a proxy with thousands of requests on one connection, and ending it ends them
all: no correct proxy comes near these rates, and the service can easily handle them.

These are not settings: the numbers follow from Envoy and from gRPC, not from the deployment. The
exception is `connections_max`, which is `listen.maxConnections`.

Nothing that the proxy's own clients can make it send ends the connection. Each request that they
abandon is a RST_STREAM, so there is no rate for rapid reset. Instead, the connection reads a
bounded amount in each turn of the loop (`Http2Connection.is_behind`), and reads the socket no
faster than that.
"""

# interpreted: the type hints of its dataclass are read at run time

from dataclasses import dataclass
from typing import Final, final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode

_SECOND_NS = 1_000_000_000


@final
@dataclass(frozen=True, slots=True)
class Rate:
    """An allowed number of frames: `burst` at once, and more with time and with streams."""

    burst: int
    per_s: int
    per_stream: int = 0
    """Added for every stream that is opened, without expiry: frames that belong to a stream may
    come long after it, and all at once."""


@final
class Budget:
    """The remaining frames of a rate. Pure; O(1).

    From the first frame on, the total is at most burst + per_s x seconds + per_stream x streams.
    Time adds at most burst at any one moment.
    """

    __slots__ = ("_earned_ns", "_earned_streams", "_left", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._left = rate.burst
        self._earned_ns: int | None = None
        self._earned_streams = 0

    def spend(self, now_ns: int, stream_count: int) -> bool:
        """Take one frame; return False if none is left.

        Args:
            now_ns: the time, monotonic.
            stream_count: streams opened on this connection so far.
        """
        if self._earned_ns is None:
            self._earned_ns = now_ns
        if self._left == 0:
            self._earn(now_ns, stream_count)
            if self._left == 0:
                return False
        self._left -= 1
        return True

    def _earn(self, now_ns: int, stream_count: int) -> None:
        assert self._earned_ns is not None, "earned from the first frame on"
        rate = self._rate
        by_time = (now_ns - self._earned_ns) * rate.per_s // _SECOND_NS
        by_work = (stream_count - self._earned_streams) * rate.per_stream
        if by_time + by_work == 0:
            return
        self._left = min(rate.burst, by_time) + by_work
        self._earned_ns = now_ns
        self._earned_streams = stream_count


@final
class Budgets:
    """The budgets of one connection, by kind of frame."""

    __slots__ = ("_budgets", "now_ns", "stream_count")

    def __init__(self, now_ns: int) -> None:
        self._budgets: dict[str, Budget] = {}
        self.now_ns = now_ns
        """The time at which the current input came."""
        self.stream_count = 0
        """Streams opened so far."""

    def spend(self, what: str, rate: Rate) -> None:
        """Take one frame of a kind.

        Raises:
            ConnectionFault: there were too many.
        """
        budget = self._budgets.get(what)
        if budget is None:
            budget = self._budgets[what] = Budget(rate)
        if not budget.spend(self.now_ns, self.stream_count):
            reason = f"{what} must be at most {rate.burst} at once and {rate.per_s} a second"
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, reason)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Http2Limits:
    """Limits of the door, each for one connection unless stated otherwise. Sizes in bytes."""

    frame_bytes_max: int = 16_384
    """Largest payload of a frame. RFC 9113's minimum: requests here are smaller."""
    header_block_bytes_max: int = 131_072
    """Largest field block before decoding, HEADERS and CONTINUATION together; beyond it the
    connection ends. A proxy may copy a client's field into it, such as `tracestate`. By default
    Envoy accepts 60 KiB of headers; this is twice that. Bounded, because a block is decoded in one
    go."""
    header_list_bytes_max: int = 16_384
    """Largest field block after decoding, counted as in RFC 9113 6.5.2; announced. As grpc-core. A
    stream beyond it is reset. That does not count as a fault of the peer if the block was large
    before decoding: the proxy passes on what its client sent. It does if a small block decodes to a
    large one. Beyond four times this size, or twice the block's own, the connection ends, because a
    decoder that stops half way has lost its state."""
    header_table_bytes: int = 4_096
    """HPACK's dynamic table for requests; announced. RFC 7541's default: Envoy's few headers fit
    many times."""
    continuation_frames_max: int = 16
    """CONTINUATION frames of one block. Eight full frames already have header_block_bytes_max."""
    streams_max: int = 100_000
    """Streams open at once; announced. High, because Envoy resets the streams of its first burst
    beyond this number: twice the 50,000 parked requests that a process must hold."""
    stream_window_bytes: int = 57_344
    """Bytes that a stream may send before they are read; announced, and in force once the client
    has acknowledged it. So much of a parked request's body is held here: with the overhead of the
    allocator, about 60 KiB."""
    connection_window_bytes: int = 16_777_216
    """Bytes that all streams together may send before they are read. They are read at once, so this
    only keeps a burst of thousands of requests from waiting for WINDOW_UPDATE."""
    message_bytes_max: int = 4_194_304
    """Largest gRPC message. gRPC's own default."""
    partial_bytes_max: int = 268_435_456
    """Held parts of messages, and of bodies of parked requests, all streams together; beyond it a
    parked request is refused. A stream's window limits the held part of a body, the rest stays in
    Envoy: this is enough for about 4,600 requests with longer bodies."""
    settings: Rate = Rate(100, 10)
    """SETTINGS; each is answered, and may affect every stream that waits for its window. Peers send
    one or two per connection."""
    pings: Rate = Rate(1_000, 100, 2)
    """PING; each is answered. Keepalive needs a few a minute, bandwidth probes of gRPC clients
    about one per message."""
    faults: Rate = Rate(100, 10)
    """Streams reset because of an error of the peer: made-you-reset. A correct proxy has none."""
    empty_data: Rate = Rate(1_000, 100, 2)
    """DATA without content and without END_STREAM."""
    priorities: Rate = Rate(1_000, 100, 10)
    """PRIORITY, which RFC 9113 deprecates; read and ignored. Envoy allows 100 a stream."""
    window_updates: Rate = Rate(1_000, 100, 20)
    """WINDOW_UPDATE. Envoy allows 10 for every DATA frame that it has sent; the door sends one or
    two DATA frames a stream."""
    ignored: Rate = Rate(1_000, 100, 10)
    """Frames of unknown type, frames for streams that have ended, because frames of the two sides
    may cross, and RST_STREAM beyond one for each stream that was opened."""
    queued_bytes_max: int = 67_108_864
    """Output that the peer does not read; beyond it the connection ends. 50,000 answers at once are
    a third."""
    write_stall_ns: int = 30_000_000_000
    """How long output beyond the system's buffers may wait for the peer to read."""
    handshake_ns: int = 10_000_000_000
    """Time for a new connection to send its preface and to acknowledge our SETTINGS."""
    keepalive_ns: int = 30_000_000_000
    """Silence after which a PING is sent; after as much silence again, the connection ends. A
    parked request and its slot must not outlive a host that vanished."""
    connections_max: int = 1_000
    """Connections at once, all addresses together. Envoy opens one for each of its workers."""

    def announced(self) -> dict[int, int]:
        """Return our SETTINGS (RFC 9113, 6.5.2)."""
        return {
            frames.HEADER_TABLE_SIZE: self.header_table_bytes,
            frames.MAX_CONCURRENT_STREAMS: self.streams_max,
            frames.INITIAL_WINDOW_SIZE: self.stream_window_bytes,
            frames.MAX_FRAME_SIZE: self.frame_bytes_max,
            frames.MAX_HEADER_LIST_SIZE: self.header_list_bytes_max,
        }

    def __post_init__(self) -> None:
        """Check the range of every announced number."""
        for name, (smallest, largest) in _RANGES.items():
            assert smallest <= getattr(self, name) <= largest, f"{name} must be within _RANGES"


_RANGES: Final = {
    "frame_bytes_max": (frames.FRAME_BYTES_DEFAULT, frames.FRAME_BYTES_MAX),
    "header_table_bytes": (0, 2**32 - 1),
    "header_list_bytes_max": (1, 2**32 - 1),
    "streams_max": (1, 2**31 - 1),
    "stream_window_bytes": (1, frames.WINDOW_MAX),
    # No SETTINGS can make this window smaller than the default (6.9.2).
    "connection_window_bytes": (frames.WINDOW_DEFAULT, frames.WINDOW_MAX),
}
"""Smallest and largest value that HTTP/2 can announce (RFC 9113, 6.5.2 and 6.9.1)."""

"""Pure. How much of anything one connection may ask for, and why that much.

A frame is cheap to send and may be dear to serve; every attack on HTTP/2 servers so far was some
frame sent too often (CVE-2019-9511 to 9518, CVE-2023-44487 rapid reset, CVE-2024-27316
CONTINUATION, CVE-2025-8671 made-you-reset). So each kind of frame that moves nothing forward has a
`Rate`. The peer is a proxy with thousands of requests on one connection, and ending it ends them
all: rates are what no proxy at honest work comes near, yet small beside what the service can do.

None of these is a setting: what a number must be follows from Envoy and from gRPC, not from where
the service runs. `connections_max` alone is one, `listen.maxConnections`.

Nothing that the proxy's own clients can make it send ends the connection. Each request that they
abandon is a RST_STREAM, so there is no rate for rapid reset: the connection reads a bounded amount
in each turn of the loop (`Http2Connection.is_behind`), and reads the socket no faster than that.
"""

# interpreted: its dataclass is read by its hints

from dataclasses import dataclass
from typing import Final, final

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode

_SECOND_NS = 1_000_000_000


@final
@dataclass(frozen=True, slots=True)
class Rate:
    """A number of frames that is fine: `burst` at once, and so many more as time and work pass."""

    burst: int
    per_s: int
    per_stream: int = 0
    """Earned with every stream that is opened, and kept: frames that come along with honest work
    may come long after it, and all together."""


@final
class Budget:
    """What is left of a rate. Pure; cost O(1).

    Counted from the first frame, never more is spent than burst + per_s x seconds + per_stream x
    streams; what time earns is at most burst at any one moment.
    """

    __slots__ = ("_earned_ns", "_earned_streams", "_left", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._left = rate.burst
        self._earned_ns: int | None = None
        self._earned_streams = 0

    def spend(self, now_ns: int, stream_count: int) -> bool:
        """Take one frame; False when there is none left.

        Args:
            now_ns: monotonic.
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
    """The budgets of one connection, by what they are for."""

    __slots__ = ("_budgets", "now_ns", "stream_count")

    def __init__(self, now_ns: int) -> None:
        self._budgets: dict[str, Budget] = {}
        self.now_ns = now_ns
        """The time of what is being read."""
        self.stream_count = 0
        """Streams opened so far."""

    def spend(self, what: str, rate: Rate) -> None:
        """Take one of these.

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
    """Limits of the door, each for one connection unless it says otherwise. Sizes in bytes."""

    frame_bytes_max: int = 16_384
    """Largest payload of a frame we take. RFC 9113's minimum: requests here are smaller."""
    header_block_bytes_max: int = 131_072
    """Largest field block as it comes, HEADERS and CONTINUATION together; beyond it the connection
    ends. A proxy may copy a client's field into it, `tracestate` for one: Envoy takes 60 KiB of
    them unless told otherwise, this is twice that. Bounded: a block is decoded in one go."""
    header_list_bytes_max: int = 16_384
    """Largest field block decoded, counted as RFC 9113 6.5.2 does; announced. As grpc-core. A
    stream beyond it is reset. That is no fault of the peer's if the block was large as it came: the
    proxy passes on what its client sent. A small block that decodes to much is one, and beyond four
    times this size, or twice the block's own, the connection ends, because a decoder that stops
    half way has lost its state."""
    header_table_bytes: int = 4_096
    """HPACK's dynamic table for requests; announced. RFC 7541's default: Envoy's few headers fit
    many times."""
    continuation_frames_max: int = 16
    """CONTINUATION frames of one block. Eight full frames are header_block_bytes_max already."""
    streams_max: int = 100_000
    """Streams open at once; announced. High, because Envoy resets what it has sent in its first
    burst beyond this number: twice the 50,000 parked requests a process must hold."""
    stream_window_bytes: int = 57_344
    """What a stream may send before we have read it; announced, in force once the client has
    acknowledged it. Of a parked request's body so much is held here: with what the allocator keeps
    beside, some 60 KiB."""
    connection_window_bytes: int = 16_777_216
    """What all streams together may send before we have read it. We read at once: this only keeps
    thousands of requests in one burst from waiting for our WINDOW_UPDATE."""
    message_bytes_max: int = 4_194_304
    """Largest gRPC message. gRPC's own default."""
    partial_bytes_max: int = 268_435_456
    """Parts of messages, and of bodies whose requests are parked, all streams together; beyond it
    a parked request is refused. Of a parked body as much is here as a stream's window admits, the
    rest stays in Envoy: this is some 4,600 requests with more than that."""
    settings: Rate = Rate(100, 10)
    """SETTINGS; each is answered, and may touch every stream that waits for its window. Peers send
    one or two in their life."""
    pings: Rate = Rate(1_000, 100, 2)
    """PING; each is answered. Keepalive needs a few a minute, bandwidth probes of gRPC clients
    about one per message."""
    faults: Rate = Rate(100, 10)
    """Streams we reset because of an error of the peer's: made-you-reset. A proxy makes none."""
    empty_data: Rate = Rate(1_000, 100, 2)
    """DATA that carries nothing and ends nothing."""
    priorities: Rate = Rate(1_000, 100, 10)
    """PRIORITY, which RFC 9113 deprecates; read and ignored. Envoy allows 100 a stream."""
    window_updates: Rate = Rate(1_000, 100, 20)
    """WINDOW_UPDATE. Envoy allows 10 for every DATA frame it has sent; we send one or two a
    stream."""
    ignored: Rate = Rate(1_000, 100, 10)
    """Frames of unknown type, frames for streams that have ended, because our last word and the
    peer's may cross, and RST_STREAM beyond one for each stream that was opened."""
    queued_bytes_max: int = 67_108_864
    """Output the peer does not take: ends the connection. 50,000 answers at once are a third."""
    write_stall_ns: int = 30_000_000_000
    """How long more output than the system buffers may wait for the peer to read."""
    handshake_ns: int = 10_000_000_000
    """Time for a new connection to send its preface and to acknowledge our SETTINGS."""
    keepalive_ns: int = 30_000_000_000
    """Silence after which a PING asks whether the peer is still there; as much again, and it is
    not. A parked request and its slot must not outlive a host that vanished."""
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
        """Hold every number that is announced to its range."""
        for name, (smallest, largest) in _RANGES.items():
            assert smallest <= getattr(self, name) <= largest, f"{name} must be within _RANGES"


_RANGES: Final = {
    "frame_bytes_max": (frames.FRAME_BYTES_DEFAULT, frames.FRAME_BYTES_MAX),
    "header_table_bytes": (0, 2**32 - 1),
    "header_list_bytes_max": (1, 2**32 - 1),
    "streams_max": (1, 2**31 - 1),
    "stream_window_bytes": (1, frames.WINDOW_MAX),
    # Which no SETTINGS can make smaller than the default (6.9.2).
    "connection_window_bytes": (frames.WINDOW_DEFAULT, frames.WINDOW_MAX),
}
"""Smallest and largest value of what a setting of HTTP/2 can say (RFC 9113, 6.5.2 and 6.9.1)."""

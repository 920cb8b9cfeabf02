"""Pure. The format on the wire: frames and their fields (RFC 9113, 4 and 6).

    +-----------------------------------------------+
    |                 Length (24)                   |
    +---------------+---------------+---------------+
    |   Type (8)    |   Flags (8)   |
    +-+-------------+---------------+-------------------------------+
    |R|                 Stream Identifier (31)                      |
    +=+=============================================================+
    |                   Frame Payload (0...)                      ...
    +---------------------------------------------------------------+

The functions here read or write one frame and have no state: the connection decides whether a frame
may come now. Types and flags are plain integers, because unknown ones are legal (4.1).
"""

from struct import Struct
from typing import Final

from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The first bytes of a client (3.4)."""

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

FRAME_HEADER_BYTES: Final = 9
STREAM_ID_MAX: Final = 2**31 - 1
WINDOW_MAX: Final = 2**31 - 1
WINDOW_DEFAULT: Final = 65_535
FRAME_BYTES_DEFAULT: Final = 16_384
FRAME_BYTES_MAX: Final = 2**24 - 1

_RANGES: Final = {
    ENABLE_PUSH: ("SETTINGS_ENABLE_PUSH", 0, 1, ErrorCode.PROTOCOL_ERROR),
    INITIAL_WINDOW_SIZE: (
        *("SETTINGS_INITIAL_WINDOW_SIZE", 0, WINDOW_MAX),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    MAX_FRAME_SIZE: (
        *("SETTINGS_MAX_FRAME_SIZE", FRAME_BYTES_DEFAULT, FRAME_BYTES_MAX),
        ErrorCode.PROTOCOL_ERROR,
    ),
}
"""Settings with a range (6.5.2): name, smallest, largest, and the error outside of it."""

_SHAPES: Final = {
    PRIORITY: ("PRIORITY", True, 5, 5),
    RST_STREAM: ("RST_STREAM", True, 4, 4),
    SETTINGS: ("SETTINGS", False, 0, FRAME_BYTES_MAX),
    PING: ("PING", False, 8, 8),
    GOAWAY: ("GOAWAY", False, 8, FRAME_BYTES_MAX),
    WINDOW_UPDATE: ("WINDOW_UPDATE", None, 4, 4),
}
"""Name, whether on a stream (None: either), smallest and largest payload. In RFC 9113 a PRIORITY of
a wrong size ends its stream only; no correct client sends one."""

_FRAME_HEADER: Final = Struct(">HBBBL")  # the length is 16 and 8 bits: there is no 24-bit field
_pack_header: Final = Struct(">LBL").pack
"""(length << 8 | type, flags, stream id): fewer numbers, so fewer objects."""
_pack_word_frame: Final = Struct(">LBLL").pack
"""The same, followed by a payload of one number of 32 bits."""
_WORD_BYTES: Final = 4
_SETTING: Final = Struct(">HL")
_TWO_WORDS: Final = Struct(">LL")

unpack_header: Final = _FRAME_HEADER.unpack_from
"""(data, offset) -> length >> 8, length & 0xFF, type, flags, reserved bit and stream id."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Write one frame."""
    return _pack_header(len(payload) << 8 | kind, flags, stream_id) + payload


def header_frames(stream_id: int, block: bytes, frame_bytes_max: int, *, is_end: bool) -> bytes:
    """Write a field block as HEADERS, with CONTINUATION if it does not fit (6.2, 6.10)."""
    end = END_STREAM if is_end else 0
    if len(block) <= frame_bytes_max:
        return frame(HEADERS, END_HEADERS | end, stream_id, block)
    pieces = [block[at : at + frame_bytes_max] for at in range(0, len(block), frame_bytes_max)]
    written = [frame(HEADERS, end, stream_id, pieces[0])]
    written += [frame(CONTINUATION, 0, stream_id, piece) for piece in pieces[1:-1]]
    written.append(frame(CONTINUATION, END_HEADERS, stream_id, pieces[-1]))
    return b"".join(written)


def settings(values: dict[int, int]) -> bytes:
    """Write a SETTINGS frame (6.5)."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in values.items()))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0, b"")


def rst_stream(stream_id: int, code: int) -> bytes:
    """Write an RST_STREAM frame (6.4)."""
    return _pack_word_frame(_WORD_BYTES << 8 | RST_STREAM, 0, stream_id, code)


def window_update(stream_id: int, increment: int) -> bytes:
    """Write a WINDOW_UPDATE frame (6.9); stream 0 is the connection."""
    return _pack_word_frame(_WORD_BYTES << 8 | WINDOW_UPDATE, 0, stream_id, increment)


def goaway(last_stream_id: int, code: int, reason: str = "") -> bytes:
    """Write a GOAWAY frame, with the reason as debug data (6.8)."""
    return frame(GOAWAY, 0, 0, _TWO_WORDS.pack(last_stream_id, code) + reason.encode())


def read_settings(payload: bytes) -> dict[int, int]:
    """Read the values of a SETTINGS frame; the last of equal identifiers counts (6.5.3).

    Raises:
        ConnectionFault: a value is out of its range (6.5.2), or the frame is cut off.
    """
    if len(payload) % _SETTING.size:
        reason = f"SETTINGS must be a multiple of 6 bytes, got {len(payload)}"
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, reason)
    values: dict[int, int] = {}
    for setting, value in _SETTING.iter_unpack(payload):
        if setting in _RANGES:
            name, smallest, largest, code = _RANGES[setting]
            if not smallest <= value <= largest:
                reason = f"{name} must be from {smallest} to {largest}, got {value}"
                raise ConnectionFault(code, reason)
        values[setting] = value
    return values


def read_word(payload: bytes) -> int:
    """Read the 32 bits of an RST_STREAM or WINDOW_UPDATE; the caller has checked the length."""
    return payload[0] << 24 | payload[1] << 16 | payload[2] << 8 | payload[3]


def read_dependency(payload: bytes) -> int:
    """Read the stream that a PRIORITY frame, or HEADERS with priority, depends on (6.3).

    The payload begins with a priority; the caller has checked its length.
    """
    return read_word(payload[:4]) & STREAM_ID_MAX


def unpadded(payload: bytes) -> bytes:
    """Return the payload of a padded DATA or HEADERS frame without its padding (6.1).

    Raises:
        ConnectionFault: the padding is as long as the payload, or longer.
    """
    if not payload or payload[0] >= len(payload):
        reason = f"padding must be shorter than the payload of {len(payload)} bytes"
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, reason)
    return payload[1 : len(payload) - payload[0]]


def check_dependency(stream_id: int, priority: bytes) -> None:
    """Ignore a priority, as RFC 9113 does, unless it is invalid (RFC 7540, 5.3.1).

    Raises:
        ConnectionFault: the stream depends on itself.
    """
    if read_dependency(priority) == stream_id:
        reason = "a stream must not depend on itself"
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, reason)


def check_shape(kind: int, stream_id: int, size: int) -> None:
    """Check the stream id and the size of a frame against its type.

    Args:
        kind: any type but DATA, HEADERS and CONTINUATION, whose shape depends on more.
        stream_id: 0 for the connection.
        size: bytes of payload.

    Raises:
        ConnectionFault: one of them is wrong for the type.
    """
    shape = _SHAPES.get(kind)
    if shape is None:
        return
    name, is_on_stream, smallest, largest = shape
    if is_on_stream is not None and is_on_stream != bool(stream_id):
        where = "a stream" if is_on_stream else "stream 0"
        reason = f"{name} must be on {where}, got {stream_id}"
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, reason)
    if not smallest <= size <= largest:
        reason = f"{name} must be from {smallest} to {largest} bytes, got {size}"
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, reason)

"""HTTP/2 for tests: the frames a server sends, and how a connection interprets received ones."""

from typing import NamedTuple

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.connection import Http2Connection
from flowcontrol_server.doors.http2.events import Event


class Heard(NamedTuple):
    """A frame of the server."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def heard(data: bytes) -> list[Heard]:
    """Yield the server's frames."""
    said = []
    while data:
        high, low, kind, flags, stream_id = frames.unpack_header(data, 0)
        end = frames.FRAME_HEADER_BYTES + (high << 8 | low)
        assert len(data) >= end, "frames are whole"
        said.append(Heard(kind, flags, stream_id, data[frames.FRAME_HEADER_BYTES : end]))
        data = data[end:]
    return said


def received(core: Http2Connection, data: bytes, now_ns: int = 0) -> list[Event]:
    """Return the meaning of all of them, taken in several calls if necessary."""
    events = core.receive(data, now_ns)
    while core.is_behind:
        events += core.receive(b"", now_ns)
    return events

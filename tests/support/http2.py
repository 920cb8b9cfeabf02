"""HTTP/2 as tests read it: what a server sends, and what a connection makes of what it receives."""

from typing import NamedTuple

from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.connection import Http2Connection
from flowcontrol_server.doors.http2.events import Event


class Heard(NamedTuple):
    """A frame of the server's."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def heard(data: bytes) -> list[Heard]:
    """What the server says, frame by frame."""
    said = []
    while data:
        high, low, kind, flags, stream_id = frames.unpack_header(data, 0)
        end = frames.FRAME_HEADER_BYTES + (high << 8 | low)
        assert len(data) >= end, "frames are whole"
        said.append(Heard(kind, flags, stream_id, data[frames.FRAME_HEADER_BYTES : end]))
        data = data[end:]
    return said


def received(core: Http2Connection, data: bytes, now_ns: int = 0) -> list[Event]:
    """What all of it means, in as many calls as that takes."""
    events = core.receive(data, now_ns)
    while core.is_behind:
        events += core.receive(b"", now_ns)
    return events

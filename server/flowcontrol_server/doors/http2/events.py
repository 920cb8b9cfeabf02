"""Pure. What a connection tells its owner.

Plain slots classes, built once and read once. Where one is made for every request, its constructor
is written out: that of a dataclass stays interpreted where this module is compiled.
"""

from dataclasses import dataclass
from typing import final

from flowcontrol_server.doors.http2.errors import ErrorCode
from flowcontrol_server.doors.http2.headers import RequestHead


@final
@dataclass(slots=True, init=False)
class Opened:
    """A request begins on a new stream."""

    stream_id: int
    head: RequestHead
    is_ended: bool
    """Whether this was all of it."""

    def __init__(self, stream_id: int, head: RequestHead, is_ended: bool) -> None:  # noqa: FBT001 - a field
        self.stream_id = stream_id
        self.head = head
        self.is_ended = is_ended


@final
@dataclass(slots=True, init=False)
class Received:
    """More of a request's body, or its end, with trailers or without."""

    stream_id: int
    data: bytes
    is_ended: bool

    def __init__(self, stream_id: int, data: bytes, is_ended: bool) -> None:  # noqa: FBT001 - a field
        self.stream_id = stream_id
        self.data = data
        self.is_ended = is_ended


@final
@dataclass(slots=True, init=False)
class Reset:
    """An opened stream is gone: the client reset it, or broke a rule on it and we did."""

    stream_id: int
    code: int

    def __init__(self, stream_id: int, code: int) -> None:
        self.stream_id = stream_id
        self.code = code


@final
@dataclass(slots=True)
class Ended:
    """The connection is over because of the client; send what is to be sent and close it.

    No stream gets an event of its own any more.
    """

    code: ErrorCode
    reason: str


Event = Opened | Received | Reset | Ended

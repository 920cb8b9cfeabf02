"""Pure. Events that a connection returns to its owner.

Plain classes with slots, built once and read once. Those made for every request have an explicit
constructor, because the one of a dataclass stays interpreted where this module is compiled.
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
    """Whether the request has no body and no trailers."""

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
    """An opened stream is gone: the client reset it, or we did because of an error on it."""

    stream_id: int
    code: int

    def __init__(self, stream_id: int, code: int) -> None:
        self.stream_id = stream_id
        self.code = code


@final
@dataclass(slots=True)
class Ended:
    """The connection ends because of an error of the client: send the remaining output, close it.

    Streams get no more events of their own.
    """

    code: ErrorCode
    reason: str


Event = Opened | Received | Reset | Ended

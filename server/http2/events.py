"""Pure. What a connection tells its owner.

Plain slots classes, built once and read once.
"""

from dataclasses import dataclass
from typing import final

from server.http2.errors import ErrorCode
from server.http2.headers import RequestHead


@final
@dataclass(slots=True)
class Opened:
    """A request begins on a new stream."""

    stream_id: int
    head: RequestHead
    is_ended: bool
    """Whether this was all of it."""


@final
@dataclass(slots=True)
class Received:
    """More of a request's body, or its end, with trailers or without."""

    stream_id: int
    data: bytes
    is_ended: bool


@final
@dataclass(slots=True)
class Reset:
    """An opened stream is gone: the client reset it, or broke a rule on it and we did."""

    stream_id: int
    code: int


@final
@dataclass(slots=True)
class Ended:
    """The connection is over because of the client; send what is to be sent and close it.

    No stream gets an event of its own any more.
    """

    code: ErrorCode
    reason: str


Event = Opened | Received | Reset | Ended

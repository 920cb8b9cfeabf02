"""Pure. Errors of the peer, and how far they reach (RFC 9113, 5.4 and 7).

The type of an error is its reach: one stream, which is reset, or the connection, which ends.
"""

from enum import IntEnum
from typing import NoReturn, final


class ErrorCode(IntEnum):
    """Why a stream or a connection is ended; an unknown code from a peer is kept as a number."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Http2Error(Exception):
    """The peer broke a rule or exceeded a limit; `code` is sent to it."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@final
class ConnectionFault(Http2Error):  # noqa: N818 - fault: the peer's; the reach is the name
    """Ends the connection, with GOAWAY."""


@final
class StreamFault(Http2Error):  # noqa: N818 - as above
    """Ends one stream, with RST_STREAM.

    Args:
        stream_id: id of the stream.
        code: error code, which is sent.
        reason: the error as text.
        is_charged: whether it counts towards the limit of faults; not if a proxy only passes on
            what its own clients sent.
    """

    def __init__(
        self, stream_id: int, code: ErrorCode, reason: str, *, is_charged: bool = True
    ) -> None:
        super().__init__(code, reason)
        self.stream_id = stream_id
        self.is_charged = is_charged


def break_protocol(reason: str) -> NoReturn:
    """End the connection because the peer broke the protocol.

    Raises:
        ConnectionFault: always.
    """
    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, reason)

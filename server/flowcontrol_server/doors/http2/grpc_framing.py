"""Pure. gRPC over HTTP/2: which requests are calls, messages in DATA, status in trailers.

The rules are in gRPC's PROTOCOL-HTTP2.md. Each message follows five bytes, a flag and its length,
and may be cut anywhere between DATA frames:

    compressed (8) │ length (32) │ message

Compression is not supported: messages are small, and Envoy does not compress them. A request that
is not a gRPC call is answered in plain HTTP.
"""

from collections.abc import Collection
from enum import IntEnum
from typing import Final, NamedTuple, final

from flowcontrol_server.doors.http2.headers import RequestHead, encode_block

PREFIX_BYTES: Final = 5
_CONTENT_TYPE: Final = "application/grpc"


class Status(IntEnum):
    """The gRPC statuses used here."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


@final
class FramingError(Exception):
    """The bytes of a call are not acceptable messages; `status` is sent."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.messages: list[bytes] = []
        """Complete messages before the one that is too large."""
        self.rest: bytes | None = None
        """Bytes of that one so far, prefix first; None: the error is another one."""


class Refusal(NamedTuple):
    """The answer to a request that is not an acceptable call."""

    block: bytes
    """Field block of the answer."""
    body: bytes
    """Body of the answer, as text; empty for gRPC clients."""
    is_grpc: bool
    """Whether to answer at once: a gRPC client may wait for that before it ends its side."""


_ALONE: Final = [
    (":status", "200"),
    ("content-type", _CONTENT_TYPE),
    ("grpc-accept-encoding", "identity"),  # also the reason to refuse a compressed message
]
HEADERS: Final = encode_block(_ALONE)
"""Headers of an answer, before its first message."""
_OK_TRAILERS: Final = encode_block([("grpc-status", "0")])
_OK_ALONE: Final = encode_block([*_ALONE, ("grpc-status", "0")])
_PLAIN: Final = {
    status: encode_block([(":status", str(status)), ("content-type", "text/plain"), *fields])
    for status, fields in ((405, [("allow", "POST")]), (415, []))
}


def refusal(head: RequestHead, paths: Collection[bytes]) -> Refusal | None:
    """Return the refusal of a request; None: it calls one of the methods at these paths."""
    kind = head.content_type.partition(b";")[0].rstrip()
    is_grpc = kind == b"application/grpc" or kind.startswith(b"application/grpc+")
    if head.method != b"POST" or not is_grpc:
        body = f"only gRPC calls are served here: {_listed(paths)}\n".encode()
        return Refusal(_PLAIN[415 if head.method == b"POST" else 405], body, is_grpc=False)
    if head.path not in paths:
        reason = f"method must be {_listed(paths)}, got {head.path.decode('latin-1')[:256]}"
    elif kind not in {b"application/grpc", b"application/grpc+proto"}:
        reason = f"messages must be protobuf, got {kind.decode('latin-1')[:256]}"
    else:
        return None
    return refused(Status.UNIMPLEMENTED, reason)


def refused(status: Status, reason: str) -> Refusal:
    """Return the refusal of a gRPC call."""
    return Refusal(ending(status, reason, is_begun=False), b"", is_grpc=True)


def ending(status: Status, reason: str = "", *, is_begun: bool) -> bytes:
    """Return the block that ends a call: trailers, or the whole answer if none has begun."""
    if status is Status.OK:
        return _OK_TRAILERS if is_begun else _OK_ALONE
    fields = [("grpc-status", str(int(status))), ("grpc-message", _percent_encoded(reason))]
    return encode_block(fields if is_begun else [*_ALONE, *fields])


def framed(message: bytes) -> bytes:
    """Return a message with its prefix."""
    return b"\x00" + len(message).to_bytes(4) + message


def split(
    held: bytearray | None, data: bytes, message_bytes_max: int
) -> tuple[list[bytes], bytearray | None]:
    """Split the body of a call into messages. O(bytes of `data`), however it is cut.

    Args:
        held: the beginning that the previous call returned, None at first; it is modified.
        data: the bytes that came since.
        message_bytes_max: size of the largest message allowed.

    Returns:
        The messages now complete, and the beginning of the next; None: nothing of it has come.

    Raises:
        FramingError: a message is compressed or too large, as soon as its prefix shows it.
    """
    if held is None:
        size = len(data) - PREFIX_BYTES
        if 0 <= size <= message_bytes_max and data[:PREFIX_BYTES] == size.to_bytes(PREFIX_BYTES):
            return [data[PREFIX_BYTES:]], None  # one message in one frame, the usual case
        held = bytearray()
    held += data
    messages: list[bytes] = []
    begin = 0
    while len(held) - begin >= PREFIX_BYTES:
        try:
            end = begin + _frame_bytes(held, begin, message_bytes_max)
        except FramingError as error:
            if error.status is Status.RESOURCE_EXHAUSTED:
                error.messages, error.rest = messages, bytes(held[begin:])
            raise
        if end > len(held):
            break
        messages.append(bytes(held[begin + PREFIX_BYTES : end]))
        begin = end
    del held[:begin]
    return messages, held or None


def _listed(paths: Collection[bytes]) -> str:
    return " or ".join(path.decode() for path in paths)


def _frame_bytes(data: bytes | bytearray, begin: int, message_bytes_max: int) -> int:
    """Return the size of a message, prefix included; the prefix must be complete."""
    if data[begin]:
        reason = "messages must not be compressed: grpc-accept-encoding is identity"
        raise FramingError(Status.UNIMPLEMENTED, reason)
    size = int.from_bytes(data[begin + 1 : begin + PREFIX_BYTES])
    if size > message_bytes_max:
        reason = f"messages must be at most {message_bytes_max} bytes, got {size}"
        raise FramingError(Status.RESOURCE_EXHAUSTED, reason)
    return PREFIX_BYTES + size


def _percent_encoded(text: str) -> str:
    """Encode a status message for gRPC: printable ASCII stays, except the percent sign."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"  # noqa: PLR2004 - ASCII's printable part
        for byte in text.encode()
    )

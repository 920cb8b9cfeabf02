"""Pure. Cuts bodies out of ProcessingRequests, and puts them into ProcessingResponses.

A body that Envoy streams to this service (FULL_DUPLEX_STREAMED) must be sent back. Decoding each
message and encoding it again would copy every byte several times, so here the fields around the
bytes are read and written by hand. A message with another encoding than that of protobuf's own
encoders is left to the codec.

    ProcessingRequest   request_body = 4, response_body = 5, request_trailers = 6,
                        response_trailers = 7
      HttpBody            body = 1, end_of_stream = 2
    ProcessingResponse  request_body = 3, response_body = 4
      BodyResponse        response = 1
        CommonResponse      body_mutation = 3
          BodyMutation        streamed_response = 3
            StreamedBodyResponse  body = 1, end_of_stream = 2
"""

from collections.abc import Iterator
from typing import Final, NamedTuple, final

CHUNK_BYTES_MAX: Final = 62_000
"""Bytes of a body in one response: gateways refuse messages beyond 64 KiB."""
_LENGTH_DELIMITED: Final = 2
_REQUEST_TAG, _RESPONSE_TAG = 0x22, 0x2A
_REQUEST_TRAILERS_TAG, _RESPONSE_TRAILERS_TAG = 0x32, 0x3A
_BODY_TAG, _END_TAG = 0x0A, 0x10
_FIRST_AFTER: Final = 8
"""The least field number after those of the oneof."""
_VARINT_BYTES_MAX: Final = 5
_HEAD_BYTES_MAX: Final = 2 + 2 * _VARINT_BYTES_MAX
"""Bytes before the body, in a message with a part of a body."""
_AROUND_BYTES_MAX: Final = 65_536
"""Bytes after the body, in such a message."""
_END: Final = b"\x10\x01"


class BodyPart(NamedTuple):
    """A part of a body."""

    is_request: bool
    """Whether it belongs to the request, not to the response."""
    body: bytes
    is_end: bool


def body_of(message: bytes) -> BodyPart | None:
    """Return the part of a body that a ProcessingRequest carries.

    None: it carries none, or has an unexpected encoding, which the codec can read.
    """
    if not message or message[0] not in {_REQUEST_TAG, _RESPONSE_TAG}:
        return None
    size, begin = _varint(message, 1)
    end = begin + size
    if size < 0 or end > len(message) or not _is_without_more(message, end):
        return None
    position = begin
    body = b""
    if position < end and message[position] == _BODY_TAG:
        length, first = _varint(message, position + 1)
        position = first + length
        if length < 0 or position > end:
            return None
        body = message[first:position]
    is_end = False
    if end - position == len(_END) and message[position] == _END_TAG:
        if message[position + 1] > 1:
            return None
        is_end = message[position + 1] == 1
        position = end
    if position != end:
        return None
    return BodyPart(message[0] == _REQUEST_TAG, body, is_end)


def trailers_of(message: bytes) -> bool | None:
    """Whether the trailers in a ProcessingRequest are the request's, not the response's.

    None: it carries none, or has an unexpected encoding. Text around them need not be UTF-8.
    """
    if not message or message[0] not in {_REQUEST_TRAILERS_TAG, _RESPONSE_TRAILERS_TAG}:
        return None
    size, begin = _varint(message, 1)
    end = begin + size
    if size < 0 or end > len(message) or not _is_without_more(message, end):
        return None
    return message[0] == _REQUEST_TRAILERS_TAG


class NoBodyError(Exception):
    """A large message is not a part of a body, or has an unexpected encoding."""


@final
class LargeBody:
    """Splits a message whose part of a body is too large to be held, into smaller messages.

    Args:
        size: bytes of the message.
    """

    __slots__ = ("_body_left", "_inner_bytes", "_left", "_rest", "_tag")

    def __init__(self, size: int) -> None:
        self._left = size
        """Bytes of the message that are still to come."""
        self._tag = 0
        """Tag of the field that has the body; 0: not read yet."""
        self._body_left = 0
        self._inner_bytes = 0
        """Bytes after the body, in that field."""
        self._rest = b""
        """Bytes of the message that have come and were not passed on."""

    def take(self, data: bytes) -> tuple[list[bytes], bytes | None]:
        """Take more of the message; return smaller ones, and the bytes after its end.

        None: its end has not come.

        Raises:
            NoBodyError: the message is not a part of a body, or has an unexpected encoding.
        """
        own, after = self._rest + data[: self._left], data[self._left :]
        self._left -= len(data) - len(after)
        if not self._tag:
            begin = self._begin(own)
            if begin is None:
                self._rest = own
                return [], None
            own = own[begin:]
        body, self._rest = own[: self._body_left], own[self._body_left :]
        self._body_left -= len(body)
        messages = [self._message(b"\x0a" + _as_varint(len(body)) + body)] if body else []
        if len(self._rest) > _AROUND_BYTES_MAX:
            raise NoBodyError
        if self._left:
            return messages, None
        inner, outer = self._rest[: self._inner_bytes], self._rest[self._inner_bytes :]
        messages.append(self._message(inner) + outer)
        return messages, after

    def _begin(self, data: bytes) -> int | None:
        """Return where the body begins; None: too little has come."""
        if len(data) < _HEAD_BYTES_MAX:
            return None
        inner_bytes, inner = _varint(data, 1)
        length, first = _varint(data, inner + 1)
        is_known = data[0] in {_REQUEST_TAG, _RESPONSE_TAG} and data[inner] == _BODY_TAG
        self._inner_bytes = inner_bytes - (first - inner) - length
        if not is_known or min(inner_bytes, length, self._inner_bytes) < 0:
            raise NoBodyError
        self._tag, self._body_left = data[0], length
        return first

    def _message(self, content: bytes) -> bytes:
        return bytes((self._tag,)) + _as_varint(len(content)) + content


def echoes(part: BodyPart) -> Iterator[bytes]:
    """Return the responses that send a part back; none if it is empty and not the end."""
    body, size = part.body, len(part.body)
    tag = b"\x1a" if part.is_request else b"\x22"
    if size <= CHUNK_BYTES_MAX:
        if size or part.is_end:
            yield _echo(tag, body, is_end=part.is_end)
        return
    for begin in range(0, size, CHUNK_BYTES_MAX):
        end = begin + CHUNK_BYTES_MAX
        yield _echo(tag, body[begin:end], is_end=part.is_end and end >= size)


def _echo(tag: bytes, body: bytes, *, is_end: bool) -> bytes:
    field = b"\x0a" + _as_varint(len(body)) if body else b""
    ending = _END if is_end else b""
    size = len(field) + len(body) + len(ending)
    around: list[bytes] = [field, body, ending]
    for outer in (b"\x1a", b"\x1a", b"\x0a", tag):
        prefix = outer + _as_varint(size)
        size += len(prefix)
        around.insert(0, prefix)
    return b"".join(around)


def _is_without_more(message: bytes, position: int) -> bool:
    """Whether only delimited and varint fields follow, none of them of the oneof."""
    total = len(message)
    while position < total:
        tag, position = _varint(message, position)
        if tag >> 3 < _FIRST_AFTER:
            return False
        if tag & 7 == _LENGTH_DELIMITED:
            size, position = _varint(message, position)
            if size < 0:
                return False
            position += size
        elif tag & 7 == 0:
            number, position = _varint(message, position)
            if number < 0:
                return False
        else:
            return False
    return position == total


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number and where it ends; -1: it is cut off, or too large for a length."""
    value = shift = 0
    last = min(len(data), position + _VARINT_BYTES_MAX)
    while position < last:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that marks that more follows
            return value, position
        shift += 7
    return -1, position


def _as_varint(value: int) -> bytes:
    if value < 0x80:  # noqa: PLR2004 - as above
        return bytes((value,))
    written = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - as above
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)

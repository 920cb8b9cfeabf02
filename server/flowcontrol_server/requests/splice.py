"""Pure. Bodies in Envoy's messages: cut out of what comes, and put into what goes back.

A body that Envoy streams to us (FULL_DUPLEX_STREAMED) must be sent back. To decode each message and
to encode it again would copy every byte several times; here the fields around the bytes are read
and written by hand. What is not written as protobuf's own encoders write it goes to the codec.

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
"""Of one answer: gateways refuse messages beyond 64 KiB."""
_LENGTH_DELIMITED: Final = 2
_REQUEST_TAG, _RESPONSE_TAG = 0x22, 0x2A
_REQUEST_TRAILERS_TAG, _RESPONSE_TRAILERS_TAG = 0x32, 0x3A
_BODY_TAG, _END_TAG = 0x0A, 0x10
_FIRST_AFTER: Final = 8
"""The least field number behind those of the oneof."""
_VARINT_BYTES_MAX: Final = 5
_HEAD_BYTES_MAX: Final = 2 + 2 * _VARINT_BYTES_MAX
"""Of a message with a part of a body, before the body."""
_AROUND_BYTES_MAX: Final = 65_536
"""Of such a message, behind the body."""
_END: Final = b"\x10\x01"


class BodyPart(NamedTuple):
    """A part of a body."""

    is_request: bool
    """Else it is of the response."""
    body: bytes
    is_end: bool


def body_of(message: bytes) -> BodyPart | None:
    """Return the part of a body that a ProcessingRequest carries.

    None if it carries none, or is not written as expected: the codec reads all that there is.
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
    """Whether it is the request's trailers that a ProcessingRequest carries, not the response's.

    None if it carries none, or is not written as expected. Text around them need not be UTF-8.
    """
    if not message or message[0] not in {_REQUEST_TRAILERS_TAG, _RESPONSE_TRAILERS_TAG}:
        return None
    size, begin = _varint(message, 1)
    end = begin + size
    if size < 0 or end > len(message) or not _is_without_more(message, end):
        return None
    return message[0] == _REQUEST_TRAILERS_TAG


class NoBodyError(Exception):
    """A large message is no part of a body, or is not written as expected."""


@final
class LargeBody:
    """A message with a part of a body too large to be kept whole: smaller ones are made of it.

    Args:
        size: of the message.
    """

    __slots__ = ("_body_left", "_inner_bytes", "_left", "_rest", "_tag")

    def __init__(self, size: int) -> None:
        self._left = size
        """Bytes of the message to come."""
        self._tag = 0
        """Of what the message carries; 0 until its beginning is known."""
        self._body_left = 0
        self._inner_bytes = 0
        """Behind the body, of what the message carries."""
        self._rest = b""
        """What has come of the message and was not passed on."""

    def take(self, data: bytes) -> tuple[list[bytes], bytes | None]:
        """Take more of it; return smaller messages, and what follows it once it is whole.

        Raises:
            NoBodyError: the message is not what is taken here.
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
        """Read where the body begins; None while too little has come."""
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
    """Write the answers that send a part back; none for a part that is empty and ends nothing."""
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
    """Whether what follows has no part of the oneof, only fields with a length or a number."""
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
    """Return a number and where it ends; -1 for what is cut off, or too large to be a length."""
    value = shift = 0
    last = min(len(data), position + _VARINT_BYTES_MAX)
    while position < last:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that says that more follows
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

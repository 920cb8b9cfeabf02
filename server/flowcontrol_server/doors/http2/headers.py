"""Pure. Field blocks: decoded by `hpack`, then checked (RFC 7541; RFC 9113, 8.2 and 8.3).

A proxy sends the same few fields with every stream, and after the first one as the same bytes: an
index for each into HPACK's dynamic table. Decoding them takes 30 us, as much as all other work for
a stream here. So a block that is decoded without changing the table is cached by its bytes, and the
cache is cleared when the table changes. This is exact for any peer: equal bytes and an equal table
have one meaning.

Our own blocks are encoded once, at import, without the dynamic table. The first block on a
connection begins with a table size update to 0 (RFC 7541, 4.2), `EMPTY_TABLE`, so that the peer's
decoder agrees for any table size that it announces.
"""

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, final

from hpack import Decoder, Encoder, HPACKError, OversizedHeaderListError

from flowcontrol_server.doors.http2 import huffman
from flowcontrol_server.doors.http2.errors import ConnectionFault, ErrorCode, StreamFault
from flowcontrol_server.doors.http2.limits import Http2Limits

huffman.use()

Fields = tuple[tuple[bytes, bytes], ...]

EMPTY_TABLE: Final = b"\x20"
_REMEMBERED_MAX: Final = 64
_REMEMBERED_BYTES_MAX: Final = 1_024
_FIELD_OVERHEAD: Final = 32
"""Size that a field counts in addition to its bytes (RFC 9113, 6.5.2)."""
_DECODED_BEYOND: Final = 4
"""Multiple of the announced list size at which decoding stops and the connection ends."""
_EXPANSION: Final = 2
"""Multiple of its own size that a block may decode to, if more: Huffman saves 3 bits of 8."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"(?![ \t])[^\x00\r\n]*(?<![ \t])")
_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))


class RequestHead(NamedTuple):
    """The field block that opens a stream, checked to be well formed."""

    method: bytes
    path: bytes
    """Empty for CONNECT."""
    content_type: bytes
    """Empty: absent; if it was sent twice, the first one."""
    content_length: int | None
    fields: Fields
    """All fields, pseudo-header fields included, as they came."""


def encode_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Encode a field block that any decoder reads alike, whatever is in its table."""
    return Encoder().encode([(name, value, True) for name, value in fields])


@final
class FieldBlock:
    """A field block that CONTINUATION must complete before any other frame (4.3)."""

    __slots__ = ("_frame_count", "_parts", "_size", "is_end", "stream_id")

    def __init__(self, stream_id: int, first: bytes, *, is_end: bool) -> None:
        self.stream_id = stream_id
        self.is_end = is_end
        """Whether it ends the client's side of the stream."""
        self._parts = [first]
        self._size = len(first)
        self._frame_count = 0

    def add(self, part: bytes, limits: Http2Limits) -> None:
        """Add one CONTINUATION.

        Raises:
            ConnectionFault: there are too many of them, or too many bytes.
        """
        self._parts.append(part)
        self._size += len(part)
        self._frame_count += 1
        frames_max, bytes_max = limits.continuation_frames_max, limits.header_block_bytes_max
        if self._frame_count > frames_max or self._size > bytes_max:
            reason = f"field blocks must be at most {frames_max} CONTINUATION and {bytes_max} bytes"
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, reason)

    def whole(self) -> bytes:
        """Return the complete block."""
        return b"".join(self._parts)


@final
class HeaderReader:
    """Reads the field blocks of one connection, each once and in order, because HPACK has state."""

    __slots__ = ("_decoder", "_list_bytes_max", "_remembered", "_table_state")

    def __init__(self, limits: Http2Limits) -> None:
        self._list_bytes_max = limits.header_list_bytes_max
        self._decoder = Decoder()
        self._table_state = self._table()
        self._remembered: dict[bytes, RequestHead] = {}

    def table_bytes_acknowledged(self, size: int) -> None:
        """Enforce the announced table size, once the peer has acknowledged it."""
        self._decoder.max_allowed_table_size = size
        self._remembered.clear()

    def request(self, stream_id: int, block: bytes) -> RequestHead:
        """Read the block that opens a stream.

        Raises:
            StreamFault: it is malformed (8.1.1), or larger than announced.
            ConnectionFault: the decoder's state is lost.
        """
        head = self._remembered.get(block)
        if head is not None:
            return head
        fields, is_table_unchanged = self._decode(block)
        self._check_size(stream_id, fields, len(block))
        head = _request_head(stream_id, fields)
        if is_table_unchanged and len(block) <= _REMEMBERED_BYTES_MAX:
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[block] = head
        return head

    def trailers(self, stream_id: int, block: bytes) -> None:
        """Check the block that ends a stream; its content is not used (8.1).

        Raises:
            StreamFault: it is malformed.
            ConnectionFault: the decoder's state is lost.
        """
        for name, value in self.skipped(block):
            if name[:1] == b":":
                raise _malformed(stream_id, f"{_text(name)} must not be in trailers")
            _check_field(stream_id, name, value)

    def skipped(self, block: bytes) -> Fields:
        """Decode a block only to keep HPACK's state.

        Raises:
            ConnectionFault: the decoder's state is lost.
        """
        fields, _ = self._decode(block)
        return fields

    def _check_size(self, stream_id: int, fields: Fields, block_bytes: int) -> None:
        size = sum(len(name) + len(value) + _FIELD_OVERHEAD for name, value in fields)
        if size > self._list_bytes_max:
            reason = f"field block must be at most {self._list_bytes_max} bytes decoded, got {size}"
            is_bomb = size > block_bytes * _EXPANSION
            code = ErrorCode.ENHANCE_YOUR_CALM
            raise StreamFault(stream_id, code, reason, is_charged=is_bomb)

    def _decode(self, block: bytes) -> tuple[Fields, bool]:
        """Return the fields, and whether the table is unchanged."""
        least = self._list_bytes_max * _DECODED_BEYOND
        self._decoder.max_header_list_size = max(least, len(block) * _EXPANSION)
        try:
            fields = tuple(self._decoder.decode(block, raw=True))
        except OversizedHeaderListError as error:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, str(error)) from error
        except (HPACKError, IndexError) as fault:  # IndexError: a block cut off in a literal
            reason = f"field blocks must be HPACK, got {type(fault).__name__}"
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, reason) from fault
        before, after = self._table_state, self._table()
        is_unchanged = before[:2] == after[:2] and before[2] is after[2]
        if not is_unchanged:
            self._table_state = after
            self._remembered.clear()
        return fields, is_unchanged

    def _table(self) -> tuple[int, int, object]:
        """Return a value that changes whenever the table does: each entry is a separate object."""
        table = self._decoder.header_table
        entries: Any = table.dynamic_entries  # compiled, a value typed as tuple has no identity
        return table.maxsize, len(entries), entries[0] if entries else None


def _request_head(stream_id: int, fields: Fields) -> RequestHead:
    pseudo: dict[bytes, bytes] = {}
    regular: dict[bytes, bytes] = {}
    for name, value in fields:
        if name[:1] == b":":
            if regular or name in pseudo or name not in _PSEUDO:
                raise _malformed(stream_id, f"{_text(name)} must be known, come once and first")
            if _VALUE.fullmatch(value) is None:
                raise _malformed(stream_id, f"{_text(name)} must be free of control characters")
            pseudo[name] = value
            continue
        _check_field(stream_id, name, value)
        if name == b"content-length" and regular.get(name, value) != value:
            raise _malformed(stream_id, "content-length must come once")
        regular.setdefault(name, value)
    _check_pseudo(stream_id, pseudo, regular.get(b"host"))
    return RequestHead(
        pseudo[b":method"],
        pseudo.get(b":path", b""),
        regular.get(b"content-type", b""),
        _content_length(stream_id, regular.get(b"content-length")),
        fields,
    )


def _check_field(stream_id: int, name: bytes, value: bytes) -> None:
    """Check a regular field (8.2.1, 8.2.2)."""
    if _NAME.fullmatch(name) is None:
        raise _malformed(stream_id, f"field name must be a token in lower case, got {_text(name)}")
    if _VALUE.fullmatch(value) is None:
        raise _malformed(
            stream_id, f"{_text(name)} must be free of control characters and outer spaces"
        )
    if name in _HOP_BY_HOP:
        raise _malformed(stream_id, f"{_text(name)} must not be sent over HTTP/2")
    if name == b"te" and value != b"trailers":
        raise _malformed(stream_id, f"te must be trailers, got {_text(value)}")


def _check_pseudo(stream_id: int, pseudo: dict[bytes, bytes], host: bytes | None) -> None:
    """Check the pseudo-header fields of a request (8.3.1, 8.5)."""
    if not pseudo.get(b":method"):
        raise _malformed(stream_id, ":method must be present")
    authority = pseudo.get(b":authority")
    if pseudo[b":method"] == b"CONNECT":
        if not authority or b":scheme" in pseudo or b":path" in pseudo:
            raise _malformed(stream_id, "CONNECT must have :authority alone")
    elif not pseudo.get(b":scheme") or not pseudo.get(b":path"):
        raise _malformed(stream_id, ":scheme and :path must be present")
    if host is not None and authority is not None and host != authority:
        raise _malformed(stream_id, "host must be the same as :authority")


def _content_length(stream_id: int, value: bytes | None) -> int | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:  # noqa: PLR2004 - an exabyte
        raise _malformed(stream_id, f"content-length must be a number, got {_text(value)}")
    return int(value)


def _malformed(stream_id: int, reason: str) -> StreamFault:
    return StreamFault(stream_id, ErrorCode.PROTOCOL_ERROR, reason)


def _text(value: bytes) -> str:
    """Return bytes of a client as short text that is safe to show."""
    return repr(value[:64])[1:]

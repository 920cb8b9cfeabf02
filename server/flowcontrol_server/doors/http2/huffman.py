"""Pure. HPACK's Huffman code (RFC 7541, 5.2), decoded a byte at a time.

`hpack` walks its table by half bytes. This takes 13 ms for a field of 60 KiB, which any client of
the proxy may send, and nothing else is served meanwhile. This module makes a table of whole bytes
from it, row by row as needed, and takes 4 ms; less if compiled.
"""

from typing import Final

import hpack.hpack
from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import (
    HUFFMAN_COMPLETE,
    HUFFMAN_EMIT_SYMBOL,
    HUFFMAN_FAIL,
    HUFFMAN_TABLE,
)

_Step = tuple[int, bytes]
"""The state after a byte, and the text that it completes; -1: the code is invalid."""
_FAIL: Final = (-1, b"")
_ROWS: Final[list[list[_Step] | None]] = [None] * (len(HUFFMAN_TABLE) // 16)
"""By state, then by byte."""
_FINAL: Final = bytearray(len(_ROWS))
"""Whether a text may end in a state; set before the state can be reached."""


def decode(huffman_string: bytes | bytearray | memoryview | None) -> bytes:
    """Decode a text.

    Raises:
        HPACKDecodingError: it is not valid Huffman code, or cut off.
    """
    if not huffman_string:
        return b""
    state = 0
    pieces: list[bytes] = []
    for byte in bytes(huffman_string):
        row = _ROWS[state]
        if row is None:
            row = _ROWS[state] = [_step(state, each) for each in range(256)]
        state, piece = row[byte]
        if state < 0:
            message = "Invalid Huffman string"
            raise HPACKDecodingError(message)
        if piece:
            pieces.append(piece)
    if not _FINAL[state]:
        message = "Incomplete Huffman string"
        raise HPACKDecodingError(message)
    return b"".join(pieces)


def _step(state: int, byte: int) -> _Step:
    """Walk the table by the two halves of a byte."""
    piece = b""
    flags = 0
    for half in (byte >> 4, byte & 0x0F):
        state, flags, output = HUFFMAN_TABLE[state * 16 + half]
        if flags & HUFFMAN_FAIL:
            return _FAIL
        if flags & HUFFMAN_EMIT_SYMBOL:
            piece += bytes((output,))
    _FINAL[state] = bool(flags & HUFFMAN_COMPLETE)
    return state, piece


def use() -> None:
    """Make hpack's decoder use this function, by replacing the name that it calls."""
    hpack.hpack.decode_huffman = decode  # type: ignore[attr-defined]  # as imported there

"""HPACK's Huffman code against hpack's own decoder of it."""

import hpack.hpack
import pytest
from hpack import Decoder, Encoder, HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.doors.http2 import huffman
from flowcontrol_server.doors.http2.headers import HeaderReader
from flowcontrol_server.doors.http2.limits import Http2Limits


class TestDecode:
    """Any bytes."""

    @given(st.binary(max_size=40))
    def test_like_hpack(self, text: bytes) -> None:
        """It says what hpack says, of what is no code too."""
        try:
            expected = decode_huffman(text)
        except HPACKDecodingError as error:
            with pytest.raises(HPACKDecodingError, match=str(error)):
                huffman.decode(text)
        else:
            assert huffman.decode(text) == expected

    @given(st.text(st.characters(max_codepoint=255), max_size=60))
    def test_round_trip(self, value: str) -> None:
        """Every octet comes back."""
        block = Encoder().encode([("x", value.encode("latin-1"), True)], huffman=True)

        ((_, decoded),) = Decoder().decode(block, raw=True)

        assert decoded == value.encode("latin-1")

    def test_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Connections decode with it: a version of hpack that does not shows here."""
        reader = HeaderReader(Http2Limits())
        fields = [(":method", "GET"), (":scheme", "http"), (":path", "/" + "y" * 100)]
        block = Encoder().encode([(*each, True) for each in fields], huffman=True)
        assert hpack.hpack.decode_huffman is huffman.decode  # type: ignore[attr-defined]  # as imported there
        monkeypatch.setattr("hpack.hpack.decode_huffman", lambda _text: b"replaced")

        assert reader.request(1, block).path == b"replaced"

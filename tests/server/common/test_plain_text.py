"""Text of clients, as people are shown it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.common.plain_text import plain


class TestPlain:
    """What a terminal obeys is shown, not obeyed."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("team-a", "team-a"),
            ("Größe 模型 🙂", "Größe 模型 🙂"),
            ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
            ("\x9b2J", r"\x9b2J"),
            ("a\nb\r\t\x7f", r"a\nb\r\t\x7f"),
            ("\u202eabc\u2066", r"\u202eabc\u2066"),
            ("zero\u200bwidth", r"zero\u200bwidth"),
            ("\u2028", r"\u2028"),
            ("\U000e0041", r"\U000e0041"),
            ("\ud800", r"\ud800"),
            ("", ""),
        ],
    )
    def test_each(self, text: str, expected: str) -> None:
        """An escape for each character that is not shown as itself."""
        assert plain(text) == expected

    @given(st.text(st.characters()))
    def test_any(self, text: str) -> None:
        """Nothing hidden is left, and cleaning twice changes nothing."""
        cleaned = plain(text)

        assert all(unicodedata.category(each)[0] != "C" for each in cleaned)
        assert plain(cleaned) == cleaned

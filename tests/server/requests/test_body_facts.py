"""Fields of a JSON body, read from its beginning."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.requests.body_facts import READ_BYTES_MAX, body_facts

CHAT = {
    "model": "llama",
    "messages": [{"role": "user", "content": 'say "model": 1, } or {'}],
    "stream": True,
    "max_tokens": 512,
    "user": "böb",
    "service_tier": "flex",
    "metadata": {"model": "not this one"},
    "temperature": 0.5,
}
FOUND = {
    "model": "llama",
    "stream": "1",
    "max_tokens": 512.0,
    "user": "böb",
    "service_tier": "flex",
}


def written(content: Any, **how: Any) -> bytes:
    """JSON."""
    return json.dumps(content, **how).encode()


class TestFacts:
    """What is found."""

    @pytest.mark.parametrize("how", [{}, {"indent": 2}, {"separators": (",", ":")}])
    def test_whole(self, how: dict[str, Any]) -> None:
        """The outermost fields, however they are written; no others."""
        assert body_facts(written(CHAT, **how)) == FOUND

    def test_byte_order_mark(self) -> None:
        """Model servers read what is behind one, and so must rules."""
        assert body_facts(b"\xef\xbb\xbf" + written(CHAT)) == FOUND

    def test_every_beginning(self) -> None:
        """What is cut off is left out; a number that may go on is no number."""
        body = written(CHAT)
        for end in range(len(body)):
            found = body_facts(body[:end])
            assert found == {name: FOUND[name] for name in found}
        assert body_facts(b'{"max_tokens": 51') == {}
        assert body_facts(b'{"model": "a", "max_tokens": 51') == {"model": "a"}

    @pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "a\\uDFFFb"])
    def test_half_a_character(self, half: str) -> None:
        """JSON can say it, and nothing that a tenant is shown by can: it is left out."""
        body = f'{{"user": "{half}", "model": "llama", "service_tier": "\\ud83d\\ude00"}}'

        assert body_facts(body.encode()) == {"model": "llama", "service_tier": "😀"}

    def test_behind_a_long_prompt(self) -> None:
        """Fields beyond what is read are unknown."""
        body = written({"prompt": "x" * READ_BYTES_MAX, "model": "llama"})

        assert body_facts(body) == {}
        assert body_facts(written({"prompt": "x" * 60_000, "model": "m"})) == {"model": "m"}

    def test_a_prompt_of_numbers(self) -> None:
        """So is what stands behind a list that is long."""
        assert body_facts(written({"prompt": list(range(9_000)), "model": "llama"})) == {}
        assert body_facts(written({"model": "m", "prompt": list(range(9_000))})) == {"model": "m"}

    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"null", b'"model"', b"--boundary", b'[{"model": "a"}]', b'{"model"']
    )
    def test_no_object(self, body: bytes) -> None:
        """What is no object says nothing."""
        assert body_facts(body) == {}

    @given(st.binary(max_size=300) | st.text('{}[]:,"\\ model1').map(str.encode))
    def test_any(self, body: bytes) -> None:
        """Whatever it is, nothing is raised."""
        assert body_facts(body).keys() <= FOUND.keys() | {
            "max_completion_tokens",
            "max_output_tokens",
        }

    @given(
        st.dictionaries(
            st.sampled_from([*FOUND, "messages", "a"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=6,
            ),
        )
    )
    def test_as_json_reads_it(self, content: dict[str, Any]) -> None:
        """Held against the parser of the standard library."""
        expected: dict[str, Any] = {}
        for name, value in content.items():
            if name in FOUND and isinstance(value, bool):
                expected[name] = "1" if value else "0"
            elif name in FOUND and isinstance(value, int):
                expected[name] = float(value)
            elif name in FOUND and isinstance(value, str):
                expected[name] = value
        assert body_facts(written(content)) == expected

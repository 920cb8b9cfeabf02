"""Hashes of what a prompt begins with."""

import json

import pytest

from flowcontrol_server.requests.prefix import BLOCK_BYTES, prefix_of_body

LONG = "You are a helpful assistant. " * 200


def chat(text: str, **more: object) -> bytes:
    """A body."""
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": text}]
    return json.dumps(more | {"model": "llama", "messages": messages}).encode()


class TestBody:
    """Prompts that begin alike."""

    def test_alike(self) -> None:
        """They share the hashes of all whole blocks before they differ."""
        one, other = (prefix_of_body("llama", chat(text * 900)) for text in ("a", "b"))
        same = [a == b for a, b in zip(one, other, strict=True)]

        assert same == [True] * (len(LONG) // BLOCK_BYTES) + [False]

    def test_fields_before(self) -> None:
        """What stands before the prompt makes no difference."""
        plain, other = chat("hello"), chat("hello", user="somebody", temperature=0.5)

        assert prefix_of_body("llama", plain) == prefix_of_body("llama", other)

    def test_model(self) -> None:
        """What another model has cached is of no use."""
        assert not set(prefix_of_body("llama", chat(""))) & set(prefix_of_body("qwen", chat("")))

    def test_every_block_counts(self) -> None:
        """A block stands for all before it, too."""
        one = prefix_of_body("", b"a" * BLOCK_BYTES + b"c" * BLOCK_BYTES)
        other = prefix_of_body("", b"b" * BLOCK_BYTES + b"c" * BLOCK_BYTES)

        assert len(one) == len(other) == 2
        assert one[1] != other[1]

    @pytest.mark.parametrize(
        ("size", "count"), [(0, 0), (1023, 0), (1024, 1), (65_536, 64), (200_000, 64)]
    )
    def test_bounded(self, size: int, count: int) -> None:
        """Whole blocks, 64 at most."""
        assert len(prefix_of_body("", b"x" * size)) == count

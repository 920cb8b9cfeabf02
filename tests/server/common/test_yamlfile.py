"""YAML files within bounds, whatever they hold."""

import itertools
import time
from pathlib import Path

import pytest

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.yamlfile import (
    DEPTH_MAX,
    FILE_BYTES_MAX,
    NUMBER_LENGTH_MAX,
    REPEATED_MAX,
    read_documents,
    read_mapping,
)

NAMES = "abcdefghi"
BOMB = "a: &a [l,l,l,l,l,l,l,l,l]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in itertools.pairwise(NAMES)
)
"""464 bytes that took 35 s and 1.7 GB."""


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    """A file's place."""
    return tmp_path / "any.yaml"


def problem_of(path: Path, text: str) -> str:
    """What is wrong with a file of this text, found within a second."""
    path.write_text(text)
    begun_s = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_documents(path)
    assert time.process_time() - begun_s < 2.0
    (problem,) = caught.value.problems
    return problem


class TestAliases:
    """Each counts as if it were written out."""

    def test_for_what_they_are(self, path: Path) -> None:
        """Anchors, aliases and merge keys are read; an anchor ends with its document."""
        path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n---\n[&a 1, *a]\n")

        assert read_documents(path) == [{"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}, [1, 1]]

    def test_of_aliases(self, path: Path) -> None:
        """Aliases of aliases multiply."""
        assert problem_of(path, BOMB) == (
            f"{path}:5: aliases must repeat at most {REPEATED_MAX} characters in all, "
            "got 71428 up to *d"
        )

    def test_of_long_text(self, path: Path) -> None:
        """A long text counts with its length, each time."""
        half = REPEATED_MAX // 2 - 1
        path.write_text(f"- &a {'x' * half}\n- *a\n- *a\n")
        assert [len(each) for each in read_documents(path)[0]] == [half] * 3

        assert f"{path}:3: aliases must repeat at most" in problem_of(
            path, f"- &a {'x' * (half + 1)}\n- *a\n- *a\n"
        )

    def test_merge_keys(self, path: Path) -> None:
        """A merge key repeats what it merges."""
        merges = "".join(f"x{n}: {{<<: [{','.join(['*a'] * 100)}]}}\n" for n in range(1000))

        assert "aliases must repeat at most" in problem_of(path, f"a: &a {{b: c}}\n{merges}")

    def test_of_itself(self, path: Path) -> None:
        """What contains itself has no end."""
        expected = f"{path}:1: *a must not be inside the value that it repeats"
        assert problem_of(path, "&a [*a]") == expected


class TestDepth:
    """Mappings and lists inside each other."""

    def test_bound(self, path: Path) -> None:
        """As deep as allowed is read, one more is not."""
        depth = DEPTH_MAX - 1
        path.write_text("[" * depth + "x" + "]" * depth)
        read_documents(path)

        expected = f"{path}:1: mappings and lists must be nested at most {DEPTH_MAX} deep"
        assert problem_of(path, "[" * DEPTH_MAX + "x" + "]" * DEPTH_MAX) == expected

    @pytest.mark.parametrize("opening", ["[", "{", "- ", "? ", "{a: "])
    def test_in_time(self, path: Path, opening: str) -> None:
        """A file of openings is given up at the bound."""
        text = opening * (FILE_BYTES_MAX // len(opening) // 4)

        assert "must be nested at most" in problem_of(path, text)


class TestNumbers:
    """Numbers and dates have a length."""

    @pytest.mark.parametrize(
        "text",
        [
            "1" + ":1" * 100_000,
            "0x" + "f" * 10_000,
            "1" * 1001,
            "1." + "1" * 100_000,
            "2026-01-01 00:00:00." + "0" * 1000,
        ],
    )
    def test_too_long(self, path: Path, text: str) -> None:
        """A longer one is not converted."""
        expected = f"a number must have at most {NUMBER_LENGTH_MAX} characters, got {len(text)}"
        assert problem_of(path, f"\na: {text}") == f"{path}:2: {expected}"

    def test_text(self, path: Path) -> None:
        """Text may be as long as the file."""
        path.write_text(f"a: '{'1' * 1000}'")

        assert read_mapping(path) == {"a": "1" * 1000}


class TestSize:
    """Of a file."""

    def test_bound(self, path: Path) -> None:
        """As large as allowed is read, one byte more is not."""
        path.write_text("#" * FILE_BYTES_MAX)
        assert read_documents(path) == []

        expected = f"{path}: must be at most {FILE_BYTES_MAX} bytes, got {FILE_BYTES_MAX + 1}"
        assert problem_of(path, "#" * (FILE_BYTES_MAX + 1)) == expected

    def test_other_bound(self, path: Path) -> None:
        """Whoever reads a file of its own making says how large it may be."""
        path.write_text("#" * 11)

        with pytest.raises(ConfigError, match="must be at most 10 bytes, got 11"):
            read_documents(path, 10)

"""The README keeps its promises, as far as a test can tell."""

import re
from pathlib import Path

from tests.support.readme import README, renewed

ROOT = README.parent


class TestReadme:
    """The README against the code."""

    def test_generated_parts_say_what_the_code_says(self) -> None:
        """`make docs` would change nothing."""
        text = README.read_text()

        assert renewed(text) == text

    def test_every_file_it_points_to_exists(self) -> None:
        """No link into the repository is dead."""
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text())
        dead = [link for link in links if not (ROOT / link).exists()]

        assert dead == []
        assert links

    def test_every_make_target_it_names_exists(self) -> None:
        """No `make` command in it is unknown."""
        named = set(re.findall(r"\bmake ([a-z-]+)", README.read_text()))
        known = set(re.findall(r"^([a-z-]+):", Path(ROOT / "Makefile").read_text(), re.MULTILINE))

        assert named <= known
        assert {"demo", "test"} <= named

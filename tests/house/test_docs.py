"""The documentation: it builds, its links lead somewhere, and what it shows is accepted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowcontrol_server.config.settings import Settings, load_settings
from tests.support.readme import PAGES, PARTS, ROOT, marks, renewed

DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks of code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def configurations() -> list[tuple[str, str]]:
    """Return every whole configuration of the service in the documentation, and where it is."""
    return [
        (f"{page.relative_to(DOCS)}:{number}", block)
        for page in PAGES
        if page.is_relative_to(DOCS)
        for number, block in enumerate(blocks(page, "yaml"))
        if "kind: FlowControlConfig" in block
    ]


class TestPages:
    """Page by page."""

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_made_parts_say_what_the_code_says(self, page: Path) -> None:
        """`make docs` would change nothing."""
        assert renewed(page.read_text()) == page.read_text()

    @pytest.mark.parametrize("name", PARTS)
    def test_made_parts_are_somewhere(self, name: str) -> None:
        """Each stands in one page, whole."""
        begin, end = marks(name)

        assert sum(begin in page.read_text() for page in PAGES) == 1
        assert sum(end in page.read_text() for page in PAGES) == 1

    @pytest.mark.parametrize(("where", "text"), configurations(), ids=lambda value: value[:20])
    def test_configurations(self, where: str, text: str, tmp_path: Path) -> None:
        """Every whole configuration that is shown is accepted."""
        if "kubernetes: {}" in text and "kubernetes" not in Settings.model_fields:
            pytest.skip("needs a cluster's sources")
        for folder in ("objectives", "state"):
            (tmp_path / folder).mkdir()
        (tmp_path / "flowcontrol.yaml").write_text(text)

        assert load_settings(tmp_path / "flowcontrol.yaml").pool, where

    def test_yaml(self) -> None:
        """Every block of YAML is YAML."""
        texts = [text for page in PAGES for text in blocks(page, "yaml")]
        assert texts

        for text in texts:
            assert all(yaml.safe_load_all(text))


class TestSite:
    """All together."""

    @pytest.mark.slow
    def test_builds_strictly(self, tmp_path: Path) -> None:
        """No link is dead, no anchor, no page forgotten; and nothing is fetched from elsewhere."""
        pytest.importorskip("material", reason="needs mkdocs-material")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

        assert done.returncode == 0, done.stderr
        page = (tmp_path / "concepts.html").read_text()
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', page)
        assert loaded == []

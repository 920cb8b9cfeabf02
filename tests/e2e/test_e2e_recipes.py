"""Every recipe, run from its own text in an empty folder."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from flowcontrol_server.tools.envoy.binary import envoy_binary
from tests.support.recipes import Recipe

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    *sorted(set((DOCS / "recipes").glob("*.md")) - {DOCS / "recipes" / "index.md"}),
    DOCS / "quickstart" / "laptop.md",
)
NEEDS = {
    "nginx": "nginx",
    "litellm-before": "litellm",
    "litellm-behind": "litellm",
    "systemd": "systemd-analyze",
}
"""Programs that the machine may lack, by the page that runs them."""
_ENVOY = """#!/bin/sh
exec {binary} --use-dynamic-base-id --concurrency 1 "$@"
"""
_OLLAMA = """#!/bin/sh
test "$1" != serve || exec flowcontrol simulate-server --port "${OLLAMA_HOST##*:}"
"""
"""Stands in for Ollama."""


@pytest.fixture(name="environment")
def _environment(tmp_path: Path) -> dict[str, str]:
    """Programs of this environment, and an Envoy that shares no memory with others."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("envoy", _ENVOY.format(binary=envoy_binary())), ("ollama", _OLLAMA)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    return {"PATH": path, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipe(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Its commands succeed, and print what the page says."""
    program = NEEDS.get(page.stem)
    if program and shutil.which(program, path=environment["PATH"]) is None:
        pytest.skip(f"{program} is not installed")
    directory = tmp_path / "empty"
    directory.mkdir()
    differences = [difference for _, _, difference in Recipe(page, directory, environment).run()]

    assert differences, "a recipe says what one should see"
    assert not any(differences), "\n".join(differences)

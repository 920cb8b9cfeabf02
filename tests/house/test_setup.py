"""setup.sh, and the versions it pins."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OLDEST_PYTHON = "3.11.2"
"""Debian 12's."""
PYTHON_WITHOUT_PIP_SUCCESS = """\
#!/bin/sh
case "$*" in *--version) echo Python 3.11.2; exit ;; esac
echo Collecting this
echo 'ERROR: Ignored the following versions that require a different python version: 13.1'
echo 'ERROR: No matching distribution found for left-pad==1.0'
exit 1
"""


class TestPins:
    """constraints.txt."""

    def test_installed(self) -> None:
        """Every version pinned, where it is installed, is the one installed."""
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
        found = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
        pinned = found.keys() & pins.keys()

        assert len(pinned) > 50
        assert {name: found[name] for name in pinned if found[name] not in pins[name]} == {}

    def test_oldest_python(self) -> None:
        """Every version installed allows the oldest Python that is promised."""
        needs = {
            f"{each.name} {each.version}": each.metadata["Requires-Python"]
            for each in importlib.metadata.distributions()
            if each.metadata["Requires-Python"]
        }

        assert len(needs) > 50
        assert {
            name: python
            for name, python in needs.items()
            if OLDEST_PYTHON not in SpecifierSet(python)
        } == {}


class TestSetup:
    """setup.sh."""

    def test_package_that_cannot_be_had(self, tmp_path: Path) -> None:
        """It names the package, the Python, the log, and what to do."""
        python = tmp_path / "bin" / "python"
        python.parent.mkdir()
        python.write_text(PYTHON_WITHOUT_PIP_SUCCESS)
        python.chmod(0o755)

        command = ("sh", "setup.sh", str(tmp_path), "demo")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

        assert done.returncode == 1
        said = done.stderr.splitlines()
        assert said[:3] == [
            "setup: pip could not install the project with Python 3.11.2:",
            "ERROR: No matching distribution found for left-pad==1.0",
            f"setup: the whole output of pip is in {tmp_path}/setup.log.",
        ]
        assert "PYTHON=python3.x" in said[3]
        assert "PIP_INDEX_URL" in said[4]

    @pytest.mark.slow
    def test_interrupted(self, tmp_path: Path) -> None:
        """An environment that ctrl-C left without pip is finished by the next run."""
        subprocess.run((sys.executable, "-m", "venv", "--without-pip", tmp_path), check=True)

        command = ("sh", "setup.sh", str(tmp_path), "demo")
        offline = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHON": sys.executable}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=offline
        )

        assert (tmp_path / "bin" / "pip").exists()
        assert "No module named pip" not in done.stderr
        assert done.stderr.startswith("setup: pip could not install the project")


class TestMakefile:
    """Targets together."""

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        """Also with -j, nothing installs into the environment while something else does."""
        shutil.copy(ROOT / "Makefile", tmp_path)
        for name in ("pyproject.toml", "constraints.txt", "hatch_build.py"):
            (tmp_path / name).touch()
        (tmp_path / "setup.sh").write_text("mkdir -p $1 && mkdir busy && sleep 0.5 && rmdir busy")

        command = ("make", "-j2", ".venv/ready", ".venv/ready-demo")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr


class TestClean:
    """make clean."""

    def test_all_that_git_ignores(self) -> None:
        """It removes everything that is made here: what git is told to ignore."""
        command = ("make", "--dry-run", "clean")
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}

        assert len(ignored) > 10
        assert ignored - set(said.split()) == set()


def test_a_control_plane_is_built_before_the_tests() -> None:
    """A test has 15 minutes, in which a busy machine does not build an API server."""
    command = ("make", "--dry-run", "--no-print-directory", "kubernetes")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    *_, before, run = done.stdout.splitlines()
    assert before.endswith("-m tests.support.control_plane")
    assert "pytest -m kubernetes" in run

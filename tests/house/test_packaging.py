"""The wheel that people install.

It is built once, from what the Dockerfile copies; FLOWCONTROL_WHEEL names another to be read.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.dockerfile import copied

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60


@pytest.fixture(name="wheel", scope="module")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """The wheel that was named, or one from what the Dockerfile copies, nothing generated in it."""
    named = os.environ.get("FLOWCONTROL_WHEEL")
    with ZipFile(named or _built(tmp_path_factory)) as wheel:
        yield wheel


def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in (*copied(), "tests"):  # which must not get into it
        if (ROOT / name).is_dir():
            made = ("__pycache__", "v1") if name == "flowcontrol" else ("__pycache__",)
            ignored = shutil.ignore_patterns(*made)
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    # xds-protos is no part of an environment; its descriptors lie beside the sources.
    command = [*build, "--skip-dependency-check", "--outdir", str(target), str(source)]
    done = subprocess.run(command, check=False, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(name="names")
def _names(wheel: ZipFile) -> set[str]:
    """The files in the wheel."""
    return set(wheel.namelist())


@pytest.fixture(name="metadata")
def _metadata(wheel: ZipFile) -> dict[str, list[str]]:
    """What the wheel says of itself, every value by its name."""
    (name,) = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
    message = message_from_string(wheel.read(name).decode())
    return {key: message.get_all(key, []) for key in message}


@pytest.mark.slow
class TestWheel:
    """What is in it, and what is not."""

    def test_every_module(self, names: set[str]) -> None:
        """Every module of both packages is in it."""
        expected = {
            path.relative_to(folder).as_posix()
            for folder, package in ((ROOT, "flowcontrol"), (ROOT / "server", "flowcontrol_server"))
            for path in (folder / package).rglob("*.py")
            if "__pycache__" not in path.parts
        }

        assert expected
        assert expected <= names

    def test_generated_modules(self, names: set[str]) -> None:
        """Our own gRPC API was compiled on the way; Envoy's messages are there."""
        assert {
            "flowcontrol/v1/__init__.py",
            "flowcontrol/v1/flowcontrol_pb2.py",
            "flowcontrol/v1/flowcontrol_pb2.pyi",
            "flowcontrol/v1/flowcontrol_pb2_grpc.py",
            "flowcontrol_server/common/envoy_messages.binpb",
        } <= names

    def test_typed(self, names: set[str]) -> None:
        """Type checkers are told that both packages are typed."""
        assert {"flowcontrol/py.typed", "flowcontrol_server/py.typed"} <= names

    def test_nothing_else(self, names: set[str]) -> None:
        """There are no tests in it, and no top-level name that is not ours."""
        tops = {name.partition("/")[0] for name in names}

        (info,) = tops - {"flowcontrol", "flowcontrol_server"}
        assert info.startswith("flowcontrol-")
        assert info.endswith(".dist-info")
        assert not [name for name in names if "test" in name.rpartition("/")[2]]

    def test_command(self, wheel: ZipFile, names: set[str]) -> None:
        """It installs the command flowcontrol."""
        (name,) = [each for each in names if each.endswith(".dist-info/entry_points.txt")]

        expected = ["[console_scripts]", "flowcontrol = flowcontrol_server.__main__:main"]
        assert expected == wheel.read(name).decode().split("\n")[:2]

    def test_licence(self, wheel: ZipFile, names: set[str], metadata: dict[str, list[str]]) -> None:
        """The licence is in it, whole, and named."""
        (name,) = [each for each in names if each.endswith("/licenses/LICENSE")]

        assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
        assert metadata["License-Expression"] == ["Apache-2.0"]

    def test_metadata(self, metadata: dict[str, list[str]]) -> None:
        """Name, Python and the extras are what pyproject.toml says."""
        assert metadata["Name"] == ["flowcontrol"]
        assert metadata["Requires-Python"] == [">=3.11"]
        extras = {"demo", "dev", "envoy", "kubernetes", "otel", "top", "valkey"}
        assert set(metadata["Provides-Extra"]) == extras
        needed = metadata["Requires-Dist"]
        assert any(each.startswith("grpcio") for each in needed)
        assert not any(each.startswith("pytest") and "extra ==" not in each for each in needed)

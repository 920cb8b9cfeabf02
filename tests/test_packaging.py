"""The wheel that people install."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 60


@pytest.fixture(name="wheel", scope="module")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """The wheel, built from a copy of the project that holds nothing generated."""
    source = tmp_path_factory.mktemp("source")
    generated = shutil.ignore_patterns("__pycache__", "v1")
    for name in ("flowcontrol", "server", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=generated)
    shutil.copytree(ROOT / "protos", source / "protos")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command = [*build, "--outdir", str(target), str(source)]
    done = subprocess.run(command, check=False, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    with ZipFile(path) as wheel:
        yield wheel


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
            path.relative_to(ROOT).as_posix()
            for package in ("flowcontrol", "server")
            for path in (ROOT / package).rglob("*.py")
            if "__pycache__" not in path.parts
        }

        assert expected
        assert expected <= names

    def test_generated_modules(self, names: set[str]) -> None:
        """Our own gRPC API was compiled on the way."""
        assert {
            "flowcontrol/v1/__init__.py",
            "flowcontrol/v1/flowcontrol_pb2.py",
            "flowcontrol/v1/flowcontrol_pb2.pyi",
            "flowcontrol/v1/flowcontrol_pb2_grpc.py",
        } <= names

    def test_typed(self, names: set[str]) -> None:
        """Type checkers are told that both packages are typed."""
        assert {"flowcontrol/py.typed", "server/py.typed"} <= names

    def test_nothing_else(self, names: set[str]) -> None:
        """There are no tests in it, and no top-level name that is not ours."""
        tops = {name.partition("/")[0] for name in names}

        (info,) = tops - {"flowcontrol", "server"}
        assert info.startswith("flowcontrol-")
        assert info.endswith(".dist-info")
        assert not [name for name in names if "test" in name.rpartition("/")[2]]

    def test_command(self, wheel: ZipFile, names: set[str]) -> None:
        """It installs the command flowcontrol."""
        (name,) = [each for each in names if each.endswith(".dist-info/entry_points.txt")]

        expected = ["[console_scripts]", "flowcontrol = server.cli:main"]
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
        extras = {"demo", "dev", "envoy", "kubernetes", "otel", "top"}
        assert set(metadata["Provides-Extra"]) == extras
        needed = metadata["Requires-Dist"]
        assert any(each.startswith("grpcio") for each in needed)
        assert not any(each.startswith("pytest") and "extra ==" not in each for each in needed)

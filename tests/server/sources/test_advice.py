"""What check-config says of the files that sources read."""

from pathlib import Path

import pytest

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources.advice import source_advice

RULES = [{"match": {"header:x-tier": "batch"}, "objective": "btch"}, {"objective": "chat"}]


def said(directory: Path, rules: object = (), **more: object) -> list[str]:
    """Every line."""
    settings = Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"directory": "."},
            "endpoints": {"static": ["127.0.0.1:8000"]},
            "requests": {"rules": rules},
            **more,
        },
        context={"directory": directory},
    )
    return list(source_advice(settings))


def manifest(directory: Path, name: str, pool: str = "llama", priority: str = "1") -> Path:
    """An objective in a file of its own."""
    path = directory / f"{name}.yaml"
    path.write_text(
        f"apiVersion: llm-d.ai/v1alpha2\nkind: InferenceObjective\nmetadata: {{name: {name}}}\n"
        f"spec:\n  priority: {priority}\n  poolRef: {{name: {pool}}}\n"
    )
    return path


class TestAdvice:
    """Each line names the setting, and what follows."""

    def test_nothing(self, tmp_path: Path) -> None:
        """A folder that is right has nothing to be said of it."""
        manifest(tmp_path, "chat")
        assert said(tmp_path) == []

    def test_a_bad_manifest(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """An error in a manifest is one line; it is not logged as well."""
        manifest(tmp_path, "chat")
        bad = manifest(tmp_path, "bad", priority="high")

        rule = "spec.priority must be a whole number, got 'high'"
        line = f"objectives.directory: {bad}:5: InferenceObjective 'bad': {rule}"
        assert said(tmp_path) == [line]
        assert capsys.readouterr() == ("", "")

    def test_another_pool(self, tmp_path: Path) -> None:
        """A pool that no manifest names, and those that they do."""
        manifest(tmp_path, "chat", pool="lama")
        line = f"pool is 'llama', which no manifest in {tmp_path} names; they name lama: "
        assert said(tmp_path) == [f"{line}every request is served at priority 0"]

    def test_undeclared(self, tmp_path: Path) -> None:
        """A rule that names an objective which nobody declares."""
        manifest(tmp_path, "chat")
        manifest(tmp_path, "batch")
        line = "requests.rules[0].objective is 'btch', which no manifest declares: such requests "
        assert said(tmp_path, RULES) == [f"{line}are served at priority 0, did you mean batch?"]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[", "{file}:1: is not YAML"),
            ("a: 1", "{file}:1: must be a mapping with apiVersion and kind"),
            (
                "{kind: Service, metadata: {name: x}}",
                "{file}: must hold only objectives of pool 'llama'",
            ),
        ],
    )
    def test_kept_by_the_api(self, tmp_path: Path, text: str, problem: str) -> None:
        """A file that the service would not read, or not write over."""
        file = tmp_path / "kept.yaml"
        api = {"objectives": {"api": {"file": str(file)}}}
        assert said(tmp_path, **api) == []
        file.write_text(text)

        (line,) = said(tmp_path, **api)
        assert line.startswith(f"objectives.api.file: {problem.format(file=file)}")

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("a: 1", "{file}: must be one list of endpoints"),
            ("- 10.0.0.5", "{file}: [0] must be host:port"),
            ("- vllm.example:8000", "{file}: [0] is left out, as it must have an IP address"),
            ("- !!timestamp a", "{file}: is not YAML"),
        ],
    )
    def test_endpoints(self, tmp_path: Path, text: str, problem: str) -> None:
        """A file of endpoints that does not count, or not all of it."""
        manifest(tmp_path, "chat")
        file = tmp_path / "endpoints.list"
        file.write_text("- 10.0.0.5:8000")
        listed = {"endpoints": {"file": str(file)}, "picker": "prefix-affinity"}
        assert said(tmp_path, **listed) == []
        file.write_text(text)

        (line,) = said(tmp_path, **listed)
        assert line.startswith(f"endpoints.file: {problem.format(file=file)}")

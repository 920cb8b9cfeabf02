"""What check-config says of the objectives folder."""

from pathlib import Path

import pytest

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources.advice import objective_advice

RULES = [{"match": {"header:x-tier": "batch"}, "objective": "btch"}, {"objective": "chat"}]


def said(directory: Path, rules: object = ()) -> list[str]:
    """Every line."""
    settings = Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"directory": "."},
            "endpoints": {"static": ["127.0.0.1:8000"]},
            "requests": {"rules": rules},
        },
        context={"directory": directory},
    )
    return list(objective_advice(settings))


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

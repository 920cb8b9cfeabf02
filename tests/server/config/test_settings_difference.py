"""In what two configurations differ."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from flowcontrol_server.cli import main
from flowcontrol_server.config.difference import differences, settings_hash
from flowcontrol_server.config.settings import Settings, load_settings

PLAIN: dict[str, Any] = {
    "apiVersion": "flowcontrol/v1alpha1",
    "kind": "FlowControlConfig",
    "pool": "llama",
    "objectives": {"directory": "."},
    "endpoints": {"static": ["127.0.0.1:8000"]},
}
AGAIN = "generate Envoy's configuration again"


def settings(tmp_path: Path, **changes: Any) -> Settings:
    """Settings that differ from the plain ones in whole sections."""
    return load_settings(written(tmp_path, **changes))


def written(tmp_path: Path, name: str = "flowcontrol.yaml", **changes: Any) -> Path:
    """A file with them."""
    path = tmp_path / name
    path.write_text(yaml.safe_dump({**PLAIN, **changes}))
    return path


class TestDifferences:
    """What is named."""

    def test_none(self, tmp_path: Path) -> None:
        """Said or left to its default, a setting is the same; so are other words for a value."""
        before = settings(tmp_path)

        for after in (
            settings(tmp_path),
            settings(tmp_path, picker="off", flowControl={"requestTTL": "1m", "bands": []}),
        ):
            assert differences(before, after) == []
            assert settings_hash(before) == settings_hash(after)

    def test_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever one stands, paths beside the file are the same ones."""
        path = written(tmp_path, ledger={"file": "ledger.jsonl"}, admin={"tokenFile": "token"})
        (tmp_path / "token").write_text("say-friend-and-enter")
        monkeypatch.chdir(tmp_path)

        here, there = load_settings(Path(path.name)), load_settings(path)

        assert differences(here, there) == []
        assert settings_hash(here) == settings_hash(there)

    def test_any_folder(self, tmp_path: Path) -> None:
        """The same files in another folder are the same configuration."""
        hashes = set()
        for name in ("here", "there"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "token").write_text("0123456789abcdef0123456789abcdef")
            path = written(folder, ledger={"file": "ledger.jsonl"}, admin={"tokenFile": "token"})
            hashes.add(settings_hash(load_settings(path)))

        assert len(hashes) == 1

    def test_a_slash_at_the_end(self, tmp_path: Path) -> None:
        """It makes another path of a request, and so another configuration."""
        paths = ("/x", "/x/", "/x//", "/")
        hashes = {settings_hash(settings(tmp_path, requests={"exemptPaths": [p]})) for p in paths}

        assert len(hashes) == len(paths)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"picker": "least-loaded"}, [f'picker: "off" -> "least-loaded" ({AGAIN})']),
            (
                {"flowControl": {"maxRequests": 5, "maxBytes": "unlimited"}},
                [
                    f"flowControl.maxRequests: 20000 -> 5 ({AGAIN})",
                    'flowControl.maxBytes: 4294967296 -> "unlimited"',
                ],
            ),
            (
                {"endpoints": {"static": ["127.0.0.1:8000", "127.0.0.1:8001"]}},
                [
                    (
                        'endpoints.static: ["127.0.0.1:8000"] -> '
                        f'["127.0.0.1:8000", "127.0.0.1:8001"] ({AGAIN})'
                    )
                ],
            ),
            (
                {"flowControl": {"requestTTL": "90s"}},
                [f'flowControl.requestTTL: "60s" -> "90s" ({AGAIN})'],
            ),
            (
                {"load": {"engine": "ollama"}, "endpoints": {"static": []}},
                [
                    f'endpoints.static: ["127.0.0.1:8000"] -> [] ({AGAIN})',
                    'load.engine: unset -> "ollama"',
                    'load.scheme: unset -> "http"',
                    'load.interval: unset -> "200ms"',
                    'load.timeout: unset -> "1s"',
                    "load.scrapesPerSecondMax: unset -> 100",
                    "load.unreachableAfter: unset -> 3",
                ],
            ),
            ({"pool": "qwen"}, [f'pool: "llama" -> "qwen" (needs a restart, {AGAIN})']),
            (
                {"listen": {"http": "127.0.0.1:1"}},
                ['listen.http: "127.0.0.1:9090" -> "127.0.0.1:1" (needs a restart)'],
            ),
        ],
    )
    def test_changes(self, tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
        """Each setting that differs, and what needs a restart."""
        before, after = settings(tmp_path), settings(tmp_path, **changes)

        assert [*map(str, differences(before, after))] == expected
        assert settings_hash(before) != settings_hash(after)

    def test_a_default_that_depends(self, tmp_path: Path) -> None:
        """A body that rules ask for is read whole, unless the size is set: that is a difference."""
        rules = {"rules": [{"objectiveFrom": "body:model"}]}
        before = settings(tmp_path, requests=rules)
        after = settings(tmp_path, requests={**rules, "readBodiesUpTo": "64Ki"})

        (change,) = map(str, differences(before, after))
        assert change == f'requests.readBodiesUpTo: "unlimited" -> 65536 ({AGAIN})'
        assert settings_hash(before) != settings_hash(after)

    def test_bands(self, tmp_path: Path) -> None:
        """The settings of a template are named by its place in the list."""
        before = settings(tmp_path, flowControl={"bands": [{"maxRequests": 7}]})
        after = settings(tmp_path, flowControl={"bands": [{"maxRequests": 8}, {}]})

        first, *rest = map(str, differences(before, after))
        assert first == "flowControl.bands[0].maxRequests: 7 -> 8"
        assert all(each.startswith("flowControl.bands[1].") for each in rest)

    def test_hash(self, tmp_path: Path) -> None:
        """Twelve hexadecimal digits: as a number they fit into a metric without loss."""
        text = settings_hash(settings(tmp_path))

        assert len(text) == 12
        assert int(float(int(text, 16))) == int(text, 16)


class TestCommand:
    """`flowcontrol diff-config`."""

    def test_same(self, tmp_path: Path) -> None:
        """Nothing to say, exit status 0."""
        path = str(written(tmp_path))

        result = CliRunner().invoke(main, ["diff-config", path, path])

        assert (result.exit_code, result.output) == (0, "")

    def test_different(self, tmp_path: Path) -> None:
        """One line per setting, exit status 1."""
        before = written(tmp_path)
        after = written(tmp_path, "after.yaml", picker="least-loaded", pool="qwen")

        result = CliRunner().invoke(main, ["diff-config", str(before), str(after)])

        assert result.exit_code == 1
        assert result.output.splitlines() == [
            f'pool: "llama" -> "qwen" (needs a restart, {AGAIN})',
            f'picker: "off" -> "least-loaded" ({AGAIN})',
        ]

    def test_mistake(self, tmp_path: Path) -> None:
        """A file with a mistake is told of, exit status 2."""
        before = written(tmp_path)
        after = written(tmp_path, "after.yaml", picker="best")

        result = CliRunner().invoke(main, ["diff-config", str(before), str(after)])

        assert result.exit_code == 2
        assert result.stderr.startswith(f"{after}: picker must be 'off'")

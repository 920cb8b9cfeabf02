"""What `flowcontrol classify` says of a request."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flowcontrol_server.cli import main

CONFIG = """
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
objectives: {directory: objectives}
endpoints: {static: ["127.0.0.1:8000"]}
flowControl: {requestTTL: 60s}
requests:
  rules:
  - {match: {body:service_tier: flex}, objective: batch}
  - {match: {"metadata:jwt:claims:plan": "gold-*"}, objective: gold}
  - {flowIdFrom: "metadata:jwt:claims:org"}
"""
BANDS = "[{match: {minPriority: 5}, requestTTL: 9s}, {match: {maxPriority: -1}, requestTTL: 30m}]"
WITH_BANDS = CONFIG.replace("requestTTL: 60s", f"requestTTL: 60s, bands: {BANDS}")
MANIFEST = """
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: batch}
spec: {priority: -1, poolRef: {name: llama}}
"""


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> Path:
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "batch.yaml").write_text(MANIFEST)
    path = tmp_path / "flowcontrol.yaml"
    path.write_text(CONFIG)
    return path


def classify(config: Path, *arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["classify", "--config", str(config), *arguments])


class TestClassify:
    """Each thing with where it comes from."""

    def test_by_rules(self, config: Path) -> None:
        """Rules on body and claims, and the priority from the folder."""
        body = '{"model": "m", "service_tier": "flex", "max_tokens": 50}'
        result = classify(config, "--metadata", "jwt:claims:org=acme", "--body", body)

        assert result.stdout.splitlines() == [
            "path: /v1/chat/completions",
            "objective: batch (requests.rules[0])",
            f"priority: -1 (declared in {config.parent / 'objectives'})",
            "flow id: acme (requests.rules[2])",
            "may wait: 1 min 0 s (flowControl.requestTTL)",
            "model: m",
            "output tokens at most: 50",
        ]

    def test_by_headers(self, config: Path) -> None:
        """Headers, where no rule says it; an objective that nobody declares."""
        result = classify(
            config,
            *("--header", "x-llm-d-inference-objective: chat"),
            *("--header", "x-llm-d-inference-fairness-id: bob"),
            *("--header", "x-llm-d-inference-ttl: 5s"),
        )

        assert result.stdout.splitlines()[1:] == [
            "objective: chat (header x-llm-d-inference-objective)",
            f"priority: 0 (no manifest in {config.parent / 'objectives'} declares 'chat')",
            "flow id: bob (header x-llm-d-inference-fairness-id)",
            "may wait: 5.0 s (header x-llm-d-inference-ttl)",
        ]

    def test_pattern(self, config: Path) -> None:
        """A claim that begins as the rule says."""
        result = classify(config, "--metadata", "jwt:claims:plan=gold-2")
        assert "objective: gold (requests.rules[1])" in result.stdout

    @pytest.mark.parametrize(
        ("objective", "ttl", "expected"),
        [
            ("batch", None, "30 min 0 s (flowControl.bands[1].requestTTL)"),
            ("batch", "90s", "1 min 30 s (header x-llm-d-inference-ttl)"),
            ("batch", "2h", "30 min 0 s (flowControl.bands[1].requestTTL)"),
            ("chat", None, "1 min 0 s (flowControl.requestTTL)"),
            ("chat", "2h", "1 min 0 s (flowControl.requestTTL)"),
        ],
    )
    def test_wait(self, config: Path, objective: str, ttl: str | None, expected: str) -> None:
        """What sets it: the band, the queue, or a header that shortens it."""
        config.write_text(WITH_BANDS)
        headers = {"x-llm-d-inference-objective": objective, "x-llm-d-inference-ttl": ttl}
        given = [f"{name}: {value}" for name, value in headers.items() if value]
        result = classify(config, *(word for each in given for word in ("--header", each)))

        assert f"may wait: {expected}" in result.stdout.splitlines()

    def test_wait_in_a_band_that_is_not_known(self, config: Path) -> None:
        """Where objectives come from elsewhere, the band may have the last word."""
        config.write_text(WITH_BANDS.replace("{directory: objectives}", "{api: {}}"))
        result = classify(config, "--header", "x-llm-d-inference-objective: batch")

        wait = (
            "may wait: 1 min 0 s (flowControl.requestTTL, unless its band has another requestTTL)"
        )
        assert wait in result.stdout.splitlines()
        config.write_text(CONFIG.replace("{directory: objectives}", "{api: {}}"))
        result = classify(config, "--header", "x-llm-d-inference-objective: batch")
        assert "may wait: 1 min 0 s (flowControl.requestTTL)" in result.stdout.splitlines()

    def test_exempt(self, config: Path) -> None:
        """A path that passes ungated."""
        result = classify(config, "--header", ":method: GET", "--header", ":path: /v1/models?x=y")
        line = "path: GET /v1/models, exempt: passes without queueing (requests.exemptPaths)"
        assert result.stdout.splitlines() == [line]

    @pytest.mark.parametrize(
        "body",
        [
            "{",
            '{"model": "\\ud800"}',
            "[" * 100_000,
            "[" * 1001 + "]" * 1001,
            f'{{"service_tier": "flex", "seed": {2**63}}}',
            f'{{"service_tier": "flex", "seed": {2**64 - 1}}}',
            f'{{"service_tier": "flex", "max_tokens": 1{"0" * 400}}}',
            '{"service_tier": "flex", "x": NaN}',
            '{"service_tier": "flex", "x": -1e309}',
        ],
    )
    def test_unread_body(self, config: Path, tmp_path: Path, body: str) -> None:
        """A body that is no JSON to Envoy, from a file."""
        path = tmp_path / "body"
        path.write_text(body)
        result = classify(config, "--body", f"@{path}")
        assert "body: Envoy cannot read it; no rule on the body matches" in result.stdout

    @pytest.mark.parametrize("more", [str(2**64), str(-(2**63)), str(2**63 - 1), "1e308"])
    def test_read_body(self, config: Path, more: str) -> None:
        """A body that Envoy reads: such numbers, so deep, and behind a byte order mark."""
        nested = "[" * 500 + "]" * 500
        body = f'\ufeff{{"service_tier": "flex", "x": {more}, "y": {nested}}}'
        result = classify(config, "--body", body)
        assert "objective: batch (requests.rules[0])" in result.stdout.splitlines()

    @pytest.mark.parametrize(
        ("kind", "is_read"),
        [
            ("application/json", True),
            ("Application/JSON ; charset=utf-8", True),
            ("application/jsonp", False),
            ("application/vnd.api+json", False),
            ("text/plain", False),
            ("", False),
        ],
    )
    def test_content_type(self, config: Path, kind: str, is_read: bool) -> None:  # noqa: FBT001 - a parameter
        """Envoy reads JSON alone: rules on the body do not match another type."""
        arguments = ("--header", f"content-type: {kind}", "--body", '{"service_tier": "flex"}')
        said = classify(config, *arguments).stdout.splitlines()
        why = f"content-type is {kind!r}, not application/json"
        line = f"body: Envoy does not read it, as {why}; no rule on the body matches"
        assert (line in said) is not is_read
        assert ("objective: batch (requests.rules[0])" in said) is is_read

    @pytest.mark.parametrize(
        ("setting", "why"),
        [
            ("readBodiesUpTo: 24", ""),
            ("readBodiesUpTo: 23", "content-length is 24, above requests.readBodiesUpTo, 23"),
        ],
    )
    def test_size(self, config: Path, setting: str, why: str) -> None:
        """A body beyond the size that is read."""
        config.write_text(CONFIG.replace("rules:", f"{setting}\n  rules:"))
        said = classify(config, "--body", '{"service_tier": "flex"}').stdout.splitlines()
        line = f"body: Envoy does not read it, as {why}; no rule on the body matches"
        assert (line in said) is bool(why)
        assert ("objective: batch (requests.rules[0])" in said) is not bool(why)

    def test_no_number(self, config: Path) -> None:
        """What is no number is unknown, as it is to Envoy."""
        result = classify(config, "--body", '{"model": "m", "max_tokens": "many"}')
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == "model: m"

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (("--header", "nonsense"), "--header must be NAME: VALUE, got 'nonsense'"),
            (("--metadata", "jwt=x"), "--metadata must be NAMESPACE:KEY=VALUE, got 'jwt=x'"),
            (("--body", "@/nowhere"), "No such file or directory"),
        ],
    )
    def test_wrong(self, config: Path, arguments: tuple[str, ...], problem: str) -> None:
        """A wrong option is named."""
        result = classify(config, *arguments)
        assert result.exit_code != 0
        assert problem in result.stderr

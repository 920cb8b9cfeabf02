"""Alert rules and dashboard: they parse, they fire when they should, and ask for what there is."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import ProcessCollector, generate_latest

from flowcontrol_server.telemetry.metrics import SnapshotCollector, registry_of
from tests.support.exposition import EVERYTHING, own_families, sample_names
from tests.support.readme import ROOT

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
RULE_TESTS = DEPLOY / "prometheus" / "alerts.test.yaml"
DASHBOARD = DEPLOY / "grafana" / "flowcontrol.json"
METRIC = re.compile(r"\b(?:flowcontrol|process|llm_d_epp)_\w+")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"|by\s*\(([\w, ]+)\)|on\s*\(([\w, ]+)\)")


@pytest.fixture(name="promtool")
def _promtool() -> str:
    """Prometheus' own checker."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    return path


def run(command: list[str], folder: Path) -> None:
    """Run a command; what it says is shown when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    """Return every alert rule."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return every panel of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    """Return every query of the rules and of the dashboard."""
    of_panels = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    assert len(of_panels) > 15
    return [rule["expr"] for rule in alerts()] + of_panels


def known() -> set[str]:
    """Return the names of all series the service has."""
    process = registry_of([ProcessCollector(registry=None)]).collect()
    return sample_names([*own_families(), *process])


class TestRules:
    """deploy/prometheus."""

    def test_rules_are_valid(self, promtool: str) -> None:
        """Prometheus takes them."""
        run([promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES.name], RULES.parent)

    def test_rules_fire(self, promtool: str) -> None:
        """Each comes when it should, and not when it should not."""
        run([promtool, "test", "rules", RULE_TESTS.name], RULES.parent)

    def test_every_rule_is_tested(self) -> None:
        """No alert is without a test that makes it fire."""
        tests = RULE_TESTS.read_text()

        assert [rule["alert"] for rule in alerts() if rule["alert"] not in tests] == []

    def test_every_rule_says_what_to_do(self) -> None:
        """Each has a severity, a summary and a description."""
        for rule in alerts():
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}
            assert rule["annotations"].keys() == {"summary", "description"}


class TestExposition:
    """What /metrics says."""

    def test_is_as_prometheus_likes_it(self, promtool: str, tmp_path: Path) -> None:
        """Names, units and help texts follow Prometheus' conventions."""
        collector = SnapshotCollector(EVERYTHING, 0, 0, EVERYTHING.pace and EVERYTHING.pace.turns)
        (tmp_path / "metrics").write_bytes(generate_latest(registry_of([collector])))

        run(["sh", "-c", f"{promtool} check metrics < metrics"], tmp_path)


class TestQueries:
    """What rules and dashboard ask for."""

    def test_metrics_exist(self) -> None:
        """Every metric that is asked for is one that the service shows."""
        asked = {name for text in expressions() for name in METRIC.findall(text)}

        assert asked - known() == set()
        assert len(asked) > 10

    def test_labels_exist(self) -> None:
        """Every label that is asked for is one of ours, or Prometheus' own."""
        ours = {name for each in own_families() for s in each.samples for name in s.labels}
        asked = {
            name.strip()
            for text in expressions()
            for groups in LABEL.findall(text)
            for names in groups
            for name in names.split(",")
            if name
        }

        assert asked - ours - {"instance", "le"} == set()
        assert {"priority", "outcome"} <= asked

    def test_clients_that_hung_up(self) -> None:
        """A client that hung up, or a request that moved, is no refusal in any panel or alert."""
        excluded, included = (
            [names.split("|") for text in expressions() for names in re.findall(pattern, text)]
            for pattern in (r'outcome!~"(.*?)"', r'outcome=~"(.*?)"')
        )

        assert len(excluded) == 2
        neither = {"evicted-cancelled", "evicted-moved"}
        assert all(neither <= set(names) for names in excluded)
        assert included
        assert not any((neither | {"evicted-.*"}) & set(names) for names in included)

    def test_panels(self) -> None:
        """Panels have names and say what they show, and none lies on another."""
        shown = [panel for panel in panels() if panel["type"] != "row"]
        spots = [
            (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
            for panel in panels()
            for x in range(panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["h"])
        ]

        assert all(panel["title"] and panel["description"] for panel in shown)
        assert len({panel["id"] for panel in panels()}) == len(panels())
        assert len(spots) == len(set(spots))
        assert max(x for x, _ in spots) == 23

    def test_queries_parse(self, promtool: str, tmp_path: Path) -> None:
        """Every query of the dashboard is PromQL, once Grafana's variables have values."""
        rules = [
            {"record": f"check:panel_{number}", "expr": _with_values(text)}
            for number, text in enumerate(expressions())
        ]
        path = tmp_path / "rules.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "check", "rules": rules}]}))

        run([promtool, "check", "rules", path.name], tmp_path)

    def test_limits_of_who_decides(self, promtool: str, tmp_path: Path) -> None:
        """A standby has a limit that nothing is held to; two that decide have one each."""
        (query,) = (text for text in expressions() if "detector_requests_limit" in text)
        limit = 'flowcontrol_detector_requests_limit{stage="both", detector="auto", instance="%s"}'
        deciding = 'flowcontrol_deciding{instance="%s"}'
        series = [(limit % "a", "13x20"), (limit % "b", "8x20")]
        series += [(deciding % "a", "1x20"), (deciding % "b", "0x10 1x10")]
        tests = {
            "rule_files": ["rules.yaml"],
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in series],
                    "promql_expr_test": [
                        {
                            "expr": _with_values(query),
                            "eval_time": at,
                            "exp_samples": [
                                {"labels": '{detector="auto", stage="both"}', "value": value}
                            ],
                        }
                        for at, value in (("5m", 13), ("15m", 21))
                    ],
                }
            ],
        }
        (tmp_path / "rules.yaml").write_text("groups: []")
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))

        run([promtool, "test", "rules", "test.yaml"], tmp_path)


def _with_values(text: str) -> str:
    return text.replace("$__rate_interval", "5m").replace("$instance", ".*")


class TestChart:
    """The Helm chart."""

    @pytest.mark.parametrize("source", ["prometheus/alerts.yaml", "grafana/flowcontrol.json"])
    def test_it_has_what_deploy_has(self, source: str) -> None:
        """Its files are links, which an archive may turn into files that hold a path."""
        packed = DEPLOY / "helm" / "flowcontrol" / "files" / Path(source).name

        assert packed.read_text() == (DEPLOY / source).read_text()

"""Metrics of the sources and of the configuration."""

import time
from pathlib import Path

from prometheus_client import generate_latest
from yaml import safe_dump

from flowcontrol.events import Fact
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.config.settings import Settings, load_settings
from flowcontrol_server.sources.feed import Feed
from flowcontrol_server.telemetry.metrics import registry_of
from flowcontrol_server.telemetry.source_metrics import SourceCollector
from tests.support.told import eventually


def rendered(feed: Feed, configuration: Configuration) -> dict[str, float]:
    """Every sample, as Prometheus would read it."""
    registry = registry_of([SourceCollector(feed.snapshot(), configuration, time.monotonic())])
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _space, value in samples}


async def apply(_settings: Settings) -> None:
    """Change nothing."""


async def test_samples(tmp_path: Path) -> None:
    """Errors and standing mistakes by source, scrapes by result, the configuration's hash."""
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "bad.yaml").write_text("[")
    path = tmp_path / "flowcontrol.yaml"
    written = {
        "apiVersion": "flowcontrol/v1alpha1",
        "kind": "FlowControlConfig",
        "pool": "llama",
        "objectives": {"directory": "objectives"},
        "endpoints": {"static": ["127.0.0.1:1"]},
        "load": {"interval": "10ms", "unreachableAfter": 1},
    }
    path.write_text(safe_dump(written))
    settings = load_settings(path)
    configuration = Configuration(settings, path, apply)
    facts = list[Fact]()
    feed = Feed(facts.append)
    await feed.start(settings)
    await eventually(lambda: feed.down)
    try:
        samples = rendered(feed, configuration)
        path.write_text("pool: [")
        await configuration.read()
        rejected = rendered(feed, configuration)
    finally:
        await feed.stop()

    assert samples['flowcontrol_source_errors_total{source="objectives.directory"}'] >= 1
    assert samples['flowcontrol_source_problems{source="objectives.directory"}'] == 1
    assert samples["flowcontrol_endpoints_down"] == 1
    assert samples['flowcontrol_scrapes_total{result="refused"}'] >= 1
    assert samples['flowcontrol_scrapes_total{result="ok"}'] == 0
    assert not [name for name in samples if name.startswith("flowcontrol_endpoint_load_age")]
    assert samples["flowcontrol_config_hash"] == int(configuration.hash, 16)
    assert samples["flowcontrol_config_last_reload_successful"] == 1
    assert samples["flowcontrol_config_rejections_total"] == 0
    assert rejected["flowcontrol_config_last_reload_successful"] == 0
    assert rejected["flowcontrol_config_rejections_total"] == 1
    assert rejected["flowcontrol_config_hash"] == samples["flowcontrol_config_hash"]

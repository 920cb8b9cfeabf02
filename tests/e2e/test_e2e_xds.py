"""A control plane changes Envoy while a request is in flight and others wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import pytest
import yaml

from tests.e2e.client import fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e
PACKAGES = {"lds": "listener.v3.Listener", "cds": "cluster.v3.Cluster"}
COUNTS = {
    "lds": "listener_manager.listener_modified",
    "cds": "cluster_manager.cluster_modified",
}
Change = Callable[[dict[str, dict[str, Any]]], None]


@final
class Files:
    """Listeners and clusters in files that Envoy follows, as it would follow a control plane."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[str, list[dict[str, Any]]] = {}

    def move(self, configuration: dict[str, Any]) -> None:
        """Take them out of the configuration."""
        static = configuration["static_resources"]
        self._found = {"lds": static.pop("listeners"), "cds": static.pop("clusters")}
        dynamic = configuration["dynamic_resources"] = {}
        for kind in PACKAGES:
            source = {"path": str(self._write(kind))}
            dynamic[f"{kind}_config"] = {"resource_api_version": "V3", "path_config_source": source}
        configuration["node"] = {"id": "gateway", "cluster": "gateways"}

    async def change(self, gateway: Gateway, kind: str, change: Change) -> None:
        """Change some, by their names, and wait until Envoy has taken that in."""
        change({each["name"]: each for each in self._found[kind]})
        self._write(kind)

        async def is_taken_in() -> bool:
            reply = await fetch(gateway.stack.admin, f"/stats?filter={COUNTS[kind]}")
            return reply.body.strip().endswith(b": 1")

        await eventually(is_taken_in, what=f"{kind} changed")

    def _write(self, kind: str) -> Path:
        package = f"type.googleapis.com/envoy.config.{PACKAGES[kind]}"
        resources = [{"@type": package, **each} for each in self._found[kind]]
        path = self._directory / f"{kind}.yaml"
        new = path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"resources": resources}))
        return new.rename(path)


def slower(cluster: str) -> Change:
    """Change a setting of a cluster that makes it another one."""
    return lambda found: found[cluster].update(connect_timeout="3s")


def shorter(found: dict[str, dict[str, Any]]) -> None:
    """Change a listener."""
    found["ingress"]["per_connection_buffer_limit_bytes"] = 2**20


@pytest.mark.parametrize(
    ("kind", "change"),
    [("cds", slower("model_servers")), ("cds", slower("access_log")), ("lds", shorter)],
    ids=["model_servers", "access_log", "listener"],
)
async def test_goes_on(start: Start, tmp_path: Path, kind: str, change: Change) -> None:
    """What is in flight, and what waits, notices nothing."""
    files = Files(tmp_path)
    gateway = await start(Spec(edit_envoy=files.move))
    occupant, occupied = await gateway.occupy()
    caller = await gateway.call()
    await gateway.until(waiting=1, in_flight=1)
    await files.change(gateway, kind, change)
    later = await gateway.call()
    await gateway.until(waiting=2, in_flight=1)
    await occupied.respond()
    for _ in (caller, later):
        await (await gateway.next_call()).respond()

    assert [(await each.reply()).status for each in (occupant, caller, later)] == [200] * 3


async def test_own_cluster(start: Start, tmp_path: Path) -> None:
    """Envoy resets all streams to a cluster that is another one: what waits cannot be asked about.

    Responses complete, but nothing tells of their end any more.
    """
    files = Files(tmp_path)
    gateway = await start(Spec(edit_envoy=files.move))
    occupant, occupied = await gateway.occupy()
    caller = await gateway.call()
    await gateway.until(waiting=1, in_flight=1)
    await files.change(gateway, "cds", slower("ext_proc"))
    refused = await caller.reply()
    await gateway.until(waiting=0, in_flight=0)
    later = await gateway.call()
    await (await gateway.next_call()).respond()
    await occupied.respond()

    assert refused.status == 503
    assert refused.headers["x-llm-d-request-dropped-reason"] == "rejected-unavailable"
    assert [(await each.reply()).status for each in (occupant, later)] == [200] * 2

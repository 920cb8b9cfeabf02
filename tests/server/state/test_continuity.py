"""What a process knows of its store and its lease, over a real server."""

import asyncio
from pathlib import Path

import pytest

from flowcontrol_server.config.settings import Settings, load_settings
from flowcontrol_server.state.continuity import Continuity
from tests.support.told import eventually
from tests.support.valkey_server import BINARY, ValkeyServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server"),
]


def settings_of(directory: Path, server: ValkeyServer) -> Settings:
    """Return settings with state and election in a server."""
    path = directory / "flowcontrol.yaml"
    path.write_text(
        "apiVersion: flowcontrol/v1alpha1\nkind: FlowControlConfig\npool: llama\n"
        "endpoints: {static: ['10.0.0.5:8000']}\nobjectives: {api: {}}\n"
        f"state: {{valkey: {{url: '{server.url}', timeout: 100ms}}}}\n"
        "availability: {election: valkey, leaseDuration: 1s}\n"
    )
    return load_settings(path)


async def test_problems(tmp_path: Path, server: ValkeyServer) -> None:
    """A server that is gone is a problem, until it is back."""
    continuity = Continuity(
        settings_of(tmp_path, server),
        lambda _fact: None,
        memory=_nothing,
        remembered=lambda _text: None,
        is_live=lambda _request_id: False,
        turned=_turned,
    )
    await continuity.begin()
    await eventually(continuity.may_decide)
    before = [*continuity.problems()]
    server.stop()
    await eventually(lambda: "availability" in dict(continuity.problems()))
    server.start()
    await eventually(lambda: not dict(continuity.problems()).get("availability"))
    await eventually(continuity.may_decide)
    await asyncio.wait_for(continuity.end(), 5)

    assert before == []


async def _nothing() -> str | None:
    return None


async def _turned() -> None:
    return None

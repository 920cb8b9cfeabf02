"""What a process knows of its store and its lease, over a real server."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from flowcontrol.events import Fact, LeasesRecovered
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


def continuity_of(
    directory: Path,
    server: ValkeyServer,
    post: Callable[[Fact], None] = lambda _fact: None,
    renew_loads: Callable[[], Awaitable[None]] | None = None,
) -> Continuity:
    """Return what a process knows, as its service wires it."""
    return Continuity(
        settings_of(directory, server),
        post,
        memory=_nothing,
        remembered=lambda _text: None,
        is_live=lambda _request_id: False,
        turned=_turned,
        renew_loads=renew_loads or _turned,
    )


async def test_counts_what_runs_before_it_decides(tmp_path: Path, server: ValkeyServer) -> None:
    """What the leader before could not record is counted first, and behind what it recorded."""
    seen: list[object] = []

    async def renew_loads() -> None:
        seen.append(("loads", continuity.may_decide()))

    continuity = continuity_of(tmp_path, server, lambda fact: seen.append(type(fact)), renew_loads)
    await continuity.begin()
    await eventually(continuity.may_decide)
    await asyncio.wait_for(continuity.end(), 5)

    assert seen == [LeasesRecovered, ("loads", False)]


async def test_decides_although_endpoints_are_silent(tmp_path: Path, server: ValkeyServer) -> None:
    """It waits for what they work on no longer than a part of its lease, which it keeps."""
    silent = asyncio.Event()
    continuity = continuity_of(tmp_path, server, renew_loads=_forever(silent))
    await continuity.begin()
    await eventually(continuity.may_decide)
    is_asked, counts = silent.is_set(), continuity.election_counts()
    await asyncio.wait_for(continuity.end(), 5)

    assert is_asked
    assert counts is not None
    assert counts.elections == 1, "it lost its lease while it waited"


async def test_problems(tmp_path: Path, server: ValkeyServer) -> None:
    """A server that is gone is a problem, until it is back."""
    continuity = continuity_of(tmp_path, server)
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


def _forever(asked: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def renew_loads() -> None:
        asked.set()
        await asyncio.Event().wait()

    return renew_loads


async def _nothing() -> str | None:
    return None


async def _turned() -> None:
    return None

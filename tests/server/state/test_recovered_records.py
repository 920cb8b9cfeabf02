"""What becomes of the records of requests that another process dispatched, in a real file."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowcontrol.events import Fact, LeasesRecovered, RecoveredLeaseEnded
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.state.continuity import Continuity
from flowcontrol_server.state.file_store import FileStore
from flowcontrol_server.state.store import Batch, LeaseRecord

POOL = "llama"
FIRST, SECOND = "0badc0de.1", "0badc0de.2"


@pytest.fixture(name="folder")
async def _folder(tmp_path: Path) -> Path:
    """A folder in which a former process has left the records of two requests."""
    records = [
        LeaseRecord(ticket, "10.0.0.5:8000", 10, "tenant", 1.5, time.time())
        for ticket in (FIRST, SECOND)
    ]
    store = FileStore(tmp_path, POOL)
    await store.open(1)
    await store.write(Batch(records, (), is_whole=True, memory=None))
    await store.close()
    return tmp_path


async def recorded(folder: Path) -> list[str]:
    """Return the tickets in the file."""
    store = FileStore(folder, POOL)
    contents = await store.open(9_999_999_999_999_999)
    await store.close()
    return sorted(each.ticket for each in contents.leases)


@asynccontextmanager
async def running(folder: Path, posted: list[Fact]) -> AsyncIterator[Continuity]:
    """What a process knows that has recovered them; ended as a service ends it."""
    path = folder / "flowcontrol.yaml"
    path.write_text(
        f"apiVersion: flowcontrol/v1alpha1\nkind: FlowControlConfig\npool: {POOL}\n"
        "endpoints: {static: ['10.0.0.5:8000']}\nobjectives: {api: {}}\n"
        f"state: {{directory: '{folder}'}}\n"
    )
    continuity = Continuity(
        load_settings(path),
        posted.append,
        memory=_nothing,
        remembered=lambda _text: None,
        is_live=lambda _request_id: False,
        turned=_turned,
        renew_loads=_turned,
    )
    await continuity.begin()
    try:
        yield continuity
    finally:
        await asyncio.wait_for(continuity.end(), 5)


async def test_held_by_the_engine(folder: Path) -> None:
    """They stay for the next process."""
    posted: list[Fact] = []
    async with running(folder, posted) as continuity:
        continuity.hold_only(frozenset({FIRST, SECOND, "unknown.1"}))
        counts = continuity.counts()

    (recovered,) = posted
    assert isinstance(recovered, LeasesRecovered)
    assert sorted(each.ticket for each in recovered.leases) == [FIRST, SECOND]
    assert counts is not None
    assert counts.live == 2
    assert await recorded(folder) == [FIRST, SECOND]


async def test_not_held_any_more(folder: Path) -> None:
    """Their endpoint does not have them: the next process would hold their slots for nothing."""
    async with running(folder, []) as continuity:
        continuity.hold_only(frozenset({SECOND}))
        counts = continuity.counts()

    assert counts is not None
    assert counts.live == 1
    assert await recorded(folder) == [SECOND]


async def test_reported_afterwards(folder: Path) -> None:
    """A report that comes late is of a request that is known, once."""
    posted: list[Fact] = []
    async with running(folder, posted) as continuity:
        continuity.hold_only(frozenset())
        first, again = continuity.recovered_ended(FIRST), continuity.recovered_ended(FIRST)

    assert first is not None
    assert (first.priority, first.endpoints, again) == (10, ("10.0.0.5:8000",), None)
    assert posted[1:] == [RecoveredLeaseEnded(FIRST)]


async def _nothing() -> str | None:
    return None


async def _turned() -> None:
    return None

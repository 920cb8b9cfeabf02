"""The lease book: what is noted is written, whatever the store does; a real file, and a bad one."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, final

import pytest
import structlog

from flowcontrol.events import RecoveredLease
from flowcontrol_server.state.book import LeaseBook
from flowcontrol_server.state.file_store import FileStore
from flowcontrol_server.state.store import Batch, Contents, FencedError, LeaseRecord, StateError
from tests.support.told import eventually

NOW_S = 1_000_000.0
AGE_MAX_S = 600.0
OTHER_RECORDS = (
    '["more", 1]',
    "no JSON",
    "",
    "[" * 100_000,
    b"\x00\x01",
    '["10.0.0.1:80", 10, "tenant", NaN, 999900.0]',
    '["10.0.0.1:80", 10, "tenant", -1.5, 999900.0]',
    f'["10.0.0.1:80", 10, "tenant", 1{"0" * 400}, 999900.0]',
    '["10.0.0.1:80", 10, "tenant", 1.5, Infinity]',
)


def record(number: int, age_s: float = 0.0) -> LeaseRecord:
    """Return a lease."""
    return LeaseRecord(f"ab.{number}", "10.0.0.1:80", 10, "tenant", 1.5, NOW_S - age_s)


@final
class MemoryStore:
    """A store that holds what it is told, unless the test says otherwise."""

    def __init__(self) -> None:
        self.leases: dict[str, LeaseRecord] = {}
        self.error: Exception | None = None
        self.is_hanging = False
        self.batches: list[Batch] = []

    async def open(self, token: int) -> Contents:
        """Return what it holds."""
        del token
        if self.error is not None:
            raise self.error
        return Contents([*self.leases.values()])

    async def write(self, batch: Batch) -> None:
        """Take a batch."""
        if self.is_hanging:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        if batch.is_whole:
            self.leases.clear()
        for ticket in batch.removed:
            self.leases.pop(ticket, None)
        self.leases |= {each.ticket: each for each in batch.put}

    async def close(self) -> None:
        """Have nothing to close."""


@final
class House:
    """A book over a store."""

    def __init__(self, store: MemoryStore | FileStore) -> None:
        self.recovered: list[RecoveredLease] = []
        self.fault: Exception | None = None
        """Raised instead of what the engine has learnt."""
        self.book = LeaseBook(
            store,
            write_within_s=0.01,
            age_max_s=AGE_MAX_S,
            recovered=lambda leases, _memory: self.recovered.extend(leases),
            memory=self._memory,
            wall_clock=lambda: NOW_S,
        )

    async def _memory(self) -> str | None:
        if self.fault is not None:
            raise self.fault
        return None


@asynccontextmanager
async def running(store: MemoryStore | FileStore) -> AsyncIterator[House]:
    """A book that runs."""
    house = House(store)
    attempted = asyncio.Event()
    task = asyncio.ensure_future(house.book.run(1, attempted.set))
    await attempted.wait()
    try:
        yield house
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await house.book.close(1.0)


def tickets(store: MemoryStore) -> list[str]:
    """Return what a store holds."""
    return sorted(store.leases)


async def test_noted_and_written() -> None:
    """Dispatches are put and departures removed; who came and went in between is never written."""
    store = MemoryStore()
    async with running(store) as house:
        house.book.dispatched(record(1))
        house.book.dispatched(record(2))
        ended = house.book.ended("ab.2"), house.book.ended("ab.2")
        await eventually(lambda: tickets(store) == ["ab.1"])
        house.book.ended("ab.1")
        await eventually(lambda: tickets(store) == [])
        await eventually(lambda: house.book.counts().unwritten == 0)

    assert ended == (record(2), None)
    assert not any(each.ticket == "ab.2" for batch in store.batches for each in batch.put)


async def test_recovery() -> None:
    """With the age by the time of day; what is too old is removed."""
    store = MemoryStore()
    store.leases = {each.ticket: each for each in (record(1, 5.0), record(2, AGE_MAX_S))}
    async with running(store) as house:
        await eventually(lambda: tickets(store) == ["ab.1"])
        is_known = house.book.ended("ab.1")
        await eventually(lambda: tickets(store) == [])

    assert house.recovered == [RecoveredLease("ab.1", "10.0.0.1:80", 1.5, 5_000_000_000)]
    assert is_known


async def test_a_store_that_fails_is_caught_up() -> None:
    """It is counted and shown; afterwards it holds what is in flight, and nothing else."""
    store = MemoryStore()
    async with running(store) as house:
        house.book.dispatched(record(1))
        house.book.dispatched(record(2))
        await eventually(lambda: tickets(store) == ["ab.1", "ab.2"])
        store.error = StateError("no space left")
        house.book.ended("ab.1")
        house.book.dispatched(record(3))
        await eventually(lambda: not house.book.counts().is_up)
        problem, failing = house.book.problem, house.book.counts()
        store.error = None
        await eventually(lambda: tickets(store) == ["ab.2", "ab.3"])
        await eventually(lambda: house.book.counts().is_up)

    assert problem == "no space left"
    assert failing.failures >= 1
    assert failing.lag_s > 0


async def test_over_before_it_was_written() -> None:
    """A request as short as that leaves nothing behind, and nothing to be late with."""
    async with running(MemoryStore()) as house:
        house.book.dispatched(record(1))
        house.book.ended("ab.1")
        noted = house.book.counts()
        await eventually(lambda: house.book.counts().lag_s == 0)
        counts = house.book.counts()

    assert (noted.lag_s > 0, noted.unwritten) == (True, 0)
    assert (counts.live, counts.unwritten, counts.writes) == (0, 0, 0)


async def test_closed_while_its_store_is_gone() -> None:
    """A process that keeps nothing there any more is behind with nothing, and has no problem."""
    store = MemoryStore()
    async with running(store) as house:
        house.book.dispatched(record(1))
        await eventually(lambda: store.leases)
        store.error = StateError("gone")
        house.book.ended("ab.1")
        await eventually(lambda: house.book.problem)
        before = house.book.counts()
    after = house.book.counts()

    assert (before.is_up, before.lag_s > 0) == (False, True)
    assert house.book.problem is None
    assert (after.live, after.unwritten, after.lag_s, after.is_up) == (0, 0, 0.0, True)


async def test_a_store_that_is_gone_at_the_start() -> None:
    """The book goes on without it, and adds what is in flight to what it then holds."""
    store = MemoryStore()
    store.error = StateError("out of reach")
    store.leases = {"ab.1": record(1)}
    async with running(store) as house:
        house.book.dispatched(record(2))
        before = list(house.recovered)
        store.error = None
        await eventually(lambda: tickets(store) == ["ab.1", "ab.2"])
        await eventually(lambda: house.recovered)

    assert before == []
    assert [each.ticket for each in house.recovered] == ["ab.1"]


async def test_a_store_that_hangs_holds_up_nothing() -> None:
    """What waits to be written is no more than what is in flight; the end is not held up."""
    store = MemoryStore()
    async with running(store) as house:
        store.is_hanging = True
        for number in range(1000):
            house.book.dispatched(record(number))
            await asyncio.sleep(0)
            house.book.ended(f"ab.{number}")
        unwritten = house.book.counts().unwritten
        began_s = asyncio.get_running_loop().time()
    took_s = asyncio.get_running_loop().time() - began_s

    assert unwritten <= 2
    assert took_s < 2.0


async def test_fenced() -> None:
    """A former leader writes nothing more, and tries no more."""
    store = MemoryStore()
    async with running(store) as house:
        store.error = FencedError("a later leader has taken over")
        house.book.dispatched(record(1))
        await eventually(lambda: not house.book.counts().is_up)
        failures = house.book.counts().failures
        house.book.dispatched(record(2))
        live = house.book.counts().live

    assert failures == 1
    assert live == 1
    assert store.batches == []


class TestFile:
    """The file of one replica."""

    async def test_it_outlives_the_process(self, tmp_path: Path) -> None:
        """What was in flight when the book was left is recovered by the next."""
        async with running(FileStore(tmp_path, "a/b")) as house:
            house.book.dispatched(record(1))
            house.book.dispatched(record(2))
            await eventually(lambda: house.book.counts().unwritten == 0)
            house.book.ended("ab.1")
            house.book.freeze()
            house.book.ended("ab.2")
        async with running(FileStore(tmp_path, "a/b")) as later:
            recovered = [each.ticket for each in later.recovered]

        assert recovered == ["ab.2"]
        assert (tmp_path / "a%2Fb.sqlite").exists()

    async def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        """The second waits until the first lets go."""
        first, second = FileStore(tmp_path, "llama"), FileStore(tmp_path, "llama")
        await first.open(1)
        opening = asyncio.ensure_future(second.open(2))
        done, _waiting = await asyncio.wait((opening,), timeout=0.3)
        await first.close()
        contents = await asyncio.wait_for(opening, 5)
        await second.close()

        assert done == set()
        assert contents.leases == []

    @pytest.mark.parametrize("damage", [b"not a database" * 1000, b""])
    async def test_a_damaged_file(self, tmp_path: Path, damage: bytes) -> None:
        """It is set aside, and a new one begun."""
        (tmp_path / "llama.sqlite").write_bytes(damage)
        store = FileStore(tmp_path, "llama")
        contents = await store.open(1)
        await store.write(Batch([record(1)], (), is_whole=False))
        again = await store.open(1)
        await store.close()

        assert contents.leases == []
        assert again.leases == [record(1)]
        assert (tmp_path / "llama.damaged").exists() == bool(damage)

    async def test_a_file_that_cannot_be_begun(self, tmp_path: Path) -> None:
        """Tables that could not be made, as on a full disk, are made at the next try."""
        store = FileStore(tmp_path, "llama")
        with closing(sqlite3.connect(tmp_path / "llama.sqlite")) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StateError, match="locked"):
                await store.open(1)
        contents = await store.open(1)
        await store.close()

        assert contents.leases == []

    async def test_a_full_volume(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is no room beside the old file, a whole batch is written into a new one."""
        connect = sqlite3.connect
        limits = iter([8])

        def bounded(*args: Any, **options: Any) -> sqlite3.Connection:
            """Leave the first file room for a few pages."""
            database: sqlite3.Connection = connect(*args, **options)
            database.execute(f"PRAGMA max_page_count = {next(limits, 1000)}")
            return database

        monkeypatch.setattr(sqlite3, "connect", bounded)
        many = [record(number) for number in range(500)]
        store = FileStore(tmp_path, "llama")
        await store.open(1)
        await store.write(Batch([record(1)], (), is_whole=False, memory="{}"))
        with pytest.raises(StateError, match="full"):
            await store.write(Batch(many, (), is_whole=False))
        before = await store.open(1)
        await store.write(Batch(many, (), is_whole=True))
        after = await store.open(1)
        await store.close()

        assert before == Contents([record(1)], "{}")
        assert (len(after.leases), after.memory) == (500, "{}")

    async def test_a_record_of_another_version(self, tmp_path: Path) -> None:
        """It is skipped, and so is a damaged one."""
        store = FileStore(tmp_path, "llama")
        await store.open(1)
        await store.write(Batch([record(1)], (), is_whole=False))
        await store.close()
        with sqlite3.connect(tmp_path / "llama.sqlite") as database:
            for number, text in enumerate(OTHER_RECORDS):
                database.execute("INSERT INTO leases VALUES (?, ?)", (f"cd.{number}", text))
            database.execute("INSERT INTO leases VALUES ('cd', CAST(X'5BFF5D' AS TEXT))")
        database.close()
        store = FileStore(tmp_path, "llama")
        with structlog.testing.capture_logs() as lines:
            contents = await store.open(1)
        await store.close()

        assert contents.leases == [record(1)]
        skipped = len(OTHER_RECORDS) + 1
        assert [each["count"] for each in lines if "skipped" in each["event"]] == [skipped]


async def test_what_was_learnt_cannot_be_had() -> None:
    """Leases are written all the same, to the end."""
    store = MemoryStore()
    async with running(store) as house:
        house.fault = RuntimeError("planted")
        house.book.dispatched(record(1))

    assert tickets(store) == ["ab.1"]


async def test_a_fault_of_the_store() -> None:
    """What nobody has foreseen ends neither the writer nor the hand-over."""
    store = MemoryStore()
    store.error = RuntimeError("planted")
    async with running(store) as house:
        house.book.dispatched(record(1))
        problem = house.book.problem
        store.error = None
        await eventually(lambda: tickets(store) == ["ab.1"])
        store.error = RuntimeError("planted")
        house.book.dispatched(record(2))
        await eventually(lambda: not house.book.counts().is_up)

    assert problem == "RuntimeError('planted')"


async def test_a_file_is_opened_again(tmp_path: Path) -> None:
    """A replica that is elected a second time reads what it wrote in its first term."""
    store = FileStore(tmp_path, "llama")
    async with running(store) as house:
        house.book.dispatched(record(1))
    async with asyncio.timeout(5):
        contents = await store.open(2)
        await store.close()

    assert contents.leases == [record(1)]

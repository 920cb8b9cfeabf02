"""Leases in an SQLite file, for one replica that restarts.

With a write-ahead log and synchronous NORMAL, written records outlive the process without waiting
for the disk. A machine that loses power may lose the last batches; its requests are lost, too.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar, final
from urllib.parse import quote

import structlog

from flowcontrol_server.common.file_lock import lock_file
from flowcontrol_server.state.store import (
    Batch,
    Contents,
    LeaseRecord,
    StateError,
    records_of,
    to_plain,
)
from flowcontrol_server.state.worker import Worker

Answer = TypeVar("Answer")
LOCK_AGAIN_S = 0.1
"""Time between two attempts to lock the file, which a draining predecessor keeps until it ends."""
_BUSY_S = 1.0
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS leases (ticket TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS memory (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_log = structlog.get_logger()


@final
class FileStore:
    """A store in a folder; a lock on a file beside it keeps other processes out.

    Args:
        directory: the folder.
        pool: names the file, so several pools can share the folder.
    """

    def __init__(self, directory: Path, pool: str) -> None:
        self.path = directory / f"{quote(pool, safe='')}.sqlite"
        self._worker: Worker | None = None
        self._database: sqlite3.Connection | None = None
        self._lock: IO[bytes] | None = None

    async def open(self, token: int) -> Contents:
        """Wait until no other process uses the file, and return its content.

        Raises:
            StateError: it cannot be read or created.
        """
        del token  # the lock admits one process only
        is_logged = False
        while not await self._do(self._take_lock):
            if not is_logged:
                problem = "waiting until the process that uses it ends"
                _log.warning("state_file_in_use", file=str(self.path), problem=problem)
                is_logged = True
            await asyncio.sleep(LOCK_AGAIN_S)
        return await self._do(self._open)

    async def write(self, batch: Batch) -> None:
        """Write changes in one transaction."""
        await self._do(lambda: self._write(batch))

    async def close(self) -> None:
        """Close the file and unlock it."""
        await self._do(self._close)
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    async def _do(self, call: Callable[[], Answer]) -> Answer:
        if self._worker is None:
            self._worker = Worker("state-file")
        try:
            return await self._worker.do(call)
        except (OSError, sqlite3.Error) as error:
            message = f"state.directory: {self.path}: {error}"
            raise StateError(message) from error

    # In the worker's thread

    def _take_lock(self) -> bool:
        """Lock the file, unless that is done already; return whether it is locked."""
        if self._lock is None:
            self._lock = lock_file(self.path.with_suffix(".lock"))
        return self._lock is not None

    def _open(self) -> Contents:
        try:
            return self._read()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._set_aside(error)
            return self._read()

    def _read(self) -> Contents:
        if self._database is None:
            self._database = self._connected()
        leases = dict(self._database.execute("SELECT ticket, record FROM leases"))
        return Contents(records_of(leases), _memory(self._database))

    def _connected(self) -> sqlite3.Connection:
        """Open the file and create its tables; if that fails, close it for the next attempt."""
        database = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        database.text_factory = _text
        try:
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename a damaged file, so that a new one is created; it is kept for inspection."""
        self._disconnect()
        damaged = self.path.with_suffix(".damaged")
        self.path.replace(damaged)
        self._delete_log()
        _log.error("state_file_damaged", file=str(damaged), problem=str(error))

    def _write(self, batch: Batch) -> None:
        if self._lock is None:
            message = "the file is not open"
            raise sqlite3.ProgrammingError(message)
        if self._database is None:
            self._database = self._connected()
        try:
            _put(self._database, batch)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not batch.is_whole:
                raise
            self._start_over(self._database, batch)

    def _start_over(self, database: sqlite3.Connection, batch: Batch) -> None:
        """Write a whole batch into a new file, because the old one has no room for it.

        A log that has filled the volume never shrinks again: a checkpoint of its content into the
        file takes room, too.
        """
        memory = _memory(database) if batch.memory is None else batch.memory
        self._disconnect()
        self.path.unlink(missing_ok=True)
        self._delete_log()
        self._database = self._connected()
        _put(self._database, batch._replace(memory=memory))
        _log.warning("state_file_recreated", file=str(self.path), problem="no room for its log")

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _delete_log(self) -> None:
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _close(self) -> None:
        self._disconnect()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _put(database: sqlite3.Connection, batch: Batch) -> None:
    """Write a batch in one transaction."""
    database.execute("BEGIN IMMEDIATE")
    try:
        if batch.is_whole:
            database.execute("DELETE FROM leases")
        else:
            database.executemany(
                "DELETE FROM leases WHERE ticket = ?", [(each,) for each in batch.removed]
            )
        database.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?)", _rows(batch.put))
        if batch.memory is not None:
            database.execute("INSERT OR REPLACE INTO memory VALUES ('', ?)", (batch.memory,))
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _memory(database: sqlite3.Connection) -> str | None:
    """Return what the engine had learnt; None: nothing is stored."""
    found = database.execute("SELECT value FROM memory").fetchone()
    return None if found is None else str(found[0])


def _text(raw: bytes) -> str:
    """Decode a text; one damaged record must not make the others unreadable."""
    return raw.decode(errors="replace")


def _rows(records: Sequence[LeaseRecord]) -> list[tuple[str, str]]:
    return [(each.ticket, json.dumps(to_plain(each))) for each in records]

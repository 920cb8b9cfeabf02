"""The lease book: what is in flight, written behind to a store. Owner: the loop.

Dispatches and departures are noted at once and written in batches by one task. A store that is
slow, full or gone delays no request: notes wait in memory, at most one for each live request and
one for each record to be removed. After a failed write the next one replaces all the store holds.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, final

import structlog

from flowcontrol.events import RecoveredLease
from flowcontrol_server.sources.backoff import Backoff
from flowcontrol_server.state.store import Batch, FencedError, LeaseRecord, StateError, Store

MEMORY_INTERVAL_S = 10.0
"""How often what the engine has learnt is written."""
_RETRY_FIRST_S, _RETRY_LONGEST_S = 0.1, 2.0
_log = structlog.get_logger()


class BookCounts(NamedTuple):
    """How the store keeps up."""

    live: int
    """Leases the store should hold."""
    unwritten: int
    """Changes that are not written."""
    lag_s: float
    """For how long the oldest of them has been unwritten; 0 where none is."""
    is_up: bool
    writes: int
    records_written: int
    failures: int


@final
class LeaseBook:
    """Keeps a store up to date.

    Args:
        store: where leases are kept.
        write_within_s: the longest time from a note to its write while the store keeps up.
        age_max_s: records that are older are of no more use.
        recovered: gets what was in flight and what the engine had learnt, when the store is open.
        memory: returns what the engine has learnt, as JSON; None: nothing to write.
        wall_clock: seconds since 1970.
    """

    def __init__(  # noqa: PLR0913 - each is one wire of the shell
        self,
        store: Store,
        *,
        write_within_s: float,
        age_max_s: float,
        recovered: Callable[[tuple[RecoveredLease, ...], str | None], None],
        memory: Callable[[], Awaitable[str | None]],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.write_within_s = write_within_s
        self.age_max_s = age_max_s
        self._writes = 0
        self._failures = 0
        self._records_written = 0
        self.problem: str | None = None
        """Why the store is behind; None while it is not."""
        self._store = store
        self._recovered = recovered
        self._memory = memory
        self._wall_clock = wall_clock
        self._live: dict[str, LeaseRecord] = {}
        """What the store should hold."""
        self._put: dict[str, LeaseRecord] = {}
        """Noted and not written."""
        self._removed: set[str] = set()
        """Written, and to be removed."""
        self._is_whole_wanted = False
        self._is_frozen = False
        self._behind_since_s: float | None = None
        self._memory_due_s = 0.0
        self._noted = asyncio.Event()
        self._turn = asyncio.Lock()

    def counts(self) -> BookCounts:
        """Return how the store keeps up."""
        since_s = self._behind_since_s
        return BookCounts(
            len(self._live),
            len(self._put) + len(self._removed),
            0.0 if since_s is None else max(0.0, time.monotonic() - since_s),
            self.problem is None,
            self._writes,
            self._records_written,
            self._failures,
        )

    async def _open(self, token: int) -> None:
        """Take the store; what is noted already is added to what it holds."""
        async with self._turn:
            contents = await self._store.open(token)
            now_s = self._wall_clock()
            kept = [each for each in contents.leases if now_s - each.since_s < self.age_max_s]
            self._is_whole_wanted = bool(self._live) or len(kept) < len(contents.leases)
            if self._is_whole_wanted:
                self._note()
            self._live = {each.ticket: each for each in kept} | self._live
            self._memory_due_s = time.monotonic() + MEMORY_INTERVAL_S
        leases = tuple(
            RecoveredLease(
                each.ticket,
                each.endpoint,
                each.tokens,
                max(0, round((now_s - each.since_s) * 1e9)),
            )
            for each in kept
        )
        _log.info("state_recovered", leases=len(leases), dropped=len(contents.leases) - len(kept))
        self._recovered(leases, contents.memory)

    def dispatched(self, record: LeaseRecord) -> None:
        """Note a request that is in flight from now on."""
        if not self._is_frozen:
            self._live[record.ticket] = self._put[record.ticket] = record
            self._note()

    def ended(self, ticket: str) -> LeaseRecord | None:
        """Note that a request has ended; return its record if it was known."""
        record = None if self._is_frozen else self._live.pop(ticket, None)
        if record is not None:
            if self._put.pop(ticket, None) is None:
                self._removed.add(ticket)
            self._note()
        return record

    def freeze(self) -> None:
        """Note nothing any more: streams end now, and the requests of them go on."""
        self._is_frozen = True

    def _note(self) -> None:
        if self._behind_since_s is None:
            self._behind_since_s = time.monotonic()
        self._noted.set()

    async def run(self, token: int, attempted: Callable[[], None]) -> None:
        """Open the store and write what is noted, until cancelled; begins with an empty book.

        Args:
            token: grows with every leader; a store refuses writes of those before.
            attempted: called when the store is open, or cannot be had for now.
        """
        self._live.clear()
        self._put.clear()
        self._removed.clear()
        self._is_frozen = False
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_LONGEST_S, lambda: 0.5)
        while True:
            try:
                await self._open(token)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                self._failed(error, None)
                attempted()
                await asyncio.sleep(backoff.next_s())
            else:
                break
        attempted()
        self._succeeded()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._memory_due_s - time.monotonic())):
                    await self._noted.wait()
            if await self.write():
                backoff.reset()
                await asyncio.sleep(self.write_within_s)
            else:
                await asyncio.sleep(backoff.next_s())

    async def write(self) -> bool:
        """Write once what is noted now; whether that went well."""
        async with self._turn:
            batch = await self._batch()
            if not batch:
                return True
            noted_s, self._behind_since_s = self._behind_since_s, None
            try:
                await self._store.write(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is, the writer goes on
                self._failed(error, noted_s)
                return False
            except asyncio.CancelledError:
                self._is_whole_wanted = True
                raise
            self._writes += 1
            self._records_written += len(batch.put) + len(batch.removed)
            self._succeeded()
            return True

    def _succeeded(self) -> None:
        if self.problem is not None:
            self.problem = None
            _log.info("state_store_recovered", leases=len(self._live))

    async def _batch(self) -> Batch:
        self._noted.clear()
        memory = None
        if not self._is_frozen and time.monotonic() >= self._memory_due_s:
            self._memory_due_s = time.monotonic() + MEMORY_INTERVAL_S
            self._drop_old()
            memory = await self._learnt()
        if self._is_whole_wanted:
            batch = Batch([*self._live.values()], (), is_whole=True, memory=memory)
        else:
            batch = Batch([*self._put.values()], [*self._removed], is_whole=False, memory=memory)
        self._put.clear()
        self._removed.clear()
        self._is_whole_wanted = False
        return batch

    async def _learnt(self) -> str | None:
        """Return what the engine has learnt; leases are written without it where that fails."""
        try:
            return await self._memory()
        except Exception as error:  # noqa: BLE001 - whatever it is, leases matter more
            _log.error("learnt_state_not_written", exc_info=error)
            return None

    def _drop_old(self) -> None:
        oldest_s = self._wall_clock() - self.age_max_s
        for ticket in [each.ticket for each in self._live.values() if each.since_s < oldest_s]:
            self.ended(ticket)

    def _failed(self, error: Exception, noted_s: float | None) -> None:
        self._failures += 1
        if self._behind_since_s is None:
            self._behind_since_s = noted_s
        if isinstance(error, FencedError):
            self._is_frozen = True
        else:
            self._is_whole_wanted = True
            self._noted.set()
        problem = str(error) if isinstance(error, StateError) else repr(error)
        if self.problem is None:
            _log.error("state_store_failed", problem=problem)
        self.problem = problem

    async def close(self, within_s: float) -> None:
        """Write what is noted, if that can be done in time, and close the store."""
        try:
            async with asyncio.timeout(within_s):
                if not self._is_frozen:
                    self._memory_due_s = 0.0
                    await self.write()
                    self.freeze()
                await self.write()
                await self._store.close()
        except Exception as error:  # noqa: BLE001 - the lease is released all the same
            _log.error("state_store_not_closed", problem=str(error) or "no answer in time")

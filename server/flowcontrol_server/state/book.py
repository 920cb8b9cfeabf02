"""The lease book: requests in flight, written behind to a store. Owner: the loop.

Dispatches and ends are noted at once and written in batches by one task. A store that is slow, full
or unreachable delays no request: notes wait in memory, at most one for each request in flight and
one for each record to be removed. After a failed write, the next one replaces the whole store.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, final

import structlog

from flowcontrol.events import RecoveredLease
from flowcontrol_server.common.backoff import Backoff
from flowcontrol_server.state.store import Batch, FencedError, LeaseRecord, StateError, Store

MEMORY_INTERVAL_S = 10.0
"""Time between two writes of what the engine has learnt."""
_RETRY_FIRST_S, _RETRY_LONGEST_S = 0.1, 2.0
_log = structlog.get_logger()


class BookCounts(NamedTuple):
    """State of the store and of its writes."""

    live: int
    """Leases the store should hold."""
    unwritten: int
    """Changes not yet written."""
    lag_s: float
    """Age of the oldest of them; 0: none."""
    is_up: bool
    writes: int
    records_written: int
    failures: int


@final
class LeaseBook:
    """Keeps a store up to date.

    Args:
        store: keeps the leases.
        write_within_s: the longest time from a note to its write while the store keeps up.
        age_max_s: older records are dropped.
        recovered: gets the requests that were in flight, and what the engine had learnt, when the
            store is open.
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
        """Why the store is behind; None: it is not."""
        self._store = store
        self._recovered = recovered
        self._memory = memory
        self._wall_clock = wall_clock
        self._live: dict[str, LeaseRecord] = {}
        """Leases that the store should hold."""
        self._put: dict[str, LeaseRecord] = {}
        """Leases that are noted and not written."""
        self._removed: set[str] = set()
        """Tickets of leases that are written and to be removed."""
        self._is_whole_wanted = False
        self._is_frozen = False
        self._behind_since_s: float | None = None
        self._memory_due_s = 0.0
        self._noted = asyncio.Event()
        self._turn = asyncio.Lock()

    def counts(self) -> BookCounts:
        """Return the state of the store and of its writes."""
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
        """Take over the store; add the leases that are noted already to its own."""
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
        """Note a request that has been dispatched."""
        if not self._is_frozen:
            self._live[record.ticket] = self._put[record.ticket] = record
            self._note()

    def ended(self, ticket: str) -> LeaseRecord | None:
        """Note that a request has ended; return its record; None: unknown."""
        record = None if self._is_frozen else self._live.pop(ticket, None)
        if record is not None:
            if self._put.pop(ticket, None) is None:
                self._removed.add(ticket)
            self._note()
        return record

    def freeze(self) -> None:
        """Stop taking notes: streams end now, but their requests go on."""
        self._is_frozen = True

    def _note(self) -> None:
        if self._behind_since_s is None:
            self._behind_since_s = time.monotonic()
        self._noted.set()

    async def run(self, token: int, attempted: Callable[[], None]) -> None:
        """Open the store and write the notes, until cancelled; starts with an empty book.

        Args:
            token: grows with every leader; a store refuses writes of earlier leaders.
            attempted: called when the store is open, or the first attempt to open it has failed.
        """
        self._forget()
        self._is_frozen = False
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_LONGEST_S, lambda: 0.5)
        while True:
            try:
                await self._open(token)
            except Exception as error:  # noqa: BLE001 - after any error it is tried again
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
        """Write the current notes once; return whether that succeeded."""
        async with self._turn:
            batch = await self._batch()
            if not batch:
                self._behind_since_s = None  # what was noted is over
                return True
            noted_s, self._behind_since_s = self._behind_since_s, None
            try:
                await self._store.write(batch)
            except Exception as error:  # noqa: BLE001 - after any error the writer goes on
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
        """Return what the engine has learnt; None: unavailable, leases are written without it."""
        try:
            return await self._memory()
        except Exception as error:  # noqa: BLE001 - leases matter more
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
        """Write the notes, if there is time, and close the store.

        After that this process stores nothing more, and has no lag.
        """
        try:
            async with asyncio.timeout(within_s):
                if not self._is_frozen:
                    self._memory_due_s = 0.0
                    await self.write()
                    self.freeze()
                await self.write()
                await self._store.close()
        except Exception as error:  # noqa: BLE001 - the lease is released in any case
            _log.error("state_store_not_closed", problem=str(error) or "no answer in time")
        self._forget()

    def _forget(self) -> None:
        self._live.clear()
        self._put.clear()
        self._removed.clear()
        self._behind_since_s = None
        self.problem = None

"""State that outlives this process, and whether it may decide now. Owner: the loop.

Without an election this process decides from its start to its end. With one it decides while it is
the leader: from the moment at which it has recovered the requests in flight, to the moment at which
its lease may have passed to another replica.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Final, final

import structlog

from flowcontrol.estimates import TokenEstimator
from flowcontrol.events import (
    Decision,
    Fact,
    LeasesRecovered,
    RecoveredLease,
    RecoveredLeaseEnded,
)
from flowcontrol_server.common.background import in_background
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.log_join import Claim
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.tickets import TICKETS
from flowcontrol_server.state.book import BookCounts, LeaseBook
from flowcontrol_server.state.election import (
    HAND_OVER_WITHIN_S,
    RENEWALS,
    Election,
    ElectionCounts,
    Lock,
)
from flowcontrol_server.state.file_store import FileStore
from flowcontrol_server.state.kube_lock import KubeLock
from flowcontrol_server.state.store import LeaseRecord, Store
from flowcontrol_server.state.valkey_client import ValkeyClient
from flowcontrol_server.state.valkey_lock import ValkeyLock
from flowcontrol_server.state.valkey_store import ValkeyStore

COUNT_RUNNING_WITHIN_NS: Final = 10_000_000_000
"""Time after the start in which the first report of an endpoint counts its requests in flight."""
CLOSE_WITHIN_S: Final = 0.5
"""Longest time for the last write at the end."""
IDENTITY: Final = f"{socket.gethostname()}_{TICKETS.instance}"
"""Identifies this process among the replicas."""
_ESTIMATOR: Final = TokenEstimator()
"""Has learnt nothing, so that what is recorded does not depend on what this process has seen."""
_log = structlog.get_logger()


@final
class Continuity:
    """Records the requests in flight, recovers them, and takes part in the election.

    Args:
        settings: of the service.
        post: takes facts for the engine.
        memory: returns what the engine has learnt, as JSON.
        remembered: gets what an earlier process had learnt.
        is_live: returns whether the stream of a request of this process is open.
        turned: called when this process begins to decide, and when it must stop.
        renew_loads: scrapes the endpoints.
    """

    def __init__(  # noqa: PLR0913 - each is one wire of the shell
        self,
        settings: Settings,
        post: Callable[[Fact], None],
        *,
        memory: Callable[[], Awaitable[str | None]],
        remembered: Callable[[str], None],
        is_live: Callable[[int], bool],
        turned: Callable[[], Awaitable[None]],
        renew_loads: Callable[[], Awaitable[None]],
    ) -> None:
        self._state = settings.state
        self._post = post
        self._remembered = remembered
        self._is_live = is_live
        self._turned = turned
        self._renew_loads = renew_loads
        self._is_deciding = False
        self._recovered_tickets: frozenset[str] = frozenset()
        """Tickets of requests that the engine was to hold, and whose records are in the store."""
        self._over: dict[str, LeaseRecord] = {}
        """Recovered requests that the engine no longer holds, and whose report may still come."""
        self._writing: asyncio.Task[None] | None = None
        self._client: ValkeyClient | None = None
        if settings.state.valkey is not None:
            self._client = ValkeyClient(settings.state.valkey, settings.pool)
        self.election = self._election_of(settings)
        self._recover_within_s: float | None = None
        """Longest wait for the store, part of a lease; its records are counted once they come."""
        if self.election is not None:
            self._recover_within_s = settings.availability.lease_duration / 1e9 / RENEWALS
        store = self._store_of(settings)
        self.book: LeaseBook | None = None
        if store is not None:
            self.book = LeaseBook(
                store,
                write_within_s=self._state.write_within / 1e9,
                age_max_s=self._state.lease_age_max / 1e9,
                recovered=self._recovered,
                memory=memory,
            )

    def _store_of(self, settings: Settings) -> Store | None:
        if settings.state.directory is not None:
            return FileStore(settings.state.directory, settings.pool)
        return None if self._client is None else ValkeyStore(self._client)

    def _election_of(self, settings: Settings) -> Election | None:
        duration_s = settings.availability.lease_duration / 1e9
        lock: Lock
        match settings.availability.election:
            case "off":
                return None
            case "valkey":
                assert self._client is not None, "the settings require it"
                lock = ValkeyLock(self._client, IDENTITY, round(duration_s * 1000))
            case "kubernetes":
                lock = KubeLock(settings.kubernetes, settings.pool, IDENTITY, duration_s)
        return Election(lock, duration_s, self._elected, self._deposed)

    async def begin(self) -> None:
        """Start to decide, or to take part in the election."""
        if self.election is None:
            await self._elected(time.time_ns() // 1_000)
        else:
            self.election.begin()

    async def _elected(self, token: int) -> None:
        """Recover the requests in flight; decide once they are known or the store has failed once.

        With an election this takes no longer than the time between two renewals of the lease.
        """
        deadline_s = asyncio.get_running_loop().time() + (self._recover_within_s or 0.0)
        if self.book is None:
            self._recovered((), None)
        else:
            attempted = asyncio.Event()
            self._writing = in_background(
                self.book.run(token, attempted.set), "state_writer_failed"
            )
            trying = asyncio.ensure_future(attempted.wait())
            await asyncio.wait(
                (trying, self._writing),
                timeout=self._recover_within_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            trying.cancel()
            if not attempted.is_set() or self.book.problem is not None or self._writing.done():
                self._recovered((), None)
        if self.election is not None and self._state.count_running:
            await self._count_running(deadline_s)
        self._is_deciding = True
        await self._turned()

    async def _count_running(self, deadline_s: float) -> None:
        """Scrape the endpoints, to count requests there that are in no record.

        A leader that could not reach the store dispatched requests until its lease ended. All of
        them are at the endpoints by now, and none of this process is yet.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline_s):
                await self._renew_loads()

    async def _deposed(self) -> None:
        self._is_deciding = False
        self.freeze()
        await self._turned()
        await self._end_writing()

    async def hand_over(self) -> bool:
        """Let another replica decide; return whether one does. Without an election none can.

        Waiting requests are not decided meanwhile. If no other replica takes over in time, this
        one decides again.
        """
        if self.election is None:
            return False
        was_leader = self._is_deciding
        self._is_deciding = False
        await self._end_writing()
        await self.election.resign()
        if not was_leader or await self.election.another_leads(HAND_OVER_WITHIN_S):
            return True
        self.election.begin()
        return False

    def may_decide(self) -> bool:
        """Return whether this process decides now."""
        return self._is_deciding and (self.election is None or self.election.is_leader())

    def counts(self) -> BookCounts | None:
        """Return the state of the store; None: there is none."""
        return None if self.book is None else self.book.counts()

    def election_counts(self) -> ElectionCounts | None:
        """Return the state of the election; None: there is none."""
        return None if self.election is None else self.election.counts()

    def role(self) -> str:
        """Return the role of this process in the election, in words; empty: no election."""
        return "" if self.election is None else self.election.role()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the current problems with the store and the lease."""
        if self.book is not None and self.book.problem is not None:
            yield "state", self.book.problem
        if self.election is not None and self.election.problem is not None:
            yield "availability", self.election.problem

    def freeze(self) -> None:
        """Stop recording: streams end now, but their requests go on."""
        if self.book is not None:
            self.book.freeze()

    async def end(self) -> None:
        """Write the notes, close the store, and release the lease."""
        await self._end_writing()
        if self.election is not None:
            await self.election.resign()
            await self.election.close()
        if self._client is not None:
            await self._client.close()

    async def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            _, unended = await asyncio.wait((self._writing,), timeout=CLOSE_WITHIN_S)
            if unended:  # a library has lost the cancellation; the lease is released in any case
                _log.error("state_writer_not_ended")
            self._writing = None
        if self.book is not None:
            await self.book.close(CLOSE_WITHIN_S)

    def dispatched(self, parked: Parked, decision: Decision) -> None:
        """Record a request that has been dispatched."""
        if self.book is not None:
            request = parked.request
            tokens = _ESTIMATOR.estimate(request)
            record = LeaseRecord(
                TICKETS.issue(parked.request_id).decode(),
                decision.endpoint,
                decision.priority,
                decision.flow_id,
                tokens.input + tokens.output,
                time.time(),
            )
            self.book.dispatched(record)

    def ended(self, request_id: int) -> None:
        """Record that a request of this process has ended."""
        if self.book is not None:
            self.book.ended(TICKETS.issue(request_id).decode())

    def recovered_ended(self, ticket: str) -> Claim | None:
        """Record that a request of another process has ended; return the bounds of its report.

        None: no record has the ticket. A record includes the code of the ticket, so it cannot have
        been guessed, and no key of the other process is needed to check it.
        """
        record = self._over.pop(ticket, None)
        if record is None and self.book is not None:
            record = self.book.ended(ticket)
        if record is None:
            return None
        self._post(RecoveredLeaseEnded(ticket))
        age_ns = max(0, round((time.time() - record.since_s) * 1e9))
        return Claim(
            record.priority,
            time.monotonic_ns() - age_ns,
            endpoints=() if record.endpoint is None else (record.endpoint,),
        )

    def hold_only(self, tickets: frozenset[str]) -> None:
        """Remove the records of recovered requests that the engine no longer holds.

        Otherwise the next process would hold their slots once more.

        Args:
            tickets: of the requests that it holds.
        """
        if self.book is None:
            return
        for ticket in self._recovered_tickets - tickets:
            record = self.book.ended(ticket)
            if record is not None:
                self._over[ticket] = record
        self._recovered_tickets &= tickets

    def _recovered(self, leases: tuple[RecoveredLease, ...], memory: str | None) -> None:
        leases = tuple(each for each in leases if not self._is_own(each.ticket))
        self._recovered_tickets = frozenset(each.ticket for each in leases)
        self._over.clear()
        within_ns = COUNT_RUNNING_WITHIN_NS if self._state.count_running else 0
        self._post(LeasesRecovered(leases, self._state.lease_age_max, within_ns))
        if memory is not None:
            self._remembered(memory)

    def _is_own(self, ticket: str) -> bool:
        """Return whether the engine has the request, as this process leads a second time."""
        request_id = TICKETS.read(ticket)
        return isinstance(request_id, int) and self._is_live(request_id)

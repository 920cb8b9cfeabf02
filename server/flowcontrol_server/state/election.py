"""Election: of several replicas, the holder of an expiring lease decides. Owner: the loop.

A leader renews four times within the duration of the lease. It counts its own lease from before the
request for it, and as a quarter shorter. So it has stopped before the lease can pass to another
replica, provided that clocks run at the same speed within a quarter. Before every answer it checks
whether it still leads, on a clock that goes on while the process is stopped or the machine is
suspended: a leader that wakes too late decides nothing more.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol, final

import structlog

from flowcontrol_server.common.background import in_background
from flowcontrol_server.state.store import StateError

RENEWALS: Final = 4
"""Renewals within the duration of a lease."""
MARGIN: Final = 0.25
"""Part of the duration by which a leader stops early."""
RELEASE_WITHIN_S: Final = 1.0
HAND_OVER_WITHIN_S: Final = 1.0
"""Longest wait for another replica to take over; after it, none is assumed."""
STANDBY_ASKS_S: Final = 0.4
"""Longest time between two requests of a standby: short enough to take over in time."""
HELD_AGAIN_S: Final = 0.02
"""Time between two checks of a replica that hands over for the next leader."""
_log = structlog.get_logger()


class Lock(Protocol):
    """A lease that one process holds at a time. Every method may raise StateError."""

    retry_s: float
    """Time between two requests of a standby for the lease, at most `STANDBY_ASKS_S`."""

    async def acquire(self) -> int | None:
        """Take or renew the lease; return its fencing token; None: another process holds it.

        The token is greater than that of every earlier holder, and stays while the lease is held.
        """

    async def release(self) -> None:
        """Release the lease, if it is held by this process."""

    async def is_held_by_another(self) -> bool:
        """Return whether another process holds the lease."""

    async def close(self) -> None:
        """Close the connections."""


class ElectionCounts(NamedTuple):
    """State of the election, from this process."""

    is_up: bool
    """Whether the last request for the lease was answered."""
    failures: int
    """Failed requests for the lease."""
    elections: int
    """Times that this process became the leader."""


def clock_s() -> float:
    """Return seconds on a clock that never goes back and does not stop with the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@final
class Election:
    """Takes part in the election for one process.

    Args:
        lock: the lease that the replicas compete for.
        duration_s: of the lease.
        elected: called with the token when this process becomes the leader.
        deposed: called when it is no longer the leader.
        clock: as `clock_s`.
    """

    def __init__(
        self,
        lock: Lock,
        duration_s: float,
        elected: Callable[[int], Awaitable[None]],
        deposed: Callable[[], Awaitable[None]],
        *,
        clock: Callable[[], float] = clock_s,
    ) -> None:
        self.problem: str | None = None
        """Why the last request for the lease failed; None: it was answered."""
        self.failures = 0
        self.elections = 0
        """Times that this process became the leader."""
        self._lock = lock
        self._duration_s = duration_s
        self._elected = elected
        self._deposed = deposed
        self._clock = clock
        self._until_s = 0.0
        """When this process stops deciding; 0: it does not lead."""
        self._token: int | None = None
        """Of the term for which `elected` was called."""
        self._running: asyncio.Task[None] | None = None

    def is_leader(self) -> bool:
        """Return whether this process surely holds the lease."""
        return self._clock() < self._until_s

    def role(self) -> str:
        """Return the role of this process in the election, in words."""
        left_s = self._until_s - self._clock()
        if left_s > 0:
            return f"this replica leads, term {self._token}, for {left_s:.1f} s unless it renews"
        if self.problem is not None:
            return f"this replica does not lead: the lease cannot be requested ({self.problem})"
        return "this replica is a standby and decides nothing: ask the one that leads"

    def counts(self) -> ElectionCounts:
        """Return the state of the election."""
        return ElectionCounts(self.problem is None, self.failures, self.elections)

    def begin(self) -> None:
        """Take part from now on."""
        self._running = in_background(self._run(), "election_failed")

    async def _run(self) -> None:
        while True:
            try:
                await self._request()
            except Exception as error:  # noqa: BLE001 - our own fault must not leave the pool without
                self._failed(repr(error))
                if self._token is not None:
                    await self._give_up()
            wait_s = min(self._lock.retry_s, STANDBY_ASKS_S)
            if self._token is not None:
                # No longer than the lease: a leader must stop in time.
                left_s = self._until_s - self._clock()
                renewal_s = wait_s if self.problem is not None else self._duration_s / RENEWALS
                wait_s = max(0.0, min(renewal_s, left_s))
            await asyncio.sleep(wait_s)

    async def _request(self) -> None:
        """Request the lease once, and act on the answer or on the end of the lease."""
        requested_s = self._clock()
        token: int | None = None
        is_answered = False
        try:
            async with asyncio.timeout(self._patience_s(requested_s)):
                token = await self._lock.acquire()
            is_answered = True
        except (StateError, TimeoutError) as error:
            self._failed(str(error) or "no answer in time")
        except Exception as error:  # noqa: BLE001 - our own fault must not leave the pool without
            self._failed(repr(error))
        else:
            self._succeeded()
        if token is not None:
            until_s = requested_s + self._duration_s * (1 - MARGIN)
            if self._token is not None and (token != self._token or not self.is_leader()):
                await self._step_down("the lease was lost meanwhile")
            self._until_s = until_s
            if self._token is None:
                await self._step_up(token)
        elif self._token is not None and (is_answered or not self.is_leader()):
            reason = "another replica leads" if is_answered else "the lease could not be renewed"
            await self._step_down(reason)

    def _patience_s(self, requested_s: float) -> float:
        """Return the timeout of a request for the lease: never beyond the end of the lease."""
        patience_s = self._duration_s / RENEWALS
        if self._token is None:
            return patience_s
        return max(0.0, min(patience_s, self._until_s - requested_s))

    async def _step_up(self, token: int) -> None:
        self._token = token
        self.elections += 1
        _log.info("leader_elected", token=token)
        await self._elected(token)

    async def _give_up(self) -> None:
        """Let another replica lead after a fault of this one."""
        self._until_s = 0.0
        self._token = None
        _log.error("leader_failed", problem=self.problem)
        try:
            await self._deposed()
        except Exception as error:  # noqa: BLE001 - the lease is released in any case
            _log.error("leader_not_deposed", exc_info=error)
        await self._release()

    async def _step_down(self, reason: str) -> None:
        self._until_s = 0.0
        self._token = None
        _log.warning("leader_stepped_down", reason=reason)
        await self._deposed()

    def _failed(self, problem: str) -> None:
        self.failures += 1
        if self.problem is None:
            _log.error("election_unreachable", problem=problem)
        self.problem = problem

    def _succeeded(self) -> None:
        if self.problem is not None:
            self.problem = None
            _log.info("election_reachable_again")

    async def resign(self) -> None:
        """Leave the election, and release the lease at once."""
        self._until_s = 0.0
        self._token = None
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,), timeout=RELEASE_WITHIN_S)
            self._running = None
        await self._release()

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_WITHIN_S):
                await self._lock.release()
        except (StateError, TimeoutError) as error:
            _log.error("lease_not_released", problem=str(error) or "no answer in time")

    async def another_leads(self, within_s: float) -> bool:
        """Wait until another process holds the lease; return whether one does in time."""
        try:
            async with asyncio.timeout(within_s):
                while not await self._lock.is_held_by_another():  # noqa: ASYNC110 - not ours
                    await asyncio.sleep(HELD_AGAIN_S)
        except (StateError, TimeoutError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self._lock.close()

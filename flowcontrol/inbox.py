"""Thread shell. The one way into the processor, and the one place with a lock.

A deque and a lock rather than `queue.Queue`: the lock makes "before close" and "after close"
exclusive, so a fact is either refused or will be processed, never lost in between. The bell is
apart from the putting: whoever puts many facts rings once. It is a bare lock, held until it is
rung: a Condition makes a new lock for each sleep, and costs three times as much.

Arrivals are bounded here, because clients make them. Departures and the rest are not: every
accepted request causes exactly one departure, so they are bounded by the arrivals, and a departure
refused would be a slot lost for ever.
"""

import time
from collections import deque
from collections.abc import Callable
from threading import TIMEOUT_MAX, Lock
from typing import final

from flowcontrol.errors import NotRunningError
from flowcontrol.events import Arrived, Fact
from flowcontrol.question import Asked


@final
class Inbox:
    """Facts from any thread, in the order they were put, for one thread that takes them in batches.

    Args:
        arrivals_max: arrivals not yet taken, at least 1.
        batch_max: facts taken at once, at least 1; bounds one turn of the processor.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        arrivals_max: int,
        batch_max: int = 4096,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.since_ns = 0
        """When the first fact came of those taken last; where more came than were taken at once,
        when the inbox was last empty. For the taker."""
        self._clock = clock
        self._filled_ns = 0
        self._arrivals_max = arrivals_max
        self._batch_max = batch_max
        self._facts: deque[Fact | Asked] = deque()
        self._arrival_count = 0
        self._is_closed = False
        self._lock = Lock()
        self._bell = Lock()
        self._bell.acquire()

    def offer(self, arrived: Arrived) -> bool:
        """Put an arrival; False when too many are here already. Ring afterwards.

        Raises:
            NotRunningError: the inbox is closed.
        """
        with self._lock:
            if self._is_closed:
                message = "the processor has stopped"
                raise NotRunningError(message)
            if self._arrival_count >= self._arrivals_max:
                return False
            self._arrival_count += 1
            self._append(arrived)
            return True

    def post(self, fact: Fact | Asked) -> None:
        """Put anything else; never refused, and without effect once closed. Ring afterwards."""
        with self._lock:
            if not self._is_closed:
                self._append(fact)

    def ring(self) -> None:
        """Wake the taker; when it is awake, its next `take` returns at once."""
        with self._lock:
            self._ring()

    def take(self, timeout_s: float | None) -> list[Fact | Asked]:
        """Return what is here, oldest first; when nothing is, sleep until the bell or the timeout.

        Args:
            timeout_s: longest sleep, seconds; None for ever, 0 or less not at all.
        """
        may_sleep = timeout_s is None or timeout_s > 0
        if may_sleep and not (self._facts or self._is_closed):
            self._bell.acquire(timeout=-1 if timeout_s is None else min(timeout_s, TIMEOUT_MAX))
        else:
            self._bell.acquire(blocking=False)
        with self._lock:
            facts = self._facts
            self.since_ns = self._filled_ns
            batch = [facts.popleft() for _ in range(min(len(facts), self._batch_max))]
            self._arrival_count -= sum(type(fact) is Arrived for fact in batch)
            return batch

    def _append(self, fact: Fact | Asked) -> None:
        if not self._facts:
            self._filled_ns = self._clock()
        self._facts.append(fact)

    def close(self) -> list[Fact | Asked]:
        """Refuse everything from now on; return what nobody will take any more."""
        with self._lock:
            self._is_closed = True
            left = list(self._facts)
            self.since_ns = self._filled_ns
            self._facts.clear()
            self._ring()
            return left

    def _ring(self) -> None:
        """Let the bell go, if it is held: by nobody but the taker is it ever taken."""
        if self._bell.locked():
            self._bell.release()

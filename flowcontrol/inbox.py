"""Thread shell. The one way into the processor, and the one place with a lock.

A deque and a lock rather than `queue.Queue`: the lock makes "before close" and "after close"
exclusive, so a fact is either refused or will be processed, never lost in between. Putting and
waking are separate, so that a caller that puts many facts wakes the processor once. The wake-up is
a byte in a pipe, written only while the processor sleeps. Writing it releases the interpreter's
lock, so the processor runs at once. Releasing a lock does not: the processor woke, slept again for
the interpreter's lock, and the round trip of a single request took eight times as long
(tests/benchmarks/handover.py).

Arrivals are bounded here, because clients cause them. Departures and other facts are not: every
accepted request causes exactly one departure, so arrivals bound them, and a refused departure would
be a slot lost for ever.
"""

import os
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from threading import Lock
from typing import Final, final

from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.events import Arrived, Fact

_TIMEOUT_MS_MAX: Final = 2**31 - 1


@final
@dataclass(slots=True)
class Asked:
    """A query of the engine's state, put into the inbox like a fact; it changes nothing.

    It is answered in the turn that takes it, after that turn's decisions.
    """

    question: Callable[[FlowController, int], object]
    """Reads the controller at a given time. If it raises, the exception is the answer."""
    reply: Callable[[object], None]
    """Called in the processor's thread with the answer, or the exception; must return at once."""


@final
class Inbox:
    """Facts from any thread, in the order they were put, for one thread that takes them in batches.

    Args:
        arrivals_max: most arrivals not yet taken, at least 1.
        batch_max: most facts taken at once, at least 1; bounds one turn of the processor.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        arrivals_max: int,
        batch_max: int = 4096,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.since_ns = 0
        """When the first fact of the last batch was put; if it left some behind, when the inbox was
        last empty. For the taker."""
        self._clock = clock
        self._filled_ns = 0
        self._arrivals_max = arrivals_max
        self._batch_max = batch_max
        self._facts: deque[Fact | Asked] = deque()
        self._arrival_count = 0
        self._is_closed = False
        self._lock = Lock()
        self._pipe: tuple[int, int] | None = None
        """Its read end and write end, once the taker has slept."""
        self._is_asleep = False
        """Whether the taker sleeps, and no caller has begun to wake it."""
        self._is_at_pipe = False
        """Whether the taker may still read from the pipe."""
        self._is_rung = False
        """Whether `ring` was called while the taker was awake."""

    def offer(self, arrived: Arrived) -> bool:
        """Put an arrival; return False if too many are here already. Call `ring` afterwards.

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
        """Put anything else; never refused, ignored once closed. Call `ring` afterwards."""
        with self._lock:
            if not self._is_closed:
                self._append(fact)

    def ring(self) -> None:
        """Wake the taker; if it is awake, its next `take` returns at once."""
        with self._lock:
            is_asleep = self._is_woken()
        if is_asleep:
            self._write()

    def take(self, timeout_s: float | None) -> list[Fact | Asked]:
        """Return what is here, oldest first; if nothing is, sleep until `ring` or the timeout.

        Args:
            timeout_s: longest sleep in seconds; None: for ever, 0 or less: not at all.
        """
        with self._lock:
            is_due = bool(self._facts) or self._is_rung or self._is_closed
            may_sleep = not is_due and (timeout_s is None or timeout_s > 0)
            self._is_asleep = self._is_at_pipe = may_sleep
            if may_sleep and self._pipe is None:
                self._pipe = os.pipe()
        if may_sleep:
            self._sleep(timeout_s)
        with self._lock:
            self._is_at_pipe = self._is_rung = False  # everything put before a ring is here
            if self._is_closed:
                self._close_pipe()
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
        """Refuse everything from now on; return what was not taken."""
        with self._lock:
            self._is_closed = True
            left = list(self._facts)
            self.since_ns = self._filled_ns
            self._facts.clear()
            is_asleep = self._is_woken()
            if not self._is_at_pipe:
                self._close_pipe()
        if is_asleep:
            self._write()
        return left

    def _is_woken(self) -> bool:
        """Whether the taker sleeps and must be woken; else prevent its next sleep."""
        is_asleep, self._is_asleep = self._is_asleep, False
        self._is_rung = not is_asleep
        return is_asleep

    def _write(self) -> None:
        """Wake the taker. Not under the lock, which it takes next."""
        assert self._pipe is not None, "it is open while the taker is there"
        os.write(self._pipe[1], b"x")

    def _sleep(self, timeout_s: float | None) -> None:
        """Sleep until `ring` or the timeout, which is rounded up to a millisecond."""
        assert self._pipe is not None, "it is open while the taker is there"
        reader = self._pipe[0]
        if timeout_s is not None:
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            if not poll.poll(min(ceil(timeout_s * 1000), _TIMEOUT_MS_MAX)):
                with self._lock:
                    is_asleep, self._is_asleep = self._is_asleep, False
                if is_asleep:
                    return
        os.read(reader, 1)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None

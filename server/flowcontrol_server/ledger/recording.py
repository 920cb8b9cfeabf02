"""The queue of turns between the processor and the thread that writes the ledger.

The processor never waits. Turns that do not fit are dropped, counted and recorded as a gap, with a
checkpoint behind it, from which a reader can go on.
"""

import time
from collections import deque
from collections.abc import Sequence
from threading import Condition, Event, Lock
from typing import final

from flowcontrol.controller import FlowController
from flowcontrol.replay.ledger import Entry, Gap, Turn, take_checkpoint

SIZE_MAX = 200_000
"""Facts and decisions in the queue: some seconds of a busy processor, or 100 MB."""


@final
class TurnFeed:
    """Entries from the processor's thread, in order, for one thread that takes them in batches.

    Args:
        size_max: facts and decisions not yet taken, at least 1; beyond it turns are dropped.
    """

    def __init__(self, size_max: int = SIZE_MAX) -> None:
        self.missed_turns = 0
        """Turns dropped so far."""
        self.missed_s: float | None = None
        """When the last turn was dropped, on the monotonic clock; None: never."""
        self._size_max = size_max
        self._entries: deque[Entry] = deque()
        self._size = 0
        self._gap = 0
        self._is_checkpoint_wanted = False
        self._bell = Condition(Lock())
        self._closed = Event()

    def turned(self, controller: FlowController, turn: Turn) -> None:
        """Queue a turn, or drop and count it. In the processor's thread."""
        size = _size(turn)
        checkpoint = None
        if self._gap or self._is_checkpoint_wanted:
            has_room = self._size <= self._size_max // 2
            if has_room or not self._gap:
                checkpoint = take_checkpoint(controller, turn.now_ns)
        with self._bell:
            if self._closed.is_set():
                return
            if (self._gap and checkpoint is None) or self._size + size > self._size_max:
                self._gap += 1
                self._missed(1)
                return
            if self._gap:
                self._entries.append(Gap(self._gap))
                self._gap = 0
            self._entries.append(turn)
            self._size += size
            if checkpoint is not None:
                self._is_checkpoint_wanted = False
                self._entries.append(checkpoint)
            self._bell.notify()

    def want_checkpoint(self) -> None:
        """Request a checkpoint with the next turn."""
        self._is_checkpoint_wanted = True

    def lose(self, entries: Sequence[Entry]) -> int:
        """Drop entries that the taking thread could not write: a gap like any other.

        Entries queued meanwhile build on them and are dropped with them; a gap is recorded again.
        Return the number of turns dropped. In the taking thread.
        """
        with self._bell:
            lost = (*entries, *self._entries)
            self._entries.clear()
            self._size = 0
            turns = sum(isinstance(entry, Turn) for entry in lost)
            self._gap += turns + sum(entry.turns for entry in lost if isinstance(entry, Gap))
            self._missed(turns)
            self._is_checkpoint_wanted = True
            return turns

    def take(self, linger_s: float) -> Sequence[Entry]:
        """Wait for an entry and then `linger_s` for more; return all of them; empty: closed.

        Args:
            linger_s: from the first entry on; a batch costs one write and one wake-up.
        """
        with self._bell:
            while not self._entries and not self._closed.is_set():
                self._bell.wait()
        self._closed.wait(linger_s)
        with self._bell:
            entries, self._entries = self._entries, deque()
            self._size = 0
            return entries

    def _missed(self, turns: int) -> None:
        self.missed_turns += turns
        self.missed_s = time.monotonic()

    def close(self) -> None:
        """Drop further turns; those in the queue can still be taken, then `take` returns none."""
        with self._bell:
            self._closed.set()
            self._bell.notify()


def _size(entry: Entry) -> int:
    return 1 + len(entry.facts) + len(entry.decisions) if isinstance(entry, Turn) else 1

"""The inbox, with real threads and without sleeps."""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Barrier, Event, Thread

import pytest

from flowcontrol.errors import NotRunningError
from flowcontrol.events import Arrived, DrainBegan, Fact, Left
from flowcontrol.inbox import Inbox
from flowcontrol.request import Request

WAIT_S = 10
"""Longest wait for another thread; reached only when a test fails."""


def arrived(request_id: int) -> Arrived:
    """Return an arrival."""
    return Arrived(Request(request_id))


def in_threads(*targets: Callable[[], None]) -> None:
    """Run all at once, and wait until all have ended."""
    barrier = Barrier(len(targets))

    def run(target: Callable[[], None]) -> None:
        barrier.wait(WAIT_S)
        target()

    threads = [Thread(target=run, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a thread hangs"


class TestTake:
    """What the one taker gets."""

    def test_facts_come_in_the_order_they_were_put(self) -> None:
        """Arrivals and other facts are one line."""
        inbox = Inbox(arrivals_max=9)
        facts: list[Fact] = [arrived(1), Left(1), arrived(2), DrainBegan(0)]
        for fact in facts:
            if isinstance(fact, Arrived):
                inbox.offer(fact)
            else:
                inbox.post(fact)

        assert inbox.take(None) == facts

    def test_since(self) -> None:
        """The taker knows since when there was something to take, leftovers included."""
        times_ns = iter([100, 200, 300])
        inbox = Inbox(arrivals_max=9, batch_max=2, clock=lambda: next(times_ns))
        assert inbox.offer(arrived(1))
        for request_id in range(2):
            inbox.post(Left(request_id))
        since_ns = []
        for _ in range(2):
            inbox.take(None)
            since_ns.append(inbox.since_ns)
        inbox.post(Left(2))
        inbox.close()

        assert [*since_ns, inbox.since_ns] == [100, 100, 200]
        assert next(times_ns) == 300

    def test_batch_is_bounded(self) -> None:
        """What is too much for one turn stays for the next, which does not sleep."""
        inbox = Inbox(arrivals_max=9, batch_max=2)
        for request_id in range(5):
            inbox.post(Left(request_id))
        batches = [inbox.take(None) for _ in range(3)]

        assert batches == [[Left(0), Left(1)], [Left(2), Left(3)], [Left(4)]]

    @pytest.mark.parametrize("timeout_s", [0.0, -1.0, 0.001])
    def test_empty_inbox_gives_nothing_after_the_timeout(self, timeout_s: float) -> None:
        """A deadline that is now, or past, does not sleep at all."""
        assert Inbox(arrivals_max=9).take(timeout_s) == []

    def test_timeout_of_zero_takes_what_is_here(self) -> None:
        """Not to sleep is not to look away."""
        inbox = Inbox(arrivals_max=9)
        inbox.post(Left(1))

        assert inbox.take(0) == [Left(1)]


class TestBell:
    """How the taker is woken."""

    def test_rings_while_nobody_sleeps_are_not_lost(self) -> None:
        """Rung before it is asked, the next take returns at once, though it may sleep for ever."""
        inbox = Inbox(arrivals_max=9)
        inbox.ring()
        inbox.ring()

        assert inbox.take(None) == []

    def test_ring_wakes_the_sleeper(self) -> None:
        """What was put before a ring is taken."""
        inbox = Inbox(arrivals_max=9)
        taken: list[object] = []

        def take() -> None:
            while not taken:
                taken.extend(inbox.take(None))

        def put() -> None:
            inbox.post(Left(1))
            inbox.ring()

        in_threads(take, put)

        assert taken == [Left(1)]

    @pytest.mark.slow
    def test_no_ring_is_ever_lost(self) -> None:
        """Two threads that answer each other's ring never sleep past it."""
        ping, pong = Inbox(arrivals_max=9), Inbox(arrivals_max=9)

        def answer(own: Inbox, other: Inbox) -> None:
            for _ in range(500):
                while not own.take(None):
                    pass
                other.post(Left(1))
                other.ring()

        ping.post(Left(1))
        in_threads(lambda: answer(ping, pong), lambda: answer(pong, ping))

        assert ping.take(0) == [Left(1)]
        assert pong.take(0) == []


class TestOffer:
    """Arrivals are bounded, because clients make them."""

    def test_full_inbox_refuses_arrivals(self) -> None:
        """Up to the bound they are taken, beyond it refused on the spot."""
        inbox = Inbox(arrivals_max=2)
        answers = [inbox.offer(arrived(request_id)) for request_id in range(4)]

        assert answers == [True, True, False, False]
        assert inbox.take(None) == [arrived(0), arrived(1)]

    def test_departures_are_never_refused(self) -> None:
        """A departure refused would be a slot lost; neither do they take an arrival's room."""
        inbox = Inbox(arrivals_max=1)
        for request_id in range(100):
            inbox.post(Left(request_id))

        assert inbox.offer(arrived(1))
        assert not inbox.offer(arrived(2))

        inbox.post(Left(100))

        assert len(inbox.take(None)) == 102

    def test_room_is_there_again_when_arrivals_are_taken(self) -> None:
        """As many as were taken, whatever else was taken along, and no more."""
        inbox = Inbox(arrivals_max=3, batch_max=5)
        inbox.offer(arrived(1))
        for request_id in range(3):
            inbox.post(Left(request_id))
        inbox.offer(arrived(2))
        inbox.offer(arrived(3))
        inbox.take(None)

        answers = [inbox.offer(arrived(request_id)) for request_id in range(4, 8)]

        assert answers == [True, True, False, False]

    @pytest.mark.slow
    def test_bound_holds_against_many_threads(self) -> None:
        """Of what eight threads offer at once, as much is taken as there is room."""
        inbox = Inbox(arrivals_max=100)
        accepted: list[int] = []

        def offer(first_id: int) -> None:
            ids = range(first_id, first_id + 50)
            accepted.extend(each for each in ids if inbox.offer(arrived(each)))

        in_threads(*(partial(offer, 50 * index) for index in range(8)))

        taken = [fact.request.request_id for fact in inbox.take(0) if isinstance(fact, Arrived)]
        assert len(taken) == 100
        assert sorted(taken) == sorted(accepted)


class TestClose:
    """The end of the inbox."""

    def test_close_returns_what_nobody_took(self) -> None:
        """Accepted facts are not lost."""
        inbox = Inbox(arrivals_max=9)
        inbox.offer(arrived(1))
        inbox.post(Left(1))

        assert inbox.close() == [arrived(1), Left(1)]
        assert inbox.close() == []

    def test_closed_inbox_takes_nothing_in(self) -> None:
        """Arrivals raise an error, other facts have no effect any more."""
        inbox = Inbox(arrivals_max=9)
        inbox.close()
        with pytest.raises(NotRunningError, match="the processor has stopped"):
            inbox.offer(arrived(1))
        inbox.post(Left(1))

        assert inbox.take(None) == []

    def test_close_wakes_the_sleeper(self) -> None:
        """A taker that sleeps for ever is let go."""
        inbox = Inbox(arrivals_max=9)
        taken: list[Sequence[object]] = []

        in_threads(lambda: taken.append(inbox.take(None)), lambda: taken.append(inbox.close()))

        assert taken == [[], []]

    @pytest.mark.slow
    def test_accepted_means_taken_or_returned(self) -> None:
        """However a close meets offers and takes, no accepted fact is lost, and none is doubled."""
        for _ in range(200):
            race = Race()
            in_threads(
                *(partial(race.offer, 20 * each) for each in range(3)), race.take, race.close
            )

            ids = [fact.request.request_id for fact in race.found if isinstance(fact, Arrived)]
            assert sorted(ids) == sorted(race.accepted)


class Race:
    """An inbox that is filled, emptied and closed at once."""

    def __init__(self) -> None:
        self.inbox = Inbox(arrivals_max=1000, batch_max=3)
        self.is_closed = Event()
        self.accepted: list[int] = []
        self.found: list[object] = []
        """Taken, or returned by close."""

    def offer(self, first_id: int) -> None:
        """Offer arrivals until the inbox is closed; each in a batch of its own bell."""
        for request_id in range(first_id, first_id + 20):
            try:
                self.inbox.offer(arrived(request_id))
            except NotRunningError:
                return
            self.accepted.append(request_id)
            self.inbox.ring()

    def take(self) -> None:
        """Take until the inbox is closed."""
        while not self.is_closed.is_set():
            self.found.extend(self.inbox.take(None))

    def close(self) -> None:
        """Close the inbox somewhere in the middle."""
        left = self.inbox.close()
        self.found.extend(left)
        self.is_closed.set()

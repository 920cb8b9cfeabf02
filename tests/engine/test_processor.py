"""The processor: a real thread on a clock that the test sets."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from typing import cast

import pytest

from flowcontrol.config import BandSettings, Concurrency, ControllerConfig, Limits
from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.events import Arrived, Decision, DrainBegan, EndpointsChanged, Left
from flowcontrol.inbox import Inbox
from flowcontrol.processor import FlowProcessor
from flowcontrol.request import Outcome, Request
from flowcontrol.views.snapshot import Snapshot

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
WAIT_S = 10
"""Longest wait for the thread; reached only when a test fails."""


@dataclass(slots=True)
class Clock:
    """Tells the times it was given, one a reading, then the last again and again."""

    times_ns: list[int] = field(default_factory=lambda: [0])
    readings: int = 0

    def __call__(self) -> int:
        """Return the time of this reading."""
        index = min(self.readings, len(self.times_ns) - 1)
        self.readings += 1
        return self.times_ns[index]


class Restless:
    """An engine with a bug: it always wants to be woken at once, and never has anything to do."""

    OFTEN = 100

    def __init__(self) -> None:
        self.is_drained = False
        self.has_turned_often = Event()
        self._turns = 0

    def poll(self, _now_ns: int) -> list[Decision]:
        """Decide nothing."""
        self._turns += 1
        if self._turns > self.OFTEN:
            self.has_turned_often.set()
        return []

    def next_wakeup_ns(self) -> int:
        """Want a time long past."""
        return 1


class Shop:
    """A processor with one slot and all that it hands out.

    Facts given before `start` make the first turn's batch.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.inbox_clock = Clock()
        self.inbox = Inbox(arrivals_max=100_000, clock=self.inbox_clock)
        self.controller = FlowController(
            ControllerConfig(
                default_settings=BandSettings(ttl_ns=5 * SECOND),
                detectors=(Concurrency(requests_max=1),),
            ),
            0,
        )
        self.deliveries: SimpleQueue[tuple[list[Decision], Snapshot | None]] = SimpleQueue()
        self.ends: SimpleQueue[BaseException | None] = SimpleQueue()
        self.processor = FlowProcessor(
            self.controller, self.inbox, self.deliver, self.ends.put, self.clock
        )
        self.inbox.post(EndpointsChanged(("a",)))

    def deliver(self, decisions: list[Decision], snapshot: Snapshot | None) -> None:
        """Keep a delivery for the test to look at."""
        self.deliveries.put((decisions, snapshot))

    def arrive(self, *request_ids: int) -> None:
        """Let requests arrive, and ring once."""
        for request_id in request_ids:
            self.inbox.offer(Arrived(Request(request_id)))
        self.inbox.ring()

    def drain(self, budget_ns: int = 0) -> None:
        """Begin to drain."""
        self.inbox.post(DrainBegan(budget_ns))
        self.inbox.ring()

    def decided(self) -> list[tuple[int, Outcome]]:
        """Return the next delivery's decisions, as request and outcome."""
        decisions, _ = self.deliveries.get(timeout=WAIT_S)
        return [(decision.request_id, decision.outcome) for decision in decisions]

    def end(self) -> BaseException | None:
        """Wait for the thread's last act."""
        fault = self.ends.get(timeout=WAIT_S)
        assert self.processor.join(WAIT_S)
        return fault


@pytest.fixture(name="shop")
def _shop() -> Iterator[Shop]:
    """Open a shop, and close it."""
    shop = Shop()
    yield shop
    shop.drain()
    assert shop.processor.join(WAIT_S)


class TestTurn:
    """What the thread does with what came."""

    def test_batch_is_decided_at_once(self, shop: Shop) -> None:
        """What came together is one delivery, in order of decision."""
        shop.arrive(1, 2)
        shop.inbox.post(Left(2))
        shop.arrive(3)
        shop.processor.start()

        assert shop.decided() == [(2, Outcome.EVICTED_CANCELLED), (1, Outcome.DISPATCHED)]

    def test_turn_reads_the_clock_once(self, shop: Shop) -> None:
        """Facts, decisions and waits of one turn are of one moment."""
        shop.clock.times_ns = [7 * SECOND, 8 * SECOND, 9 * SECOND]
        shop.arrive(1, 2)
        shop.inbox.post(Left(1))
        shop.processor.start()
        decisions, _ = shop.deliveries.get(timeout=WAIT_S)

        assert [decision.waited_ns for decision in decisions] == [0, 0]

    def test_departure_frees_the_slot_in_the_same_turn(self, shop: Shop) -> None:
        """The next request goes without waiting for anything else to happen."""
        shop.arrive(1, 2)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        shop.inbox.post(Left(1))
        shop.inbox.ring()

        assert shop.decided() == [(2, Outcome.DISPATCHED)]

    def test_nothing_decided_is_nothing_delivered(self, shop: Shop) -> None:
        """Turns that only took facts in deliver nothing."""
        shop.processor.start()
        shop.drain()
        shop.end()

        assert shop.deliveries.empty()


class TestWakeUp:
    """The thread wakes when the machine asked to be woken, without a ring."""

    def test_deadline_is_kept_to_the_nanosecond(self, shop: Shop) -> None:
        """It sleeps for the millisecond that is left, and evicts at the deadline."""
        deadline_ns = 5 * SECOND
        shop.clock.times_ns = [0, deadline_ns - MILLISECOND, deadline_ns]
        shop.arrive(1, 2)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        (evicted,), _ = shop.deliveries.get(timeout=WAIT_S)

        assert (evicted.request_id, evicted.outcome) == (2, Outcome.EVICTED_TTL)
        assert evicted.waited_ns == deadline_ns

    def test_woken_too_early_it_sleeps_again(self, shop: Shop) -> None:
        """A sleep may end before its time; nothing is decided then."""
        deadline_ns = 5 * SECOND
        shop.clock.times_ns = [
            *(0, deadline_ns - MILLISECOND),  # the first turn, and the sleep after it
            *(deadline_ns - 1, deadline_ns - 1),  # a turn that comes too early, and its sleep
            deadline_ns,
        ]
        shop.arrive(1, 2)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        (evicted,), _ = shop.deliveries.get(timeout=WAIT_S)

        assert evicted.waited_ns == deadline_ns

    def test_deadline_in_the_past_does_not_sleep(self, shop: Shop) -> None:
        """A turn that took longer than the time left is followed by the next at once."""
        shop.clock.times_ns = [0, 6 * SECOND]
        shop.arrive(1, 2)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        (evicted,), _ = shop.deliveries.get(timeout=WAIT_S)

        assert evicted.waited_ns == 6 * SECOND

    @pytest.mark.interpreted
    def test_a_wish_that_is_never_fulfilled_does_not_spin(self) -> None:
        """An engine that wants to be woken at a time it has decided costs a turn a millisecond."""
        controller = Restless()
        inbox = Inbox(1)
        processor = FlowProcessor(
            cast("FlowController", controller), inbox, lambda *_: None, lambda _: None
        )
        began_s = time.monotonic()
        processor.start()
        assert controller.has_turned_often.wait(WAIT_S)
        took_s = time.monotonic() - began_s
        controller.is_drained = True
        assert processor.join(WAIT_S)

        assert took_s > Restless.OFTEN * 0.001

    def test_very_far_deadline_is_no_fault(self) -> None:
        """A client may be willing to wait for a thousand years."""
        shop = Shop()
        shop.controller = FlowController(
            ControllerConfig(detectors=(Concurrency(requests_max=1),)), 0
        )
        processor = FlowProcessor(
            shop.controller, shop.inbox, shop.deliver, shop.ends.put, shop.clock
        )
        shop.inbox.offer(Arrived(Request(1)))
        shop.inbox.offer(Arrived(Request(2, ttl_ns=1000 * 366 * 86400 * SECOND)))
        processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        shop.drain()

        assert shop.ends.get(timeout=WAIT_S) is None


class TestSnapshot:
    """How others look at the machine: it is shown to them."""

    def test_wanted_snapshot_comes_with_the_next_delivery(self, shop: Shop) -> None:
        """Even where nothing was decided."""
        shop.processor.start()
        shop.processor.want_snapshot()
        decisions, snapshot = shop.deliveries.get(timeout=WAIT_S)

        assert decisions == []
        assert snapshot is not None
        assert [endpoint.address for endpoint in snapshot.endpoints] == ["a"]

    def test_snapshot_shows_the_turn_it_came_with(self, shop: Shop) -> None:
        """It is taken after the turn's decisions."""
        shop.arrive(1, 2, 3)
        shop.processor.want_snapshot()
        shop.processor.start()
        decisions, snapshot = shop.deliveries.get(timeout=WAIT_S)

        assert len(decisions) == 1
        assert snapshot is not None
        assert (snapshot.waiting, snapshot.in_flight) == (2, 1)

    def test_pace(self, shop: Shop) -> None:
        """It comes with what turns took and how long facts had to wait for them."""
        shop.clock.times_ns = [40 * MILLISECOND, 43 * MILLISECOND, 50 * MILLISECOND]
        shop.inbox.take(0)
        shop.inbox_clock.times_ns = [0, 39 * MILLISECOND]
        shop.inbox.post(EndpointsChanged(("a",)))
        shop.arrive(1)
        shop.processor.start()
        assert shop.decided() == [(1, Outcome.DISPATCHED)]
        shop.processor.want_snapshot()
        _, snapshot = shop.deliveries.get(timeout=WAIT_S)

        assert snapshot is not None
        assert snapshot.pace is not None
        turns, lags = snapshot.pace.turns, snapshot.pace.lags
        assert (sum(turns.counts), turns.sum_ns) == (1, 3 * MILLISECOND)
        assert (sum(lags.counts), lags.sum_ns) == (1, 1 * MILLISECOND)

    def test_many_asks_make_one(self, shop: Shop) -> None:
        """Asked thrice before the turn, it is taken once."""
        for _ in range(3):
            shop.processor.want_snapshot()
        shop.arrive(1)
        shop.processor.start()
        _, first = shop.deliveries.get(timeout=WAIT_S)
        shop.inbox.post(Left(1))
        shop.arrive(2)
        decisions, second = shop.deliveries.get(timeout=WAIT_S)

        assert first is not None
        assert [decision.request_id for decision in decisions] == [2]
        assert second is None


class TestDrain:
    """The end that was asked for."""

    def test_ends_when_nobody_waits(self, shop: Shop) -> None:
        """In flight is no reason to stay: those streams end without it."""
        shop.arrive(1)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]

        shop.drain()

        assert shop.end() is None

    def test_budget_is_a_deadline_too(self, shop: Shop) -> None:
        """What waits at its end is evicted then, without a ring."""
        shop.clock.times_ns = [0, SECOND - MILLISECOND, SECOND]
        shop.arrive(1, 2)
        shop.drain(SECOND)
        shop.processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED)]
        assert shop.decided() == [(2, Outcome.EVICTED_DRAINED)]
        assert shop.end() is None

    def test_arrivals_of_the_last_moment_are_decided(self) -> None:
        """Accepted while the last turn was under way, they are refused, not forgotten."""
        shop = Shop()

        def deliver(decisions: list[Decision], snapshot: Snapshot | None) -> None:
            shop.deliver(decisions, snapshot)
            if decisions[0].request_id == 1:
                shop.arrive(3, 4)

        processor = FlowProcessor(shop.controller, shop.inbox, deliver, shop.ends.put, shop.clock)
        shop.arrive(1, 2)
        shop.drain()
        processor.start()

        assert shop.decided() == [(1, Outcome.DISPATCHED), (2, Outcome.EVICTED_DRAINED)]
        assert shop.decided() == [(3, Outcome.REJECTED_DRAINING), (4, Outcome.REJECTED_DRAINING)]
        assert shop.ends.get(timeout=WAIT_S) is None

    def test_nothing_is_accepted_afterwards(self, shop: Shop) -> None:
        """An arrival that comes too late is refused at once."""
        shop.processor.start()
        shop.drain()
        shop.end()

        with pytest.raises(NotRunningError):
            shop.arrive(1)

    def test_join_says_whether_it_has_ended(self, shop: Shop) -> None:
        """While it runs, waiting for no time at all answers no."""
        shop.processor.start()

        assert not shop.processor.join(0)

        shop.drain()

        assert shop.processor.join(WAIT_S)


class TestCrash:
    """An end without a drain."""

    def test_fault_in_the_machine_reaches_ended(self, shop: Shop) -> None:
        """A request that arrives twice is a bug of the gate; nothing is decided after it."""
        shop.arrive(1, 1)
        shop.processor.start()
        fault = shop.end()

        assert isinstance(fault, AssertionError)
        assert str(fault) == "a request arrives once"
        assert shop.deliveries.empty()

    @pytest.mark.parametrize("fault", [ValueError("broken"), SystemExit(3), KeyboardInterrupt()])
    def test_fault_in_the_delivery_reaches_ended(self, fault: BaseException) -> None:
        """Whatever it is: no thread dies silently."""
        shop = Shop()

        def deliver(_decisions: list[Decision], _snapshot: Snapshot | None) -> None:
            raise fault

        processor = FlowProcessor(shop.controller, shop.inbox, deliver, shop.ends.put, shop.clock)
        shop.arrive(1)
        processor.start()

        assert shop.ends.get(timeout=WAIT_S) is fault
        assert processor.join(WAIT_S)

    def test_fault_closes_the_inbox(self, shop: Shop) -> None:
        """When the end is reported, the inbox takes nothing any more."""
        shop.arrive(1, 1)
        shop.processor.start()
        shop.end()

        with pytest.raises(NotRunningError):
            shop.arrive(2)


@pytest.mark.slow
class TestManyRequests:
    """The thread against a crowd of others."""

    def test_ten_thousand_are_decided_exactly_once(self) -> None:
        """Four threads of arrivals and departures; no decision is lost, none is doubled."""
        shop = Shop()
        config = ControllerConfig(
            limits=Limits(requests_max=50), detectors=(Concurrency(requests_max=10),)
        )
        shop.controller = FlowController(config, 0)
        processor = FlowProcessor(shop.controller, shop.inbox, shop.deliver, shop.ends.put)
        processor.start()

        def come_and_go(first_id: int) -> None:
            for request_id in range(first_id, first_id + 2500):
                shop.arrive(request_id)
                if request_id % 3:
                    shop.inbox.post(Left(request_id - 2))
                    shop.inbox.ring()

        clients = [Thread(target=come_and_go, args=(2500 * each,)) for each in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(WAIT_S)
        shop.drain()

        assert shop.ends.get(timeout=WAIT_S) is None

        decided = []
        while not shop.deliveries.empty():
            decided += [request_id for request_id, _ in shop.decided()]

        assert sorted(decided) == list(range(10_000))

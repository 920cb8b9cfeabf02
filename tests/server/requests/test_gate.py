"""The gate: a real event loop, a real processor thread, and no sleep."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVarTuple, final

import grpc
import pytest

from flowcontrol.config import Concurrency, ControllerConfig, Limits, Picker, Reclaim
from flowcontrol.errors import NotRunningError
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Left,
    ObjectivesChanged,
)
from flowcontrol.request import FlowKey, Outcome, Request
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.ext_proc import ExtProcDoor
from flowcontrol_server.requests.classify import Origin
from flowcontrol_server.requests.exchange import FurtherAttempt, Message, MessageKind, Mode
from flowcontrol_server.requests.gate import SETTLED_AT_ONCE_MAX, SUBSETS_MAX, FlowGate
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.tickets import TICKETS
from tests.e2e.harness import eventually


def request(flow_id: str = "tenant", objective: str | None = None, **more: Any) -> Request:
    """A request that nobody has taken in."""
    return Request(0, flow_id, objective, **more)


POOL = EndpointsChanged(("10.0.0.5:8000",))
TIMEOUT_S = 10.0
Arguments = TypeVarTuple("Arguments")


@final
class House:
    """A gate and everything it tells its owner."""

    def __init__(self, config: ControllerConfig, arrivals_max: int) -> None:
        self.unsent: list[str] = []
        self.gate = FlowGate(
            config,
            arrivals_max,
            self._request_ended,
            self._processor_ended,
            unsent=self.unsent.append,
            may_decide=lambda: self.is_leader,
        )
        self.is_leader = True
        self.requests: list[tuple[Parked, Decision]] = []
        self.tell: Callable[[tuple[Parked, Decision]], None] = self.requests.append
        self.faults: list[BaseException | None] = []
        self.has_started = False
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Start the processor."""
        self.has_started = True
        self.gate.start()

    def fail(self) -> None:
        """Make the processor fail: a request that is here already must not arrive again."""
        self.gate.post(POOL)
        self.gate.post(Arrived(Request(-1)))
        self.gate.post(Arrived(Request(-1)))

    async def ended(self) -> None:
        """Wait for the processor to end."""
        await asyncio.wait_for(self._ended.wait(), TIMEOUT_S)

    @property
    def outcomes(self) -> Counter[Outcome]:
        """What became of the requests that are over."""
        return Counter(decision.outcome for _, decision in self.requests)

    def _request_ended(self, parked: Parked, decision: Decision) -> None:
        self.tell((parked, decision))

    def _processor_ended(self, fault: BaseException | None) -> None:
        self.faults.append(fault)
        self._ended.set()


@asynccontextmanager
async def house(
    *,
    config: ControllerConfig | None = None,
    arrivals_max: int = 100_000,
    has_pool: bool = True,
    starts: bool = True,
) -> AsyncIterator[House]:
    """A gate, started or not, that is drained and joined at the end, and said so once."""
    each = House(config or ControllerConfig(), arrivals_max)
    if has_pool:
        each.gate.post(POOL)
    if starts:
        each.start()
    try:
        yield each
    finally:
        if not each.has_started:
            each.start()
        each.gate.post(DrainBegan(0))
        await each.ended()
        assert each.gate.join(TIMEOUT_S)
        assert len(each.faults) == 1, "the end is told once"


async def decided(parked: Parked) -> Decision:
    """The decision about a request."""
    return await asyncio.wait_for(asyncio.shield(parked.future()), TIMEOUT_S)


@final
class ListeningLoop(asyncio.SelectorEventLoop):
    """An event loop that counts what is put on it and lets a test wait for other threads."""

    def __init__(self) -> None:
        super().__init__()
        self.soon_count = 0
        self.thread_count = 0
        self._woken = threading.Semaphore(0)

    def call_soon(
        self,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Count a callback put on the loop by its own thread."""
        self.soon_count += 1
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Count a callback put on the loop by another thread."""
        self.thread_count += 1  # before the loop can run it
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        self._woken.release()
        return handle

    def block(self) -> None:
        """Keep the loop from turning until another thread has put a callback on it."""
        assert self._woken.acquire(timeout=TIMEOUT_S)


def run_listening(scenario: Callable[[ListeningLoop], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario on a listening loop."""
    loop = ListeningLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scenario(loop))


class TestArrival:
    """Since when a request counts."""

    async def test_from_the_gate(self) -> None:
        """It came when it stood at the gate or before, however late the processor takes it in."""
        began = (datetime.now(UTC) - timedelta(seconds=7)).isoformat()
        async with house(has_pool=False) as home:
            old, new = home.gate.park(request(), began=began), home.gate.park(request())
            arrived = await home.gate.ask(
                lambda controller, _now_ns: [each.arrived_ns for each in controller.leases.values()]
            )

            assert arrived == [old.arrived_ns, new.arrived_ns]
            assert 6_000_000_000 < new.arrived_ns - old.arrived_ns < 8_000_000_000


class TestBatches:
    """What the processor decides in one turn comes to the loop at once, and is settled in parts."""

    async def test_bounded(self) -> None:
        """So many are settled in a turn of the loop; what was asked behind them comes last."""
        count = 3 * SETTLED_AT_ONCE_MAX
        async with house(has_pool=False) as home:
            parked = [home.gate.park(request()) for _ in range(count)]
            await home.gate.snapshot()
            evicting = asyncio.ensure_future(home.gate.evict_flow(FlowKey(0, "tenant")))
            turns = []
            while not evicting.done():
                await asyncio.sleep(0)
                turns.append(sum(each.decision is not None for each in parked))

            settled = [after - before for before, after in itertools.pairwise([0, *turns])]
            assert max(settled) == SETTLED_AT_ONCE_MAX
            assert sum(settled) == count
            assert await evicting == count

    async def test_a_failure_between_parts(self) -> None:
        """When the loop fails what was not settled yet is, once, as the rest is."""
        async with house(has_pool=False) as home:
            parked = [home.gate.park(request()) for _ in range(2 * SETTLED_AT_ONCE_MAX)]
            await home.gate.snapshot()
            evicting = asyncio.ensure_future(home.gate.evict_flow(FlowKey(0, "tenant")))
            await parked[0].future()
            home.gate.fail(RuntimeError("planted"))
            outcomes = Counter([(await decided(each)).outcome for each in parked])

            assert outcomes == {
                Outcome.EVICTED_OPERATOR: SETTLED_AT_ONCE_MAX,
                Outcome.INTERNAL: SETTLED_AT_ONCE_MAX,
            }
            with pytest.raises(NotRunningError):
                await evicting

    def test_told_in_one_turn(self) -> None:
        """Whoever a request belongs to is called when its decision comes, without a callback."""

        async def scenario(loop: ListeningLoop) -> None:
            async with house(starts=False) as home:
                told: list[Decision] = []
                parked = [home.gate.park(request()) for _ in range(5)]
                for each in parked:
                    each.decided = told.append
                await asyncio.sleep(0)
                home.start()
                loop.block()
                before = loop.soon_count
                await asyncio.sleep(0)  # counts as one

                assert loop.soon_count - before <= 1
                assert told == [each.decision for each in parked]
                assert not any(each.decided for each in parked)
                for each in parked:
                    home.gate.leave(each)

        run_listening(scenario)

    async def test_an_owner_that_fails(self) -> None:
        """One that fails when it is called keeps no other from its decision."""

        def fail(_decision: Decision) -> None:
            message = "planted"
            raise RuntimeError(message)

        faults: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        async with house(starts=False) as home:
            first, second = home.gate.park(request()), home.gate.park(request())
            first.decided = fail
            told: list[Decision] = []
            second.decided = told.append
            home.start()
            await eventually(lambda: faults, what="the fault")
            for each in (first, second):
                home.gate.leave(each)

        assert first.decision is not None
        assert told == [second.decision]
        assert [type(each["exception"]) for each in faults] == [RuntimeError]
        assert all("handle" in each for each in faults), "as of any callback"


def attempt(parked: Parked, endpoint: str) -> FurtherAttempt:
    """Another attempt at a dispatched request."""
    return FurtherAttempt(TICKETS.issue(parked.request_id).decode(), endpoint)


class TestAttempt:
    """Envoy could not send a dispatched request, and would send it elsewhere."""

    TWO = EndpointsChanged(("10.0.0.5:8000", "10.0.0.6:8000"))
    CONFIG = ControllerConfig(picker=Picker.LEAST_LOADED, detectors=(Concurrency(requests_max=1),))

    async def test_waits_for_a_slot(self) -> None:
        """It waits for a slot there as what it is, and only then gives up the other slot."""
        async with house(config=self.CONFIG, has_pool=False) as home:
            home.gate.post(self.TWO)
            home.gate.post(ObjectivesChanged({"chat": 10}))
            origin = Origin("by default", "header x")
            first = home.gate.park(request("tenant", "chat"), origin=origin)
            other = home.gate.park(request("other"))
            dead = (await decided(first)).endpoint
            alive = (await decided(other)).endpoint
            assert dead is not None
            assert alive is not None
            second = home.gate.park(request(), attempt=attempt(first, alive))
            waiting = await home.gate.snapshot()
            assert home.requests == []
            home.gate.leave(other)
            decision = await decided(second)
            after = await home.gate.snapshot()

            assert (waiting.waiting, waiting.in_flight) == (1, 2)
            assert (decision.endpoint, decision.priority, decision.flow_id) == (alive, 10, "tenant")
            assert second.arrived_ns == first.arrived_ns
            assert (after.waiting, after.in_flight) == (0, 1)
            assert (second.origin, home.unsent) == (origin, [dead])
            assert [parked for parked, _ in home.requests] == [other, first]
            assert (first.is_unsent, second.is_unsent, other.is_unsent) == (True, False, False)
            home.gate.leave(second)

    async def test_third(self) -> None:
        """A second attempt that is over before its turn leaves the first for a third to follow."""
        async with house(config=self.CONFIG, has_pool=False) as home:
            home.gate.post(self.TWO)
            first = home.gate.park(request("tenant"))
            other = home.gate.park(request("other"))
            dead = (await decided(first)).endpoint
            alive = (await decided(other)).endpoint
            assert alive is not None
            second = home.gate.park(request(), attempt=attempt(first, alive))
            home.gate.leave(second)
            assert (await decided(second)).outcome is Outcome.EVICTED_MOVED
            assert home.requests == [(second, await decided(second))]
            third = home.gate.park(request(), attempt=attempt(first, alive))
            home.gate.leave(other)

            assert (await decided(third)).flow_id == "tenant"
            assert [parked for parked, _ in home.requests] == [second, other, first]
            assert home.unsent == [dead], "one request that could not be sent there"
            home.gate.leave(third)

    async def test_client_leaves(self) -> None:
        """Its client is gone when the attempt before it has left, too."""
        async with house(config=self.CONFIG, has_pool=False) as home:
            home.gate.post(self.TWO)
            first = home.gate.park(request("tenant"))
            other = home.gate.park(request("other"))
            alive = (await decided(other)).endpoint
            assert alive is not None
            second = home.gate.park(request(), attempt=attempt(first, alive))
            home.gate.leave(first)
            home.gate.leave(second)

            assert (await decided(second)).outcome is Outcome.EVICTED_CANCELLED
            home.gate.leave(other)

    async def test_unknown(self) -> None:
        """An attempt at a request that is not in flight here waits for a slot all the same."""
        async with house(config=self.CONFIG, has_pool=False) as home:
            home.gate.post(self.TWO)
            parked = home.gate.park(request(), attempt=FurtherAttempt("ab.1.cd", "10.0.0.6:8000"))

            assert (await decided(parked)).endpoint == "10.0.0.6:8000"
            assert home.unsent == []
            home.gate.leave(parked)


class TestPark:
    """A request comes, is decided, and goes."""

    async def test_dispatched(self) -> None:
        """A request with a free slot is dispatched and holds the slot until it leaves."""
        async with house() as home:
            parked = home.gate.park(request())
            decision = await decided(parked)

            assert decision.outcome is Outcome.DISPATCHED
            assert decision.flow_id == "tenant"
            assert decision.request_id == parked.request_id
            assert (await home.gate.snapshot()).in_flight == 1
            assert home.requests == []

            home.gate.leave(parked)

            assert home.requests == [(parked, decision)]
            assert (await home.gate.snapshot()).in_flight == 0
            assert parked.left_ns is not None
            assert 0 < parked.decided_ns <= parked.left_ns

    async def test_every_fact_reaches_the_engine(self) -> None:
        """Flow, objective, size and time to live are handed on as they were read."""
        async with house(has_pool=False) as home:
            waiting = home.gate.park(request("tenant-b", "nobody", byte_size=77))
            decision = await decided(
                home.gate.park(request("tenant-b", "nobody", byte_size=77, ttl_ns=0))
            )
            snapshot = await home.gate.snapshot()

            assert decision.outcome is Outcome.EVICTED_NO_ENDPOINTS
            assert snapshot.waiting_bytes == 77
            assert snapshot.unknown_objectives == 2
            assert [flow.flow_id for band in snapshot.bands for flow in band.flows] == ["tenant-b"]
            assert waiting.decision is None

    async def test_subsets_are_bounded(self) -> None:
        """A request with one subset more than may wait is refused; one that others have is not."""
        async with house(has_pool=False) as home:
            waiting = [
                home.gate.park(request(subset=(f"10.0.0.{number}:80",)))
                for number in range(SUBSETS_MAX)
            ]
            another = home.gate.park(request(subset=("10.0.1.0:80",)))
            alike = home.gate.park(request(subset=waiting[0].request.subset))
            home.gate.leave(waiting[1])
            await home.gate.snapshot()
            later = home.gate.park(request(subset=("10.0.1.1:80",)))
            snapshot = await home.gate.snapshot()

            assert (await decided(another)).outcome is Outcome.REJECTED_CAPACITY
            assert home.gate.inbox_refusals == 1
            assert alike.decision is None
            assert later.decision is None
            assert snapshot.waiting == SUBSETS_MAX + 1

    @pytest.mark.slow
    async def test_ten_thousand(self) -> None:
        """However they come and go, every one is settled once and ends once."""
        config = ControllerConfig(
            limits=Limits(requests_max=2000), detectors=(Concurrency(requests_max=100),)
        )
        async with house(config=config) as home:

            async def live(number: int) -> Parked:
                parked = home.gate.park(request(flow_id=f"tenant-{number % 7}"))
                if number % 3 == 1:
                    await parked.future()
                elif number % 3 == 2:
                    for _ in range(number % 5):
                        await asyncio.sleep(0)
                home.gate.leave(parked)
                await parked.future()
                return parked

            lives = await asyncio.wait_for(asyncio.gather(*map(live, range(10_000))), TIMEOUT_S)
            snapshot = await home.gate.snapshot()

            ends = Counter(parked.request_id for parked, _ in home.requests)
            assert ends == Counter(parked.request_id for parked in lives)
            assert set(ends.values()) == {1}
            assert len(ends) == 10_000
            assert all(parked.decision is decision for parked, decision in home.requests)
            assert snapshot.totals[0].outcomes == home.outcomes
            assert (snapshot.waiting, snapshot.in_flight, home.gate.inbox_refusals) == (0, 0, 0)
            expected = {Outcome.DISPATCHED, Outcome.EVICTED_CANCELLED, Outcome.REJECTED_CAPACITY}
            assert expected == home.outcomes.keys() - {Outcome.EVICTED_DISPLACED}

    async def test_inbox_full(self) -> None:
        """Arrivals beyond what the processor may be behind are refused on the spot, and counted."""
        async with house(arrivals_max=2, starts=False) as home:
            parked = [home.gate.park(request()) for _ in range(5)]

            are_decided = [each.decision is not None for each in parked]
            assert are_decided == [False, False, True, True, True]
            refused = parked[-1].decision
            assert refused is not None
            assert refused.outcome is Outcome.REJECTED_CAPACITY
            assert refused.retry_after_ns == 1_000_000_000
            assert refused.flow_id == "tenant"
            assert home.gate.inbox_refusals == 3

            home.start()

            assert (await decided(parked[0])).outcome is Outcome.DISPATCHED
            assert (await decided(parked[1])).outcome is Outcome.DISPATCHED
            assert (await decided(home.gate.park(request()))).outcome is Outcome.DISPATCHED


class TestLeave:
    """A stream ends, before, while or after its request is decided."""

    async def test_before(self) -> None:
        """Who leaves while waiting is evicted, and ends when that is decided."""
        async with house(has_pool=False) as home:
            parked = home.gate.park(request())
            assert (await home.gate.snapshot()).waiting == 1

            home.gate.leave(parked)

            assert home.requests == []
            decision = await decided(parked)
            assert decision.outcome is Outcome.EVICTED_CANCELLED
            assert home.requests == [(parked, decision)]

    async def test_in_the_same_turn(self) -> None:
        """Who comes and leaves before the processor looks has never waited for anything."""
        async with house(starts=False) as home:
            parked = home.gate.park(request())
            home.gate.leave(parked)
            home.start()

            assert (await decided(parked)).outcome is Outcome.EVICTED_CANCELLED
            assert (await home.gate.snapshot()).in_flight == 0
            assert len(home.requests) == 1

    def test_while_the_decision_crosses(self) -> None:
        """A request dispatched just before it left gives its slot back, and ends once."""

        async def scenario(loop: ListeningLoop) -> None:
            async with house(starts=False) as home:
                parked = home.gate.park(request())
                home.start()
                loop.block()  # the decision is on its way, and has not been received
                assert parked.decision is None

                home.gate.leave(parked)

                decision = await decided(parked)
                assert decision.outcome is Outcome.DISPATCHED
                assert home.requests == [(parked, decision)]
                assert (await home.gate.snapshot()).in_flight == 0

        run_listening(scenario)

    async def test_after_a_refusal(self) -> None:
        """Who was refused ends on leaving, and the engine need not be told."""
        config = ControllerConfig(limits=Limits(requests_max=0))
        async with house(config=config, has_pool=False) as home:
            parked = home.gate.park(request())
            decision = await decided(parked)
            assert decision.outcome is Outcome.REJECTED_NO_ENDPOINTS
            assert home.requests == []

            home.gate.leave(parked)

            assert home.requests == [(parked, decision)]

    async def test_twice(self) -> None:
        """To leave twice is our own mistake."""
        async with house() as home:
            parked = home.gate.park(request())
            home.gate.leave(parked)

            with pytest.raises(AssertionError, match="a request leaves once"):
                home.gate.leave(parked)


RECLAIMING = ControllerConfig(
    detectors=(Concurrency(requests_max=1),), reclaim=Reclaim(is_enabled=True)
)


class TestRecall:
    """A request in flight is to end for a better one."""

    async def test_second_decision(self) -> None:
        """The batch request is told so; when it has left, the line says what became of it."""
        async with house(config=RECLAIMING) as home:
            home.gate.post(ObjectivesChanged({"batch": -1}))
            batch = home.gate.park(request(objective="batch"))
            first = await decided(batch)
            assert batch.recall is not None
            person = home.gate.park(request())
            second = await asyncio.wait_for(asyncio.shield(batch.recall), TIMEOUT_S)

            assert (first.outcome, first.awaits_answer) == (Outcome.DISPATCHED, True)
            assert second.outcome is Outcome.RECLAIMED
            assert person.decision is None
            assert [each.decision for each in home.gate.recent.newest(9)] == [second, first]

            home.gate.leave(batch)

            assert home.requests == [(batch, second)]
            assert (await decided(person)).outcome is Outcome.DISPATCHED
            assert person.recall is None
            home.gate.leave(person)

    async def test_begun_answer(self) -> None:
        """What has begun to answer is let alone."""
        async with house(config=RECLAIMING) as home:
            home.gate.post(ObjectivesChanged({"batch": -1}))
            batch = home.gate.park(request(objective="batch"))
            await decided(batch)
            home.gate.responded(batch, Message(MessageKind.RESPONSE_HEADERS, {}), Mode.ANSWERS)
            person = home.gate.park(request())
            await home.gate.snapshot()

            assert batch.recall is not None
            assert not batch.recall.done()

            home.gate.leave(batch)
            assert (await decided(person)).outcome is Outcome.DISPATCHED
            home.gate.leave(person)

    def test_gone_meanwhile(self) -> None:
        """To be reclaimed and to leave may cross: then it has ended as it would have."""
        faults: list[object] = []

        async def scenario(loop: ListeningLoop) -> None:
            loop.set_exception_handler(lambda _loop, context: faults.append(context))
            async with house(config=RECLAIMING, starts=False) as home:
                home.gate.post(ObjectivesChanged({"batch": -1}))
                batch = home.gate.park(request(objective="batch"))
                home.start()
                loop.block()
                first = await decided(batch)
                person = home.gate.park(request())
                await asyncio.sleep(0)  # the bell rings
                loop.block()  # the second decision is on its way, and has not been received

                home.gate.leave(batch)

                assert (await decided(person)).outcome is Outcome.DISPATCHED
                assert home.requests == [(batch, first)]
                home.gate.leave(person)

        run_listening(scenario)

        assert faults == []


class TestSnapshot:
    """Whoever wants to look."""

    async def test_many_asks_make_one(self) -> None:
        """Whoever asks while one is being taken shares the next: that one may be older."""
        async with house() as home:
            first = await home.gate.snapshot()
            second, *same = await asyncio.gather(*(home.gate.snapshot() for _ in range(100)))
            last = await home.gate.snapshot()

            assert {id(each) for each in same} == {id(same[0])}
            assert len({id(each) for each in (first, second, same[0], last)}) == 4

    async def test_an_ask_that_is_given_up(self) -> None:
        """Who gives up disturbs nobody else who asked."""
        async with house(starts=False) as home:
            impatient = asyncio.ensure_future(home.gate.snapshot())
            patient = asyncio.ensure_future(home.gate.snapshot())
            await asyncio.sleep(0)
            impatient.cancel()
            await asyncio.wait([impatient])
            home.start()

            assert (await asyncio.wait_for(patient, TIMEOUT_S)).waiting == 0
            assert impatient.cancelled()

    async def test_after_the_end(self) -> None:
        """Nobody is left to answer."""
        async with house() as home:
            home.gate.post(DrainBegan(0))
            await home.ended()

            with pytest.raises(NotRunningError, match="the processor has stopped"):
                await home.gate.snapshot()

    async def test_while_the_processor_fails(self) -> None:
        """An ask that the processor can no longer answer is told so."""
        async with house(starts=False) as home:
            asked = asyncio.ensure_future(home.gate.snapshot())
            await asyncio.sleep(0)
            home.fail()
            home.start()

            with pytest.raises(NotRunningError, match="the processor has stopped"):
                await asyncio.wait_for(asked, TIMEOUT_S)


class TestFault:
    """The processor fails."""

    async def test_everything_parked_is_settled(self) -> None:
        """All that wait, and all that come later, are settled as an internal fault."""
        async with house(has_pool=False) as home:
            waiting = [home.gate.park(request()) for _ in range(100)]
            await home.gate.snapshot()
            home.fail()
            await home.ended()
            later = home.gate.park(request())

            decisions = [await decided(each) for each in (*waiting, later)]

            assert isinstance(home.faults[0], AssertionError)
            assert {each.outcome for each in decisions} == {Outcome.INTERNAL}
            assert {each.retry_after_ns for each in decisions} == {None}
            assert [each.waited_ns > 0 for each in decisions] == [True] * 100 + [False]
            assert home.requests == []
            for each in (*waiting, later):
                home.gate.leave(each)
            assert home.outcomes == {Outcome.INTERNAL: 101}

    async def test_in_flight(self) -> None:
        """A request in flight stays what it is, and ends when it leaves."""
        async with house() as home:
            parked = home.gate.park(request())
            decision = await decided(parked)
            home.fail()
            await home.ended()
            assert home.requests == []

            home.gate.leave(parked)

            assert home.requests == [(parked, decision)]
            assert decision.outcome is Outcome.DISPATCHED

    async def test_left_and_undecided(self) -> None:
        """A request that left just before the fault is settled, and ends once."""
        async with house(starts=False) as home:
            parked = home.gate.park(request())
            home.fail()
            home.gate.leave(parked)
            home.start()

            assert (await decided(parked)).outcome is Outcome.INTERNAL
            assert home.outcomes == {Outcome.INTERNAL: 1}

    async def test_of_the_gate(self) -> None:
        """All are settled likewise, the processor ends, and the end is told once."""
        fault = RuntimeError("a callback failed")
        async with house(has_pool=False) as home:
            waiting = [home.gate.park(request()) for _ in range(3)]
            snapshot = asyncio.ensure_future(home.gate.snapshot())
            await asyncio.sleep(0)
            home.gate.fail(fault)
            later = home.gate.park(request())
            outcomes = {(await decided(each)).outcome for each in (*waiting, later)}

            assert outcomes == {Outcome.INTERNAL}
            assert [fault] == home.faults
            with pytest.raises(NotRunningError):
                await snapshot
            assert await asyncio.to_thread(home.gate.join, TIMEOUT_S)

    def test_of_the_gate_while_decisions_cross(self) -> None:
        """What the processor decided meanwhile is not heard any more."""

        async def scenario(loop: ListeningLoop) -> None:
            async with house() as home:
                parked = home.gate.park(request())
                await asyncio.sleep(0)
                loop.block()  # its dispatch is on its way, and has not been received
                home.gate.fail(RuntimeError("a callback failed"))

                assert (await decided(parked)).outcome is Outcome.INTERNAL

        run_listening(scenario)

    async def test_of_who_is_told(self) -> None:
        """One whose end cannot be told keeps no other from being settled."""
        loop, complaints = asyncio.get_running_loop(), list[BaseException]()
        async with house(has_pool=False) as home:

            def fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
                """As the service does."""
                complaints.append(context["exception"])
                home.gate.fail(context["exception"])

            def append(_ended: tuple[Parked, Decision]) -> None:
                """Fail."""
                message = "cannot be told"
                raise RuntimeError(message)

            loop.set_exception_handler(fail)
            home.tell = append
            parked = [home.gate.park(request()) for _ in range(4)]
            for each in parked[:2]:
                home.gate.leave(each)
            outcomes = {(await decided(each)).outcome for each in parked[2:]}
            home.tell = home.requests.append

            assert outcomes == {Outcome.INTERNAL}
            assert [str(each) for each in complaints] == ["cannot be told"] * 2
            assert complaints[:1] == home.faults

    async def test_of_who_is_told_what_was_held(self) -> None:
        """Nor does it keep a replica that decides no more from its end."""
        loop, complaints = asyncio.get_running_loop(), list[str]()
        async with house(config=ControllerConfig(detectors=(Concurrency(requests_max=1),))) as home:

            def append(_ended: tuple[Parked, Decision]) -> None:
                """Fail."""
                message = "cannot be told"
                raise RuntimeError(message)

            loop.set_exception_handler(lambda _, it: complaints.append(str(it["exception"])))
            home.is_leader, home.tell = False, append
            moved, stays = home.gate.park(request()), home.gate.park(request())
            await home.gate.snapshot()
            assert moved.decision is None, "decisions do not count now"
            home.gate.leave(moved)
            home.gate.post(DrainBegan(0))
            await home.ended()

            assert (await decided(stays)).outcome is Outcome.DISPATCHED
            assert (complaints, home.faults) == (["cannot be told"], [None])
            home.tell = home.requests.append
            home.gate.leave(stays)

    async def test_what_has_moved_is_not_held(self) -> None:
        """That a replica decides no more keeps nothing from being told that has no client here."""
        async with house(has_pool=False) as home:
            home.is_leader = False
            moved, stays = home.gate.park(request()), home.gate.park(request())
            home.gate.leave(moved, Outcome.EVICTED_MOVED)
            await home.gate.snapshot()

            assert home.outcomes == {Outcome.EVICTED_MOVED: 1}
            assert stays.decision is None
            home.is_leader = True
            home.gate.leave(stays)

    def test_before_the_news_arrives(self) -> None:
        """Who parks when the processor has failed, but nobody heard yet, gets the same answer."""

        async def scenario(loop: ListeningLoop) -> None:
            async with house(has_pool=False, starts=False) as home:
                home.fail()
                home.start()
                loop.block()  # the news is on its way, and has not been received
                assert home.faults == []

                parked = home.gate.park(request())

                assert (await decided(parked)).outcome is Outcome.INTERNAL

        run_listening(scenario)


class TestDrain:
    """The service goes away."""

    async def test_waiting(self) -> None:
        """What still waits when the budget is spent is evicted; the processor ends well."""
        async with house(has_pool=False) as home:
            parked = home.gate.park(request())
            home.gate.post(DrainBegan(0))

            assert (await decided(parked)).outcome is Outcome.EVICTED_DRAINED
            await home.ended()
            assert home.faults == [None]

    async def test_later(self) -> None:
        """Who comes after the end is told to try elsewhere, soon."""
        async with house() as home:
            home.gate.post(DrainBegan(0))
            await home.ended()

            decision = await decided(home.gate.park(request()))

            assert decision.outcome is Outcome.REJECTED_DRAINING
            assert decision.retry_after_ns == 1_000_000_000

    async def test_in_flight(self) -> None:
        """A request in flight outlives the processor, and ends when it leaves."""
        async with house() as home:
            parked = home.gate.park(request())
            decision = await decided(parked)
            home.gate.post(DrainBegan(10**9))
            await home.ended()

            home.gate.leave(parked)

            assert home.requests == [(parked, decision)]

    async def test_arrivals_while_it_closes(self) -> None:
        """Whenever the processor stops taking arrivals, each is decided, by it or by the gate."""
        for _ in range(10):
            async with house() as home:
                early = home.gate.park(request())
                await decided(early)
                home.gate.post(DrainBegan(0))
                parked = []
                while not home.faults:
                    parked.append(home.gate.park(request()))
                    await asyncio.sleep(0)
                parked.append(home.gate.park(request()))

                outcomes = {(await decided(each)).outcome for each in parked}

                assert outcomes == {Outcome.REJECTED_DRAINING}


class TestBells:
    """Who wakes whom, and how often."""

    def test_once_per_turn_and_once_per_batch(self) -> None:
        """A thousand requests in a turn ring once; a thousand decisions come back at once."""

        async def scenario(loop: ListeningLoop) -> None:
            config = ControllerConfig(detectors=(Concurrency(requests_max=1000),))
            async with house(config=config, has_pool=False, starts=False) as home:
                before = loop.soon_count
                home.gate.post(POOL)
                parked = [home.gate.park(request()) for _ in range(1000)]
                rung = loop.soon_count - before

                home.start()
                await asyncio.wait_for(asyncio.gather(*(p.future() for p in parked)), TIMEOUT_S)

                assert (rung, loop.thread_count) == (1, 1)

                before = loop.soon_count
                for each in parked:
                    home.gate.leave(each)
                assert loop.soon_count == before, "nobody waits for a slot"
                assert (await home.gate.snapshot()).in_flight == 0

        run_listening(scenario)

    async def test_news_of_no_consequence_is_read_soon(self) -> None:
        """What nobody waits for wakes the processor a moment later, if nothing else does."""
        async with house() as home:
            parked = home.gate.park(request())
            await decided(parked)
            home.gate.leave(parked)
            home.gate.post(DrainBegan(0))

            await home.ended()
            assert home.outcomes == {Outcome.DISPATCHED: 1}

    async def test_every_turn_rings(self) -> None:
        """The next turn rings again: no request waits for another to wake the processor."""
        async with house() as home:
            for _ in range(100):
                parked = home.gate.park(request())
                await decided(parked)
                home.gate.leave(parked)

            assert home.outcomes == {Outcome.DISPATCHED: 100}

    async def test_a_departure_rings(self) -> None:
        """A slot given back wakes the processor for whoever waits for it."""
        async with house(config=ControllerConfig(detectors=(Concurrency(requests_max=1),))) as home:
            first, second = home.gate.park(request()), home.gate.park(request())
            await decided(first)
            assert second.decision is None
            home.gate.leave(first)

            assert (await decided(second)).outcome is Outcome.DISPATCHED


class TestEvictFlow:
    """An operator clears a queue."""

    async def test_two_at_once(self) -> None:
        """Each is told what was evicted while it asked, of its own flow."""
        async with house(has_pool=False) as home:
            parked = [home.gate.park(request()) for _ in range(5)]
            flow, other = FlowKey(0, "tenant"), FlowKey(0, "other")
            evicted = await asyncio.gather(
                *(home.gate.evict_flow(key) for key in (flow, other, flow))
            )

            assert evicted == [5, 0, 5]
            assert await home.gate.evict_flow(flow) == 0
            outcomes = {(await decided(each)).outcome for each in parked}
            assert outcomes == {Outcome.EVICTED_OPERATOR}


@final
class Stream:
    """Envoy's end of an ext_proc stream, in the place of grpc's ServicerContext."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[object] = asyncio.Queue()

    async def read(self) -> object:
        """Give the next thing Envoy says."""
        return await self.said.get()

    async def write(self, data: bytes) -> None:
        """Take an answer; nobody is there to have it."""


class CallDetails:
    """What grpc tells of a call before it is taken."""

    method = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    invocation_metadata = ()


class TestCancelledStream:
    """A stream is broken off after Envoy has closed its side, before the decision is here."""

    async def test_the_others_are_settled(self) -> None:
        """It takes no decision with it: its own is received, and all others of its batch."""
        async with house(starts=False) as home:
            door = ExtProcDoor(CallContext(gate=home.gate))
            method = door.handler().service(CallDetails())  # type: ignore[arg-type]  # all it reads
            assert method is not None
            process: Any = method.stream_stream
            stream = Stream()
            stream.said.put_nowait(b"\x12\x00")  # request headers, none
            handling = asyncio.ensure_future(process(None, stream))
            for _ in range(5):
                await asyncio.sleep(0)
            stream.said.put_nowait(grpc.aio.EOF)  # type: ignore[attr-defined]  # not in its stubs
            for _ in range(5):
                await asyncio.sleep(0)
            handling.cancel()
            await asyncio.wait([handling])
            other = home.gate.park(request())
            home.start()

            assert (await decided(other)).outcome is Outcome.DISPATCHED
            assert home.outcomes == {Outcome.EVICTED_CANCELLED: 1}


class TestPost:
    """Facts from elsewhere."""

    async def test_a_departure_of_nobody(self) -> None:
        """The departure of a request that is over changes nothing."""
        async with house() as home:
            home.gate.post(Left(12345))

            assert (await home.gate.snapshot()).in_flight == 0

    async def test_after_the_end(self) -> None:
        """A fact that nobody takes any more is let go."""
        async with house() as home:
            home.gate.post(DrainBegan(0))
            await home.ended()
            home.gate.post(POOL)

            assert home.faults == [None]

"""The bridge between the event loop and the processor thread.

Everything here runs on the loop's thread, except that `deliver` and `ended` are called by the
processor and hop over at once. Per turn of the loop the processor is woken once, however many
requests came; per batch of decisions the loop is woken once. While nobody waits there is nothing to
decide, and what is not an arrival wakes nobody: it is read before the next arrival, or a moment
later if none comes.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.events import Answered, Arrived, Decision, DrainBegan, Fact, FlowEvicted, Left
from flowcontrol.inbox import Inbox
from flowcontrol.processor import FlowProcessor, Recorder
from flowcontrol.question import Asked
from flowcontrol.request import DEFAULT_PRIORITY, FlowKey, Outcome, Request
from flowcontrol.snapshot import Snapshot
from server.classify import RequestFacts
from server.pool_view import PoolView
from server.recent import RecentDecisions, is_ours

Answer = TypeVar("Answer")
_STOPPED = "the processor has stopped"

NEWS_WITHIN_S: Final = 0.005
"""How long a fact that decides nothing may stay unread. To wake the processor for each departure,
too, would double its turns."""


@final
@dataclass(slots=True, eq=False)
class Parked:
    """A request at the gate, from its arrival to the end of its stream."""

    request_id: int
    facts: RequestFacts
    future: asyncio.Future[Decision]
    """Resolves exactly once, with the decision; never cancelled, never an exception."""
    decided_ns: int = 0
    left_ns: int | None = None
    recall: asyncio.Future[Decision] | None = None
    """Resolves with a second decision, if one comes: to end the request in flight. None where none
    can come."""
    trace: Mapping[str, str] | None = None
    """Headers that tell of the trace it belongs to; None while traces are off."""
    arrived_ns: int = 0


@final
@dataclass(slots=True, eq=False)
class _Eviction:
    """One caller's wish that a flow be evicted, and how many of it were since."""

    key: FlowKey
    count: int = 0


@final
class FlowGate:
    """Parks requests on futures and settles them with the processor's decisions.

    Args:
        config: for the flow controller it builds.
        arrivals_max: arrivals the processor may be behind before more are refused on the spot.
        request_ended: told of every request once, when it is both decided and gone.
        processor_ended: told once, with what went wrong or None after a drain.
        recorder: is shown every turn of the processor.
        recent_max: decisions kept to be asked about.
    """

    def __init__(  # noqa: PLR0913 - each is one wire of the shell
        self,
        config: ControllerConfig,
        arrivals_max: int,
        request_ended: Callable[[Parked, Decision], None],
        processor_ended: Callable[[BaseException | None], None],
        *,
        recorder: Recorder | None = None,
        recent_max: int = 1000,
    ) -> None:
        self.inbox_refusals = 0
        self.pool_view = PoolView()
        self.recent = RecentDecisions(recent_max)
        self._loop = asyncio.get_running_loop()
        self._request_ended = request_ended
        self._processor_ended = processor_ended
        self._inbox = Inbox(arrivals_max)
        self.made_ns = time.monotonic_ns()
        """When the engine was made."""
        self._processor = FlowProcessor(
            FlowController(config, self.made_ns),
            self._inbox,
            self._deliver,
            self._ended,
            recorder=recorder,
        )
        self._ids = itertools.count(1)
        self._parked: dict[int, Parked] = {}
        self._undecided = 0
        """Of them, those that wait for their decision."""
        self._is_bell_due = False
        self._is_news_due = False
        self._snapshot: asyncio.Future[Snapshot] | None = None
        self._questions: set[asyncio.Future[Any]] = set()
        """Asked and not answered yet."""
        self._evictions: set[_Eviction] = set()
        """Asked for and not answered yet."""
        self._closed_as: Outcome | None = None
        """How arrivals are answered once the processor has ended."""

    def start(self) -> None:
        """Start the processor."""
        self._processor.start()

    def fail(self, fault: Exception) -> None:
        """Settle all that is parked, as when the processor fails, and let the processor end.

        For a callback on the loop that failed: what it was doing is half done, perhaps of ours.
        """
        self._inbox.post(DrainBegan(0))
        self._inbox.ring()
        self._close(fault)

    def join(self, timeout_s: float) -> bool:
        """Wait for the processor thread, which has said it ended; whether it did."""
        return self._processor.join(timeout_s)

    def park(self, facts: RequestFacts) -> Parked:
        """Take in a request; its future resolves with the decision. `leave` must follow, once."""
        request_id = next(self._ids)
        now_ns = time.monotonic_ns()
        parked = Parked(request_id, facts, self._loop.create_future(), arrived_ns=now_ns)
        self._parked[request_id] = parked
        self._undecided += 1
        request = Request(
            request_id,
            facts.flow_id,
            facts.objective,
            facts.byte_size,
            facts.ttl_ns,
            input_tokens=facts.input_tokens,
            output_tokens_max=facts.output_tokens_max,
            ttft_slo_ns=facts.ttft_slo_ns,
            model=facts.model,
            subset=facts.subset,
        )
        if self._closed_as is not None:
            self._settle(self._own_decision(parked, self._closed_as))
            return parked
        try:
            is_taken = self._inbox.offer(Arrived(request))
        except NotRunningError:
            return parked  # that news is on its way, and settles it
        if is_taken:
            self._ring()
        else:
            self.inbox_refusals += 1
            self._settle(self._own_decision(parked, Outcome.REJECTED_CAPACITY))
        return parked

    def leave(self, parked: Parked) -> None:
        """Note that the request's stream has ended, whatever state the request is in."""
        assert parked.left_ns is None, "a request leaves once"
        parked.left_ns = time.monotonic_ns()
        if not parked.future.done():
            self._put(Left(parked.request_id))
            return
        decision = parked.future.result()
        if decision.outcome is Outcome.DISPATCHED:
            self._put(Left(parked.request_id))
        self._finish(parked, decision)

    def answered(self, parked: Parked) -> None:
        """Note that the first byte of the request's response has been seen."""
        self._put(Answered(parked.request_id))

    def post(self, fact: Fact) -> None:
        """Tell the engine anything but an arrival or a departure."""
        self.pool_view.notice(fact, time.monotonic_ns())
        self._put(fact)

    def priority_in_flight(self, request_id: int) -> int | None:
        """Return the priority of a request that is dispatched and not gone; None if it is not."""
        parked = self._parked.get(request_id)
        if parked is None or not parked.future.done():
            return None
        decision = parked.future.result()
        return decision.priority if decision.outcome is Outcome.DISPATCHED else None

    def live(self, request_id: int) -> Parked | None:
        """Return a request of ours that has not left, or whose decision has not come."""
        return self._parked.get(request_id)

    def find(self, request_id: str) -> Parked | None:
        """Return a live request: by our id, else by the client's, the latest; O(live) for that."""
        known = self._parked.get(int(request_id)) if is_ours(request_id) else None
        if known is not None:
            return known
        theirs = (p for p in self._parked.values() if p.facts.client_request_id == request_id)
        return max(theirs, key=lambda parked: parked.request_id, default=None)

    async def evict_flow(self, key: FlowKey) -> int:
        """Refuse everything of a flow that waits; return how many were, by whoever asked meanwhile.

        Raises:
            NotRunningError: the processor has ended.
        """
        eviction = _Eviction(key)
        self._evictions.add(eviction)
        self.post(FlowEvicted(key.priority, key.flow_id))
        try:
            await self.ask(_nothing)  # its answer comes behind the evictions
            return eviction.count
        finally:
            self._evictions.discard(eviction)

    async def ask(self, question: Callable[[FlowController, int], Answer]) -> Answer:
        """Return the processor's answer to a question: all posted before it has been decided.

        Raises:
            NotRunningError: the processor has ended.
        """
        if self._closed_as is not None:
            raise NotRunningError(_STOPPED)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._questions.add(future)

        def reply(answer: object) -> None:
            """Hop over to the loop."""
            self._loop.call_soon_threadsafe(self._answered, future, answer)

        self._inbox.post(Asked(question, reply))
        self._ring()
        return await future

    def _answered(self, future: asyncio.Future[Answer], answer: object) -> None:
        self._questions.discard(future)
        if future.done():
            return  # whoever asked is gone
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)  # type: ignore[arg-type]  # its question's answer

    async def snapshot(self) -> Snapshot:
        """Return the engine's state as of a moment after this call.

        Raises:
            NotRunningError: the processor has ended.
        """
        if self._closed_as is not None:
            raise NotRunningError(_STOPPED)
        if self._snapshot is None:
            self._snapshot = self._loop.create_future()
            self._processor.want_snapshot()
        return await asyncio.shield(self._snapshot)

    def _put(self, fact: Fact) -> None:
        self._inbox.post(fact)
        if self._undecided:
            self._ring()
        elif not self._is_news_due:
            self._is_news_due = True
            self._loop.call_later(NEWS_WITHIN_S, self._tell_news)

    def _tell_news(self) -> None:
        self._is_news_due = False
        self._inbox.ring()

    def _ring(self) -> None:
        if not self._is_bell_due:
            self._is_bell_due = True
            self._loop.call_soon(self._ring_now)

    def _ring_now(self) -> None:
        self._is_bell_due = False
        self._inbox.ring()

    def _deliver(self, decisions: list[Decision], snapshot: Snapshot | None) -> None:
        self._loop.call_soon_threadsafe(self._receive, decisions, snapshot)

    def _receive(self, decisions: list[Decision], snapshot: Snapshot | None) -> None:
        if self._closed_as is not None:
            return  # we have failed meanwhile, and decided ourselves
        if snapshot is not None and self._snapshot is not None:
            self._snapshot.set_result(snapshot)
            self._snapshot = None
        for decision in decisions:
            self._settle(decision)

    def _settle(self, decision: Decision) -> None:
        """Resolve a request's future: the one place where that is done."""
        if decision.outcome is Outcome.RECLAIMED:
            self._recall(decision)
            return
        parked = self._parked[decision.request_id]
        self._undecided -= 1
        parked.decided_ns = time.monotonic_ns()
        if decision.is_reclaimable:
            parked.recall = self._loop.create_future()
        parked.future.set_result(decision)
        self.recent.keep(parked.facts, decision, parked.decided_ns)
        if decision.outcome is Outcome.EVICTED_OPERATOR:
            key = FlowKey(decision.priority, decision.flow_id)
            for eviction in self._evictions:
                eviction.count += eviction.key == key
        if parked.left_ns is not None:
            self._finish(parked, decision)

    def _recall(self, decision: Decision) -> None:
        parked = self._parked.get(decision.request_id)
        if parked is not None:  # else it has ended meanwhile: what was wanted of it
            assert parked.recall is not None, "only what is reclaimable is reclaimed"
            parked.recall.set_result(decision)
            self.recent.keep(parked.facts, decision, time.monotonic_ns())

    def _finish(self, parked: Parked, decision: Decision) -> None:
        del self._parked[parked.request_id]
        if parked.recall is not None and parked.recall.done():
            decision = parked.recall.result()
        self._request_ended(parked, decision)

    def _ended(self, fault: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._close, fault)

    def _close(self, fault: BaseException | None) -> None:
        """Settle what the processor left behind: nothing after a drain, all after a fault."""
        if self._closed_as is not None:
            return
        self._closed_as = Outcome.REJECTED_DRAINING if fault is None else Outcome.INTERNAL
        now_ns = time.monotonic_ns()
        for parked in self._parked.values():
            if not parked.future.done():  # each by itself: one that fails keeps no other from it
                waited_ns = now_ns - parked.arrived_ns
                decision = self._own_decision(parked, self._closed_as, waited_ns)
                self._loop.call_soon(self._settle, decision)
        if self._snapshot is not None:
            self._snapshot.set_exception(NotRunningError(_STOPPED))
            self._snapshot = None
        for question in self._questions:
            if not question.done():
                question.set_exception(NotRunningError(_STOPPED))
        self._questions.clear()
        self._processor_ended(fault)

    def _own_decision(self, parked: Parked, outcome: Outcome, waited_ns: int = 0) -> Decision:
        """Decide in the engine's place, where the engine never saw the request or is no more."""
        retry_after_ns = 1_000_000_000 if outcome is not Outcome.INTERNAL else None
        return Decision(
            parked.request_id,
            outcome,
            DEFAULT_PRIORITY,
            parked.facts.flow_id,
            waited_ns=waited_ns,
            retry_after_ns=retry_after_ns,
        )


def trace_of(
    fields: tuple[str, ...], metadata: Mapping[str, str | bytes], headers: Mapping[str, str]
) -> dict[str, str]:
    """Return what tells of a request's trace.

    Args:
        fields: names of the headers that do.
        metadata: of the stream: Envoy's own span, where Envoy traces.
        headers: of the request: the client's span, where Envoy does not.
    """
    said = {name: text for name in fields if isinstance(text := metadata.get(name), str)}
    return said or {name: headers[name] for name in fields if name in headers}


def _nothing(_controller: FlowController, _now_ns: int) -> None:
    """Ask nothing."""

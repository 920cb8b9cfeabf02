"""The bridge between the event loop and the processor thread.

Everything here runs on the loop's thread. Only `_deliver` and `_ended` are called by the processor,
and pass their arguments to the loop at once. In one turn of the loop the processor is woken once,
however many requests came. For one batch of decisions the loop is woken once, and the owner of each
request is called in that same turn. While no request waits there is nothing to decide, so a fact
that is not an arrival wakes no thread: the processor reads it before the next arrival, or a moment
later if none comes.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar, final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.events import Answered, Arrived, Decision, DrainBegan, Fact, FlowEvicted, Left
from flowcontrol.inbox import Asked, Inbox
from flowcontrol.processor import FlowProcessor, Recorder
from flowcontrol.request import DEFAULT_FLOW_ID, DEFAULT_PRIORITY, FlowKey, Outcome, Request
from flowcontrol.views.snapshot import Snapshot
from flowcontrol_server.requests.arrival import ArrivalClock
from flowcontrol_server.requests.classify import (
    Origin,
    client_request_id_of,
    path_of,
    served_endpoint,
)
from flowcontrol_server.requests.dialects import dialect_of
from flowcontrol_server.requests.exchange import FurtherAttempt, Message, MessageKind, Mode
from flowcontrol_server.requests.log_join import Claim
from flowcontrol_server.requests.parked import Parked, claim_of
from flowcontrol_server.requests.pool_view import PoolView
from flowcontrol_server.requests.recent import RecentDecisions, own_id
from flowcontrol_server.requests.response_reader import ResponseReader
from flowcontrol_server.requests.splice import BodyPart
from flowcontrol_server.requests.tickets import TICKETS

Answer = TypeVar("Answer")
_STOPPED: Final = "the processor has stopped"

NEWS_WITHIN_S: Final = 0.005
"""Longest time that a fact stays unread while no request waits. Waking the processor for each
departure, too, would double its turns."""
SETTLED_AT_ONCE_MAX: Final = 256
"""Decisions settled in one turn of the loop. One turn of the processor may decide a queue of
thousands, and each decision costs the loop about 20 us until its answer is written."""
SUBSETS_MAX: Final = 256
"""Distinct subsets of endpoints among the waiting requests. The engine checks each at every
dispatch, which takes about 0.6 us. A request with one more is refused as if the queue were full."""
_ROOM_NS: Final = 1_000_000_000
"""Retry-After of a request that never reached the engine."""
_NO_HEADERS: Final[Mapping[str, str]] = {}
_DISPATCHED: Final = Outcome.DISPATCHED  # looked up once: each time takes some 200 instructions
_RECLAIMED: Final = Outcome.RECLAIMED
_BY_OPERATOR: Final = Outcome.EVICTED_OPERATOR
_CANCELLED: Final = Outcome.EVICTED_CANCELLED


@final
@dataclass(slots=True, eq=False)
class _Eviction:
    """A call that evicts a flow, and how many of its requests have been evicted since."""

    key: FlowKey
    count: int = 0


@final
class FlowGate:
    """Parks requests and settles them with the processor's decisions.

    Args:
        config: of the flow controller that it builds.
        arrivals_max: arrivals that the processor has not read yet, beyond which more are refused at
            once.
        request_ended: called once for every request, when it is decided and its stream has ended.
        processor_ended: called once, with the fault; None: after a drain.
        recorder: records every turn of the processor.
        recent_max: recent decisions kept for queries.
        dispatched: called at every dispatch, before the request is answered.
        may_decide: whether decisions count now; others are held until `resume`.
        unsent: called with each endpoint to which Envoy could not send a request.
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
        dispatched: Callable[[Parked, Decision], None] | None = None,
        may_decide: Callable[[], bool] = lambda: True,
        unsent: Callable[[str], None] = lambda _endpoint: None,
    ) -> None:
        self.inbox_refusals = 0
        self.pool_view = PoolView()
        self.recent = RecentDecisions(recent_max)
        self.arrivals = ArrivalClock()
        self._loop = asyncio.get_running_loop()
        self._request_ended = request_ended
        self._processor_ended = processor_ended
        self._dispatched = dispatched
        self._may_decide = may_decide
        self._unsent = unsent
        self._held: list[Decision] = []
        """Decisions for live requests that came while none counted; at most two for each."""
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
        self._unseen: dict[Parked, asyncio.TimerHandle] = {}
        """Dispatched requests whose stream has ended, with the timers that make them leave."""
        self._undecided = 0
        """Parked requests that wait for their decision."""
        self._subsets: dict[tuple[str, ...], int] = {}
        """Subsets of undecided requests, with the number of requests that have each."""
        self._delivered: deque[Decision | Callable[[], None]] = deque()
        """Decisions of the processor that are not settled yet, and actions to run after them."""
        self._is_bell_due = False
        self._is_news_due = False
        self._snapshot: asyncio.Future[Snapshot] | None = None
        self._next_snapshot: asyncio.Future[Snapshot] | None = None
        """For callers that ask while one is being taken."""
        self._questions: set[asyncio.Future[Any]] = set()
        """Questions without an answer yet."""
        self._evictions: set[_Eviction] = set()
        """Evictions of flows under way."""
        self._closed_as: Outcome | None = None
        """Outcome of arrivals once the processor has ended; None: it has not."""

    def start(self) -> None:
        """Start the processor."""
        self._processor.start()

    def fail(self, fault: Exception) -> None:
        """Settle all parked requests, as when the processor fails, and let the processor end.

        For a callback on the loop that failed: it may have left the gate in an invalid state.
        """
        self._inbox.post(DrainBegan(0))
        self._inbox.ring()
        self._close(fault)

    def join(self, timeout_s: float) -> bool:
        """Wait for the processor thread, which has reported its end; return whether it ended."""
        return self._processor.join(timeout_s)

    def park(
        self,
        request: Request,
        headers: Mapping[str, str] = _NO_HEADERS,
        began: str = "",
        origin: Origin | None = None,
        attempt: FurtherAttempt | None = None,
    ) -> Parked:
        """Take in a request, which may be decided at once. `leave` must follow, once.

        Args:
            request: as `classify` returned it; it gets its id here.
            headers: source of fields that the engine does not need.
            began: when Envoy first saw it, RFC 3339; empty: unknown.
            origin: origin of its objective and its flow; None: unknown.
            attempt: set if Envoy sends the request again: it waits as before, for a slot at the
                endpoint where Envoy would send it now.
        """
        now_ns = time.monotonic_ns()
        former = None if attempt is None else self._dispatched_as(attempt.ticket)
        request.arrived_ns = now_ns
        if began:
            request.arrived_ns -= self.arrivals.age_ns(began, time.time_ns(), now_ns)
        if former is not None:  # its control headers have been removed; `began` is the attempt's
            request = former.request
            origin = former.origin
            self._unsent_to(former)
        if attempt is not None:
            request = replace(request, subset=(attempt.endpoint,))
        request_id = request.request_id = next(self._ids)
        path = path_of(headers)
        parked = Parked(
            request,
            client_request_id_of(headers),
            path,
            dialect_of(path, headers.get("content-type", "")),
            now_ns if request.arrived_ns is None else request.arrived_ns,
            origin=origin,
            former=former,
        )
        self._parked[request_id] = parked
        self._undecided += 1
        refused_as = self._offer(request)
        if refused_as is not None:
            self._settle(self._own_decision(parked, refused_as))
        return parked

    def _offer(self, request: Request) -> Outcome | None:
        """Pass a request to the processor; return its outcome if it is refused here."""
        if self._closed_as is not None:
            return self._closed_as
        if request.subset is None or self._count_subset(request.subset):
            try:
                is_taken = self._inbox.offer(Arrived(request))
            except NotRunningError:
                return None  # the processor's end is on its way, and settles it
            if is_taken:
                self._ring()
                return None
        self.inbox_refusals += 1
        return Outcome.REJECTED_CAPACITY

    def _dispatched_as(self, ticket: str) -> Parked | None:
        """Return the request of a ticket, if it is in flight."""
        request_id = TICKETS.read(ticket)
        parked = self._parked.get(request_id) if isinstance(request_id, int) else None
        return None if parked is None or self.claim_in_flight(parked.request_id) is None else parked

    def _unsent_to(self, parked: Parked) -> None:
        """Report the endpoint of a request that was not sent, once for all further attempts."""
        is_known, parked.is_followed = parked.is_followed, True
        if not is_known and parked.decision is not None and parked.decision.endpoint is not None:
            self._unsent(parked.decision.endpoint)

    def leave(self, parked: Parked, outcome: Outcome = Outcome.EVICTED_CANCELLED) -> None:
        """Note that the request's stream has ended, in any state of the request.

        Args:
            parked: the request.
            outcome: its outcome if it still waits.
        """
        assert parked.left_ns is None, "a request leaves once"
        parked.left_ns = time.monotonic_ns()
        decision = parked.decision
        if decision is None:
            former = parked.former
            if former is not None and former.left_ns is None and outcome is _CANCELLED:
                outcome = Outcome.EVICTED_MOVED  # its client stays, and the next attempt follows
            self._put(Left(parked.request_id, outcome))
            return
        if decision.outcome is _DISPATCHED:
            self._put(Left(parked.request_id))
        self._finish(parked, decision)

    def leave_later(self, parked: Parked, after_ns: int) -> None:
        """Make a dispatched request leave later: its response is unseen, and may go on."""
        self._unseen[parked] = self._loop.call_later(after_ns / 1e9, self._leave_unseen, parked)

    def release_unseen(self) -> None:
        """Make all requests of `leave_later` leave now."""
        for parked in list(self._unseen):
            self._leave_unseen(parked)

    def _leave_unseen(self, parked: Parked) -> None:
        self._unseen.pop(parked).cancel()
        self.leave(parked)

    @staticmethod
    def refused(parked: Parked | None) -> Decision:
        """Return the decision about a request whose body has no room here.

        Args:
            parked: the request; None: it was not parked yet.
        """
        return Decision(
            0 if parked is None else parked.request_id,
            Outcome.REJECTED_CAPACITY,
            DEFAULT_PRIORITY,
            DEFAULT_FLOW_ID if parked is None else parked.request.flow_id,
            waited_ns=0 if parked is None else time.monotonic_ns() - parked.arrived_ns,
            retry_after_ns=_ROOM_NS,
        )

    def responded(self, parked: Parked, message: Message | BodyPart, mode: Mode) -> None:
        """Note a message, if it belongs to the response.

        Args:
            parked: the request, dispatched.
            message: any message of its conversation.
            mode: of its conversation; in ANSWERS the access log reports on the response.
        """
        if isinstance(message, BodyPart):
            if parked.response is not None and not message.is_request:
                parked.response.take(message.body, time.monotonic_ns(), is_end=message.is_end)
        elif message.kind is MessageKind.RESPONSE_HEADERS:
            served = served_endpoint(message.metadata)
            self._put(Answered(parked.request_id, served))
            if mode is not Mode.ANSWERS:
                parked.response = ResponseReader(message.headers, served)
                if message.is_end:
                    parked.response.end(time.monotonic_ns())
        elif message.kind is MessageKind.RESPONSE_TRAILERS and parked.response is not None:
            parked.response.end(time.monotonic_ns())

    def post(self, fact: Fact) -> None:
        """Pass the engine a fact other than an arrival or a departure."""
        self.pool_view.notice(fact, time.monotonic_ns())
        self._put(fact)

    def claim_in_flight(self, request_id: int) -> Claim | None:
        """Return the bounds of the settlement of a request in flight; None: it is not."""
        parked = self._parked.get(request_id)
        if parked is None or parked.decision is None:
            return None
        decision = parked.decision
        return claim_of(parked, decision) if decision.outcome is _DISPATCHED else None

    def live(self, request_id: int) -> Parked | None:
        """Return a request that has not left, or whose decision has not come; None: no such one."""
        return self._parked.get(request_id)

    def find(self, request_id: str) -> Parked | None:
        """Return a live request by our id, else the latest with this client's id, in O(live)."""
        own = own_id(request_id)
        known = None if own is None else self._parked.get(own)
        if known is not None or not request_id:  # many requests have no client's id
            return known
        theirs = (p for p in self._parked.values() if p.client_request_id == request_id)
        return max(theirs, key=lambda parked: parked.request_id, default=None)

    async def evict_flow(self, key: FlowKey) -> int:
        """Evict all waiting requests of a flow; return how many, by this call and others meanwhile.

        Raises:
            NotRunningError: the processor has ended.
        """
        eviction = _Eviction(key)
        self._evictions.add(eviction)
        self.post(FlowEvicted(key.priority, key.flow_id))
        try:
            await self.ask(_nothing)  # its answer comes after the evictions
            return eviction.count
        finally:
            self._evictions.discard(eviction)

    async def ask(self, question: Callable[[FlowController, int], Answer]) -> Answer:
        """Return the processor's answer to a question, after all facts posted before it.

        Raises:
            NotRunningError: the processor has ended.
        """
        if self._closed_as is not None:
            raise NotRunningError(_STOPPED)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._questions.add(future)

        def reply(answer: object) -> None:
            """Pass the answer to the loop."""
            self._loop.call_soon_threadsafe(self._in_turn, partial(self._answered, future, answer))

        self._inbox.post(Asked(question, reply))
        self._ring()
        return await future

    def _answered(self, future: asyncio.Future[Answer], answer: object) -> None:
        self._questions.discard(future)
        if future.done():
            return  # the caller is gone
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
        if self._next_snapshot is None:  # the one asked for may have been taken by now
            self._next_snapshot = self._loop.create_future()
        return await asyncio.shield(self._next_snapshot)

    def _put(self, fact: Fact) -> None:
        self._inbox.post(fact)
        if self._undecided:
            self._ring()
        elif not self._is_news_due:
            self._is_news_due = True
            self._loop.call_later(NEWS_WITHIN_S, self._ring_news)

    def _ring_news(self) -> None:
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
            return  # the gate has failed meanwhile, and settled every request itself
        is_idle = not self._delivered
        self._delivered.extend(decisions)
        if snapshot is not None:
            self._delivered.append(partial(self._publish, snapshot))
        if is_idle:
            self._settle_some()

    def _settle_some(self) -> None:
        """Settle a part of what the processor has delivered, and the rest in later turns."""
        delivered = self._delivered
        is_held = bool(self._held) or not self._may_decide()
        for _ in range(min(len(delivered), SETTLED_AT_ONCE_MAX)):
            each = delivered.popleft()
            if not isinstance(each, Decision):
                each()
            elif is_held and not self._has_left(each):
                self._held.append(each)
            else:
                self._settle(each)
        if delivered:
            self._loop.call_soon(self._settle_some)

    def _has_left(self, decision: Decision) -> bool:
        """Whether a decision has no recipient any more, so that it may be settled at once.

        Except a reclaim: it follows a dispatch, which may be held.
        """
        is_left = self._parked[decision.request_id].left_ns is not None
        return is_left and decision.outcome is not _RECLAIMED

    def _in_turn(self, action: Callable[[], None]) -> None:
        """Run an action after everything that the processor delivered before it."""
        if self._delivered:
            self._delivered.append(action)
        else:
            action()

    def _publish(self, snapshot: Snapshot) -> None:
        if self._snapshot is not None:
            self._snapshot.set_result(snapshot)
            self._snapshot, self._next_snapshot = self._next_snapshot, None
            if self._snapshot is not None:
                self._processor.want_snapshot()

    def resume(self) -> None:
        """Settle the decisions that are held: they count again, or their requests have left."""
        held, self._held = self._held, []
        for decision in held:
            self._settle(decision)

    def _settle(self, decision: Decision) -> None:
        """Set a request's decision and call its owner; nothing else does."""
        if decision.outcome is _RECLAIMED:
            self._recall(decision)
            return
        parked = self._parked[decision.request_id]
        self._undecided -= 1
        parked.decided_ns = time.monotonic_ns()
        if decision.is_reclaimable:
            parked.recall = self._loop.create_future()
        if decision.outcome is _DISPATCHED:
            if self._dispatched is not None:
                self._dispatched(parked, decision)
            former, parked.former = parked.former, None
            if former is not None and former.left_ns is None:
                former.is_unsent = True
                self.leave(former)
        parked.decision = decision
        self._keep(parked, decision, parked.decided_ns)
        if parked.request.subset is not None:
            self._uncount_subset(parked.request.subset)
        if decision.outcome is _BY_OPERATOR:
            key = FlowKey(decision.priority, decision.flow_id)
            for eviction in self._evictions:
                eviction.count += eviction.key == key
        if parked.left_ns is not None:
            self._finish(parked, decision)
        self._call_owner(parked, decision)

    def _call_owner(self, parked: Parked, decision: Decision) -> None:
        decided, parked.decided = parked.decided, None
        if decided is not None:
            try:
                decided(decision)
            except Exception as fault:  # noqa: BLE001 - fails by itself; the others get their decisions
                self._loop.call_soon(_raise, fault)

    def _recall(self, decision: Decision) -> None:
        parked = self._parked.get(decision.request_id)
        if parked is not None:  # else it has ended by itself meanwhile
            assert parked.recall is not None, "only a reclaimable request is reclaimed"
            parked.recall.set_result(decision)
            self._keep(parked, decision, time.monotonic_ns())

    def _keep(self, parked: Parked, decision: Decision, now_ns: int) -> None:
        request, client_id = parked.request, parked.client_request_id
        self.recent.keep(request, client_id, decision, now_ns, parked.origin)

    def _finish(self, parked: Parked, decision: Decision) -> None:
        del self._parked[parked.request_id]
        if parked.recall is not None and parked.recall.done():
            decision = parked.recall.result()
        self._request_ended(parked, decision)

    def _count_subset(self, subset: tuple[str, ...]) -> bool:
        """Count a waiting request with this subset; return False if there are too many others."""
        count = self._subsets.get(subset, 0)
        if not count and len(self._subsets) >= SUBSETS_MAX:
            return False
        self._subsets[subset] = count + 1
        return True

    def _uncount_subset(self, subset: tuple[str, ...]) -> None:
        count = self._subsets.get(subset)  # None: refused as one too many
        if count == 1:
            del self._subsets[subset]
        elif count is not None:
            self._subsets[subset] = count - 1

    def _ended(self, fault: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._in_turn, partial(self._close, fault))

    def _close(self, fault: BaseException | None) -> None:
        """Settle all requests that the processor left undecided: none after a drain."""
        if self._closed_as is not None:
            return
        self._closed_as = Outcome.REJECTED_DRAINING if fault is None else Outcome.INTERNAL
        held, self._held = self._held, []
        for decision in held:  # one callback each, so that a failing one stops no other
            self._loop.call_soon(self._settle, decision)
        decided = {decision.request_id for decision in held}
        self._delivered.clear()  # not empty only after a fault of the loop
        now_ns = time.monotonic_ns()
        for parked in self._parked.values():
            if parked.decision is None and parked.request_id not in decided:
                waited_ns = now_ns - parked.arrived_ns
                decision = self._own_decision(parked, self._closed_as, waited_ns)
                self._loop.call_soon(self._settle, decision)
        for asked in (self._snapshot, self._next_snapshot):
            if asked is not None:
                asked.set_exception(NotRunningError(_STOPPED))
        self._snapshot = self._next_snapshot = None
        for question in self._questions:
            if not question.done():
                question.set_exception(NotRunningError(_STOPPED))
        self._questions.clear()
        self._processor_ended(fault)

    def _own_decision(self, parked: Parked, outcome: Outcome, waited_ns: int = 0) -> Decision:
        """Decide in place of the engine, which never got the request or has ended."""
        retry_after_ns = _ROOM_NS if outcome is not Outcome.INTERNAL else None
        return Decision(
            parked.request_id,
            outcome,
            DEFAULT_PRIORITY,
            parked.request.flow_id,
            waited_ns=waited_ns,
            retry_after_ns=retry_after_ns,
        )


def _raise(fault: Exception) -> None:
    """Fail as a callback on the loop does."""
    raise fault


def _nothing(_controller: FlowController, _now_ns: int) -> None:
    """Ask nothing."""

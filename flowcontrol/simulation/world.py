"""Pure. The world around the engine: clients, gateway and model servers on one virtual clock.

    clients ──▶ Arrived ──▶ engine ──▶ decisions ──▶ model servers ──▶ tokens ──▶ clients
       └── leave ────▶ Left ──▶  ▲                        │
                                 └── Left, Settled, LoadObserved ◀──┘

A turn is like the processor's: the facts of one moment reach the engine in one batch, then it is
polled once, and then it is left alone until the next event or its wake-up time. Every run is
checked for safety (`safety`), and ends when all calls are over; a run in which a call never ends
fails.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from random import Random
from typing import final

from flowcontrol.events import Answered, Arrived, Decision, Fact, Left, ObjectivesChanged, Settled
from flowcontrol.request import DEFAULT_PRIORITY, Outcome, Request
from flowcontrol.simulation.clients import Attempt, ClientCall, Clients
from flowcontrol.simulation.clock import VirtualClock
from flowcontrol.simulation.environment import Environment
from flowcontrol.simulation.faults import Conditions
from flowcontrol.simulation.gates import Decider
from flowcontrol.simulation.model_server import TokenEvent
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerPool, SimulatedServer
from flowcontrol.simulation.results import Results, Sample, ServerFigures
from flowcontrol.simulation.safety import LivenessError, SafetyAccounts, SafetyError, Slots
from flowcontrol.simulation.workload import BYTES_PER_TOKEN

_HOUR_NS = 3_600_000_000_000
CONNECT_TIMEOUT_NS = 5_000_000_000
"""How long Envoy tries to connect to a server that is gone: its default `connect_timeout`."""
_SAMPLES = 400
"""Samples over the time of arrivals: as many as a picture can show."""


@final
class World:
    """One run. Owner: its caller; the same arguments make the same run.

    Args:
        engine: decides; new, without any facts.
        plan: what happens.
        seed: of all random numbers.
        slots: how many requests may be in flight, if the engine counts them.
        is_checked: let the engine check its own accounts each turn, at O(requests) a turn.
    """

    def __init__(
        self,
        engine: Decider,
        plan: Plan,
        seed: int,
        *,
        slots: Slots | None = None,
        is_checked: bool = False,
    ) -> None:
        self.results = Results(plan.duration_ns)
        self._engine = engine
        self._plan = plan
        self._is_checked = is_checked
        self._ledger = SafetyAccounts(slots)
        self._clock = VirtualClock()
        self._conditions = Conditions(plan.faults)
        chance = Random(f"{seed}/balancer")  # noqa: S311 - Envoy's choice, no secret
        self._pool = ServerPool(plan.servers, self._clock, plan.balancer, chance, self._generated)
        self._clients = {
            workload.name: Clients(workload, self._clock, self, seed, plan.duration_ns)
            for workload in plan.workloads
        }
        self._attempts: dict[int, Attempt] = {}
        """Attempts that wait for a decision, or are at a model server."""
        self._facts: list[Fact] = []
        self._request_count = 0
        self._open_call_count = 0
        self._in_flight = 0
        """Attempts at model servers."""
        self._priorities: Mapping[str, int] = plan.objectives
        self._wakeup_ns: int | None = None
        self._moved_ns = 0
        """Time of the last decision or departure."""
        self._delivered_ns = 0
        """When the latest decisions take effect."""
        self._stalled_until_ns = 0
        self._clock_ahead_ns = 0
        """How far the engine's clock is ahead of the world's."""
        self._stage = Environment(plan, self._clock, self._pool, self._conditions, self)
        self._stage.start()
        for clients in self._clients.values():
            clients.start()
        self._sample()

    # Running

    @property
    def now_ns(self) -> int:
        """The present."""
        return self._clock.now_ns

    def run_until(self, until_ns: int) -> None:
        """Run up to and including a time.

        Raises:
            SafetyError: the engine did what it must never do.
        """
        while (next_ns := self._next_ns()) is not None and next_ns <= until_ns:
            self._turn(next_ns)
        self._clock.advance(max(until_ns, self._clock.now_ns))

    def finish(self, patience_ns: int = _HOUR_NS) -> Results:
        """Run on until all calls are over, and return the results.

        Args:
            patience_ns: longest time, after the end of arrivals and faults, without a decision or
                departure while there is a request to decide or serve.

        Raises:
            SafetyError: the engine did what it must never do.
            LivenessError: nothing moved for so long, or nothing ever will.
        """
        self.run_until(self._plan.duration_ns)
        while self._open_call_count or self._facts:
            next_ns = self._next_ns()
            limit_ns = max(self._moved_ns, self._plan.quiet_ns) + patience_ns
            if next_ns is None or next_ns > limit_ns:
                message = f"still open when nothing more happens: {self._ledger.open_ids()}"
                raise LivenessError(message)
            self._turn(next_ns)
        self._ledger.check_over()
        self.results.ended_ns = self._clock.now_ns
        self.results.servers = tuple(self._server_figures())
        return self.results

    def _next_ns(self) -> int | None:
        """Return the time of the next turn; None: there is none."""
        next_ns = self._clock.next_ns
        if self._wakeup_ns is None and not self._facts:
            return next_ns
        turn_ns = max(self._clock.now_ns, self._stalled_until_ns)
        if self._wakeup_ns is not None and not self._facts:
            turn_ns = max(turn_ns, self._wakeup_ns - self._clock_ahead_ns)
        return turn_ns if next_ns is None or turn_ns < next_ns else next_ns

    def _turn(self, now_ns: int) -> None:
        self._clock.advance(now_ns)
        engine_ns = now_ns + self._clock_ahead_ns
        is_due = self._wakeup_ns is not None and self._wakeup_ns <= engine_ns
        if now_ns < self._stalled_until_ns or not (self._facts or is_due):
            return
        engine, ledger = self._engine, self._ledger
        facts, self._facts = self._facts, []
        for fact in facts:
            ledger.handle(fact, engine_ns)
            engine.handle(fact, engine_ns)
        decisions = engine.poll(engine_ns)
        for decision in decisions:
            ledger.decided(decision, engine_ns)
        ledger.turn_ended()
        if self._is_checked:
            engine.check_invariants()
        self._wakeup_ns = engine.next_wakeup_ns()
        if self._wakeup_ns is not None and self._wakeup_ns <= engine_ns:
            message = f"polled at {engine_ns}, and asks to be polled at {self._wakeup_ns}"
            raise SafetyError(message)
        if decisions:
            self._moved_ns = now_ns
            slow_ns = now_ns + self._conditions.decision_delay_ns(now_ns)
            self._delivered_ns = max(self._delivered_ns, slow_ns)  # none overtakes another
        delay_ns = self._delivered_ns - now_ns
        attempts = [self._attempts[each.request_id] for each in decisions]
        for decision, attempt in zip(decisions, attempts, strict=True):
            self.results.decided(decision, attempt, now_ns)
            if decision.outcome is Outcome.EVICTED_CANCELLED:
                del self._attempts[decision.request_id]
            elif delay_ns:
                self._clock.after(delay_ns, partial(self._deliver, attempt, decision))
            else:
                self._deliver(attempt, decision)
        self.results.waiting_most = max(self.results.waiting_most, ledger.undecided_count)

    # What clients do

    def begun(self, call: ClientCall) -> None:
        """Take in that a call has begun."""
        self._open_call_count += 1
        objective = call.workload.objective
        if objective is not None:
            call.priority = self._priorities.get(objective, DEFAULT_PRIORITY)
        self.results.begun(call)

    def ended(self, call: ClientCall) -> None:
        """Take in that a call has ended."""
        self._open_call_count -= 1
        self.results.ended(call)

    def send(self, call: ClientCall) -> None:
        """Begin an attempt."""
        workload = call.workload
        self._request_count += 1
        attempt = Attempt(self._request_count, call, self._clock.now_ns)
        self._attempts[attempt.request_id] = call.attempt = attempt
        request = Request(
            attempt.request_id,
            call.tenant,
            workload.objective,
            call.prompt_tokens * BYTES_PER_TOKEN,
            workload.ttl_ns,
            input_tokens=call.prompt_tokens if workload.announces_prompt else None,
            output_tokens_max=workload.output_tokens_max,
            ttft_slo_ns=workload.ttft_slo_ns if workload.announces_slo else None,
            model=workload.model,
            subset=workload.subset,
            prefix=call.prefix,
        )
        self._facts.append(Arrived(request))

    def cancel(self, call: ClientCall) -> None:
        """End the stream of the attempt under way."""
        attempt = call.attempt
        assert attempt is not None
        if self._abort(attempt):
            self._close(attempt)

    # Events of the environment

    @property
    def is_busy(self) -> bool:
        """Whether a client still waits for something."""
        return self._open_call_count > 0

    def post(self, fact: Fact) -> None:
        """Pass a fact to the engine."""
        if isinstance(fact, ObjectivesChanged):
            self._priorities = fact.priorities
        self._facts.append(fact)

    def lost(self, request_id: int) -> None:
        """Take in that the server of a request has crashed."""
        self._fail(self._attempts[request_id])

    def stall(self, until_ns: int) -> None:
        """Give the engine no turn until then."""
        self._stalled_until_ns = max(self._stalled_until_ns, until_ns)

    def jump(self, by_ns: int) -> None:
        """Put the engine's clock forward."""
        self._clock_ahead_ns += by_ns

    # Attempts

    def _deliver(self, attempt: Attempt, decision: Decision) -> None:
        """Let a decision take effect, unless the client has left in the meantime."""
        call = attempt.call
        if call.attempt is not attempt:
            self._attempts.pop(attempt.request_id, None)
            return
        if decision.outcome is Outcome.DISPATCHED:
            self._send(attempt, decision.endpoint)
            return
        if decision.outcome is Outcome.RECLAIMED:  # wherever it is, even on its way to a server
            if not self._abort(attempt):
                return
            self._close(attempt)
        else:
            call.attempt = None
            del self._attempts[attempt.request_id]
        self._clients[call.workload.name].refused(call, decision)

    def _send(self, attempt: Attempt, address: str | None) -> None:
        call = attempt.call
        attempt.dispatched_ns = self._clock.now_ns
        server = self._pool.route(address)
        if server is None:
            self._fail(attempt)  # Envoy answers 503
            return
        prefiller = self._pool.prefiller_for(server)
        if prefiller is None:
            self._submit(attempt, server, call.output_tokens)
        else:
            attempt.decoder = server.spec.address
            self._submit(attempt, prefiller, 1)

    def _hand_over(self, attempt: Attempt) -> None:
        """Send a prefilled request on to the server that decodes it."""
        assert attempt.decoder is not None
        server, attempt.decoder, attempt.address = self._pool.servers[attempt.decoder], None, None
        self._in_flight -= 1
        self._submit(attempt, server, attempt.call.output_tokens, is_prefilled=True)

    def _submit(
        self,
        attempt: Attempt,
        server: SimulatedServer,
        output_tokens: int,
        *,
        is_prefilled: bool = False,
    ) -> None:
        request_id, prompt_tokens = attempt.request_id, attempt.call.prompt_tokens
        if not server.is_up:
            self._clock.after(CONNECT_TIMEOUT_NS, partial(self._fail, attempt))
        elif not server.submit(
            *(request_id, prompt_tokens, output_tokens),
            prefix=attempt.call.prefix,
            is_prefilled=is_prefilled,
            priority=attempt.call.priority if self._plan.has_engine_priority else 0,
        ):
            self._fail(attempt)  # it answers 400
        else:
            attempt.address = server.spec.address
            self._in_flight += 1
            self.results.in_flight_most = max(self.results.in_flight_most, self._in_flight)

    def _abort(self, attempt: Attempt) -> bool:
        """Remove an attempt from its server; return False if its last token comes just now."""
        left = None
        while (address := attempt.address) not in (None, left):  # it may move on just now
            self._pool.servers[address].abort(attempt.request_id)
            left = address
        return attempt.call.attempt is attempt

    def _fail(self, attempt: Attempt) -> None:
        """End an attempt that gets no answer, unless the client has left."""
        call = attempt.call
        if call.attempt is attempt:
            self._close(attempt, is_success=False)
            self._clients[call.workload.name].failed(call)

    def _generated(self, event: TokenEvent) -> None:
        """Take in a first or last token."""
        attempt = self._attempts[event.job_id]
        call = attempt.call
        if attempt.decoder is not None:
            self._hand_over(attempt)
            return
        if event.token_index == 0:
            attempt.first_token_ns = call.first_token_ns = event.at_ns
            if call.priority < 0:  # Envoy reports it for sheddable requests only
                self._facts.append(Answered(attempt.request_id))
        if event.is_last:
            self._close(attempt, is_whole=True)
            self._clients[call.workload.name].answered(call)

    def _close(self, attempt: Attempt, *, is_success: bool = True, is_whole: bool = False) -> None:
        """End the stream of an attempt; settle it, if it was dispatched."""
        self._moved_ns = now_ns = self._clock.now_ns
        attempt.call.attempt = None
        self._facts.append(Left(attempt.request_id))
        if attempt.dispatched_ns is None:
            return
        del self._attempts[attempt.request_id]
        self._in_flight -= attempt.address is not None
        usual_ns = self._plan.settlement_delay_ns
        if usual_ns is None:
            return
        delay_ns = self._conditions.settlement_delay_ns(usual_ns, now_ns)
        if delay_ns is None:
            return
        settled = Settled(attempt.request_id, is_success=is_success)
        if attempt.first_token_ns is not None:
            settled.ttft_ns = attempt.first_token_ns - attempt.dispatched_ns
            settled.generation_ns = now_ns - attempt.first_token_ns
        if is_whole:
            settled.input_tokens = attempt.call.prompt_tokens
            settled.output_tokens = attempt.call.output_tokens
        self._clock.after(delay_ns, partial(self.post, settled))

    # Results

    def _sample(self) -> None:
        now_ns = self._clock.now_ns
        waiting = self._ledger.undecided_count
        self.results.sampled(Sample(now_ns, waiting, self._in_flight))
        next_ns = now_ns + max(1, self._plan.duration_ns // _SAMPLES)
        if next_ns <= self._plan.duration_ns:
            self._clock.at(next_ns, self._sample)

    def _server_figures(self) -> Iterator[ServerFigures]:
        for server in self._pool.servers.values():
            server.load()
            up_ns = max(1, server.up_ns)
            yield ServerFigures(
                server.spec.address,
                server.busy_ns / up_ns,
                server.running_ns / up_ns,
                server.tokens_generated,
                server.in_flight_most,
                server.waiting_most,
                server.cached_share,
            )

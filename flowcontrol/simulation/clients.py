"""Pure. The clients of one workload: they send requests, wait, leave and retry.

A call is what a person wants answered. It makes one or more attempts, each of which is a request to
the gateway with its own id. Times of a call count from its first attempt, as the person's wait
does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from random import Random
from typing import Protocol, assert_never, final

from flowcontrol.events import Decision
from flowcontrol.retry import retry_after_s
from flowcontrol.simulation.clock import VirtualClock
from flowcontrol.simulation.distributions import WeightedNames
from flowcontrol.simulation.traces import TraceRow
from flowcontrol.simulation.workload import AtOnce, ClosedLoop, Poisson, Replayed, Workload

_SECOND_NS = 1_000_000_000
_BACKOFF_DOUBLINGS_MAX = 20
_ROUND_TRIP_NS = 1_000_000
"""Least time before a user's next call. After a failure it is at least the first backoff: otherwise
a user who is refused at once would never let time pass."""


class Ending(Enum):
    """How a call ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Refused by the gateway, without a retry."""
    GAVE_UP = "gave-up"
    """The client left before the first token."""
    FAILED = "failed"
    """Failed by the model server, or by Envoy for lack of one."""


@final
@dataclass(slots=True, eq=False)
class ClientCall:
    """One call of a client."""

    workload: Workload
    tenant: str
    prompt_tokens: int
    output_tokens: int
    patience_ns: int | None
    asked_ns: int
    user: int | None = None
    """Number of the user of a closed loop; None: an open loop."""
    prefix: tuple[int, ...] = ()
    """Ids of the first blocks of the prompt."""
    priority: int = 0
    """Priority of its objective at the first attempt."""
    attempt_count: int = 0
    attempt: "Attempt | None" = None
    """The attempt under way."""
    first_token_ns: int | None = None
    ended_ns: int | None = None
    ending: Ending | None = None


@final
@dataclass(slots=True, eq=False)
class Attempt:
    """One request to the gateway, from its arrival to the end of its stream."""

    request_id: int
    call: ClientCall
    arrived_ns: int
    dispatched_ns: int | None = None
    """When the gateway dispatched it."""
    address: str | None = None
    """The model server that has it."""
    decoder: str | None = None
    """The model server that decodes it, while another prefills it."""
    first_token_ns: int | None = None


class Door(Protocol):
    """The world as clients use it."""

    def send(self, call: ClientCall) -> None:
        """Begin an attempt."""

    def cancel(self, call: ClientCall) -> None:
        """End the stream of the attempt under way."""

    def begun(self, call: ClientCall) -> None:
        """Take in that a call has begun."""

    def ended(self, call: ClientCall) -> None:
        """Take in that a call has ended."""


@final
class Clients:
    """All clients of one workload.

    Args:
        workload: their requests.
        clock: schedules what they do.
        door: takes their requests.
        seed: the same seed makes the same calls at the same times, whatever their outcomes; only
            retries and users of a closed loop depend on the answers.
        end_ns: no call begins at or after this time.
    """

    def __init__(
        self, workload: Workload, clock: VirtualClock, door: Door, seed: int, end_ns: int
    ) -> None:
        self._workload = workload
        self._clock = clock
        self._door = door
        until_ns = workload.until_ns
        self._until_ns = end_ns if until_ns is None else min(end_ns, until_ns)
        self._shares = WeightedNames(workload.tenants)
        self._chance = self._stream(seed, "asks")
        self._retry_chance = self._stream(seed, "retries")
        self._user_chances: list[Random] = []
        self._seed = seed
        self._due: Iterator[TraceRow] = iter(())

    def _stream(self, seed: int, use: str) -> Random:
        # Text is hashed by SHA-512 there, not by the hash that differs from process to process.
        return Random(f"{seed}/{self._workload.name}/{use}")  # noqa: S311 - traffic, no secret

    def start(self) -> None:
        """Plan the first calls."""
        arrivals = self._workload.arrivals
        if isinstance(arrivals, ClosedLoop):
            for user in range(arrivals.users):
                self._user_chances.append(self._stream(self._seed, f"user-{user}"))
                begin_ns = self._workload.from_ns + user * arrivals.ramp_ns // arrivals.users
                self._plan_user(user, begin_ns)
        else:
            self._due = self._open_loop(arrivals)
            self._plan_next()

    def refused(self, call: ClientCall, decision: Decision) -> None:
        """End a refused call, or schedule a retry."""
        retry_s = retry_after_s(decision.retry_after_ns, self._retry_chance.random())
        retry = self._workload.retry
        if call.attempt_count >= retry.attempts_max:
            self._end(call, Ending.REFUSED)
        elif retry.honours_retry_after and retry_s is not None:
            self._clock.after(retry_s * _SECOND_NS, partial(self._send, call))
        else:
            self._back_off(call)

    def failed(self, call: ClientCall) -> None:
        """End a call whose server failed, or schedule a retry."""
        if call.attempt_count >= self._workload.retry.attempts_max:
            self._end(call, Ending.FAILED)
        else:
            self._back_off(call)

    def answered(self, call: ClientCall) -> None:
        """End a call that was answered."""
        self._end(call, Ending.ANSWERED)

    def _open_loop(self, arrivals: Poisson | AtOnce | Replayed) -> Iterator[TraceRow]:
        from_ns = self._workload.from_ns
        match arrivals:
            case Poisson():
                for at_ns in arrivals.times(from_ns, self._until_ns, self._chance):
                    yield TraceRow(at_ns, *self._workload.lengths.draw(self._chance))
            case AtOnce(count):
                for _ in range(count):
                    yield TraceRow(from_ns, *self._workload.lengths.draw(self._chance))
            case Replayed(rows):
                for row in rows:
                    yield row._replace(at_ns=row.at_ns + from_ns)
            case _:
                assert_never(arrivals)

    def _plan_next(self) -> None:
        row = next(self._due, None)
        if row is not None and row.at_ns < self._until_ns:
            self._clock.at(row.at_ns, partial(self._arrive, row))

    def _arrive(self, row: TraceRow) -> None:
        self._plan_next()
        tenant = self._shares.draw(self._chance)
        self._begin(row, tenant, self._chance)

    def _plan_user(self, user: int, at_ns: int) -> None:
        if at_ns < self._until_ns:
            self._clock.at(at_ns, partial(self._call_as, user))

    def _call_as(self, user: int) -> None:
        chance = self._user_chances[user]
        row = TraceRow(self._clock.now_ns, *self._workload.lengths.draw(chance))
        names = self._shares.names
        self._begin(row, names[user % len(names)], chance, user)

    def _begin(self, row: TraceRow, tenant: str, chance: Random, user: int | None = None) -> None:
        workload = self._workload
        patience_ns = None if workload.patience is None else workload.patience.draw(chance)
        output_tokens = row.output_tokens
        if workload.output_tokens_max is not None:
            output_tokens = min(output_tokens, workload.output_tokens_max)
        call = ClientCall(
            *(workload, tenant, row.input_tokens, output_tokens, patience_ns, self._clock.now_ns),
            user=user,
            prefix=row.prefix,
        )
        self._door.begun(call)
        self._send(call)

    def _send(self, call: ClientCall) -> None:
        call.attempt_count += 1
        call.first_token_ns = None
        self._door.send(call)
        if call.patience_ns is not None:
            self._clock.after(call.patience_ns, partial(self._lose_patience, call, call.attempt))

    def _lose_patience(self, call: ClientCall, attempt: Attempt | None) -> None:
        if call.attempt is not attempt or attempt is None or call.first_token_ns is not None:
            return
        self._door.cancel(call)
        if call.ending is not None:
            return  # the last token came at the same time
        retry = self._workload.retry
        if retry.after_patience and call.attempt_count < retry.attempts_max:
            self._back_off(call)
        else:
            self._end(call, Ending.GAVE_UP)

    def _back_off(self, call: ClientCall) -> None:
        retry = self._workload.retry
        doublings = min(call.attempt_count - 1, _BACKOFF_DOUBLINGS_MAX)
        delay_ns = min(retry.backoff_max_ns, retry.backoff_ns << doublings)
        spread = 0.5 + self._retry_chance.random()
        self._clock.after(round(delay_ns * spread), partial(self._send, call))

    def _end(self, call: ClientCall, ending: Ending) -> None:
        call.ended_ns = self._clock.now_ns
        call.ending = ending
        self._door.ended(call)
        arrivals = self._workload.arrivals
        if isinstance(arrivals, ClosedLoop) and call.user is not None:
            think_ns = arrivals.think.draw(self._user_chances[call.user])
            is_answered = ending is Ending.ANSWERED
            least_ns = _ROUND_TRIP_NS if is_answered else self._workload.retry.backoff_ns
            self._plan_user(call.user, self._clock.now_ns + max(think_ns, least_ns))

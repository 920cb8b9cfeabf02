"""The calls on streams of the direct door: ext_proc, the access log, health.

A call takes the data that comes on its stream, and sends messages. It ends in one of two ways:
`finish` (the service ends it, with a status) and `lose` (the stream is gone). It has no task.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final, Protocol, final

import structlog

from flowcontrol.events import Decision
from flowcontrol.request import Outcome, Request
from flowcontrol_server.doors import access_log
from flowcontrol_server.doors.call_context import STANDBY, CallContext
from flowcontrol_server.doors.envoy_secret import NOT_SHOWN
from flowcontrol_server.doors.http2 import grpc_framing
from flowcontrol_server.doors.http2.grpc_framing import FramingError, Refusal, Status, refused
from flowcontrol_server.doors.http2.headers import RequestHead
from flowcontrol_server.requests import codec, log_codec
from flowcontrol_server.requests.codec import MalformedMessageError, decode
from flowcontrol_server.requests.dialects import Dialect
from flowcontrol_server.requests.exchange import (
    Exchange,
    Message,
    MessageKind,
    Mode,
    Parting,
    Phase,
    ProtocolError,
    Reply,
)
from flowcontrol_server.requests.parked import Parked, trace_of
from flowcontrol_server.requests.replies import Answer, answer, refusal, unavailable
from flowcontrol_server.requests.splice import BodyPart, LargeBody, NoBodyError, echoes

_log = structlog.get_logger()
_PARKED: Final = Phase.PARKED  # looked up once: each time takes some 200 instructions
_OVER: Final = Phase.OVER
_DUPLEX: Final = Mode.DUPLEX


class Wire(Protocol):
    """The connection, as its calls see it."""

    @property
    def context(self) -> CallContext:
        """The settings and collaborators of all calls."""

    def send(self, stream_id: int, message: bytes, *, is_first: bool) -> None:
        """Send one message, after the headers if it is the first."""

    def end_call(self, call: "Call", ending: bytes) -> None:
        """Send the end of a call and forget it."""

    def heard(self, call: "Call") -> None:
        """Note the first message of a call."""

    def hold(self, change_bytes: int) -> None:
        """Account for parts of messages and bodies; raises FramingError beyond the limit."""

    def pause(self, stream_id: int, *, is_paused: bool) -> None:
        """Stop widening the window of a stream, or go on."""

    def park_soon(self, park: Callable[[], None]) -> None:
        """Call a function at the end of this turn of the loop."""

    def park_later(self, park: Callable[[], None]) -> None:
        """Call a function after `BODY_S`."""

    def echo_soon(self, call: "ProcessCall") -> None:
        """Make a call send its echo before the next write."""


class Call:
    """One gRPC call, from its stream's beginning to its end."""

    __slots__ = (
        *("_has_message", "_held", "_is_begun", "_is_gone", "_wire"),
        *("held_bytes", "stream_id"),
    )

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        del head  # the class of a call has all that most calls need of it
        self._wire = wire
        self.stream_id = stream_id
        self.held_bytes = 0
        """Bytes held of unfinished messages and bodies, as accounted for."""
        self._held: bytearray | None = None
        self._is_begun = False
        """The answer has begun."""
        self._is_gone = False
        """Nothing can be sent any more."""
        self._has_message = False
        """A message has come."""

    @classmethod
    def refusal(cls, context: CallContext, head: RequestHead) -> Refusal | None:
        """Return why a call must not begin; None: it may."""
        del context, head
        return None

    def take(self, data: bytes, *, is_ended: bool) -> None:
        """Take more data of the client."""
        try:
            if data:
                messages = self._messages(data)
                if messages and not self._has_message:
                    self._has_message = True
                    self._wire.heard(self)
                for message in messages:
                    if not self._is_gone:
                        self._receive(message)
            if is_ended and not self._is_gone:
                self._expect_whole()
                self._end()
        except FramingError as error:
            self._fail(error)
        except (ProtocolError, MalformedMessageError) as invalid:
            self.finish(Status.INVALID_ARGUMENT, str(invalid))
        except Exception:  # noqa: BLE001 - a bug; it must not end all other calls, too
            _log.exception("direct_call_failed")
            self.finish(Status.INTERNAL, "internal error")

    def let_go(self) -> None:
        """End the call if no response depends on it, because the door closes."""

    def move(self) -> None:
        """End the call so that another replica takes it up, if that is possible."""

    def lose(self) -> None:
        """Note that the stream is gone."""
        self._is_gone = True

    def finish(self, status: Status = Status.OK, reason: str = "") -> None:
        """End the stream with a status."""
        if not self._is_gone:
            ending = grpc_framing.ending(status, reason, is_begun=self._is_begun)
            self._wire.end_call(self, ending)
            self.lose()

    def _fail(self, error: FramingError) -> None:
        self.finish(error.status, str(error))

    def _kept_bytes(self) -> int:
        """Return how many bytes are held."""
        return 0 if self._held is None else len(self._held)

    def _account(self) -> None:
        kept_bytes = self._kept_bytes()
        if kept_bytes != self.held_bytes:
            change_bytes, self.held_bytes = kept_bytes - self.held_bytes, kept_bytes
            self._wire.hold(change_bytes)

    def _receive(self, message: bytes) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Note that the client has sent everything."""
        raise NotImplementedError

    def _send(self, message: bytes) -> None:
        self._wire.send(self.stream_id, message, is_first=not self._is_begun)
        self._is_begun = True

    def _messages(self, data: bytes) -> list[bytes]:
        held, self._held = self._held, None
        messages, self._held = grpc_framing.split(held, data, self._message_bytes_max())
        self._account()
        return messages

    def _message_bytes_max(self) -> int:
        return self._wire.context.limits.message_bytes_max

    def _expect_whole(self) -> None:
        if self._held is not None:
            reason = "the last message must be whole"
            raise FramingError(Status.INTERNAL, reason)


@final
class ProcessCall(Call):
    """One request of Envoy. Its states are those of its exchange; it leaves the gate once."""

    __slots__ = ("_echo", "_exchange", "_head", "_is_ended", "_large", "_parked", "_parking")
    PATH: ClassVar = f"/{codec.SERVICE}/Process".encode()

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        super().__init__(wire, stream_id, head)
        self._head = head if wire.context.trace_fields else None
        self._exchange = Exchange(wire.context.intake)
        self._parked: Parked | None = None
        self._parking: Callable[[], None] | None = None
        """Parks it, while it waits for the first part of its body."""
        self._is_ended = False
        """The client has sent everything."""
        self._large: LargeBody | None = None
        """A large message, which is passed on in parts as it comes."""
        self._echo: list[BodyPart] | None = None
        """Parts of one body, to be sent back together."""

    @classmethod
    def refusal(cls, context: CallContext, head: RequestHead) -> Refusal | None:
        """Refuse a client without Envoy's secret, if one is required."""
        if shows_secret(context, head):
            return None
        return refused(Status.UNAUTHENTICATED, NOT_SHOWN)

    @property
    def owes_echoes(self) -> bool:
        """Whether a body may be under way, which would break off if the stream ended."""
        return self._exchange.parting is Parting.STAY

    def let_go(self) -> None:
        """End the stream with OK if its request is in flight, so that the response goes on."""
        if self._exchange.parting is Parting.END:
            self.finish()

    def move(self) -> None:
        """End the stream so that another replica decides a parked request.

        If the request is in flight, end with OK so that the response goes on.
        """
        if self._exchange.phase is _PARKED:
            self._pass_on()
        else:
            self.let_go()

    def lose(self) -> None:
        """Note that the stream is gone."""
        super().lose()
        parked, context = self._parked, self._wire.context
        if parked is not None and self._is_ended and self._exchange.is_unseen:
            context.gate.leave_later(parked, context.unseen_ns)
        else:
            self._leave()

    def finish(self, status: Status = Status.OK, reason: str = "") -> None:
        """End the stream with a status, after sending the rest of the body back."""
        self.send_echo()
        super().finish(status, reason)

    def send_echo(self) -> None:
        """Send back the parts of a body that have come since the last time."""
        parts, self._echo = self._echo, None
        if parts is None or self._is_gone:
            return
        first, last = parts[0], parts[-1]
        if len(parts) > 1:
            body = b"".join([part.body for part in parts])
            first = BodyPart(first.is_request, body, last.is_end)
        for message in echoes(first):
            self._send(message)

    def _messages(self, data: bytes) -> list[bytes]:
        if self._large is None:
            try:
                return super()._messages(data)
            except FramingError as error:
                return self._begin_large(error)
        try:
            messages, after = self._large.take(data)
        except NoBodyError as no_body:  # compiled, a name has one type in a function
            bytes_max = self._message_bytes_max()
            reason = f"messages must be at most {bytes_max} bytes, except parts of bodies"
            raise FramingError(Status.RESOURCE_EXHAUSTED, reason) from no_body
        if after is not None:
            self._large = None
            if after:
                messages += self._messages(after)
        return messages

    def _begin_large(self, error: FramingError) -> list[bytes]:
        """Begin to split a message that is too large, if it may be a part of a body."""
        if error.rest is None:
            raise error
        if error.messages:  # first those: they decide which conversation it is
            self._held = bytearray(error.rest)
            self._account()
            return error.messages
        if not self._exchange.takes_bodies:
            raise error
        prefix = grpc_framing.PREFIX_BYTES
        self._large = LargeBody(int.from_bytes(error.rest[1:prefix]))
        self._account()
        return self._messages(error.rest[prefix:])

    def _expect_whole(self) -> None:
        super()._expect_whole()
        if self._large is not None:
            reason = "the last message must be whole"
            raise FramingError(Status.INTERNAL, reason)

    def _receive(self, message: bytes) -> None:
        decoded = decode(message)
        was_parked = self._exchange.phase is _PARKED
        reply = self._exchange.receive(decoded)
        if isinstance(reply, BodyPart):
            self._note_response(reply)
            self._send_back(reply)
        elif isinstance(decoded, BodyPart):
            if reply is not None:
                assert not isinstance(reply, Request), "headers ask for a decision"
                self._note_response(decoded)
                self._reply(reply)
            elif was_parked:
                self._wire.pause(self.stream_id, is_paused=True)
                self._account()
                if self._parking is not None:
                    self._wire.park_soon(self._park_now)
        elif was_parked and decoded.kind is MessageKind.RESPONSE_HEADERS:
            self._give_up(reply)
        else:
            self._receive_message(decoded, reply)

    def _give_up(self, reply: Request | Reply | None) -> None:
        """Let a response pass that Envoy itself makes while the request waits, or before."""
        assert reply is not None, "a message that passes is acknowledged"
        assert not isinstance(reply, Request), "headers ask for a decision"
        self._leave()
        self._wire.pause(self.stream_id, is_paused=False)
        self._account()
        self._reply(reply)

    def _receive_message(self, message: Message, reply: Request | Reply | None) -> None:
        if isinstance(reply, Request):
            if not self._wire.context.may_decide():
                self._pass_on()
            elif self._exchange.mode is _DUPLEX and not message.is_end:
                self._wire.pause(self.stream_id, is_paused=True)
                self._wire.park_soon(partial(self._park_in_time, reply, message))
            else:
                self._park(reply, message)
            return
        self._note_response(message)
        if reply is not None:
            self._reply(reply)

    def _park_in_time(self, request: Request, message: Message) -> None:
        """Park a request when the first part of its body has come, at the latest after `BODY_S`.

        Many clients send the body in a packet after the headers, such as OpenAI's for Python.
        """
        self._parking = partial(self._park_with_body, request, message)
        if self._exchange.held_bytes or not self._exchange.reads_body(message):
            self._park_now()
        else:
            self._wire.park_later(self._park_now)

    def _park_now(self) -> None:
        park, self._parking = self._parking, None
        if park is not None:
            park()

    def _park_with_body(self, request: Request, message: Message) -> None:
        """Park a request with the part of its body that has come."""
        if self._is_gone or self._exchange.phase is not _PARKED:
            return
        self._park(self._exchange.with_body(request, message), message)
        if self._is_ended and not self._exchange.awaits_end:
            self._leave()

    def _park(self, request: Request, message: Message) -> None:
        context = self._wire.context
        parked = context.gate.park(
            request, message.headers, message.began, self._exchange.origin, message.attempt
        )
        self._parked = parked
        if self._head is not None:
            fields = {
                name.decode("latin-1"): text.decode("latin-1") for name, text in self._head.fields
            }
            parked.trace = trace_of(context.trace_fields, fields, message.headers)
            self._head = None
        if parked.decision is None:
            parked.decided = self._decided
        else:
            self._decided(parked.decision)

    def _decided(self, decision: Decision) -> None:
        if self._is_gone or self._exchange.phase is not _PARKED:
            return
        parked, context = self._parked, self._wire.context
        assert parked is not None, "a decided request was parked"
        if not context.may_decide():
            self._pass_on()
            return
        if parked.recall is not None:
            parked.recall.add_done_callback(self._recalled, context=context.callbacks)
        chance = context.chance.random()
        decided = answer(
            decision,
            chance,
            parked.dialect,
            continue_on_fault=context.continue_on_fault,
        )
        self._answer(decided)

    def _pass_on(self) -> None:
        """Pass an undecided request to another replica, or refuse it so that the client retries."""
        if self._exchange.parting is Parting.REFUSE:
            self._leave(Outcome.EVICTED_STOOD_DOWN)
            parked = self._parked
            self._answer(unavailable(Dialect.OPENAI if parked is None else parked.dialect))
        else:
            self._leave(Outcome.EVICTED_MOVED)
            self.finish(Status.UNAVAILABLE, STANDBY)

    def _answer(self, decided: Answer) -> None:
        """Answer the headers, and send back the held part of the body."""
        replies = self._exchange.decide(decided)
        if self._exchange.mode is _DUPLEX:
            self._account()
            self._wire.pause(self.stream_id, is_paused=False)
        for reply in replies[:-1]:
            self._send_all(reply)
        self._reply(replies[-1])

    def _recalled(self, future: asyncio.Future[Decision]) -> None:
        if not self._is_gone:
            assert self._parked is not None, "a recalled request was parked"
            chance, dialect = self._wire.context.chance.random(), self._parked.dialect
            self._reply(self._exchange.recall(refusal(future.result(), chance, dialect)))

    def _note_response(self, message: Message | BodyPart) -> None:
        if self._parked is not None and self._parked.left_ns is None:
            self._wire.context.gate.responded(self._parked, message, self._exchange.mode)

    def _send_back(self, part: BodyPart) -> None:
        """Send back a part of a body, together with further parts of this turn of the loop."""
        if self._echo is None or self._echo[0].is_request is not part.is_request:
            self.send_echo()
            self._echo = []
            self._wire.echo_soon(self)
        self._echo.append(part)

    def _send_all(self, reply: Reply) -> None:
        self.send_echo()
        for message in self._wire.context.encoder.encode(reply, self._exchange.mode):
            self._send(message)

    def _reply(self, reply: Reply) -> None:
        self._send_all(reply)
        is_left_alone = self._wire.context.is_closing and not self.owes_echoes
        if self._is_ended or is_left_alone or self._exchange.phase is _OVER:
            self.finish()

    def _end(self) -> None:
        """Note that the client has sent everything.

        A parked request ends with that, but is still answered: Envoy lets a request pass whose
        stream ends unanswered.
        """
        self._is_ended = True
        if self._exchange.phase is not _PARKED:
            self.finish()
            return
        if not self._exchange.awaits_end:
            self._leave()

    def _fail(self, error: FramingError) -> None:
        """Refuse a parked request whose body takes too much room; fail any other call."""
        parked = self._parked
        is_full = error.status is Status.RESOURCE_EXHAUSTED
        if not is_full or self._exchange.phase is not _PARKED:
            super()._fail(error)
            return
        self._wire.context.body_refusals += 1
        own = self._wire.context.gate.refused(parked)
        self._leave(own.outcome)  # counted and logged as what the client gets
        dialect = Dialect.OPENAI if parked is None else parked.dialect
        self._answer(refusal(own, self._wire.context.chance.random(), dialect))

    def _kept_bytes(self) -> int:
        return super()._kept_bytes() + self._exchange.held_bytes

    def _leave(self, outcome: Outcome = Outcome.EVICTED_CANCELLED) -> None:
        if self._parked is not None and self._parked.left_ns is None:
            self._wire.context.gate.leave(self._parked, outcome)


@final
class HealthCall(Call):
    """A health check: one request, one answer."""

    __slots__ = ()
    PATH: ClassVar = b"/grpc.health.v1.Health/Check"

    def _receive(self, message: bytes) -> None:
        reply = self._wire.context.health.check(message)
        if reply is None:
            self.finish(Status.NOT_FOUND, "unknown service")
        else:
            self._send(reply)
            self.finish()

    def _end(self) -> None:
        self.finish(Status.INVALID_ARGUMENT, "a health check must have a request")


@final
class WatchCall(Call):
    """A health check that is answered again at every change, until the client ends it."""

    __slots__ = ("_is_watching",)
    PATH: ClassVar = b"/grpc.health.v1.Health/Watch"

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        super().__init__(wire, stream_id, head)
        self._is_watching = False

    def tell(self, answer: bytes) -> None:
        """Send a change."""
        self._send(answer)

    def let_go(self) -> None:
        """End the call, which would not end by itself."""
        self.finish(Status.UNAVAILABLE, "the service is shutting down")

    def lose(self) -> None:
        """Note that the stream is gone."""
        super().lose()
        self._wire.context.health.unwatch(self)

    def _receive(self, message: bytes) -> None:
        if self._is_watching:
            self.finish(Status.INVALID_ARGUMENT, "a health check must have only one request")
            return
        answer = self._wire.context.health.watch(message, self)
        if answer is None:
            self.finish(Status.RESOURCE_EXHAUSTED, "too many Watch streams; use Check")
            return
        self._is_watching = True
        self._send(answer)

    def _end(self) -> None:
        if not self._is_watching:
            self.finish(Status.INVALID_ARGUMENT, "a health check must have a request")


@final
class LogCall(Call):
    """A stream of Envoy's access log, which Envoy keeps open as long as it can.

    While messages of the stream wait for settlement, its window is not widened. It ends with
    UNAVAILABLE; then Envoy opens another stream, and sends again what it still has.
    """

    __slots__ = ("_is_ended", "_log", "_waiting")
    PATH: ClassVar = f"/{log_codec.SERVICE}/StreamAccessLogs".encode()

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        super().__init__(wire, stream_id, head)
        log = wire.context.access_log
        assert log is not None, "else the call is refused"
        self._log = log
        self._waiting = 0
        """Messages that are not settled yet."""
        self._is_ended = False
        """The client has sent everything."""
        log.opened(self)

    @classmethod
    def refusal(cls, context: CallContext, head: RequestHead) -> Refusal | None:
        """Refuse a stream if the log is off, the secret is missing, or another replica decides."""
        log = context.access_log
        if log is None or not log.is_served:
            return refused(Status.UNIMPLEMENTED, "settlement.accessLog is off")
        if not shows_secret(context, head):
            log.log_join.stream_refused()
            return refused(Status.UNAUTHENTICATED, NOT_SHOWN)
        if not context.may_decide():
            return refused(Status.UNAVAILABLE, STANDBY)
        return None

    def settled(self) -> None:
        """Note that one more message is settled."""
        self._waiting -= 1
        if not (self._waiting or self._is_gone):
            if self._is_ended:
                self._answer()
            else:
                self._wire.pause(self.stream_id, is_paused=False)

    def let_go(self) -> None:
        """End the stream, which Envoy would keep open forever."""
        self.move()

    def move(self) -> None:
        """End the stream so that Envoy opens another, here or elsewhere."""
        self.finish(Status.UNAVAILABLE, STANDBY)

    def lose(self) -> None:
        """Note that the stream is gone."""
        super().lose()
        self._log.closed(self)

    def _receive(self, message: bytes) -> None:
        if not self._log.take(self, message):
            self.finish(Status.RESOURCE_EXHAUSTED, "log entries come faster than they are settled")
            return
        self._waiting += 1
        if self._waiting == 1:
            self._wire.pause(self.stream_id, is_paused=True)

    def _message_bytes_max(self) -> int:
        return access_log.MESSAGE_BYTES_MAX

    def _end(self) -> None:
        self._is_ended = True
        if not self._waiting:
            self._answer()

    def _answer(self) -> None:
        self._send(b"")  # StreamAccessLogsResponse, which has no fields
        self.finish()


CALLS: Final[dict[bytes, type[Call]]] = {
    ProcessCall.PATH: ProcessCall,
    HealthCall.PATH: HealthCall,
    WatchCall.PATH: WatchCall,
    LogCall.PATH: LogCall,
}
"""The calls that are served, by path."""


def shows_secret(context: CallContext, head: RequestHead) -> bool:
    """Whether a call has Envoy's secret, or none is required."""
    secret = context.secret
    return secret is None or any(
        name == b"authorization" and secret.is_shown(value) for name, value in head.fields
    )

"""What is said on the streams of the direct door: ext_proc conversations, and health checks.

A call is told what comes on its stream, and says what is to go out. It ends in one of two ways:
`finish` (we end it, with a status) and `lose` (it is gone). There is no task behind it.
"""

import asyncio
from typing import ClassVar, Final, Protocol, final

import structlog

from flowcontrol.events import Decision
from server import codec
from server.codec import MalformedMessageError, decode
from server.exchange import Exchange, MessageKind, Park, Phase, ProtocolError, Reply
from server.gate import Parked, trace_of
from server.http2 import grpc_framing
from server.http2.grpc_framing import FramingError, Status
from server.http2.headers import RequestHead
from server.replies import answer, refusal
from server.terms import Terms

_log = structlog.get_logger()


class Wire(Protocol):
    """The connection, as its calls see it."""

    @property
    def terms(self) -> Terms:
        """Return what holds for every call."""

    def send(self, stream_id: int, message: bytes, *, is_first: bool) -> None:
        """Send one message, behind the headers if it is the first."""

    def end_call(self, call: "Call", ending: bytes) -> None:
        """Send the end of a call and forget it."""

    def hold(self, change_bytes: int) -> None:
        """Account for parts of messages; raises FramingError beyond the limit."""


class Call:
    """One gRPC call, from its stream's beginning to its end."""

    __slots__ = ("_held", "_is_begun", "_is_gone", "_wire", "held_bytes", "stream_id")

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        del head  # what most calls have to know of it is said by their class
        self._wire = wire
        self.stream_id = stream_id
        self.held_bytes = 0
        """Of a message that has begun, as accounted for."""
        self._held: bytearray | None = None
        self._is_begun = False
        """An answer was written."""
        self._is_gone = False
        """Nothing is to be said any more."""

    def take(self, data: bytes, *, is_ended: bool) -> None:
        """Take more of what the client says."""
        try:
            if data:
                for message in self._messages(data):
                    if not self._is_gone:
                        self._receive(message)
            if is_ended and not self._is_gone:
                self._expect_whole()
                self._end()
        except FramingError as error:
            self.finish(error.status, str(error))
        except (ProtocolError, MalformedMessageError) as mistake:
            self.finish(Status.INVALID_ARGUMENT, str(mistake))
        except Exception:  # noqa: BLE001 - a bug; it must not end all the calls beside this one
            _log.exception("direct_call_failed")
            self.finish(Status.INTERNAL, "internal error")

    def let_go(self) -> None:
        """End the call if that harms nobody; the door closes."""

    def lose(self) -> None:
        """Take note that the stream is gone."""
        self._is_gone = True

    def finish(self, status: Status = Status.OK, reason: str = "") -> None:
        """End the stream with a status."""
        if not self._is_gone:
            ending = grpc_framing.ending(status, reason, is_begun=self._is_begun)
            self._wire.end_call(self, ending)
            self.lose()

    def _receive(self, message: bytes) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Take note that the client has said everything."""
        raise NotImplementedError

    def _send(self, message: bytes) -> None:
        self._wire.send(self.stream_id, message, is_first=not self._is_begun)
        self._is_begun = True

    def _messages(self, data: bytes) -> list[bytes]:
        held, self._held = self._held, None
        messages, self._held = grpc_framing.split(
            held, data, self._wire.terms.limits.message_bytes_max
        )
        held_bytes = len(self._held) if self._held is not None else 0
        if held_bytes != self.held_bytes:
            change_bytes, self.held_bytes = held_bytes - self.held_bytes, held_bytes
            self._wire.hold(change_bytes)
        return messages

    def _expect_whole(self) -> None:
        if self._held is not None:
            reason = "the last message must be whole"
            raise FramingError(Status.INTERNAL, reason)


@final
class ProcessCall(Call):
    """One request of Envoy's. It has no more states than its exchange; it leaves the gate once."""

    __slots__ = ("_exchange", "_head", "_is_ended", "_parked")
    PATH: ClassVar = f"/{codec.SERVICE}/Process".encode()

    def __init__(self, wire: Wire, stream_id: int, head: RequestHead) -> None:
        super().__init__(wire, stream_id, head)
        self._head = head if wire.terms.trace_fields else None
        self._exchange = Exchange(wire.terms.intake)
        self._parked: Parked | None = None
        self._is_ended = False
        """The client has said everything."""

    def let_go(self) -> None:
        """End the stream if its request is in flight: politely, so that the response goes on."""
        if self._exchange.phase is Phase.GOING:
            self.finish()

    def lose(self) -> None:
        """Take note that the stream is gone."""
        super().lose()
        self._leave()

    def _receive(self, message: bytes) -> None:
        said = decode(message)
        reply = self._exchange.receive(said)
        terms = self._wire.terms
        if isinstance(reply, Park):
            self._parked = parked = terms.gate.park(reply.facts)
            if self._head is not None:
                fields = {
                    name.decode("latin-1"): text.decode("latin-1")
                    for name, text in self._head.fields
                }
                parked.trace = trace_of(terms.trace_fields, fields, said.headers)
                self._head = None
            parked.future.add_done_callback(self._decided, context=terms.context)
            return
        if said.kind is MessageKind.RESPONSE_HEADERS:
            assert self._parked is not None, "only a request that was let on is responded to"
            terms.gate.answered(self._parked)
        self._say(reply)

    def _decided(self, future: asyncio.Future[Decision]) -> None:
        if self._is_gone:
            return
        parked, terms = self._parked, self._wire.terms
        assert parked is not None, "what is decided was parked"
        if parked.recall is not None:
            parked.recall.add_done_callback(self._recalled, context=terms.context)
        chance = terms.chance.random()
        decided = answer(
            future.result(),
            chance,
            parked.facts.dialect,
            continue_on_fault=terms.continue_on_fault,
        )
        self._say(self._exchange.decide(decided))

    def _recalled(self, future: asyncio.Future[Decision]) -> None:
        if not self._is_gone:
            assert self._parked is not None, "what is recalled was parked"
            chance, dialect = self._wire.terms.chance.random(), self._parked.facts.dialect
            self._say(self._exchange.recall(refusal(future.result(), chance, dialect)))

    def _say(self, reply: Reply) -> None:
        terms = self._wire.terms
        self._send(terms.encoder.encode(reply))
        if self._is_ended or terms.is_closing or self._exchange.phase is Phase.OVER:
            self.finish()

    def _end(self) -> None:
        """Take note that the client has said everything.

        A request that is parked has ended by that, but is told its decision all the same: a stream
        that ends unanswered would let it through.
        """
        self._is_ended = True
        if self._exchange.phase is Phase.PARKED:
            self._leave()
        else:
            self.finish()

    def _leave(self) -> None:
        if self._parked is not None and self._parked.left_ns is None:
            self._wire.terms.gate.leave(self._parked)


@final
class HealthCall(Call):
    """A health check: one question, one answer."""

    __slots__ = ()
    PATH: ClassVar = b"/grpc.health.v1.Health/Check"

    def _receive(self, message: bytes) -> None:
        reply = self._wire.terms.health(message)
        if reply is None:
            self.finish(Status.NOT_FOUND, "unknown service")
        else:
            self._send(reply)
            self.finish()

    def _end(self) -> None:
        self.finish(Status.INVALID_ARGUMENT, "a health check must ask for a service")


CALLS: Final[dict[bytes, type[Call]]] = {ProcessCall.PATH: ProcessCall, HealthCall.PATH: HealthCall}
"""What is served here, by path."""

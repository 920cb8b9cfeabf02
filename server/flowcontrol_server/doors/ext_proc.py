"""The grpcio door: carries the ext_proc conversation between Envoy and the gate."""

import asyncio
from typing import Any, Final, final

import grpc

from flowcontrol.request import Outcome, Request
from flowcontrol_server.doors.call_context import BODY_S, STANDBY, CallContext
from flowcontrol_server.doors.envoy_secret import NOT_SHOWN
from flowcontrol_server.requests.codec import SERVICE, MalformedMessageError, decode
from flowcontrol_server.requests.dialects import Dialect
from flowcontrol_server.requests.exchange import (
    Exchange,
    Message,
    Parting,
    Phase,
    ProtocolError,
    Reply,
)
from flowcontrol_server.requests.parked import Parked, trace_of
from flowcontrol_server.requests.replies import answer, refusal, unavailable
from flowcontrol_server.requests.splice import BodyPart

_Context = grpc.aio.ServicerContext[bytes, bytes]
_Reading = asyncio.Future[Message | BodyPart | None]
HELD_BYTES_MAX: Final = 65_536
"""Held bytes of a parked request's body, beyond which no more is read until it is decided."""


@final
class ExtProcDoor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor/Process`, bytes to bytes.

    Args:
        shared: settings and collaborators of all calls.
    """

    def __init__(self, shared: CallContext) -> None:
        self._shared = shared
        self._closing = asyncio.get_running_loop().create_future()
        self._moving = asyncio.get_running_loop().create_future()
        """Resolves, and is replaced, when another replica is to take up all streams."""

    def handler(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """Return the handler for a grpc.aio server."""
        process = grpc.stream_stream_rpc_method_handler(self._process)
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": process})

    def close(self) -> None:
        """End the streams of requests in flight with OK.

        If a stream breaks off, Envoy breaks off the response. If it ends with OK after its answer,
        the response goes on.
        """
        if not self._closing.done():
            self._closing.set_result(None)
        self._shared.gate.release_unseen()

    def move_calls(self) -> None:
        """End all streams so that another replica takes them up; requests in flight go on."""
        self._moving.set_result(None)
        self._moving = asyncio.get_running_loop().create_future()

    async def _process(self, _requests: Any, context: _Context) -> None:
        shared = self._shared
        if shared.secret is not None and not shared.secret.is_among(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_SHOWN)
        exchange = Exchange(shared.intake)
        try:
            first = await self._read(context)
            if first is None:
                return
            reply = exchange.receive(first)
            if isinstance(reply, Request):
                assert isinstance(first, Message), "headers ask for a decision"
                if not shared.may_decide():
                    await self._pass_on(exchange, None, context)
                    return
                request, reading = await self._with_body(exchange, reply, first, context)
                parked = shared.gate.park(
                    request, first.headers, first.began, exchange.origin, first.attempt
                )
                if shared.trace_fields:
                    fields = dict(context.invocation_metadata() or ())
                    parked.trace = trace_of(shared.trace_fields, fields, first.headers)
                await self._hold(exchange, parked, context, reading)
            else:
                await self._send(exchange, reply, context)
                if exchange.phase is Phase.GOING:
                    await self._converse(exchange, None, context, self._reading(context))
        except (ProtocolError, MalformedMessageError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _with_body(
        self, exchange: Exchange, request: Request, message: Message, context: _Context
    ) -> tuple[Request, _Reading]:
        """Return a request updated with its body so far, and the reading of the next message."""
        reading = self._reading(context)
        if not exchange.reads_body(message):
            return request, reading
        try:
            await asyncio.wait((reading,), timeout=BODY_S)
        except asyncio.CancelledError:
            reading.cancel()
            raise
        part = reading.result() if reading.done() else None
        if not isinstance(part, BodyPart):
            return request, reading
        exchange.receive(part)
        return exchange.with_body(request, message), self._reading(context)

    async def _hold(  # noqa: C901 - one conversation, in one place
        self, exchange: Exchange, parked: Parked, context: _Context, reading: _Reading
    ) -> None:
        """Answer a parked request, and keep its slot until its stream ends."""
        shared, moving, deciding = self._shared, self._moving, parked.future()
        # Read on while parked: if Envoy closes gracefully, only the stream shows the request's end.
        is_full = is_unseen = False
        try:
            while not (deciding.done() or moving.done()):
                parts = (deciding, reading, moving)
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                if deciding.done() or moving.done():
                    break
                message = reading.result()
                if message is None:
                    if not exchange.awaits_end:
                        shared.gate.leave(parked)  # answered below: unanswered, it would pass
                    break
                reply = exchange.receive(message)  # raises if it is not allowed while parked
                if exchange.phase is Phase.GOING:  # Envoy itself responds
                    shared.gate.leave(parked)
                    await self._send(exchange, reply, context)
                    await self._converse(exchange, None, context, self._reading(context))
                    return
                is_full = exchange.held_bytes > HELD_BYTES_MAX
                if is_full:
                    break
                reading = self._reading(context)
            # Not awaited directly: cancelling the stream would cancel the future, too.
            await asyncio.wait((deciding, moving), return_when=asyncio.FIRST_COMPLETED)
            if not deciding.done() or not shared.may_decide():
                await self._pass_on(exchange, parked, context)
                return
            if is_full:
                reading = self._reading(context)
            decided = answer(
                deciding.result(),
                shared.chance.random(),
                parked.dialect,
                continue_on_fault=shared.continue_on_fault,
            )
            for each in exchange.decide(decided):
                await self._send(exchange, each, context)
            await self._converse(exchange, parked, context, reading)
            is_unseen = exchange.is_unseen and not self._closing.done()
        finally:
            reading.cancel()
            if is_unseen:
                shared.gate.leave_later(parked, shared.unseen_ns)
            elif parked.left_ns is None:
                shared.gate.leave(parked)

    async def _pass_on(self, exchange: Exchange, parked: Parked | None, context: _Context) -> None:
        """Pass an undecided request to another replica, or refuse it so that the client retries."""
        is_refused = exchange.parting is Parting.REFUSE
        if parked is not None and parked.left_ns is None:
            outcome = Outcome.EVICTED_STOOD_DOWN if is_refused else Outcome.EVICTED_MOVED
            self._shared.gate.leave(parked, outcome)
        if not is_refused:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STANDBY)
        dialect = Dialect.OPENAI if parked is None else parked.dialect
        for each in exchange.decide(unavailable(dialect)):
            await self._send(exchange, each, context)

    async def _converse(
        self, exchange: Exchange, parked: Parked | None, context: _Context, reading: _Reading
    ) -> None:
        """Answer the messages after the headers, until the request is over or recalled."""
        shared = self._shared
        try:
            while exchange.phase is Phase.GOING:
                awaited: list[asyncio.Future[Any]] = [reading]
                if exchange.parting is Parting.END:  # else a body may be under way
                    awaited += (self._closing, self._moving)
                if parked is not None and parked.recall is not None:
                    awaited.append(parked.recall)
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if parked is not None and parked.recall is not None and parked.recall.done():
                    chance = shared.chance.random()
                    ending = refusal(parked.recall.result(), chance, parked.dialect)
                    await self._send(exchange, exchange.recall(ending), context)
                    return
                message = reading.result() if reading.done() else None
                if message is None:
                    return
                reading = self._reading(context)
                reply = exchange.receive(message)
                if parked is not None:
                    shared.gate.responded(parked, message, exchange.mode)
                await self._send(exchange, reply, context)
        finally:
            reading.cancel()

    async def _send(
        self, exchange: Exchange, reply: Request | Reply | None, context: _Context
    ) -> None:
        assert not isinstance(reply, Request), "headers come once"
        if reply is not None:
            for message in self._shared.encoder.encode(reply, exchange.mode):
                await context.write(message)

    @staticmethod
    def _reading(context: _Context) -> _Reading:
        return asyncio.ensure_future(ExtProcDoor._read(context))

    @staticmethod
    async def _read(context: _Context) -> Message | BodyPart | None:
        """Return the next message; None: the stream has ended."""
        data: object = await context.read()  # grpc.aio.EOF at the end, which its stubs omit
        return decode(data) if isinstance(data, bytes) else None

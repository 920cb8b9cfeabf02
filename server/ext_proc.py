"""The grpcio door: carries the ext_proc conversation between Envoy and the gate, nothing else."""

import asyncio
from typing import Any, final

import grpc

from server.codec import SERVICE, MalformedMessageError, decode
from server.exchange import Exchange, Message, MessageKind, Park, Phase, ProtocolError
from server.gate import Parked, trace_of
from server.replies import answer, refusal
from server.terms import Terms

_Context = grpc.aio.ServicerContext[bytes, bytes]


@final
class ExtProcDoor:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor/Process`, bytes to bytes.

    Args:
        terms: what holds for every call.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._closing = asyncio.get_running_loop().create_future()

    def handler(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """Return what a grpc.aio server takes up."""
        process = grpc.stream_stream_rpc_method_handler(self._process)
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": process})

    def close(self) -> None:
        """End the streams of requests in flight politely.

        A stream that breaks off makes Envoy break off the response; one that ends with OK after its
        answer leaves the response alone.
        """
        if not self._closing.done():
            self._closing.set_result(None)

    async def _process(self, _requests: Any, context: _Context) -> None:
        terms = self._terms
        exchange = Exchange(terms.intake)
        try:
            first = await self._read(context)
            if first is None:
                return
            reply = exchange.receive(first)
            if isinstance(reply, Park):
                parked = terms.gate.park(reply.facts)
                if terms.trace_fields:
                    said = dict(context.invocation_metadata() or ())
                    parked.trace = trace_of(terms.trace_fields, said, first.headers)
                await self._hold(exchange, parked, context)
            else:
                await context.write(terms.encoder.encode(reply))
        except (ProtocolError, MalformedMessageError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _hold(self, exchange: Exchange, parked: Parked, context: _Context) -> None:
        """Answer a parked request, and keep its slot until its stream ends."""
        terms = self._terms
        # Read on while parked: with Envoy's graceful close the end of a request shows only there.
        reading = asyncio.ensure_future(self._read(context))
        try:
            await asyncio.wait((parked.future, reading), return_when=asyncio.FIRST_COMPLETED)
            if not parked.future.done():
                message = reading.result()
                if message is not None:
                    exchange.receive(message)  # raises: nothing may be said while parked
                terms.gate.leave(parked)  # and is told so: an unanswered request would go through
            # Not awaited itself: a stream cancelled now would cancel the future with it.
            await asyncio.wait((parked.future,))
            decision = parked.future.result()
            reply = exchange.decide(
                answer(
                    decision,
                    terms.chance.random(),
                    parked.facts.dialect,
                    continue_on_fault=terms.continue_on_fault,
                )
            )
            await context.write(terms.encoder.encode(reply))
            while exchange.phase is Phase.GOING:
                news = [reading, self._closing]
                if parked.recall is not None:
                    news.append(parked.recall)
                await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
                if parked.recall is not None and parked.recall.done():
                    ending = refusal(
                        parked.recall.result(), terms.chance.random(), parked.facts.dialect
                    )
                    await context.write(terms.encoder.encode(exchange.recall(ending)))
                    return
                message = reading.result() if reading.done() else None
                if message is None:
                    return
                if message.kind is MessageKind.RESPONSE_HEADERS:
                    terms.gate.answered(parked)
                reading = asyncio.ensure_future(self._read(context))
                await self._acknowledge(exchange, message, context)
        finally:
            reading.cancel()
            if parked.left_ns is None:
                terms.gate.leave(parked)

    async def _acknowledge(self, exchange: Exchange, message: Message, context: _Context) -> None:
        reply = exchange.receive(message)
        assert not isinstance(reply, Park), "headers come once"
        await context.write(self._terms.encoder.encode(reply))

    @staticmethod
    async def _read(context: _Context) -> Message | None:
        """Return the next message, None at the end of the stream."""
        data: object = await context.read()  # grpc.aio.EOF, which its stubs do not know
        return decode(data) if isinstance(data, bytes) else None

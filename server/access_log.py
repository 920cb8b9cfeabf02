"""The door for Envoy's access log: what it reports of finished requests, taken in as it comes."""

import asyncio
import logging
from typing import Any, final

import grpc
import structlog

from server.codec import MalformedMessageError
from server.log_codec import SERVICE, decode_log
from server.settlement import Settlement

_Context = grpc.aio.ServicerContext[bytes, bytes]
_log = structlog.get_logger()


@final
class AccessLogDoor:
    """Serves `envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs`, bytes to bytes.

    Every message is read as soon as it is there, and nothing of it is kept: Envoy is never held up,
    and what cannot be read is counted and skipped.
    """

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement
        self._closing = asyncio.get_running_loop().create_future()

    def handler(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """Return what a grpc.aio server takes up."""
        stream = grpc.stream_unary_rpc_method_handler(self._stream)
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": stream})

    def close(self) -> None:
        """End the streams, which Envoy holds open for ever."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def _stream(self, _requests: Any, context: _Context) -> bytes:
        self._settlement.stream_opened()
        _log.info("access_log_opened", peer=context.peer(), streams=self._settlement.streams)
        try:
            while True:
                reading = asyncio.ensure_future(context.read())
                await asyncio.wait((reading, self._closing), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    break
                data: object = reading.result()
                if not isinstance(data, bytes):
                    break
                self._take(data)
        finally:
            self._settlement.stream_closed()
            _log.info("access_log_closed", streams=self._settlement.streams)
        return b""  # StreamAccessLogsResponse, which has no fields

    def _take(self, data: bytes) -> None:
        try:
            entries = decode_log(data)
        except MalformedMessageError:
            self._settlement.malformed()
            return
        is_told = _log.is_enabled_for(logging.DEBUG)  # to say nothing costs as much as to settle
        for entry in entries:
            result = self._settlement.take(entry)
            if is_told:
                _log.debug("request_reported", result=result.value, **entry._asdict())

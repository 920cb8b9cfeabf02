"""Bodies that pass through the direct door, as Envoy sends them, and the echoed parts."""

import asyncio
from collections.abc import Sequence
from typing import final

from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.direct.connection import Line
from flowcontrol_server.doors.http2 import frames, grpc_framing
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.limits import Http2Limits
from tests.support.direct import announcing, data, opening
from tests.support.http2 import heard


def part(body: bytes, *, is_end: bool = False, is_request: bool = True) -> bytes:
    """A part of a body, as Envoy sends it."""
    content = {"body": body, "end_of_stream": is_end}
    message = envoy_messages.ProcessingRequest(
        **{"request_body" if is_request else "response_body": content}
    )
    return framed(message.SerializeToString())


def begun(stream_id: int = 1, headers: bytes | None = None) -> bytes:
    """A stream with the request's headers."""
    return opening(stream_id) + data(stream_id, framed(headers or announcing()))


def cut(stream_id: int, content: bytes, size: int = 16_384) -> bytes:
    """DATA frames."""
    pieces = [content[begin : begin + size] for begin in range(0, len(content), size)]
    return b"".join(data(stream_id, piece) for piece in pieces)


@final
class Echo:
    """The parts that came back on a stream."""

    def __init__(self) -> None:
        self.request = self.response = b""
        self.request_ends = self.response_ends = 0
        self.messages: list[str] = []
        self.status = 0
        self._rest = b""

    def take(self, content: bytes) -> None:
        """Read the content of a DATA frame."""
        messages, rest = grpc_framing.split(bytearray(self._rest), content, 1 << 20)
        self._rest = bytes(rest or b"")
        for each in messages:
            response = envoy_messages.ProcessingResponse.FromString(each)
            kind = response.WhichOneof("response")
            self.messages.append(kind)
            if kind == "immediate_response":
                self.status = response.immediate_response.status.code
            if kind == "request_body":
                streamed = response.request_body.response.body_mutation.streamed_response
                self.request += streamed.body
                self.request_ends += streamed.end_of_stream
            if kind == "response_body":
                streamed = response.response_body.response.body_mutation.streamed_response
                self.response += streamed.body
                self.response_ends += streamed.end_of_stream


@final
class Peer:
    """An Envoy without a socket, whose frames are split as a test requires; its stream is 1."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.echo = Echo()
        self.allowed = Http2Limits().stream_window_bytes
        self.spoken = asyncio.Event()
        self.answered = asyncio.Event()
        self.is_ended = False
        """Whether the door has ended the stream."""

    def written(self, content: bytes) -> None:
        """Read the output of the door."""
        self.spoken.set()
        for frame in heard(content):
            if frame.stream_id != 1:
                continue
            assert not self.is_ended, "nothing follows the end of a stream"
            if frame.kind == frames.HEADERS:
                self.answered.set()
                self.is_ended = bool(frame.flags & frames.END_STREAM)
            if frame.kind == frames.DATA:
                self.echo.take(frame.payload)
            if frame.kind == frames.WINDOW_UPDATE:
                self.allowed += frames.read_word(frame.payload)

    def say(self, content: bytes, cuts: Sequence[int]) -> None:
        """Send bytes in pieces."""
        at = 0
        for size in cuts:
            self.line.data_received(content[at : at + size])
            at += size
        self.line.data_received(content[at:])

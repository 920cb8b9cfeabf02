"""The direct door against whatever comes: tests/fuzz/door.py, shortly and by Hypothesis."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowcontrol_server.common import envoy_messages
from flowcontrol_server.doors.direct.calls import HealthCall, ProcessCall
from flowcontrol_server.doors.http2 import frames
from flowcontrol_server.doors.http2.grpc_framing import framed
from flowcontrol_server.doors.http2.headers import encode_block
from tests.fuzz.door import HELLO, expect_frames, one, talk

BODIES = ("request_body", "response_body", "response_headers", "response_trailers")


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message with its prefix, sensible for the most part."""
    match draw(st.integers(0, 5)):
        case 0 | 1 | 2:
            request = envoy_messages.ProcessingRequest()
            headers = request.request_headers.headers.headers
            headers.add(key=":path", raw_value=draw(st.sampled_from([b"/", b"/v1/completions"])))
            headers.add(key=draw(st.text(max_size=8)), raw_value=draw(st.binary(max_size=8)))
            return framed(request.SerializeToString())
        case 3:
            kind = draw(st.sampled_from(BODIES))
            return framed(envoy_messages.ProcessingRequest(**{kind: {}}).SerializeToString())
        case 4:
            return framed(draw(st.binary(max_size=30)))
        case _:
            return draw(st.binary(max_size=30))


@st.composite
def openings(draw: st.DrawFn, stream_id: int) -> bytes:
    """The beginning of a call, of ours for the most part."""
    path = draw(st.sampled_from([ProcessCall.PATH] * 6 + [HealthCall.PATH, b"/no/such"]))
    kind = draw(st.sampled_from(["application/grpc"] * 6 + ["application/grpc+json", "text/plain"]))
    fields = {":method": "POST", ":scheme": "http", ":path": path.decode(), "content-type": kind}
    is_end = draw(st.integers(0, 19)) == 0
    return frames.header_frames(stream_id, encode_block(fields.items()), 16_384, is_end=is_end)


@st.composite
def more(draw: st.DrawFn, stream_ids: list[int]) -> bytes:
    """What may follow on one of the streams."""
    stream_id = draw(st.sampled_from(stream_ids))
    match draw(st.integers(0, 9)):
        case 0 | 1 | 2 | 3 | 4 | 5:
            body = b"".join(draw(st.lists(messages(), max_size=3)))
            cut, is_end = draw(st.integers(0, len(body))), draw(st.booleans())
            first = frames.frame(frames.DATA, 0, stream_id, body[:cut])
            return first + frames.frame(frames.DATA, int(is_end), stream_id, body[cut:])
        case 6:
            return frames.rst_stream(stream_id, draw(st.integers(0, 15)))
        case 7:
            return frames.settings({frames.INITIAL_WINDOW_SIZE: draw(st.integers(0, 70_000))})
        case 8:
            return frames.window_update(draw(st.sampled_from([0, stream_id])), 1_000)
        case _:
            payload, kind = draw(st.binary(max_size=20)), draw(st.integers(0, 11))
            return frames.frame(kind, draw(st.integers(0, 255)), stream_id, payload)


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Some calls, mixed."""
    stream_ids = [2 * number + 1 for number in range(draw(st.integers(1, 6)))]
    said = [HELLO, *(draw(openings(stream_id)) for stream_id in stream_ids)]
    return said + draw(st.lists(more(stream_ids), max_size=20))


class TestAnything:
    """It never raises, leaves nobody at the gate, and speaks HTTP/2."""

    @pytest.mark.slow
    @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(said=conversations(), is_cut=st.booleans())
    def test_conversations(self, said: list[bytes], is_cut: bool) -> None:  # noqa: FBT001 - drawn
        """Streams of messages and frames, most of them sensible, whole or in small pieces."""
        whole = b"".join(said)
        pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)] if is_cut else [whole]

        expect_frames(asyncio.run(talk(pieces)))

    @settings(max_examples=50)
    @given(st.binary(max_size=200))
    def test_noise(self, noise: bytes) -> None:
        """Any bytes, with a greeting ahead and without."""
        one(b"\x00" + noise)
        one(b"\x01" + noise)

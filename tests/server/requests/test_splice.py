"""Bodies that are cut out and put back, held against a codec that shares no code."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.common.envoy_messages import ProcessingRequest as Own
from flowcontrol_server.requests.splice import (
    CHUNK_BYTES_MAX,
    BodyPart,
    LargeBody,
    NoBodyError,
    body_of,
    echoes,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is not up to date with pydantic
    from envoy_data_plane.envoy.service.ext_proc.v3 import HttpBody, ProcessingResponse

SIZES = [0, 1, 127, 128, 16_383, 16_384, 61_999, 62_000, 62_001, 124_000, 124_001, 1_048_576]


def written(part: BodyPart) -> bytes:
    """A message that carries a part, as Envoy writes it."""
    body = {"body": part.body, "end_of_stream": part.is_end}
    request = Own(request_body=body) if part.is_request else Own(response_body=body)
    request.metadata_context.filter_metadata["envoy.lb"].fields["a"].string_value = "b"
    message: bytes = request.SerializeToString()
    return message


def read(message: bytes) -> BodyPart:
    """What an answer sends back, as the other codec reads it."""
    response = ProcessingResponse.parse(message)
    answer = response.request_body or response.response_body
    assert answer is not None
    assert answer.response is not None
    assert answer.response.body_mutation is not None
    streamed = answer.response.body_mutation.streamed_response
    assert streamed is not None
    assert len(streamed.body) <= CHUNK_BYTES_MAX
    return BodyPart(response.request_body is not None, streamed.body, streamed.end_of_stream)


class TestSplice:
    """What goes in comes out."""

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("is_request", [True, False])
    @pytest.mark.parametrize("is_end", [True, False])
    def test_there_and_back(self, *, size: int, is_request: bool, is_end: bool) -> None:
        """Byte for byte, in parts of at most 62,000, the end once and last."""
        part = BodyPart(is_request, bytes(number % 251 for number in range(size)), is_end)

        assert body_of(written(part)) == part
        back = [read(message) for message in echoes(part)]
        assert b"".join(each.body for each in back) == part.body
        assert [each.is_end for each in back][:-1] == [False] * (len(back) - 1)
        assert (back[-1].is_end if back else False) == is_end
        assert all(each.is_request == is_request for each in back)
        assert len(back) == max(-(-size // CHUNK_BYTES_MAX), int(is_end))

    def test_others_are_left_to_the_codec(self) -> None:
        """Messages without a body, and such as our own encoder would not write."""
        body = written(BodyPart(is_request=True, body=b"abc", is_end=True))
        twice = body + Own(request_body={"body": b"d"}).SerializeToString()

        assert body_of(Own(request_headers={}).SerializeToString()) is None
        assert body_of(b"") is None
        assert body_of(twice) is None
        for end in range(1, len(body)):
            cut = body_of(body[:end])
            assert cut is None or cut == BodyPart(is_request=True, body=b"abc", is_end=True)

    @given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: b"\x22" + tail))
    def test_never_otherwise_than_protobuf(self, message: bytes) -> None:
        """Whatever is read by hand, protobuf reads the same."""
        part = body_of(message)
        if part is not None:
            request = Own.FromString(message)
            assert request.WhichOneof("request") in {"request_body", "response_body"}
            body = request.request_body if part.is_request else request.response_body
            assert part == BodyPart(
                request.WhichOneof("request") == "request_body", body.body, body.end_of_stream
            )

    def test_http_body_has_no_other_fields(self) -> None:
        """A field of HttpBody that is new to us makes the codec read the message."""
        odd = HttpBody(body=b"abc", grpc_message_compressed=True)
        message = b"\x22" + bytes([len(bytes(odd))]) + bytes(odd)

        assert body_of(message) is None


@given(
    body=st.binary(min_size=20, max_size=3000),
    is_request=st.booleans(),
    is_end=st.booleans(),
    cuts=st.lists(st.integers(1, 400), max_size=12),
    after=st.binary(max_size=5),
)
def test_large(
    body: bytes, *, is_request: bool, is_end: bool, cuts: list[int], after: bytes
) -> None:
    """However a large message is cut, its parts are its body, and nothing is lost."""
    message = written(BodyPart(is_request, body, is_end))
    large, data, left = LargeBody(len(message)), message + after, b""
    parts = []
    for size in (*cuts, len(data)):
        piece, data = data[:size], data[size:]
        messages, rest = large.take(piece)
        parts += [Own.FromString(each) for each in messages]
        if rest is not None:
            left = rest + data
            break
    kind = "request_body" if is_request else "response_body"

    assert left == after
    assert {part.WhichOneof("request") for part in parts} == {kind}
    assert b"".join(getattr(part, kind).body for part in parts) == body
    assert [getattr(part, kind).end_of_stream for part in parts[:-1]] == [False] * len(parts[:-1])
    assert getattr(parts[-1], kind).end_of_stream == is_end
    assert parts[-1].metadata_context == Own.FromString(message).metadata_context


@pytest.mark.parametrize(
    "message",
    [
        Own(response_trailers={}).SerializeToString() + b"\x00" * 30,
        b"\x22\x20\x10\x01" + b"\x0a\x1c" + b"x" * 28,
        b"\x22" + b"\xff" * 30,
        b"\x22\x05\x0a\x40" + b"x" * 70,
    ],
)
def test_not_large(message: bytes) -> None:
    """What is not written as Envoy writes a part of a body is not passed on."""
    with pytest.raises(NoBodyError):
        LargeBody(len(message)).take(message)

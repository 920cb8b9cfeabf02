"""What is read by hand is what protobuf reads, or left to it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.common.envoy_messages import ProcessingRequest, StreamAccessLogsMessage
from flowcontrol_server.requests import wire
from flowcontrol_server.requests.wire import LogReport, Opening, UnexpectedError

ATTRIBUTES = "envoy.filters.http.ext_proc"
NAMES = st.sampled_from([":path", "content-length", "x-request-id", "user", ""]) | st.text(
    max_size=6
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
STRUCTS = st.dictionaries(NAMES, PLAIN, max_size=4)


@st.composite
def openings(draw: st.DrawFn) -> bytes:
    """The headers of a request or a response, as protobuf writes them."""
    request = ProcessingRequest()
    said = request.response_headers if draw(st.booleans()) else request.request_headers
    said.end_of_stream = draw(st.booleans())
    for name in draw(st.lists(NAMES, max_size=5)):
        header = said.headers.headers.add(key=name)
        if draw(st.booleans()):
            header.raw_value = draw(st.binary(max_size=200))
        else:
            header.value = draw(st.text(max_size=8))
    for namespace, struct in draw(st.dictionaries(NAMES, STRUCTS, max_size=3)).items():
        request.metadata_context.filter_metadata[namespace].update(struct)
    if draw(st.booleans()):
        request.attributes[ATTRIBUTES].update(draw(STRUCTS))
    if draw(st.booleans()):
        request.protocol_config.request_body_mode = draw(st.integers(0, 4))
        request.protocol_config.response_body_mode = draw(st.integers(0, 4))
    request.observability_mode = draw(st.booleans())
    data: bytes = request.SerializeToString()
    return data


def plain(value: Any) -> Any:
    """A Value or a Struct of protobuf's as what JSON can hold."""
    if hasattr(value, "fields"):
        return {name: plain(value.fields[name]) for name in value.fields}
    kind = value.WhichOneof("kind")
    if kind == "list_value":
        return [plain(each) for each in value.list_value.values]
    if kind in {None, "null_value"}:
        return None
    found = getattr(value, kind)
    return plain(found) if kind == "struct_value" else found


def read(data: bytes) -> Opening | None:
    """What is read by hand; None where it is left to protobuf."""
    try:
        return Opening(data)
    except (UnexpectedError, UnicodeDecodeError):
        return None


def has_odd_text(value: Any) -> bool:
    """Whether there is text in it that is not UTF-8, which protobuf does not take."""
    if isinstance(value, dict):
        return any(map(has_odd_text, value.values()))
    if isinstance(value, list):
        return any(map(has_odd_text, value))
    if not isinstance(value, str):
        return False
    try:
        value.encode("latin-1").decode()
    except UnicodeEncodeError:
        return False
    except UnicodeDecodeError:
        return True
    return False


def expect_same(opening: Opening, data: bytes) -> None:
    """It holds what protobuf finds in the same bytes."""
    if has_odd_text(opening.attributes) or has_odd_text(opening.metadata):
        return
    request = ProcessingRequest.FromString(data)
    kind = "response_headers" if opening.is_response else "request_headers"
    said = getattr(request, kind)
    assert request.WhichOneof("request") == kind
    headers: dict[str, str] = {}
    for each in said.headers.headers:
        headers.setdefault(each.key, wire.header_text(each.raw_value) or each.value)
    assert opening.headers == headers
    assert opening.is_end == said.end_of_stream
    metadata = request.metadata_context.filter_metadata
    assert (opening.metadata or {}) == {name: plain(metadata[name]) for name in metadata}
    assert (opening.metadata is None) == (not request.HasField("metadata_context"))
    assert opening.attributes == {k: plain(request.attributes[k]) for k in request.attributes}
    modes = request.protocol_config
    expected = (modes.request_body_mode, modes.response_body_mode)
    assert opening.modes == (expected if request.HasField("protocol_config") else None)


class TestOpening:
    """The headers of a request, which open a conversation, and of a response."""

    @given(openings())
    def test_same(self, data: bytes) -> None:
        """All that protobuf writes is read by hand, and means the same."""
        opening = read(data)

        assert opening is not None
        expect_same(opening, data)

    @given(openings(), st.data())
    def test_changed(self, data: bytes, draw: st.DataObject) -> None:
        """Of bytes that were changed, cut off or moved, none is read as something else."""
        at = draw.draw(st.integers(0, len(data)))
        size = draw.draw(st.integers(0, 4))
        changed = data[:at] + draw.draw(st.binary(max_size=4)) + data[at + size :]
        opening = read(changed)

        if opening is not None:
            expect_same(opening, changed)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are read as protobuf reads them, or left to it."""
        opening = read(data)

        if opening is not None:
            expect_same(opening, data)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # a length beyond 35 bits
            b"\x12\x00\x12\x00",  # twice: protobuf puts them together
            b"\x12\x05ab",  # cut off
            b"\x12\x00\x1a\x00",  # a response, too
            b"\x12\x00\x7a\x00",  # a field of a later version
        ],
    )
    def test_left_to_protobuf(self, data: bytes) -> None:
        """What is not written as expected is not read."""
        assert read(data) is None

    def test_deep_nesting(self) -> None:
        """A struct in a struct in a struct: protobuf says how deep is too deep."""
        request = ProcessingRequest()
        request.request_headers.SetInParent()
        inner = request.metadata_context.filter_metadata["a"]
        for _ in range(20):
            inner = inner.fields["b"].struct_value
        inner.SetInParent()

        assert read(request.SerializeToString()) is None


def reports(data: bytes) -> list[tuple[bytes, dict[str, str] | None]] | None:
    """What is read by hand of a log; None where it is left to protobuf."""
    try:
        return [(each.report, each.load) for each in wire.log_reports(data, "mine", 3)]
    except (UnexpectedError, UnicodeDecodeError):
        return None


class TestLog:
    """The access log."""

    @given(st.lists(st.dictionaries(NAMES | st.just("mine"), st.text(max_size=300)), max_size=3))
    def test_same(self, tags: list[dict[str, str]]) -> None:
        """The tag that is wanted, and the headers that are logged."""
        message = StreamAccessLogsMessage()
        message.identifier.log_name = "flowcontrol"
        message.http_logs.SetInParent()
        for each in tags:
            entry = message.http_logs.log_entry.add(protocol_version=2)
            entry.common_properties.custom_tags.update(each)
            entry.common_properties.start_time.seconds = 1_700_000_000
            entry.common_properties.sample_rate = 0.5
            entry.common_properties.downstream_wire_bytes_sent = 2**63
            entry.response.response_headers.update(each)
            entry.response.response_code.value = 200

        expected = [(each.get("mine", "").encode(), each or None) for each in tags]
        assert reports(message.SerializeToString()) == expected

    def test_too_many(self) -> None:
        """No more entries are read than may be there."""
        message = StreamAccessLogsMessage()
        for _ in range(4):
            message.http_logs.log_entry.add()

        assert reports(message.SerializeToString()) is None

    @given(st.binary(max_size=60))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are a log, or left to protobuf."""
        try:
            found = wire.log_reports(data, "mine", 3)
        except (UnexpectedError, UnicodeDecodeError):
            return
        assert all(isinstance(each, LogReport) for each in found)

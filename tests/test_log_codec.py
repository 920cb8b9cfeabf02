"""Envoy's access log, written by a codec that shares no code with ours."""

import warnings
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.log_codec import LogEntry, MalformedLogError, decode_log

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is not up to date with pydantic
    from envoy_data_plane.envoy.config.core.v3 import Address, Metadata, Pipe, SocketAddress
    from envoy_data_plane.envoy.data.accesslog.v3 import (
        AccessLogCommon,
        HttpAccessLogEntry,
        HttpRequestProperties,
        HttpResponseProperties,
        ResponseFlags,
    )
    from envoy_data_plane.envoy.service.accesslog.v3 import (
        StreamAccessLogsMessage,
        StreamAccessLogsMessageHttpAccessLogEntries,
    )
    from envoy_data_plane.google.protobuf import Struct, Value

NOTHING = LogEntry(ticket="", status=0, is_success=True)


def message(*entries: HttpAccessLogEntry) -> bytes:
    """A message as Envoy would send it."""
    http_logs = StreamAccessLogsMessageHttpAccessLogEntries(log_entry=list(entries))
    return bytes(StreamAccessLogsMessage(http_logs=http_logs))


def with_metadata(**namespaces: dict[str, Value]) -> HttpAccessLogEntry:
    """An entry with metadata; _ in a namespace stands for a dot."""
    structs = {name.replace("_", "."): Struct(fields=f) for name, f in namespaces.items()}
    common = AccessLogCommon(metadata=Metadata(filter_metadata=structs))
    return HttpAccessLogEntry(common_properties=common)


def numbers(**values: float) -> dict[str, Value]:
    """Fields that are numbers."""
    return {name: Value(number_value=value) for name, value in values.items()}


class TestDecode:
    """One entry, field by field."""

    def test_everything(self) -> None:
        """Whatever Envoy knows of a request."""
        common = AccessLogCommon(
            metadata=Metadata(
                filter_metadata={
                    "flowcontrol": Struct(fields={"ticket": Value(string_value="abc.17")}),
                    "flowcontrol.usage": Struct(
                        fields=numbers(input_tokens=11, cached_tokens=3, output_tokens=7)
                    ),
                    "flowcontrol.request": Struct(fields={"model": Value(string_value="m")}),
                }
            ),
            custom_tags={"ttft_us": "171979", "generation_us": "82958", "parked_us": "2600"},
            upstream_remote_address=Address(
                socket_address=SocketAddress(address="10.0.0.5", port_value=8000)
            ),
            time_to_first_upstream_rx_byte=timedelta(milliseconds=2),
        )
        entry = HttpAccessLogEntry(
            common_properties=common,
            request=HttpRequestProperties(request_body_bytes=123),
            response=HttpResponseProperties(
                response_code=200,
                response_body_bytes=456,
                response_headers={"endpoint-load-metrics": "TEXT cpu_utilization=0.3"},
            ),
        )

        expected = LogEntry(
            ticket="abc.17",
            status=200,
            is_success=True,
            ttft_us=171_979,
            generation_us=82_958,
            parked_us=2600,
            input_tokens=11,
            cached_tokens=3,
            output_tokens=7,
            request_bytes=123,
            response_bytes=456,
            endpoint="10.0.0.5:8000",
            load_report={"endpoint-load-metrics": "TEXT cpu_utilization=0.3"},
        )
        assert [expected] == decode_log(message(entry))

    def test_nothing(self) -> None:
        """An entry that says nothing is one."""
        assert decode_log(message(HttpAccessLogEntry(), HttpAccessLogEntry())) == [NOTHING, NOTHING]

    def test_no_entries(self) -> None:
        """The first message may only say who speaks."""
        assert decode_log(b"") == []

    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            (
                Address(socket_address=SocketAddress(address="fd00::1", port_value=80)),
                "[fd00::1]:80",
            ),
            (Address(pipe=Pipe(path="/run/server.sock")), ""),
            (None, ""),
        ],
    )
    def test_endpoint(self, address: Address | None, expected: str) -> None:
        """As host:port, like the endpoints of the pool."""
        entry = HttpAccessLogEntry(
            common_properties=AccessLogCommon(upstream_remote_address=address)
        )

        assert decode_log(message(entry))[0].endpoint == expected

    @pytest.mark.parametrize("value", [-1.0, 1e300, float("nan"), float("inf"), float("-inf")])
    def test_strange_numbers(self, value: float) -> None:
        """A count that no request can have is unknown."""
        entry = with_metadata(flowcontrol_usage=numbers(output_tokens=value))

        assert decode_log(message(entry)) == [NOTHING]

    @pytest.mark.parametrize("text", ["", "-", "-1", "1.5", "soon", "9" * 30])
    def test_strange_times(self, text: str) -> None:
        """A time that is none is unknown; Envoy leaves out or writes - what it does not know."""
        common = AccessLogCommon(custom_tags={"ttft_us": text})

        assert decode_log(message(HttpAccessLogEntry(common_properties=common))) == [NOTHING]

    def test_ticket_is_no_text(self) -> None:
        """A ticket of another kind is none."""
        assert decode_log(message(with_metadata(flowcontrol=numbers(ticket=17)))) == [NOTHING]


class TestSuccess:
    """Whether the model server did its part."""

    @pytest.mark.parametrize(
        ("status", "is_success", "is_failure"),
        [
            *((200, True, False), (304, True, False), (400, False, False), (429, False, False)),
            *((500, False, True), (503, False, True), (0, True, False)),
        ],
    )
    def test_status(self, status: int, *, is_success: bool, is_failure: bool) -> None:
        """Below 400 it did, from 500 it failed; in between the request is to blame."""
        entry = HttpAccessLogEntry(response=HttpResponseProperties(response_code=status))

        (found,) = decode_log(message(entry))
        assert (found.is_success, found.is_failure) == (is_success, is_failure)

    @pytest.mark.parametrize(
        ("status", "details", "expected"),
        [
            *((429, "via_upstream", True), (503, "via_upstream", True)),
            *((503, "upstream_reset_before_response_started{connection_failure}", False),),
            *((500, "via_upstream", False), (200, "via_upstream", False), (429, "", False)),
        ],
    )
    def test_turned_away(self, status: int, details: str, *, expected: bool) -> None:
        """A server without room says so itself; that Envoy finds none is another matter."""
        entry = HttpAccessLogEntry(
            response=HttpResponseProperties(response_code=status, response_code_details=details)
        )

        assert decode_log(message(entry))[0].was_turned_away is expected

    @pytest.mark.parametrize(
        ("flags", "is_success"),
        [
            (ResponseFlags(upstream_remote_reset=True), False),
            (ResponseFlags(upstream_protocol_error=True), False),
            (ResponseFlags(upstream_request_timeout=True), False),
            (ResponseFlags(downstream_connection_termination=True), True),
            (ResponseFlags(), True),
        ],
    )
    def test_flags(self, flags: ResponseFlags, *, is_success: bool) -> None:
        """A response that broke off began with 200; a client that went away is no failure."""
        entry = HttpAccessLogEntry(
            common_properties=AccessLogCommon(response_flags=flags),
            response=HttpResponseProperties(response_code=200),
        )

        (found,) = decode_log(message(entry))
        assert (found.is_success, found.is_failure) == (is_success, not is_success)


class TestGarbage:
    """Bytes that are no log."""

    @pytest.mark.parametrize("data", [b"\xff", b"GET / HTTP/1.1\r\n", b"\x12\x05abc"])
    def test_malformed(self, data: bytes) -> None:
        """They are said to be malformed."""
        with pytest.raises(MalformedLogError, match=r"^not a StreamAccessLogsMessage$"):
            decode_log(data)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are a log or malformed, never another error."""
        try:
            entries = decode_log(data)
        except MalformedLogError:
            return
        assert all(isinstance(entry, LogEntry) for entry in entries)

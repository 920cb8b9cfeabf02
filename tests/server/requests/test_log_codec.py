"""Envoy's access log, written by a codec that shares no code with ours."""

import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.requests.codec import MalformedMessageError
from flowcontrol_server.requests.log_codec import REPORT_FORMAT, REPORT_TAG, LogEntry, decode_log

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is not up to date with pydantic
    from envoy_data_plane.envoy.data.accesslog.v3 import (
        AccessLogCommon,
        HttpAccessLogEntry,
        HttpResponseProperties,
    )
    from envoy_data_plane.envoy.service.accesslog.v3 import (
        StreamAccessLogsMessage,
        StreamAccessLogsMessageHttpAccessLogEntries,
    )

NOTHING = LogEntry(ticket="", status=0, is_success=True)
UNKNOWN = replace(NOTHING, ticket="-", was_abandoned=True)
COMMANDS = {
    "ticket": "%DYNAMIC_METADATA(flowcontrol:ticket)%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "parked": "%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
    "ttft": "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%",
    "generation": "%COMMON_DURATION(US_RX_BODY_BEG:US_RX_END:us)%",
    "input_": "%DYNAMIC_METADATA(flowcontrol.usage:input_tokens)%",
    "cached": "%DYNAMIC_METADATA(flowcontrol.usage:cached_tokens)%",
    "output": "%DYNAMIC_METADATA(flowcontrol.usage:output_tokens)%",
    "cache_read": "%DYNAMIC_METADATA(flowcontrol.usage:cache_read_tokens)%",
    "cache_creation": "%DYNAMIC_METADATA(flowcontrol.usage:cache_creation_tokens)%",
    "total": "%DYNAMIC_METADATA(flowcontrol.usage:total_tokens)%",
    "error": "%DYNAMIC_METADATA(flowcontrol.usage:error)%",
    "grpc_status": "%GRPC_STATUS_NUMBER%",
    "late": "%DYNAMIC_METADATA(flowcontrol.usage:first_token_late_ms)%",
    "received": "%BYTES_RECEIVED%",
    "sent": "%BYTES_SENT%",
    "address": "%UPSTREAM_REMOTE_ADDRESS%",
}
"""What Envoy is asked for, by the names that this test uses."""


def read(data: bytes) -> list[LogEntry]:
    """All entries of a message."""
    return list(decode_log(data))


def message(*entries: HttpAccessLogEntry) -> bytes:
    """A message as Envoy would send it."""
    http_logs = StreamAccessLogsMessageHttpAccessLogEntries(log_entry=list(entries))
    return bytes(StreamAccessLogsMessage(http_logs=http_logs))


def entry(**said: object) -> HttpAccessLogEntry:
    """An entry in which Envoy says this, and a dash of everything else."""
    line = REPORT_FORMAT
    for name, command in COMMANDS.items():
        assert line.count(command) == 1
        line = line.replace(command, str(said.get(name, "-")))
    return HttpAccessLogEntry(common_properties=AccessLogCommon(custom_tags={REPORT_TAG: line}))


class TestDecode:
    """One entry, word by word."""

    def test_everything(self) -> None:
        """Whatever Envoy knows of a request."""
        full = entry(
            ticket="abc.17",
            status=200,
            details="via_upstream",
            parked=2600,
            ttft=171_979,
            generation=82_958,
            input_=11,
            cached=3,
            output=7,
            received=123,
            sent=456,
            address="10.0.0.5:8000",
        )
        reported = {"endpoint-load-metrics": "TEXT cpu_utilization=0.3"}
        full.response = HttpResponseProperties(response_headers=reported)

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
            load_report=reported,
        )
        assert [expected] == read(message(full))

    def test_nothing(self) -> None:
        """An entry that says nothing is one, whether it says so or not."""
        assert read(message(HttpAccessLogEntry(), entry())) == [NOTHING, UNKNOWN]

    @pytest.mark.parametrize("line", ["", "abc.17", "abc.17 200 via_upstream -", " " * 11])
    def test_too_short(self, line: str) -> None:
        """A line that is not the one we ask for says nothing."""
        common = AccessLogCommon(custom_tags={REPORT_TAG: line})

        assert read(message(HttpAccessLogEntry(common_properties=common))) == [NOTHING]

    def test_no_entries(self) -> None:
        """The first message may only say who speaks."""
        assert read(b"") == []

    def test_too_many_entries(self) -> None:
        """A message of entries that say nothing is refused: 500,000 of them fit into 1 MiB."""
        assert read(message(*[HttpAccessLogEntry()] * 10_000)) == [NOTHING] * 10_000
        with pytest.raises(MalformedMessageError, match="at most 10000 entries, got 10001"):
            read(message(*[HttpAccessLogEntry()] * 10_001))

    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("10.0.0.5:8000", "10.0.0.5:8000"),
            ("[fd00::1]:80", "[fd00::1]:80"),
            ("/run/the server.sock", ""),
            ("-", ""),
            ("", ""),
        ],
    )
    def test_endpoint(self, address: str, expected: str) -> None:
        """As host:port, like the endpoints of the pool."""
        assert read(message(entry(address=address)))[0].endpoint == expected

    @pytest.mark.parametrize("text", ["", "-", "-1", "1.5", "1e+300", "inf", "soon", "9" * 30])
    def test_strange_numbers(self, text: str) -> None:
        """A count or a time that no request can have is unknown."""
        assert read(message(entry(output=text, ttft=text, sent=text))) == [UNKNOWN]


class TestTokens:
    """What the words of each API for usage come to."""

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ({"input_": 11, "cached": 3, "output": 7}, (11, 3, 7)),
            ({"input_": 12, "cache_read": 9000, "cache_creation": 0}, (9012, 9000, None)),
            ({"input_": 12, "cache_creation": 4511, "output": 7}, (4523, None, 7)),
            ({"input_": 5, "total": 5}, (5, None, 0)),
            ({"input_": 11, "output": 7, "total": 18}, (11, None, 7)),
            ({"total": 15}, (15, None, 0)),
            ({"output": 7, "total": 11}, (11, None, 7)),  # Ollama's
            ({}, (None, None, None)),
        ],
    )
    def test_sums(
        self, said: dict[str, int], expected: tuple[int | None, int | None, int | None]
    ) -> None:
        """Caches that are counted apart belong to the prompt; a total says what is not said."""
        (found,) = read(message(entry(**said)))
        assert (found.input_tokens, found.cached_tokens, found.output_tokens) == expected

    def test_late_first_token(self) -> None:
        """What came before the first token is time to it, not generation."""
        (found,) = read(message(entry(ttft=800, generation=2_000_000, late=1400)))
        assert (found.ttft_us, found.generation_us) == (1_400_800, 600_000)


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
        (found,) = read(message(entry(status=status)))
        assert (found.is_success, found.is_failure) == (is_success, is_failure)

    @pytest.mark.parametrize(
        ("status", "details", "expected"),
        [
            *((429, "via_upstream", True), (503, "via_upstream", True)),
            *((503, "upstream_reset_before_response_started{connection_failure}", False),),
            *((500, "via_upstream", False), (200, "via_upstream", False), (429, "-", False)),
        ],
    )
    def test_turned_away(self, status: int, details: str, *, expected: bool) -> None:
        """A server without room says so itself; that Envoy finds none is another matter."""
        (found,) = read(message(entry(status=status, details=details)))
        assert found.was_turned_away is expected

    @pytest.mark.parametrize(
        ("error", "is_failure", "was_turned_away"),
        [(500, True, False), (503, True, True), (429, False, True), (400, False, False)],
    )
    def test_error_inside(self, error: int, *, is_failure: bool, was_turned_away: bool) -> None:
        """A response of 200 with an error inside counts as one of the error's status."""
        said = {"status": 200, "details": "via_upstream", "error": error}
        (found,) = read(message(entry(**said)))
        assert (found.is_success, found.status) == (False, error)
        assert (found.is_failure, found.was_turned_away) == (is_failure, was_turned_away)

    @pytest.mark.parametrize(
        ("grpc_status", "status", "is_failure", "was_turned_away"),
        [
            *((0, 200, False, False), (17, 200, False, False), ("-", 200, False, False)),
            *((2, 500, True, False), (14, 503, True, True), (8, 429, False, True)),
            *((3, 400, False, False), (12, 400, False, False), (16, 401, False, False)),
        ],
    )
    def test_grpc_status(
        self, grpc_status: object, status: int, *, is_failure: bool, was_turned_away: bool
    ) -> None:
        """An error of gRPC counts as one of HTTP; an unknown status is none."""
        said = {"status": 200, "details": "via_upstream", "grpc_status": grpc_status}
        (found,) = read(message(entry(**said)))
        assert (found.status, found.is_success) == (status, status == 200)
        assert (found.is_failure, found.was_turned_away) == (is_failure, was_turned_away)

    def test_configuration_of_before(self) -> None:
        """An Envoy that is not asked for gRPC's status is read as before."""
        line = REPORT_FORMAT.replace("/%GRPC_STATUS_NUMBER%", "")
        line = line.replace(COMMANDS["error"], "503").replace(COMMANDS["status"], "200")
        common = AccessLogCommon(custom_tags={REPORT_TAG: line})

        assert read(message(HttpAccessLogEntry(common_properties=common)))[0].status == 503

    @pytest.mark.parametrize(
        ("flags", "is_success"),
        [
            *(("UR", False), ("UPE", False), ("UT", False), ("UF,URX", False), ("DC,UC", False)),
            *(("DC", True), ("-", True), ("", True)),
        ],
    )
    def test_flags(self, flags: str, *, is_success: bool) -> None:
        """A response that broke off began with 200; a client that went away is no failure."""
        (found,) = read(message(entry(status=200, flags=flags)))
        assert (found.is_success, found.is_failure) == (is_success, not is_success)

    @pytest.mark.parametrize(
        ("flags", "expected"), [("UF", True), ("UF,URX", True), ("UC", False), ("-", False)]
    )
    def test_unreachable(self, flags: str, *, expected: bool) -> None:
        """Whether the connection could not be made at all."""
        (found,) = read(message(entry(status=503, flags=flags)))
        assert found.is_unreachable is expected

    @pytest.mark.parametrize(
        ("status", "details", "flags", "expected"),
        [
            *((200, "via_upstream", "-", False), (404, "via_upstream", "-", False)),
            *((200, "via_upstream", "DC", True), (0, "downstream_remote_disconnect", "DC", True)),
            *((200, "http2.remote_reset", "DR", True), (408, "request_overall_timeout", "-", True)),
            *((429, "evicted", "-", True), (500, "via_upstream", "DC", False)),
            (200, "upstream_reset_after_response_started", "DC,UC", False),
        ],
    )
    def test_abandoned(self, status: int, details: str, flags: str, *, expected: bool) -> None:
        """A client that left, or was answered by others, says nothing of the model server."""
        (found,) = read(message(entry(status=status, details=details, flags=flags)))
        assert found.was_abandoned is expected


class TestGarbage:
    """Bytes that are no log."""

    @pytest.mark.parametrize("data", [b"\xff", b"GET / HTTP/1.1\r\n", b"\x12\x05abc"])
    def test_malformed(self, data: bytes) -> None:
        """They are said to be malformed."""
        with pytest.raises(MalformedMessageError, match=r"^not a StreamAccessLogsMessage$"):
            read(data)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are a log or malformed, never another error."""
        try:
            entries = read(data)
        except MalformedMessageError:
            return
        assert all(isinstance(entry, LogEntry) for entry in entries)

    @given(st.lists(st.text(max_size=20), max_size=20))
    def test_any_line(self, words: list[str]) -> None:
        """Any line is an entry."""
        common = AccessLogCommon(custom_tags={REPORT_TAG: " ".join(words)})

        assert len(read(message(HttpAccessLogEntry(common_properties=common)))) == 1

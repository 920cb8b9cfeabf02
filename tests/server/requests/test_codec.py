"""Two codecs that share no code must agree on the bytes.

`requests.codec` is written on Google's protobuf; `envoy_data_plane` on betterproto2.
"""

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.requests import codec
from flowcontrol_server.requests.classify import CONTROL_HEADERS
from flowcontrol_server.requests.codec import (
    ENGINE_HEADERS,
    TICKET,
    UNSENT_BYTES_MAX,
    Encoder,
    MalformedMessageError,
)
from flowcontrol_server.requests.dialects import Dialect, content_type_of, error_body
from flowcontrol_server.requests.exchange import (
    Acknowledge,
    FurtherAttempt,
    Message,
    MessageKind,
    Mode,
    Reply,
)
from flowcontrol_server.requests.replies import (
    ENGINE_PRIORITIES,
    REFUSALS,
    Exempt,
    Refuse,
    refusal,
)
from flowcontrol_server.requests.splice import BodyPart
from flowcontrol_server.requests.tickets import TICKETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is not up to date with pydantic
    from envoy_data_plane.envoy.config.core.v3 import (
        HeaderMap,
        HeaderValue,
        HeaderValueOption,
        HeaderValueOptionHeaderAppendAction,
        Metadata,
    )
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
        ProcessingMode,
        ProcessingModeBodySendMode,
        ProcessingModeHeaderSendMode,
    )
    from envoy_data_plane.envoy.service.ext_proc.v3 import (
        BodyResponse,
        CommonResponse,
        GrpcStatus,
        HeaderMutation,
        HeadersResponse,
        HttpBody,
        HttpHeaders,
        HttpTrailers,
        ImmediateResponse,
        ProcessingRequest,
        ProcessingResponse,
        ProtocolConfiguration,
        TrailersResponse,
    )
    from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
    from envoy_data_plane.google.protobuf import ListValue, NullValue, Struct, Value

MARK = Struct(fields={"admitted": Value(bool_value=True)})
OVERWRITE = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


def request_with(*headers: HeaderValue) -> bytes:
    """The request headers as Envoy would send them."""
    http = HttpHeaders(headers=HeaderMap(headers=list(headers)), end_of_stream=True)
    return bytes(ProcessingRequest(request_headers=http))


def parsed(reply: Reply, encoder: Encoder | None = None) -> ProcessingResponse:
    """Our reply as the other codec reads it."""
    (message,) = (encoder or Encoder()).encode(reply)
    return ProcessingResponse.parse(message)


def decode(data: bytes) -> Message:
    """A message that is no part of a body."""
    message = codec.decode(data)
    assert isinstance(message, Message)
    return message


def raw(name: str, value: bytes) -> HeaderValueOption:
    """A header that replaces what is there, its value in raw_value."""
    return HeaderValueOption(
        header=HeaderValue(key=name, value="", raw_value=value), append_action=OVERWRITE
    )


class TestDecodeHeaders:
    """Request headers, written by the other codec."""

    def test_raw_value_or_value(self) -> None:
        """Envoy sends raw_value; others send value."""
        data = request_with(
            HeaderValue(key=":path", raw_value=b"/v1/completions"),
            HeaderValue(key="content-length", value="12"),
            HeaderValue(key="x-empty"),
        )

        headers = {":path": "/v1/completions", "content-length": "12", "x-empty": ""}
        expected = Message(MessageKind.REQUEST_HEADERS, headers, is_end=True)
        assert expected == decode(data)

    def test_both(self) -> None:
        """Where both are set, raw_value counts, as in Envoy."""
        data = request_with(HeaderValue(key="a", value="value", raw_value=b"raw"))

        assert decode(data).headers == {"a": "raw"}

    def test_first_wins(self) -> None:
        """Of a repeated header the first value counts, also when it is empty."""
        data = request_with(
            HeaderValue(key="a", raw_value=b"first"),
            HeaderValue(key="a", raw_value=b"second"),
            HeaderValue(key="b"),
            HeaderValue(key="b", raw_value=b"second"),
        )

        assert decode(data).headers == {"a": "first", "b": ""}

    def test_not_utf_8(self) -> None:
        """Bytes that are no UTF-8 are kept, one character each."""
        data = request_with(HeaderValue(key="a", raw_value=bytes(range(1, 256))))

        assert decode(data).headers["a"].encode("latin-1") == bytes(range(1, 256))

    @pytest.mark.parametrize("text", ["日本", "naïve", "\x7f", "😀"])
    def test_utf_8(self, text: str) -> None:
        """A tenant is called the same in a header as in a body or in the settings."""
        assert decode(request_with(HeaderValue(key="a", raw_value=text.encode()))).headers == {
            "a": text
        }

    def test_no_headers(self) -> None:
        """A request without a header is a request."""
        assert decode(request_with()).headers == {}
        assert decode(bytes(ProcessingRequest(request_headers=HttpHeaders()))).headers == {}

    def test_metadata(self) -> None:
        """What Envoy's filters found comes as plain values, namespace by namespace."""
        text, number = Value(string_value="llama"), Value(number_value=512)
        nested = Struct(
            fields={"vip": Value(bool_value=True), "none": Value(null_value=NullValue(0))}
        )
        listed = ListValue(values=[text, number, Value(struct_value=nested)])
        found = {
            "flowcontrol.request": Struct(fields={"model": text, "max_tokens": number}),
            "claims": Struct(fields={"all": Value(list_value=listed), "unset": Value()}),
            "empty": Struct(),
        }
        headers = HttpHeaders(headers=HeaderMap(headers=[HeaderValue(key="a", raw_value=b"b")]))
        request = ProcessingRequest(
            request_headers=headers, metadata_context=Metadata(filter_metadata=found)
        )

        message = decode(bytes(request))

        assert message.headers == {"a": "b"}
        assert message.metadata == {
            "flowcontrol.request": {"model": "llama", "max_tokens": 512.0},
            "claims": {"all": ["llama", 512.0, {"vip": True, "none": None}], "unset": None},
            "empty": {},
        }

    @pytest.mark.parametrize(
        ("announced", "counted", "expected"),
        [
            (b"12", 700.0, "12"),
            (None, 700.0, "700"),
            (None, 2.0**40, str(2**40)),
            (None, 0.0, "0"),
            (None, None, None),
        ],
    )
    def test_size(
        self, announced: bytes | None, counted: float | None, expected: str | None
    ) -> None:
        """What Envoy counted stands for what was not announced."""
        size = None if announced is None else HeaderValue(key="content-length", raw_value=announced)
        fields = {} if counted is None else {"request.size": Value(number_value=counted)}
        request = ProcessingRequest(
            request_headers=HttpHeaders(headers=HeaderMap(headers=[size] if size else [])),
            attributes={"envoy.filters.http.ext_proc": Struct(fields=fields)} if fields else {},
        )

        assert decode(bytes(request)).headers.get("content-length") == expected

    @pytest.mark.parametrize(
        ("announced", "arrived", "expected"),
        [
            (b"1073741824", 300.0, str(300 + UNSENT_BYTES_MAX)),
            (b"1073741824", 2.0**30, "1073741824"),
            (b"1073741824", None, "1073741824"),
            (b"9" * 400, 300.0, str(300 + UNSENT_BYTES_MAX)),
            (b"1048000", 300.0, "1048000"),
            (b"-1073741824", 300.0, "-1073741824"),
        ],
    )
    def test_unsent(self, announced: bytes, arrived: float | None, expected: str) -> None:
        """Of what was announced and has not come a megabyte counts."""
        size = HeaderValue(key="content-length", raw_value=announced)
        fields = {"request.size": Value(number_value=2.0**30)}
        if arrived is not None:
            fields["request.total_size"] = Value(number_value=arrived)
        request = ProcessingRequest(
            request_headers=HttpHeaders(headers=HeaderMap(headers=[size])),
            attributes={"envoy.filters.http.ext_proc": Struct(fields=fields)},
        )

        assert decode(bytes(request)).headers["content-length"] == expected

    @pytest.mark.parametrize(
        ("metadata", "ticket"), [({TICKET: Value(string_value="ab.1.cd")}, "ab.1.cd"), ({}, "")]
    )
    def test_attempt(self, metadata: dict[str, Value], ticket: str) -> None:
        """Where Envoy sends a request again it says where to; the ticket is of the time before."""
        fields = {"upstream.address": Value(string_value="10.0.0.6:8000")}
        request = ProcessingRequest(
            request_headers=HttpHeaders(),
            attributes={"envoy.filters.http.ext_proc": Struct(fields=fields)},
            metadata_context=Metadata(filter_metadata={"flowcontrol": Struct(fields=metadata)}),
        )
        first = ProcessingRequest(
            request_headers=HttpHeaders(), metadata_context=request.metadata_context
        )
        message, opening = decode(bytes(request)), decode(bytes(first))
        assert isinstance(message, Message)
        assert isinstance(opening, Message)

        assert (message.attempt, opening.attempt) == (FurtherAttempt(ticket, "10.0.0.6:8000"), None)

    def test_attributes(self) -> None:
        """When the request came is told; its id stands for a header that is missing."""
        text = {"request.time": "2026-11-28T13:48:29.447108+00:00", "request.id": "theirs"}
        fields = {name: Value(string_value=value) for name, value in text.items()}
        attributes = {"envoy.filters.http.ext_proc": Struct(fields=fields)}
        own = [HeaderValue(key="x-request-id", raw_value=b"ours")]
        bare = ProcessingRequest(request_headers=HttpHeaders(), attributes=attributes)
        full = ProcessingRequest(
            request_headers=HttpHeaders(headers=HeaderMap(headers=own)), attributes=attributes
        )

        assert decode(bytes(bare)).began == text["request.time"]
        assert decode(bytes(bare)).headers["x-request-id"] == "theirs"
        assert decode(bytes(full)).headers["x-request-id"] == "ours"

    @given(st.dictionaries(st.text(max_size=20), st.binary(max_size=50), max_size=10))
    def test_any_headers(self, headers: dict[str, bytes]) -> None:
        """Whatever the one codec writes, the other reads."""
        data = request_with(*(HeaderValue(key=k, raw_value=v) for k, v in headers.items()))

        read = decode(data).headers
        assert read.keys() == headers.keys()
        for name, value in headers.items():
            assert value in {read[name].encode(), read[name].encode("latin-1", "ignore")}


class TestDecode:
    """The other messages, and no messages."""

    @pytest.mark.parametrize(
        ("request_", "kind"),
        [
            (ProcessingRequest(request_trailers=HttpTrailers()), "request_trailers"),
            (ProcessingRequest(response_headers=HttpHeaders()), "response_headers"),
            (ProcessingRequest(response_trailers=HttpTrailers()), "response_trailers"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_later_messages(self, request_: ProcessingRequest, kind: str) -> None:
        """Of anything but request headers only the kind is told."""
        expected = Message(MessageKind(kind), {})

        assert expected == decode(bytes(request_))

    @pytest.mark.parametrize("is_request", [True, False])
    def test_bodies(self, *, is_request: bool) -> None:
        """A body is read whole, however it is written."""
        body = HttpBody(body=b"{}", end_of_stream=True)
        request = ProcessingRequest(request_body=body)
        plainly = bytes(request if is_request else ProcessingRequest(response_body=body))
        oddly = bytes(ProcessingRequest(observability_mode=True)) + plainly

        assert codec.decode(plainly) == BodyPart(is_request, b"{}", is_end=True)
        assert codec.decode(oddly) == BodyPart(is_request, b"{}", is_end=True)

    @pytest.mark.parametrize(
        ("modes", "expected"),
        [
            (None, None),
            (("NONE", "NONE"), Mode.ANSWERS),
            (("BUFFERED", "BUFFERED"), Mode.BUFFERED),
            (("FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED"), Mode.DUPLEX),
            (("FULL_DUPLEX_STREAMED", "NONE"), Mode.DUPLEX),
        ],
    )
    def test_modes(self, modes: tuple[str, str] | None, expected: Mode | None) -> None:
        """Envoy says in its first message which bodies it will send."""
        message = ProcessingRequest(request_headers=HttpHeaders(end_of_stream=True))
        if modes is not None:
            request, response = (ProcessingModeBodySendMode[mode] for mode in modes)
            message.protocol_config = ProtocolConfiguration(
                request_body_mode=request, response_body_mode=response
            )
        read = decode(bytes(message))

        assert (read.mode, read.is_end) == (expected, True)

    @pytest.mark.parametrize(
        ("request_", "response", "expected"),
        [
            ("STREAMED", "STREAMED", None),
            ("FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED", None),
            ("FULL_DUPLEX_STREAMED", "STREAMED", MessageKind.RESPONSE_BODY),
            ("BUFFERED_PARTIAL", "FULL_DUPLEX_STREAMED", MessageKind.REQUEST_BODY),
        ],
    )
    def test_one_body_to_be_sent_back(
        self, request_: str, response: str, expected: MessageKind | None
    ) -> None:
        """Where Envoy waits for one body alone, the other is named."""
        config = ProtocolConfiguration(
            request_body_mode=ProcessingModeBodySendMode[request_],
            response_body_mode=ProcessingModeBodySendMode[response],
        )
        headers = HttpHeaders(end_of_stream=True)
        read = decode(bytes(ProcessingRequest(request_headers=headers, protocol_config=config)))

        assert read.kept is expected

    def test_response_headers(self) -> None:
        """Status and content type of the response, and whether a body follows."""
        headers = HeaderMap(headers=[HeaderValue(key=":status", raw_value=b"204")])
        said = HttpHeaders(headers=headers, end_of_stream=True)
        message = decode(bytes(ProcessingRequest(response_headers=said)))

        assert isinstance(message, Message)
        assert (message.headers, message.is_end) == ({":status": "204"}, True)

    @pytest.mark.parametrize(
        "kind", ["request_headers", "request_trailers", "response_headers", "response_trailers"]
    )
    def test_text_that_is_not_utf_8(self, kind: str) -> None:
        """Envoy's attributes and metadata hold what clients send in headers, byte by byte."""
        said: dict[str, Any] = {kind: HttpHeaders() if kind.endswith("headers") else HttpTrailers()}
        text = Struct(fields={"request.id": Value(string_value="a-b")})
        request_ = ProcessingRequest(
            **said,
            attributes={"envoy.filters.http.ext_proc": text},
            metadata_context=Metadata(filter_metadata={"claims": text}),
        )
        message = codec.decode(bytes(request_).replace(b"a-b", b"a\xffb"))

        assert isinstance(message, Message)
        assert message.kind is MessageKind(kind)
        if kind.endswith("headers"):
            assert message.metadata == {"claims": {"request.id": "a\xffb"}}
        if kind == "request_headers":
            assert message.headers["x-request-id"] == "a\xffb"

    def test_nothing_asked(self) -> None:
        """A message that carries no request is malformed."""
        with pytest.raises(MalformedMessageError, match=r"^a ProcessingRequest without a request$"):
            decode(b"")
        with pytest.raises(MalformedMessageError, match=r"^a ProcessingRequest without a request$"):
            decode(bytes(ProcessingRequest(observability_mode=True)))

    @pytest.mark.parametrize(
        "data",
        [b"\xff", b"\x00", b"GET / HTTP/1.1\r\n", request_with(HeaderValue(key="abc"))[:-1]],
    )
    def test_garbage(self, data: bytes) -> None:
        """Bytes that are no ProcessingRequest are malformed."""
        with pytest.raises(MalformedMessageError, match=r"^not a ProcessingRequest$"):
            decode(data)

    def test_header_name_is_not_utf_8(self) -> None:
        """A name, unlike a value, must be UTF-8."""
        data = request_with(HeaderValue(key="abc")).replace(b"abc", b"a\xffc")

        with pytest.raises(MalformedMessageError, match=r"^not a ProcessingRequest$"):
            decode(data)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes are a message or malformed, never another error."""
        try:
            message = codec.decode(data)
        except MalformedMessageError:
            return
        assert isinstance(message, BodyPart) or message.kind in MessageKind


def dispatched(request_id: int, priority: int, waited_ns: int, **more: Any) -> Decision:
    """A decision to let a request go on, which fills the pool unless `more` says otherwise."""
    more = {"saturation": 1.0} | more
    return Decision(request_id, Outcome.DISPATCHED, priority, "tenant", waited_ns, **more)


class TestDispatched:
    """The request goes on."""

    def test_without_endpoint(self) -> None:
        """Our headers are taken off and our notes go into the dynamic metadata; no more."""
        expected = ProcessingResponse(
            request_headers=HeadersResponse(
                response=CommonResponse(
                    header_mutation=HeaderMutation(
                        remove_headers=[*CONTROL_HEADERS, *ENGINE_HEADERS]
                    )
                )
            ),
            dynamic_metadata=Struct(
                fields={
                    "flowcontrol": notes(7, queue_ms=1234, priority=10, headroom=0.25, position=3)
                }
            ),
        )

        assert expected == parsed(dispatched(7, 10, 1_234_999_999, saturation=0.75, position=3))

    def test_with_endpoint(self) -> None:
        """The endpoint chosen stands in the header and, the same, in envoy.lb's metadata."""
        name, value = "x-gateway-destination-endpoint", "[::1]:8000"
        picked = Struct(fields={name: Value(string_value=value)})
        expected = ProcessingResponse(
            request_headers=HeadersResponse(
                response=CommonResponse(
                    header_mutation=HeaderMutation(
                        set_headers=[raw(name, value.encode())],
                        remove_headers=[*CONTROL_HEADERS, *ENGINE_HEADERS[1:]],
                    )
                )
            ),
            dynamic_metadata=Struct(
                fields={
                    "flowcontrol": notes(8, queue_ms=0, priority=-1),
                    "envoy.lb": Value(struct_value=picked),
                }
            ),
        )

        assert expected == parsed(dispatched(8, -1, 999_999, endpoint=value))

    @given(
        st.integers(1, 2**63),
        st.integers(-1000, 1000),
        st.integers(0, 10**15),
        st.tuples(st.floats(0, 2), st.integers(0, 10**6)),
        st.none() | st.text(min_size=1, max_size=30),
    )
    def test_any_values(
        self,
        request_id: int,
        priority: int,
        waited_ns: int,
        around: tuple[float, int],
        endpoint: str | None,
    ) -> None:
        """What is filled into a template reads as if the message had been written for it."""
        saturation, position = around
        reply = dispatched(
            request_id,
            priority,
            waited_ns,
            endpoint=endpoint,
            saturation=saturation,
            position=position,
        )
        response = parsed(reply)

        assert response.dynamic_metadata is not None
        fields = response.dynamic_metadata.fields
        assert fields["flowcontrol"] == notes(
            request_id,
            queue_ms=waited_ns // 1_000_000,
            priority=priority,
            headroom=round(max(0.0, 1 - saturation), 3),
            position=position,
        )
        assert ("envoy.lb" in fields) == (endpoint is not None)
        if endpoint is not None:
            name = "x-gateway-destination-endpoint"
            assert set_headers(response) == {name: endpoint.encode()}

    def test_awaits_answer(self) -> None:
        """Of one request the response headers are asked for; of others nothing is said."""
        asked = parsed(dispatched(7, -1, 0, awaits_answer=True)).mode_override
        silent = parsed(dispatched(7, -1, 0)).mode_override

        assert silent is None
        assert asked == ProcessingMode(
            response_header_mode=ProcessingModeHeaderSendMode.SEND,
            response_trailer_mode=ProcessingModeHeaderSendMode.SEND,
        )

    @pytest.mark.parametrize(
        ("picks", "trusts", "removed"),
        [
            (False, False, ENGINE_HEADERS),
            (True, False, ENGINE_HEADERS),
            (False, True, ()),
            (True, True, ENGINE_HEADERS[:1]),
        ],
    )
    def test_exempt(self, *, picks: bool, trusts: bool, removed: tuple[str, ...]) -> None:
        """An exempt request carries the mark, and loses our headers and the engines' as well."""
        expected = ProcessingResponse(
            request_headers=HeadersResponse(
                response=CommonResponse(
                    header_mutation=HeaderMutation(remove_headers=[*CONTROL_HEADERS, *removed])
                )
            ),
            dynamic_metadata=Struct(fields={"flowcontrol": Value(struct_value=MARK)}),
        )
        encoder = Encoder(picks=picks, trusts_engine_headers=trusts)

        assert expected == parsed(Exempt(), encoder)

    @pytest.mark.parametrize("reads", [False, True])
    def test_codings(self, *, reads: bool) -> None:
        """A response that is to be read is asked for as it is; an exempt one is not read."""
        encoder = Encoder(reads_responses=reads)
        removed = []
        for reply in (dispatched(1, 0, 0), Exempt()):
            request = parsed(reply, encoder).request_headers
            assert request is not None
            assert request.response is not None
            assert request.response.header_mutation is not None
            removed.append("accept-encoding" in request.response.header_mutation.remove_headers)

        assert removed == [reads, False]

    @pytest.mark.parametrize(("trusts", "kept"), [(False, set()), (True, {*ENGINE_HEADERS})])
    def test_engine_headers(self, *, trusts: bool, kept: set[str]) -> None:
        """A client's own choice of endpoint or priority is removed unless it is trusted."""
        request = parsed(dispatched(1, 0, 0), Encoder(trusts_engine_headers=trusts)).request_headers
        assert request is not None
        assert request.response is not None
        assert request.response.header_mutation is not None
        removed = request.response.header_mutation.remove_headers

        assert {*ENGINE_HEADERS} - {*removed} == kept

    def test_exempt_is_sent_somewhere(self) -> None:
        """With a picker an exempt request goes to any endpoint, as the two places agree."""
        name, value = "x-gateway-destination-endpoint", "10.0.0.5:8000"
        response = parsed(Exempt(), Encoder(picks=True, anywhere=lambda: value))

        assert set_headers(response) == {name: value.encode()}
        picked = Struct(fields={name: Value(string_value=value)})
        assert response.dynamic_metadata == Struct(
            fields={
                "flowcontrol": Value(struct_value=MARK),
                "envoy.lb": Value(struct_value=picked),
            }
        )

    def test_exempt_without_picker(self) -> None:
        """Without a picker an endpoint is nobody's to name."""
        response = parsed(Exempt(), Encoder(anywhere=lambda: "10.0.0.5:8000"))

        assert set_headers(response) == {}

    def test_fallbacks(self) -> None:
        """More endpoints follow the first, as a list, in both places."""
        name = "x-gateway-destination-endpoint"
        response = parsed(
            dispatched(1, 0, 0, endpoint="10.0.0.5:80", fallbacks=("10.0.0.6:80", "10.0.0.7:80"))
        )

        value = "10.0.0.5:80,10.0.0.6:80,10.0.0.7:80"
        assert set_headers(response) == {name: value.encode()}
        assert response.dynamic_metadata is not None
        picked = response.dynamic_metadata.fields["envoy.lb"].struct_value
        assert picked == Struct(fields={name: Value(string_value=value)})

    @pytest.mark.parametrize(
        ("engine", "header", "value"),
        [("vllm", "x-vllm-priority", b"-10"), ("sglang", "x-override-priority", b"10")],
    )
    def test_engine_priority(self, engine: str, header: str, value: bytes) -> None:
        """The model server is told the band in its own sense; on an exempt path nobody tells it."""
        encoder = Encoder(engine_priority=ENGINE_PRIORITIES[engine])

        assert set_headers(parsed(dispatched(1, 10, 0), encoder)) == {header: value}
        exempt = parsed(Exempt(), encoder).request_headers
        assert exempt is not None
        assert exempt.response is not None
        assert exempt.response.header_mutation == HeaderMutation(
            remove_headers=[*CONTROL_HEADERS, *ENGINE_HEADERS]
        )


def set_headers(response: ProcessingResponse) -> dict[str, bytes]:
    """The headers that a response sets."""
    assert response.request_headers is not None
    assert response.request_headers.response is not None
    mutation = response.request_headers.response.header_mutation
    options = [] if mutation is None else mutation.set_headers
    return {each.header.key: each.header.raw_value for each in options if each.header}


def notes(
    request_id: int,
    *,
    queue_ms: float,
    priority: float,
    headroom: float = 0.0,
    position: float = 0.0,
) -> Value:
    """What we note of a request for Envoy's access log."""
    fields = {
        "admitted": Value(bool_value=True),
        "ticket": Value(string_value=TICKETS.issue(request_id).decode()),
        "queue_ms": Value(number_value=queue_ms),
        "priority": Value(number_value=priority),
        "headroom": Value(number_value=headroom),
        "position": Value(number_value=position),
    }
    return Value(struct_value=Struct(fields=fields))


class TestRefuse:
    """The client is answered in the model server's place."""

    @staticmethod
    def immediate(refusal: Refuse) -> ImmediateResponse:
        """The immediate response, which is all there is."""
        response = parsed(refusal)
        immediate = response.immediate_response
        assert immediate is not None
        assert response == ProcessingResponse(immediate_response=immediate)
        return immediate

    def test_every_field(self) -> None:
        """Status, headers, body, gRPC status and details are what the refusal says."""
        refusal = Refuse(429, "rejected-saturated", b'{"error": {}}', 8, retry_after_s=3)

        immediate = self.immediate(refusal)

        assert immediate.status is not None
        assert immediate.status.code == 429
        assert immediate.body == b'{"error": {}}'
        assert immediate.grpc_status is not None
        assert immediate.grpc_status.status == 8
        assert immediate.details == "rejected_saturated"
        expected = HeaderMutation(
            set_headers=[
                raw("content-type", b"application/json"),
                raw("x-llm-d-request-dropped-reason", b"rejected-saturated"),
                raw("retry-after", b"3"),
            ]
        )
        assert expected == immediate.headers

    def test_no_retry_after(self) -> None:
        """Without an expectation the header is left out."""
        immediate = self.immediate(Refuse(500, "internal", b"{}", 13))

        assert immediate.headers is not None
        names = [option.header.key for option in immediate.headers.set_headers if option.header]
        assert names == ["content-type", "x-llm-d-request-dropped-reason"]

    @pytest.mark.parametrize("refused", REFUSALS.values(), ids=[o.value for o in REFUSALS])
    def test_details(self, refused: tuple[int, str, str, int]) -> None:
        """Details are always set, in the form of Envoy's own: words joined by underscores."""
        status, reason, _message, grpc_status = refused
        immediate = self.immediate(Refuse(status, reason, b"{}", grpc_status))

        assert immediate.details == reason.replace("-", "_")
        assert immediate.details
        assert immediate.status is not None
        assert immediate.status.code == status

    @pytest.mark.parametrize("outcome", REFUSALS)
    def test_every_refusal(self, outcome: Outcome) -> None:
        """Each is made once, and is the right one whenever it comes again."""
        refused = REFUSALS[outcome]
        cases = [(dialect, after_s) for dialect in Dialect for after_s in (None, *range(1, 31))]
        for dialect, after_s in (*cases, *reversed(cases)):
            after_ns = None if after_s is None else after_s * 1_000_000_000
            decision = Decision(1, outcome, 0, "a", 5, retry_after_ns=after_ns)

            immediate = self.immediate(refusal(decision, 0.0, dialect))

            headers = [
                raw("content-type", content_type_of(dialect).encode()),
                raw("x-llm-d-request-dropped-reason", refused.reason.encode()),
            ]
            message = refused.message
            limits = {Outcome.EVICTED_TTL: "ttl", Outcome.EVICTED_NO_ENDPOINTS: "no-endpoint-ttl"}
            limit = limits.get(outcome)
            if outcome is not Outcome.INTERNAL:
                message += f" (band 0, limit reached: {limit})" if limit else " (band 0)"
                headers += [
                    raw("x-llm-d-flow-priority", b"0"),
                    raw("x-llm-d-flow-queue-duration-ms", b"0"),
                    *([raw("x-llm-d-flow-limit", limit.encode())] if limit else []),
                ]
            told_s = 1 if after_s is None and outcome is Outcome.EVICTED_DISPLACED else after_s
            back_s = told_s
            if outcome is Outcome.EVICTED_TTL:
                headers.append(raw("x-should-retry", b"false"))
                back_s = -1
            if back_s is not None and dialect is Dialect.GRPC and outcome is not Outcome.INTERNAL:
                headers.append(raw("grpc-retry-pushback-ms", str(1000 * back_s).encode()))
            if told_s is not None:
                headers.append(raw("retry-after", str(told_s).encode()))
            body = error_body(dialect, refused.status, refused.reason, message)
            assert immediate == ImmediateResponse(
                status=HttpStatus(code=StatusCode(refused.status)),
                headers=HeaderMutation(set_headers=headers),
                body=body,
                grpc_status=GrpcStatus(status=refused.grpc_status),
                details=refused.reason.replace("-", "_"),
            )

    def test_body_is_bytes(self) -> None:
        """A body need not be text."""
        body = bytes(range(256))

        assert self.immediate(Refuse(500, "internal", body, 13)).body == body


class TestAcknowledge:
    """A later part passes as it is."""

    EMPTY = CommonResponse()
    EXPECTED = {  # noqa: RUF012 - a table
        "request_headers": ProcessingResponse(request_headers=HeadersResponse(response=EMPTY)),
        "request_body": ProcessingResponse(request_body=BodyResponse(response=EMPTY)),
        "request_trailers": ProcessingResponse(request_trailers=TrailersResponse()),
        "response_headers": ProcessingResponse(response_headers=HeadersResponse(response=EMPTY)),
        "response_body": ProcessingResponse(response_body=BodyResponse(response=EMPTY)),
        "response_trailers": ProcessingResponse(response_trailers=TrailersResponse()),
    }

    @pytest.mark.parametrize("kind", MessageKind)
    def test_of_its_kind(self, kind: MessageKind) -> None:
        """The answer to each kind of message is of that kind and changes nothing."""
        expected = self.EXPECTED[kind.value]

        assert expected == parsed(Acknowledge(kind))

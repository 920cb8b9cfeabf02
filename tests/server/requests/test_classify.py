"""From request headers to what the engine needs to know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.request import DEFAULT_FLOW_ID, Request
from flowcontrol_server.requests.classify import (
    CONTROL_HEADERS,
    BodyReads,
    ExemptPaths,
    Intake,
    classify,
    client_request_id_of,
    path_of,
)
from flowcontrol_server.requests.rules import Fact, Rule

FLOW, FLOW_ALIAS = "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"
OBJECTIVE, OBJECTIVE_ALIAS = "x-llm-d-inference-objective", "x-gateway-inference-objective"
SLO, SLO_ALIAS = "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"
TTL = "x-llm-d-inference-ttl"
READ = (
    FLOW,
    FLOW_ALIAS,
    OBJECTIVE,
    OBJECTIVE_ALIAS,
    SLO,
    SLO_ALIAS,
    TTL,
    "content-length",
    "x-request-id",
    ":path",
)


class TestClassify:
    """Each header, and what it falls back to."""

    def test_defaults(self) -> None:
        """A request without headers is of the default flow, names no objective and has no size."""
        assert classify({}) == Request(0, "default-flow")
        assert (path_of({}), client_request_id_of({})) == ("", "")

    def test_everything_said(self) -> None:
        """Every header is read."""
        headers = {
            FLOW: "tenant-a",
            OBJECTIVE: "chat",
            "content-length": "1234",
            TTL: "1.5s",
            "x-request-id": "e7f1",
            ":path": "/v1/chat/completions?debug=1",
            "authorization": "Bearer nobody's business",
        }

        assert classify(headers) == Request(0, "tenant-a", "chat", 1234, 1_500_000_000)
        assert client_request_id_of(headers) == "e7f1"
        assert path_of(headers) == "/v1/chat/completions"

    def test_aliases(self) -> None:
        """The gateway's names for flow and objective are understood too."""
        facts = classify({FLOW_ALIAS: "tenant-b", OBJECTIVE_ALIAS: "batch"})

        assert facts.flow_id == "tenant-b"
        assert facts.objective == "batch"

    def test_precedence(self) -> None:
        """Where both names are there, ours counts, wherever it stands."""
        facts = classify(
            {FLOW_ALIAS: "theirs", FLOW: "ours", OBJECTIVE: "ours", OBJECTIVE_ALIAS: "theirs"}
        )

        assert facts.flow_id == "ours"
        assert facts.objective == "ours"

    def test_empty_is_absent(self) -> None:
        """An empty header says nothing: its alias is asked, then the default."""
        facts = classify({FLOW: "", FLOW_ALIAS: "alias", OBJECTIVE: "", OBJECTIVE_ALIAS: ""})

        assert facts.flow_id == "alias"
        assert facts.objective is None
        assert classify({FLOW: "", FLOW_ALIAS: ""}).flow_id == DEFAULT_FLOW_ID

    def test_long_names_are_cut(self) -> None:
        """Of a name, 256 characters count."""
        long = "n" * 257
        facts = classify({FLOW: long, OBJECTIVE: long})

        expected = "n" * 256
        assert expected == facts.flow_id
        assert expected == facts.objective
        assert expected == client_request_id_of({"x-request-id": long})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0", 0),
            ("007", 7),
            ("999999999999999", 999_999_999_999_999),
            *((text, 0) for text in ("", "-1", "+1", "1.5", "1e9", "0x10", "1_000", " 1", "1 ")),
            *((text, 0) for text in ("10, 10", "many", "²", "٣", "1000000000000000", "9" * 5000)),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_content_length(self, text: str, expected: int) -> None:
        """Only plain ASCII digits below a petabyte are a size; anything else is 0."""
        assert expected == classify({"content-length": text}).byte_size

    @pytest.mark.parametrize("text", ["", "5", "-1s", "soon", "1s,2s", "٣s ", "9" * 300 + "s"])
    def test_bad_ttl(self, text: str) -> None:
        """What is no duration shortens nothing."""
        assert classify({TTL: text}).ttl_ns is None

    def test_ttl_of_nothing(self) -> None:
        """Zero is a wish as well: go at once or not at all."""
        assert classify({TTL: "0s"}).ttl_ns == 0

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/v1/models?x=1", "/v1/models"),
            ("/v1/models?x=1?y=2", "/v1/models"),
            ("/v1/models?", "/v1/models"),
            ("?", ""),
            ("*", "*"),
        ],
    )
    def test_path_without_query(self, path: str, expected: str) -> None:
        """The query is no part of the path."""
        assert expected == path_of({":path": path})

    @given(
        st.dictionaries(
            st.sampled_from(READ) | st.text(max_size=20),
            st.text(max_size=40) | st.text("0123456789.numsh?") | st.text("é", min_size=250),
            max_size=6,
        )
    )
    def test_any_headers(self, headers: dict[str, str]) -> None:
        """No headers raise, and what is read of them stays within its bounds."""
        facts = classify(headers)

        assert 1 <= len(facts.flow_id) <= 256
        assert facts.objective is None or 1 <= len(facts.objective) <= 256
        assert 0 <= facts.byte_size < 10**15
        assert facts.ttl_ns is None or facts.ttl_ns >= 0
        assert len(client_request_id_of(headers)) <= 256
        assert "?" not in path_of(headers)

    def test_control_headers(self) -> None:
        """The headers meant for us, which the model server must not see, are all seven."""
        expected = {FLOW, FLOW_ALIAS, OBJECTIVE, OBJECTIVE_ALIAS, SLO, SLO_ALIAS, TTL}

        assert expected == set(CONTROL_HEADERS)


BODY = "flowcontrol.request"
ANY_1024 = tuple(sorted(f"10.0.{n // 100}.{n % 100}:80" for n in range(1100))[:1024])
HINT, SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"


class TestUnreadBody:
    """A body that Envoy could not read."""

    @pytest.mark.parametrize(
        ("kind", "body", "expected"),
        [
            ("application/json", {"unread": "1"}, True),
            ("Application/JSON; charset=utf-8", {"unread": "1"}, True),
            ("multipart/form-data; boundary=x", {"unread": "1"}, False),
            ("application/json", {"model": "m"}, False),
        ],
    )
    def test_json_alone(self, kind: str, body: dict[str, str], *, expected: bool) -> None:
        """Only a body that says it is JSON should have been read."""
        bodies = BodyReads()
        headers = {"content-type": kind}
        classify(headers, {"flowcontrol.request": body}, Intake(bodies=bodies))
        assert bodies.unread == expected


class TestMetadata:
    """What Envoy's filters found."""

    def test_body(self) -> None:
        """Of the body the model and the most tokens of the answer count."""
        body = {"model": "llama", "stream": "1", "max_tokens": 512.0, "user": "bob"}
        facts = classify({}, {BODY: body})

        assert (facts.model, facts.output_tokens_max) == ("llama", 512)
        assert (facts.flow_id, facts.objective) == ("default-flow", None)

    def test_newer_name_counts(self) -> None:
        """max_completion_tokens has replaced max_tokens."""
        body = {"max_tokens": 1.0, "max_completion_tokens": 2.0}

        assert classify({}, {BODY: body}).output_tokens_max == 2

    def test_name_of_responses(self) -> None:
        """OpenAI's responses have a name of their own for it."""
        assert classify({}, {BODY: {"max_output_tokens": 16.0}}).output_tokens_max == 16
        assert classify({}, {BODY: {"max_output_tokens": None, "max_tokens": 4.0}}) == classify(
            {}, {BODY: {"max_tokens": 4.0}}
        )

    @pytest.mark.parametrize(
        "value", [None, "512", -1.0, 1e300, float("nan"), float("inf"), True, [1.0], {"a": 1.0}]
    )
    def test_no_count(self, value: object) -> None:
        """What is no number a request can have is none."""
        assert classify({}, {BODY: {"max_tokens": value}}).output_tokens_max is None

    @pytest.mark.parametrize(
        ("hint", "expected"),
        [
            (["10.0.0.5:8000", " [::1]:80 "], ("10.0.0.5:8000", "[::1]:80")),
            ("10.0.0.5:8000, 10.0.0.6:8000", ("10.0.0.5:8000", "10.0.0.6:8000")),
            ("b:1,a:1, b:1", ("a:1", "b:1")),
            ([f"10.0.{n // 100}.{n % 100}:80" for n in range(1100)], ANY_1024),
            ([], ()),
            ("", ()),
            (["", 5.0, None], ()),
            (None, None),
            (5.0, None),
        ],
    )
    def test_subset(self, hint: object, expected: tuple[str, ...] | None) -> None:
        """The endpoints a request may go to, in one order, each once, so many at most.

        An empty list is no endpoint, an absent one any.
        """
        assert expected == classify({}, {HINT: {SUBSET: hint}}).subset

    def test_no_subset(self) -> None:
        """Other metadata restricts nothing."""
        assert classify({}, {HINT: {"other": ["a:1"]}}).subset is None
        assert classify({}, {BODY: {}}).subset is None

    @given(
        st.dictionaries(
            st.sampled_from([BODY, HINT, "other"]),
            st.dictionaries(
                st.sampled_from(["model", "max_tokens", "max_output_tokens", SUBSET]),
                st.recursive(
                    st.none() | st.booleans() | st.floats() | st.text(max_size=300),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                    max_leaves=5,
                ),
            ),
        )
    )
    def test_any_metadata(self, metadata: dict[str, dict[str, object]]) -> None:
        """No metadata raises, and what is read of it stays within its bounds."""
        facts = classify({}, metadata)

        assert len(facts.model) <= 256
        assert facts.output_tokens_max is None or 0 <= facts.output_tokens_max < 10**15
        assert facts.subset is None or all(facts.subset)


class TestIntake:
    """How the operator wants requests to be read."""

    SAID = {OBJECTIVE: "chat", FLOW: "tenant", SLO: "250", TTL: "5s"}  # noqa: RUF012 - a table

    def test_slo(self) -> None:
        """The target for the first token is milliseconds; its older name is understood."""
        assert classify({SLO: "250"}).ttft_slo_ns == 250_000_000
        assert classify({SLO_ALIAS: "10"}).ttft_slo_ns == 10_000_000
        assert classify({SLO: "soon"}).ttft_slo_ns is None

    def test_distrust(self) -> None:
        """Headers in which a client could promote itself count for nothing; a shorter wait does."""
        facts = classify(self.SAID, {}, Intake(trusts_headers=False))

        assert (facts.objective, facts.flow_id, facts.ttft_slo_ns) == (None, "default-flow", None)
        assert facts.ttl_ns == 5_000_000_000

    def test_rules_come_first(self) -> None:
        """A header counts where no rule has spoken."""
        facts = classify(self.SAID, {}, Intake(rules=(Rule(objective="batch"),)))

        assert (facts.objective, facts.flow_id) == ("batch", "tenant")

    def test_names_are_cut(self) -> None:
        """What a rule takes from a fact is bounded like a header."""
        rule = Rule(objective=Fact(header="x"), flow_id=Fact(header="x"))
        facts = classify({"x": "é" * 300}, {}, Intake(rules=(rule,)))

        assert (facts.objective, facts.flow_id) == ("é" * 256, "é" * 256)

    def test_input_tokens(self) -> None:
        """The size of the prompt, from wherever somebody says it."""
        by_header = Intake(input_tokens=Fact(header="x-tokens"))
        by_metadata = Intake(input_tokens=Fact(namespace="counter", path=("tokens",)))

        assert classify({"x-tokens": "42"}, {}, by_header).input_tokens == 42
        assert classify({"x-tokens": "many"}, {}, by_header).input_tokens is None
        assert classify({}, {"counter": {"tokens": 42.0}}, by_metadata).input_tokens == 42
        assert classify({"x-tokens": "42"}).input_tokens is None


class TestExemptPaths:
    """Paths that pass ungated."""

    @pytest.mark.parametrize(
        ("path", "is_exempt"),
        [
            *(("/health", True), ("/health/", False), ("/healthz", False), ("/Health", False)),
            *(("/v1/models", False), ("/v1/models/", True), ("/v1/models/llama", True)),
            *(("/v1/chat/completions", False), ("", False), ("/", False), ("*", False)),
        ],
    )
    def test_exact_and_prefix(self, path: str, is_exempt: bool) -> None:  # noqa: FBT001 - a table
        """A path matches as a whole, or by its beginning where a trailing * says so."""
        exempt = ExemptPaths(("/health", "/v1/models/*"))

        assert is_exempt == exempt.passes("GET", path)

    @pytest.mark.parametrize(
        "rest",
        [
            *("../chat/completions", "..%2fchat/completions", "%2E%2e/chat/completions"),
            *("llama%2F..%2Fchat", r"..\chat", "..%5Cchat", "./llama", "llama/..", ".%2e"),
        ],
    )
    def test_evasion(self, rest: str) -> None:
        """A path that may mean another one matches no prefix."""
        exempt = ExemptPaths(("/v1/models/*", "/*"))

        assert not exempt.passes("GET", f"/v1/models/{rest}")

    @pytest.mark.parametrize("rest", ["llama-3.1", "a..b", "..a", "org/llama", "a%20b", ".hidden"])
    def test_no_evasion(self, rest: str) -> None:
        """Dots that are part of a name are no harm."""
        assert ExemptPaths(("/v1/models/*",)).passes("GET", f"/v1/models/{rest}")

    def test_none(self) -> None:
        """Without exempt paths everything is gated."""
        assert not ExemptPaths().passes("GET", "/health")

    def test_all(self) -> None:
        """/* exempts everything."""
        assert ExemptPaths(("* /*",)).passes("POST", "/v1/chat/completions")

    @pytest.mark.parametrize(
        ("entry", "methods"),
        [
            ("/tags*", {"GET", "HEAD", "OPTIONS"}),
            ("POST /tags*", {"POST"}),
            ("* /tags*", {"GET", "HEAD", "OPTIONS", "POST", "DELETE"}),
        ],
    )
    def test_methods(self, entry: str, methods: set[str]) -> None:
        """A path alone stands for methods that change nothing; else the method is named."""
        exempt = ExemptPaths((entry,))
        asked = ("GET", "HEAD", "OPTIONS", "POST", "DELETE")

        assert methods == {method for method in asked if exempt.passes(method, "/tags/1")}
        assert not exempt.passes("", "/tags") or entry.startswith("*")

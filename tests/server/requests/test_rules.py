"""Facts by name, conditions on them, and which rule is heard."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.requests.rules import (
    BODY_NAMESPACE,
    Condition,
    Fact,
    Metadata,
    Rule,
    as_text,
    judge,
    parse_fact,
)

CLAIMS = "envoy.filters.http.jwt_authn"
HEADERS = {"x-team": "search", "x-empty": "", ":path": "/v1/chat/completions"}
METADATA: Metadata = {
    BODY_NAMESPACE: {"model": "llama-70b", "stream": "1", "max_tokens": 512.0, "user": "1"},
    CLAIMS: {
        "claims": {
            "org": "acme",
            "groups": ["staff", "", 7.0, None, {"a": 1}],
            "none": [],
            "vip": True,
            "level": 2.5,
            "nothing": None,
        }
    },
}


def fact(name: str) -> Fact:
    """The fact of that name."""
    found = parse_fact(name)
    assert found is not None
    return found


def claim(*path: str) -> str:
    """The name of a claim."""
    return ":".join(("metadata", CLAIMS, "claims", *path))


class TestParseFact:
    """Names of facts."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("header:X-Team", Fact(header="x-team")),
            ("header::path", Fact(header=":path")),
            ("body:model", Fact(namespace=BODY_NAMESPACE, path=("model",))),
            ("metadata:a.b:c:d", Fact(namespace="a.b", path=("c", "d"))),
        ],
    )
    def test_named(self, name: str, expected: Fact) -> None:
        """A name says where a fact is found."""
        assert expected == parse_fact(name)

    @pytest.mark.parametrize(
        "name",
        [
            *("", ":", "x-team", "header:", "header: x", "headers:x", "body:", "body:messages"),
            *("body:model:x", "metadata:", "metadata:a", "metadata::a", "metadata:a:", "jwt:sub"),
        ],
    )
    def test_no_name(self, name: str) -> None:
        """Anything else names none."""
        assert parse_fact(name) is None


class TestFind:
    """What a fact is."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("header:x-team", "search"),
            ("header:x-empty", ""),
            ("header:x-other", ""),
            ("header::path", "/v1/chat/completions"),
            ("body:model", "llama-70b"),
            ("body:stream", "true"),
            ("body:max_tokens", "512"),
            ("body:user", "1"),
            ("body:service_tier", ""),
            (claim("org"), "acme"),
            (claim("vip"), "true"),
            (claim("level"), "2.5"),
            (claim("nothing"), ""),
            (claim("org", "deeper"), ""),
            (f"metadata:{CLAIMS}:claims", ""),
            ("metadata:elsewhere:claims:org", ""),
            (claim("groups"), ["staff", "", "7", "", ""]),
        ],
    )
    def test_found(self, name: str, expected: str | list[str]) -> None:
        """Text as one writes it; nothing for what is absent or has parts."""
        assert expected == fact(name).find(HEADERS, METADATA)

    def test_first(self) -> None:
        """Of a list the first value that is there."""
        assert fact(claim("groups")).first(HEADERS, METADATA) == "staff"
        assert fact(claim("none")).first(HEADERS, METADATA) == ""
        assert fact("body:model").first(HEADERS, {}) == ""

    @given(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.lists(st.text())
    )
    def test_any_value_is_text(self, value: object) -> None:
        """No value, infinite ones included, is more than text."""
        assert isinstance(as_text(value), str)


class TestCondition:
    """Exactly, or by how it begins."""

    @pytest.mark.parametrize(
        ("name", "pattern", "expected"),
        [
            ("header:x-team", "search", True),
            ("header:x-team", "sea", False),
            ("header:x-team", "sea*", True),
            ("header:x-team", "*", True),
            ("header:x-empty", "*", False),
            ("header:x-other", "*", False),
            ("body:max_tokens", "512", True),
            ("body:stream", "true", True),
            (claim("groups"), "staff", True),
            (claim("groups"), "7", True),
            (claim("groups"), "st*", True),
            (claim("groups"), "guest", False),
            (claim("none"), "*", False),
        ],
    )
    def test_holds(self, name: str, pattern: str, *, expected: bool) -> None:
        """An absent fact fits nothing; of a list any value."""
        assert Condition(fact(name), pattern).holds(HEADERS, METADATA) is expected


RULES = st.lists(
    st.builds(
        Rule,
        match=st.lists(
            st.builds(
                Condition,
                st.sampled_from([Fact(header="x"), Fact(header="y")]),
                st.sampled_from(["1", "2", "*"]),
            ),
            max_size=2,
        ).map(tuple),
        objective=st.sampled_from([None, "chat", "batch", Fact(header="x"), Fact(header="z")]),
        flow_id=st.sampled_from([None, "acme", Fact(header="y"), Fact(header="z")]),
    ),
    max_size=5,
).map(tuple)


class TestJudge:
    """The first rule that matches and says it."""

    def test_each_by_itself(self) -> None:
        """Objective and flow id may come from different rules."""
        rules = (
            Rule(match=(Condition(fact("header:x-team"), "ads"),), objective="never"),
            Rule(objective="chat"),
            Rule(objective="batch", flow_id=fact(claim("org"))),
            Rule(flow_id="last"),
        )

        assert judge(rules, HEADERS, METADATA) == ("chat", "acme", 1, 2)

    def test_absent_fact_says_nothing(self) -> None:
        """A rule that takes from an absent fact leaves it to a later one."""
        rules = (Rule(flow_id=fact("header:x-empty")), Rule(flow_id="later"))

        assert judge(rules, HEADERS, METADATA) == ("", "later", None, 1)

    @pytest.mark.parametrize(
        ("header", "value"),
        [
            ("authorization", "Bearer sk-of-acme"),
            ("authorization", "sk-of-acme"),
            ("x-api-key", "sk-of-acme"),
            ("api-key", "sk-of-acme"),
            ("x-goog-api-key", "sk-of-acme"),
        ],
    )
    def test_key(self, header: str, value: str) -> None:
        """A tenant that is named by its key is named by the key's fingerprint: it is no secret."""
        rules = (Rule(flow_id=fact(f"header:{header}")),)

        assert judge(rules, {header: value}, {}).flow_id == "key-0a24644562042472"
        assert judge(rules, {header: f"{value}2"}, {}).flow_id != "key-0a24644562042472"
        assert judge(rules, {header: ""}, {}).flow_id == ""

    def test_cookies(self) -> None:
        """All of them count."""
        rules = (Rule(flow_id=fact("header:cookie")),)
        verdicts = [judge(rules, {"cookie": f"user={n}; theme=dark"}, {}) for n in (1, 2, 1)]

        assert verdicts[0].flow_id == verdicts[2].flow_id != verdicts[1].flow_id

    def test_objective_of_a_key(self) -> None:
        """Nor is an objective, which a log names when nobody declares it."""
        rules = (Rule(objective=fact("header:authorization")),)

        assert judge(rules, {"authorization": "Bearer \udcff"}, {}).objective.startswith("key-")

    def test_no_rules(self) -> None:
        """Without rules nothing is said."""
        assert judge((), HEADERS, METADATA) == ("", "", None, None)

    @given(RULES, st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["1", "2", ""])))
    def test_oracle(self, rules: tuple[Rule, ...], headers: dict[str, str]) -> None:
        """As somebody would say who reads the rules one by one, once for each question."""

        def said(source: str | Fact | None) -> str:
            return headers.get(source.header, "") if isinstance(source, Fact) else source or ""

        def matches(rule: Rule) -> bool:
            values = [(headers.get(fact.header, ""), pattern) for fact, pattern in rule.match]
            return all(value and pattern in {"*", value} for value, pattern in values)

        held = [rule for rule in rules if matches(rule)]
        objectives = [said(rule.objective) for rule in held if said(rule.objective)]
        flow_ids = [said(rule.flow_id) for rule in held if said(rule.flow_id)]

        expected = (next(iter(objectives), ""), next(iter(flow_ids), ""))
        verdict = judge(rules, headers, {})
        assert expected == (verdict.objective, verdict.flow_id)
        for name, index in zip(("objective", "flow_id"), verdict[2:], strict=True):
            by_one = judge(() if index is None else (rules[index],), headers, {})
            assert getattr(by_one, name) == getattr(verdict, name)

"""Pure. Facts about a request that its operator trusts, and the rules on them.

A fact is named by its place:

    header:NAME                        a request header, its name in lower case
    body:NAME                          a field of the JSON body, as read by Envoy
    metadata:NAMESPACE:KEY[:KEY...]    metadata of another filter of Envoy, such as a claim of a JWT

The client chooses header and body unless Envoy overwrites them; it cannot choose a verified claim.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

BODY_NAMESPACE: Final = "flowcontrol.request"
"""Dynamic metadata in which Envoy stores fields of a request's body."""
ANSWER_FIELDS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
"""The token limit of an answer, by its name in each API; the first that is set counts."""
BODY_FIELDS: Final = ("model", "stream", *ANSWER_FIELDS, "user", "service_tier")
"""Fields that Envoy reads from a body."""
BODY_UNREAD: Final = "unread"
"""Set in that namespace if Envoy could not parse a body as JSON. Envoy also rejects integers from
2^63 to 2^64 - 1, NaN, and thousands of nested levels."""
JSON_TYPES: Final = "(?i)application/json( *;.*)?"
"""Regex for the content types of bodies that Envoy reads."""
FACT_RULE: Final = (
    "must be header:NAME, metadata:NAMESPACE:KEY or one of "
    f"{', '.join(f'body:{name}' for name in BODY_FIELDS)}"
)

Metadata = Mapping[str, Mapping[str, Any]]
"""By namespace; values are JSON values."""
_KEY_HEADERS: Final = (
    *("authorization", "proxy-authorization", "cookie"),
    *("x-api-key", "api-key", "x-goog-api-key"),
)
"""Headers with secrets, which no log, ledger or page may show: the tenant is a fingerprint."""
_FINGERPRINT_DIGITS: Final = 16
_STREAM: Final = ("stream",)
_FLAGS: Final = {"0": "false", "1": "true"}
"""Text for each of Envoy's values of a boolean in a body."""


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """The place of a value in a request."""

    header: str = ""
    """Name of a header; empty: the value is in metadata."""
    namespace: str = ""
    path: tuple[str, ...] = ()

    def find(self, headers: Mapping[str, str], metadata: Metadata) -> str | list[str]:
        """Return the value as text, or each value of a list; empty: it is absent."""
        if self.header:
            return headers.get(self.header, "")
        found: Any = metadata.get(self.namespace)
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, list):
            return [as_text(each) for each in found]
        text = as_text(found)
        is_flag = self.path == _STREAM and self.namespace == BODY_NAMESPACE
        return _FLAGS.get(text, text) if is_flag else text

    def first(self, headers: Mapping[str, str], metadata: Metadata) -> str:
        """Return the value, or the first non-empty one of a list; empty: it is absent."""
        found = self.find(headers, metadata)
        return next(filter(None, found), "") if isinstance(found, list) else found


def parse_fact(text: str) -> Fact | None:
    """Return the fact of a name; None: it names none."""
    kind, _, name = text.partition(":")
    if kind == "header" and name and name == name.strip():
        return Fact(header=name.lower())
    if kind == "body" and name in BODY_FIELDS:
        return Fact(namespace=BODY_NAMESPACE, path=(name,))
    namespace, *path = name.split(":")
    if kind == "metadata" and namespace and path and all(path):
        return Fact(namespace=namespace, path=tuple(path))
    return None


def as_text(value: object) -> str:
    """Return a scalar as text; empty: it is absent, or a list or mapping."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else ""


class Condition(NamedTuple):
    """A required value of a fact: exactly the pattern, or with that prefix if it ends in *."""

    fact: Fact
    pattern: str

    def holds(self, headers: Mapping[str, str], metadata: Metadata) -> bool:
        """Whether any value of the fact matches; an absent fact matches nothing."""
        found = self.fact.find(headers, metadata)
        if isinstance(found, list):
            return any(map(self._fits, found))
        return self._fits(found)

    def _fits(self, text: str) -> bool:
        if self.pattern.endswith("*"):
            return bool(text) and text.startswith(self.pattern[:-1])
        return text == self.pattern


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Sets an objective, a flow id, or both, if all conditions hold."""

    match: tuple[Condition, ...] = ()
    objective: str | Fact | None = None
    """A name, or the place of the name; None: the rule does not set it."""
    flow_id: str | Fact | None = None

    def holds(self, headers: Mapping[str, str], metadata: Metadata) -> bool:
        """Whether every condition holds."""
        for condition in self.match:  # noqa: SIM110 - a generator doubles what a rule costs
            if not condition.holds(headers, metadata):
                return False
        return True


class Verdict(NamedTuple):
    """Objective and flow id that rules set for a request, and the rules that set them."""

    objective: str = ""
    flow_id: str = ""
    objective_rule: int | None = None
    """Index of the rule; None: no rule sets it."""
    flow_id_rule: int | None = None


def judge(rules: tuple[Rule, ...], headers: Mapping[str, str], metadata: Metadata) -> Verdict:
    """Return objective and flow id, each set by the first rule that holds and sets it; else empty.

    A rule does not set a value that it takes from an absent fact; a later rule may.
    """
    objective = flow_id = ""
    objective_rule = flow_id_rule = None
    for index, rule in enumerate(rules):
        if rule.holds(headers, metadata):
            if not objective and (objective := _text(rule.objective, headers, metadata)):
                objective_rule = index
            if not flow_id and (flow_id := _text(rule.flow_id, headers, metadata)):
                flow_id_rule = index
            if objective and flow_id:
                break
    return Verdict(objective, flow_id, objective_rule, flow_id_rule)


def _text(value: str | Fact | None, headers: Mapping[str, str], metadata: Metadata) -> str:
    if isinstance(value, Fact):
        found = value.first(headers, metadata)
        return (
            _fingerprint(value.header, found) if found and value.header in _KEY_HEADERS else found
        )
    return value or ""


def _fingerprint(header: str, key: str) -> str:
    """Return the fingerprint of a key: the same in any header, with or without a scheme."""
    if header.endswith("authorization"):
        key = key.rpartition(" ")[2]
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return f"key-{digest[:_FINGERPRINT_DIGITS]}"

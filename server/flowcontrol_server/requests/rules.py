"""Pure. Facts about a request that its operator trusts, and what follows from them.

A fact is named by where it is found:

    header:NAME                        a request header, its name in lower case
    body:NAME                          a field of the JSON body, as Envoy has read it
    metadata:NAMESPACE:KEY[:KEY...]    what another filter of Envoy's has found, a JWT's claim say

A header and a body are the client's word unless Envoy overwrites them; a verified claim is not.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

BODY_NAMESPACE: Final = "flowcontrol.request"
"""Dynamic metadata that Envoy makes of a request's body."""
ANSWER_FIELDS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
"""The most tokens of an answer, as each API names it; the first that is there counts."""
BODY_FIELDS: Final = ("model", "stream", *ANSWER_FIELDS, "user", "service_tier")
"""What Envoy reads from a body."""
BODY_UNREAD: Final = "unread"
"""Set in that namespace where Envoy could not read a body: it is no JSON to Envoy, which knows no
integer beyond 64 bits, no NaN, and no nesting of thousands."""
FACT_RULE: Final = (
    "must be header:NAME, metadata:NAMESPACE:KEY or one of "
    f"{', '.join(f'body:{name}' for name in BODY_FIELDS)}"
)

Metadata = Mapping[str, Mapping[str, Any]]
"""By namespace; values are what JSON can hold."""
_KEY_HEADERS: Final = (
    *("authorization", "proxy-authorization", "cookie"),
    *("x-api-key", "api-key", "x-goog-api-key"),
)
"""They hold secrets, which no log, ledger or page may show: what is named by one of them is named
by its fingerprint."""
_FINGERPRINT_DIGITS: Final = 16
_STREAM: Final = ("stream",)
_FLAGS: Final = {"0": "false", "1": "true"}
"""How Envoy writes a boolean of a body."""


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """Where something about a request is found."""

    header: str = ""
    """Name of a header; empty: it is metadata."""
    namespace: str = ""
    path: tuple[str, ...] = ()

    def find(self, headers: Mapping[str, str], metadata: Metadata) -> str | list[str]:
        """Return what is there, as text: empty when it is absent; each of a list's values."""
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
        """Return what is there, the first value of a list; empty when it is absent."""
        found = self.find(headers, metadata)
        return next(filter(None, found), "") if isinstance(found, list) else found


def parse_fact(text: str) -> Fact | None:
    """Return the fact that a name stands for, None if it names none."""
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
    """Return a plain value as one writes it, nothing for what has parts or is not there."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else ""


class Condition(NamedTuple):
    """What a fact must be: exactly that text, or what begins like it where it ends in *."""

    fact: Fact
    pattern: str

    def holds(self, headers: Mapping[str, str], metadata: Metadata) -> bool:
        """Whether any value of the fact fits; an absent fact fits nothing."""
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
    """What follows where all conditions hold: an objective, a flow id, or both."""

    match: tuple[Condition, ...] = ()
    objective: str | Fact | None = None
    """A name, or where it is found; None: the rule says nothing about it."""
    flow_id: str | Fact | None = None

    def holds(self, headers: Mapping[str, str], metadata: Metadata) -> bool:
        """Whether every condition holds."""
        for condition in self.match:  # noqa: SIM110 - a generator doubles what a rule costs
            if not condition.holds(headers, metadata):
                return False
        return True


class Verdict(NamedTuple):
    """What the rules say of a request, and which of them says it."""

    objective: str = ""
    flow_id: str = ""
    objective_rule: int | None = None
    """Index of the rule; None: no rule says it."""
    flow_id_rule: int | None = None


def judge(rules: tuple[Rule, ...], headers: Mapping[str, str], metadata: Metadata) -> Verdict:
    """Return objective and flow id, each by the first rule that holds and says it; else empty.

    A rule that takes it from an absent fact says nothing, and a later one may.
    """
    objective = flow_id = ""
    objective_rule = flow_id_rule = None
    for index, rule in enumerate(rules):
        if rule.holds(headers, metadata):
            if not objective and (objective := _said(rule.objective, headers, metadata)):
                objective_rule = index
            if not flow_id and (flow_id := _said(rule.flow_id, headers, metadata)):
                flow_id_rule = index
            if objective and flow_id:
                break
    return Verdict(objective, flow_id, objective_rule, flow_id_rule)


def _said(said: str | Fact | None, headers: Mapping[str, str], metadata: Metadata) -> str:
    if isinstance(said, Fact):
        found = said.first(headers, metadata)
        return _fingerprint(said.header, found) if found and said.header in _KEY_HEADERS else found
    return said or ""


def _fingerprint(header: str, key: str) -> str:
    """Return what stands for a key: the same whichever header holds it, behind a scheme or not."""
    if header.endswith("authorization"):
        key = key.rpartition(" ")[2]
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return f"key-{digest[:_FINGERPRINT_DIGITS]}"

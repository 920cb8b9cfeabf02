"""Pure. From request headers, and what Envoy's filters found, to what the engine needs to know.

Nothing here refuses: what is missing or malformed falls to a documented default.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple, final

from flowcontrol.request import DEFAULT_FLOW_ID, Request
from flowcontrol_server.common.units import parse_duration, parse_whole
from flowcontrol_server.requests.conformance import Conformance
from flowcontrol_server.requests.prefix import prefix_of_flow
from flowcontrol_server.requests.rules import (
    ANSWER_FIELDS,
    BODY_NAMESPACE,
    BODY_UNREAD,
    Fact,
    Metadata,
    Rule,
    Verdict,
    judge,
)

FLOW_ID_HEADERS: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE_HEADERS: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
TTFT_SLO_HEADERS: Final = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TTL_HEADER: Final = "x-llm-d-inference-ttl"
CONTROL_HEADERS: Final = (*FLOW_ID_HEADERS, *OBJECTIVE_HEADERS, *TTFT_SLO_HEADERS, TTL_HEADER)
"""Meant for us: removed before the model server sees the request."""

READ_HEADERS: Final = (
    *(":method", ":path", "content-length", "content-type", "x-request-id"),
    *CONTROL_HEADERS,
)
"""All that is read of a request, but for those that rules ask for; Envoy sends no others."""

SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET_KEY: Final = "x-gateway-destination-endpoint-subset"
"""Endpoint picker protocol: the endpoints a request may go to, as request metadata."""

_SERVED_NAMESPACE: Final = "envoy.lb"
_SERVED: Final = "x-gateway-destination-endpoint-served"
"""Endpoint picker protocol: in that metadata of the response."""

NAME_LENGTH_MAX: Final = 256
"""Characters of a flow id, an objective or a model that count; the rest is cut off."""
SUBSET_LENGTH_MAX: Final = 1024
"""Endpoints of a subset that count, the first in order of their names: to fewer the request may go
just as well, and each is looked at when the request is dispatched."""
_DIGITS_MAX: Final = 15
"""Of a number that is taken for one: a petabyte, a day of microseconds."""
_MS_NS: Final = 1_000_000
_JSON: Final = "application/json"
_AMBIGUOUS: Final = re.compile(r"%2f|%5c|\\|/(\.|%2e){1,2}(/|$)", re.IGNORECASE)
"""Slashes in disguise, and segments of dots: a server may take such a path for another."""
_NO_METADATA: Final[Metadata] = {}
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
"""What an exempt path without a method stands for."""
_ANY_METHOD: Final = "*"


@final
class ExemptPaths:
    """Requests that pass ungated, as `PATH` or `METHOD PATH`.

    A path is exact, or a prefix with a trailing *. Without a method it stands for SAFE_METHODS;
    the method * stands for every method. Envoy has normalized a path before it comes here; an
    ambiguous one matches no prefix.
    """

    def __init__(self, entries: tuple[str, ...] = ()) -> None:
        self.entries = tuple(_exempt_entry(entry) for entry in entries)
        """Methods (empty: every method) and path of each entry."""
        exact: dict[str, tuple[str, ...]] = {}
        prefixes: dict[str, tuple[str, ...]] = {}
        for methods, path in self.entries:
            for method in methods or (_ANY_METHOD,):
                if path.endswith("*"):
                    prefixes[method] = (*prefixes.get(method, ()), path[:-1])
                else:
                    exact[method] = (*exact.get(method, ()), path)
        self._exact = exact
        self._prefixes = prefixes

    def passes(self, method: str, path: str) -> bool:
        """Return whether a request passes ungated; path without its query."""
        return self._matches(method, path) or self._matches(_ANY_METHOD, path)

    def _matches(self, method: str, path: str) -> bool:
        return path in self._exact.get(method, ()) or (
            path.startswith(self._prefixes.get(method, ())) and _AMBIGUOUS.search(path) is None
        )


def _exempt_entry(entry: str) -> tuple[tuple[str, ...], str]:
    method, _, path = entry.rpartition(" ")
    if not method:
        return SAFE_METHODS, path
    return (() if method == _ANY_METHOD else (method,)), path


@final
class BodyReads:
    """Counts the bodies that Envoy was to read."""

    def __init__(self) -> None:
        self.unread = 0
        """Requests with a JSON body that Envoy could not parse."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """How requests are read, as the operator decided."""

    exempt: ExemptPaths = field(default_factory=ExemptPaths)
    trusts_headers: bool = True
    """Whether objective, flow id and TTFT target are taken from their headers."""
    rules: tuple[Rule, ...] = ()
    """Come before the headers."""
    input_tokens: Fact | None = None
    """Where the size of the prompt is found, if it is given."""
    bodies: BodyReads | None = None
    """Counts what Envoy has not read, where it is to read bodies."""
    conformance: Conformance | None = None
    """For conformance tests: lets a request choose its endpoint."""
    reads_prefixes: bool = False
    """Whether the picker asks what a prompt begins with."""


class Origin(NamedTuple):
    """What named the objective and the flow of a request: a rule, a header, or nothing."""

    objective: str
    flow_id: str


_UNNAMED: Final = "by default"
_ORIGINS_MAX: Final = 1024
"""Kept to be given again: most requests are named in one of a few ways."""


def is_body_unread(headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
    """Whether a request has a JSON body that Envoy could not read: no rule on the body matches."""
    return BODY_UNREAD in body and headers.get("content-type", "").lower().startswith(_JSON)


def classify(
    headers: Mapping[str, str], metadata: Metadata = _NO_METADATA, intake: Intake | None = None
) -> Request:
    """Read a request for the engine; the gate gives it its id.

    Args:
        headers: names in lower case; the first value of each counts.
        metadata: of the request, as Envoy's filters left it.
        intake: how to read it; None: as by default.
    """
    return classify_with_origin(headers, metadata, intake or _DEFAULT_INTAKE)[0]


def classify_with_origin(
    headers: Mapping[str, str], metadata: Metadata, intake: Intake
) -> tuple[Request, Origin]:
    """Return what `classify` does, and what named its objective and its flow."""
    verdict = judge(intake.rules, headers, metadata) if intake.rules else _NO_VERDICT
    objective, flow_id = verdict.objective, verdict.flow_id
    objective_header = flow_id_header = ""
    if intake.trusts_headers:
        if not objective and (objective_header := _first(headers, OBJECTIVE_HEADERS)):
            objective = headers[objective_header]
        if not flow_id and (flow_id_header := _first(headers, FLOW_ID_HEADERS)):
            flow_id = headers[flow_id_header]
        slo_ms = parse_whole(headers.get(_first(headers, TTFT_SLO_HEADERS), ""), _DIGITS_MAX)
    else:
        slo_ms = None
    body = metadata.get(BODY_NAMESPACE, _NO_METADATA) if metadata else _NO_METADATA
    if intake.bodies is not None and is_body_unread(headers, body):
        intake.bodies.unread += 1
    flow_id = flow_id[:NAME_LENGTH_MAX]
    request = Request(
        0,
        flow_id or DEFAULT_FLOW_ID,
        objective[:NAME_LENGTH_MAX] or None,
        parse_whole(headers.get("content-length", ""), _DIGITS_MAX) or 0,
        parse_duration(headers.get(TTL_HEADER, "")),
        _prompt(intake, headers, metadata),
        _answer_max(body),
        None if slo_ms is None else slo_ms * _MS_NS,
        str(body.get("model", ""))[:NAME_LENGTH_MAX],
        _subset(intake, headers, metadata),
        prefix_of_flow(flow_id) if intake.reads_prefixes and flow_id else (),
    )
    origin = _origin(verdict.objective_rule, objective_header, verdict.flow_id_rule, flow_id_header)
    return request, origin


def path_of(headers: Mapping[str, str]) -> str:
    """Return the path of a request without its query."""
    return headers.get(":path", "").partition("?")[0]


def client_request_id_of(headers: Mapping[str, str]) -> str:
    """Return x-request-id, for people who read logs; never used as an identity."""
    return headers.get("x-request-id", "")[:NAME_LENGTH_MAX]


def served_endpoint(metadata: Metadata) -> str:
    """Return the endpoint that served a request, where the gateway says so; else nothing."""
    said = metadata.get(_SERVED_NAMESPACE)
    served = said.get(_SERVED) if isinstance(said, Mapping) else None
    return served if isinstance(served, str) else ""


_DEFAULT_INTAKE: Final = Intake()
_NO_VERDICT: Final = Verdict()


@lru_cache(_ORIGINS_MAX)
def _origin(
    objective_rule: int | None, objective_header: str, flow_id_rule: int | None, flow_id_header: str
) -> Origin:
    return Origin(_named(objective_rule, objective_header), _named(flow_id_rule, flow_id_header))


def _named(rule: int | None, header: str) -> str:
    if rule is not None:
        return f"requests.rules[{rule}]"
    return f"header {header}" if header else _UNNAMED


def _prompt(intake: Intake, headers: Mapping[str, str], metadata: Metadata) -> int | None:
    if intake.input_tokens is None:
        return None
    return parse_whole(intake.input_tokens.first(headers, metadata), _DIGITS_MAX)


def _subset(
    intake: Intake, headers: Mapping[str, str], metadata: Metadata
) -> tuple[str, ...] | None:
    if intake.conformance is not None:
        chosen = intake.conformance.subset(headers)
        if chosen is not None:
            return chosen
    if not metadata:
        return None
    hint: Any = metadata.get(SUBSET_NAMESPACE, _NO_METADATA).get(SUBSET_KEY)
    if isinstance(hint, str):
        hint = hint.split(",")
    if not isinstance(hint, list):
        return None
    addresses = {each.strip() for each in hint if isinstance(each, str)} - {""}
    return tuple(sorted(addresses)[:SUBSET_LENGTH_MAX])


def _answer_max(body: Mapping[str, Any]) -> int | None:
    """Return the most tokens of the answer that a body asks for; None: it says no such number."""
    for name in ANSWER_FIELDS:
        value = body.get(name)
        if value is not None:
            is_count = isinstance(value, float) and 0 <= value < 10**_DIGITS_MAX
            return int(value) if is_count else None
    return None


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return the first of these headers that says something, or nothing."""
    for name in names:
        if headers.get(name):
            return name
    return ""

"""Pure. Makes the engine's request from request headers and the metadata of Envoy's filters.

Nothing here refuses a request: a missing or malformed value gets a documented default.
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
"""Meant for this service, and removed before the model server gets the request."""

READ_HEADERS: Final = (
    *(":method", ":path", "content-length", "content-type", "x-request-id"),
    *CONTROL_HEADERS,
)
"""All headers of a request that are read, besides those in rules; Envoy sends no others."""

SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET_KEY: Final = "x-gateway-destination-endpoint-subset"
"""Endpoint picker protocol: the endpoints a request may go to, as request metadata."""

_SERVED_NAMESPACE: Final = "envoy.lb"
_SERVED: Final = "x-gateway-destination-endpoint-served"
"""Endpoint picker protocol: the endpoint that served, in that metadata of the response."""

NAME_LENGTH_MAX: Final = 256
"""Length in characters to which a flow id, an objective or a model is cut."""
SUBSET_LENGTH_MAX: Final = 1024
"""Endpoints of a subset that count, the first by name. Each one is checked when the request is
dispatched, and any part of the subset is allowed for the request."""
_DIGITS_MAX: Final = 15
"""Digits of a number; longer ones are ignored. 15 are enough for any size below a petabyte."""
_MS_NS: Final = 1_000_000
_JSON: Final = "application/json"
_AMBIGUOUS: Final = re.compile(r"%2f|%5c|\\|/(\.|%2e){1,2}(/|$)", re.IGNORECASE)
"""Encoded slashes, backslashes and dot segments: a server may read such a path as another one."""
_NO_METADATA: Final[Metadata] = {}
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
"""Methods of an exempt path that names none."""
_ANY_METHOD: Final = "*"


@final
class ExemptPaths:
    """Requests that pass ungated, as `PATH` or `METHOD PATH`.

    A path is exact, or a prefix if it ends in *. Without a method the entry is for SAFE_METHODS;
    the method * is for every method. Envoy normalizes paths before they come here; a path that is
    still ambiguous matches no prefix.
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
        """Return whether a request passes ungated; the path is without its query."""
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
    """Counts bodies that Envoy failed to read."""

    def __init__(self) -> None:
        self.unread = 0
        """Requests with a JSON body that Envoy could not parse."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """How requests are read, as configured."""

    exempt: ExemptPaths = field(default_factory=ExemptPaths)
    trusts_headers: bool = True
    """Whether objective, flow id and TTFT target are taken from their headers."""
    rules: tuple[Rule, ...] = ()
    """Take precedence over the headers."""
    input_tokens: Fact | None = None
    """Where the number of tokens of the prompt is found; None: nowhere."""
    bodies: BodyReads | None = None
    """Counts bodies that Envoy could not read; None: Envoy reads no bodies."""
    conformance: Conformance | None = None
    """For conformance tests: lets a request choose its endpoint."""
    reads_prefixes: bool = False
    """Whether the picker uses hashes of the beginning of the prompt."""


class Origin(NamedTuple):
    """The source of a request's objective and of its flow: a rule, a header, or the default."""

    objective: str
    flow_id: str


_UNNAMED: Final = "by default"
_ORIGINS_MAX: Final = 1024
"""Origins that are cached: most requests share a few."""


def is_body_unread(headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
    """Whether a request has a JSON body that Envoy could not read: no rule on the body matches."""
    return BODY_UNREAD in body and names_json(headers)


def names_json(headers: Mapping[str, str]) -> bool:
    """Whether the body of a request is JSON, by its headers."""
    return headers.get("content-type", "").lower().startswith(_JSON)


def classify(
    headers: Mapping[str, str], metadata: Metadata = _NO_METADATA, intake: Intake | None = None
) -> Request:
    """Read a request for the engine; the gate gives it its id.

    Args:
        headers: names in lower case; only the first value of each counts.
        metadata: of the request, as Envoy's filters set it.
        intake: how to read it; None: the defaults.
    """
    return classify_with_origin(headers, metadata, intake or _DEFAULT_INTAKE)[0]


def classify_with_origin(
    headers: Mapping[str, str], metadata: Metadata, intake: Intake
) -> tuple[Request, Origin]:
    """Return what `classify` does, and the origin of the objective and the flow."""
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
    """Return x-request-id, for readers of logs; never used as an identity."""
    return headers.get("x-request-id", "")[:NAME_LENGTH_MAX]


def served_endpoint(metadata: Metadata) -> str:
    """Return the endpoint that served a request, as the gateway reports it; empty: unknown."""
    fields = metadata.get(_SERVED_NAMESPACE)
    served = fields.get(_SERVED) if isinstance(fields, Mapping) else None
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
    """Return the token limit of the answer in a body; None: there is none, or it is not a count."""
    for name in ANSWER_FIELDS:
        value = body.get(name)
        if value is not None:
            is_count = isinstance(value, float) and 0 <= value < 10**_DIGITS_MAX
            return int(value) if is_count else None
    return None


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return the name of the first of these headers that is not empty; empty: all are."""
    for name in names:
        if headers.get(name):
            return name
    return ""

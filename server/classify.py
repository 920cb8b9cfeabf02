"""Pure. From request headers, and what Envoy's filters found, to what the engine needs to know.

Nothing here refuses: what is missing or malformed falls to a documented default.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from flowcontrol.request import DEFAULT_FLOW_ID
from server.dialects import Dialect, dialect_of
from server.rules import BODY_NAMESPACE, Fact, Metadata, Rule, judge
from server.units import parse_duration

FLOW_ID_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
TTFT_SLO_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TTL_HEADER = "x-llm-d-inference-ttl"
CONTROL_HEADERS = (*FLOW_ID_HEADERS, *OBJECTIVE_HEADERS, *TTFT_SLO_HEADERS, TTL_HEADER)
"""Meant for us: removed before the model server sees the request."""

READ_HEADERS = (":path", "content-length", "content-type", "x-request-id", *CONTROL_HEADERS)
"""All that is read of a request, but for those that rules ask for; Envoy sends no others."""

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
"""Endpoint picker protocol: the endpoints a request may go to, as request metadata."""

NAME_LENGTH_MAX = 256
"""Characters of a flow id, an objective or a model that count; the rest is cut off."""
_DIGITS_MAX = 15
"""Of a number that is taken for one: a petabyte, a day of microseconds."""
_MS_NS = 1_000_000
_AMBIGUOUS = re.compile(r"%2f|%5c|\\|/(\.|%2e){1,2}(/|$)", re.IGNORECASE)
"""Slashes in disguise, and segments of dots: a server may take such a path for another."""
_NO_METADATA: Metadata = {}


class RequestFacts(NamedTuple):
    """What is known of a request."""

    flow_id: str
    objective: str | None
    byte_size: int
    """From content-length, or as counted by Envoy; 0 when nobody knows."""
    ttl_ns: int | None
    client_request_id: str
    """x-request-id, for people who read logs; never used as an identity."""
    path: str
    model: str = ""
    """From the body, by Envoy; empty when it was not read."""
    input_tokens: int | None = None
    output_tokens_max: int | None = None
    """max_completion_tokens, or max_tokens."""
    ttft_slo_ns: int | None = None
    subset: tuple[str, ...] | None = None
    """Endpoints it may go to; None: to any."""
    dialect: Dialect = Dialect.OPENAI
    """How the client wants to be told of an error."""


@final
class ExemptPaths:
    """Paths that pass ungated: exact ones, and prefixes written with a trailing *.

    Envoy has made a path plain before it comes here; one that may mean another matches no prefix.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._exact = frozenset(path for path in paths if not path.endswith("*"))
        self._prefixes = tuple(path[:-1] for path in paths if path.endswith("*"))

    def __contains__(self, path: str) -> bool:
        return path in self._exact or (
            path.startswith(self._prefixes) and _AMBIGUOUS.search(path) is None
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """How requests are read, as the operator decided."""

    exempt: ExemptPaths = field(default_factory=lambda: ExemptPaths(()))
    trusts_headers: bool = True
    """Whether objective, flow id and TTFT target are taken from their headers."""
    rules: tuple[Rule, ...] = ()
    """Come before the headers."""
    input_tokens: Fact | None = None
    """Where the size of the prompt is said, if anybody says it."""


def classify(
    headers: Mapping[str, str], metadata: Metadata = _NO_METADATA, intake: Intake | None = None
) -> RequestFacts:
    """Read a request.

    Args:
        headers: names in lower case; the first value of each counts.
        metadata: of the request, as Envoy's filters left it.
        intake: how to read it; None: as by default.
    """
    intake = intake or _DEFAULT_INTAKE
    objective = flow_id = ""
    if intake.rules:
        objective, flow_id = judge(intake.rules, headers, metadata)
    if intake.trusts_headers:
        objective = objective or _first(headers, OBJECTIVE_HEADERS)
        flow_id = flow_id or _first(headers, FLOW_ID_HEADERS)
        slo_ms = _whole(_first(headers, TTFT_SLO_HEADERS))
    else:
        slo_ms = None
    body = metadata.get(BODY_NAMESPACE, _NO_METADATA) if metadata else _NO_METADATA
    path = headers.get(":path", "").partition("?")[0]
    return RequestFacts(
        flow_id=flow_id[:NAME_LENGTH_MAX] or DEFAULT_FLOW_ID,
        objective=objective[:NAME_LENGTH_MAX] or None,
        byte_size=_whole(headers.get("content-length", "")) or 0,
        ttl_ns=parse_duration(headers.get(TTL_HEADER, "")),
        client_request_id=headers.get("x-request-id", "")[:NAME_LENGTH_MAX],
        path=path,
        model=str(body.get("model", ""))[:NAME_LENGTH_MAX],
        input_tokens=_prompt(intake, headers, metadata),
        output_tokens_max=_count(body.get("max_completion_tokens", body.get("max_tokens"))),
        ttft_slo_ns=None if slo_ms is None else slo_ms * _MS_NS,
        subset=_subset(metadata) if metadata else None,
        dialect=dialect_of(path, headers.get("content-type", "")),
    )


_DEFAULT_INTAKE = Intake()


def _prompt(intake: Intake, headers: Mapping[str, str], metadata: Metadata) -> int | None:
    if intake.input_tokens is None:
        return None
    return _whole(intake.input_tokens.first(headers, metadata))


def _subset(metadata: Metadata) -> tuple[str, ...] | None:
    hint: Any = metadata.get(SUBSET_NAMESPACE, _NO_METADATA).get(SUBSET_KEY)
    if isinstance(hint, str):
        hint = hint.split(",")
    if not isinstance(hint, list):
        return None
    return tuple(each.strip() for each in hint if isinstance(each, str) and each.strip())


def _whole(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
    return int(text) if is_number else None


def _count(value: object) -> int | None:
    """Return a number of the body's as a count; None if it is none."""
    if isinstance(value, float) and 0 <= value < 10**_DIGITS_MAX:
        return int(value)
    return None


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if value := headers.get(name):
            return value
    return ""

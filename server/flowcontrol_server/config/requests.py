"""The sections of the configuration file about requests and their settlement."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from flowcontrol_server.common.sections import (
    Duration,
    LimitFrom1,
    Section,
    broken,
    switched_off,
    written,
)
from flowcontrol_server.requests.classify import READ_HEADERS, BodyReads, ExemptPaths, Intake
from flowcontrol_server.requests.conformance import SELECTION_HEADER, Conformance
from flowcontrol_server.requests.replies import ENGINE_PRIORITIES, EnginePriority
from flowcontrol_server.requests.rules import (
    BODY_NAMESPACE,
    FACT_RULE,
    Condition,
    Fact,
    Rule,
    as_text,
    parse_fact,
)

_HEADER = re.compile(r":(authority|method|path|scheme)|[!#$%&'*+.^_`|~0-9a-z-]+")
"""Names of headers that Envoy can forward."""
_HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection"))
"""Headers that Envoy removes before any filter gets them."""


def _fact(value: object) -> object:
    fact = parse_fact(value) if isinstance(value, str) else None
    if fact is None:
        raise broken(FACT_RULE)
    if fact.header == "host":
        rule = "must be header::authority, as Envoy names that header"
        raise broken(rule)
    if fact.header and (not _HEADER.fullmatch(fact.header) or fact.header in _HOP_BY_HOP):
        rule = "must name a header that Envoy forwards"
        raise broken(rule)
    return fact


_STREAM = Fact(namespace=BODY_NAMESPACE, path=("stream",))


def _fact_text(fact: Fact) -> str:
    if fact.header:
        return f"header:{fact.header}"
    if fact.namespace == BODY_NAMESPACE:
        return f"body:{fact.path[0]}"
    return ":".join(("metadata", fact.namespace, *fact.path))


def _pattern(value: object) -> object:
    text = as_text(value)
    if not text or "*" in text[:-1]:
        rule = "must be a text that is not empty and has * only at the end"
        raise broken(rule)
    return text


def _match(value: object) -> object:
    """Reject a value, as YAML reads it, that its fact can never have, and a fact named twice."""
    named: set[Fact] = set()
    for name, pattern in value.items() if isinstance(value, Mapping) else ():
        fact = parse_fact(name) if isinstance(name, str) else None
        if fact is None:
            continue
        if fact in named:  # in other case, which makes it another key for YAML
            rule = f"must name each fact once, {name} is repeated"
            raise broken(rule)
        named.add(fact)
        is_text = fact.header or fact.namespace == BODY_NAMESPACE
        if fact == _STREAM:
            if as_text(pattern) not in {"true", "false", "*"}:
                rule = f"must have true or false for {name}, got {pattern!r}"
                raise broken(rule)
        elif is_text and isinstance(pattern, bool | float):
            rule = f"must quote the value of {name}, which YAML reads as {pattern!r}"
            raise broken(rule)
        elif isinstance(pattern, date):
            rule = f"must quote the value of {name}, which YAML reads as a date, got {pattern}"
            raise broken(rule)
        elif fact.header and isinstance(pattern, str) and pattern != pattern.strip():
            rule = f"must have a value without spaces around it for {name}, got {pattern!r}"
            raise broken(rule)
    return value


def _exempt_path(value: str) -> str:
    if _EXEMPT.fullmatch(value) is None:
        rule = (
            "must be a path that begins with /, has * only at the end and no query, alone or after "
            "a method, as in POST /api/show"
        )
        raise broken(rule)
    return value


_EXEMPT = re.compile(r"(([A-Z]+|\*) )?/[^\s*?#]*\*?")


ExemptPath = Annotated[str, AfterValidator(_exempt_path)]
FactName = Annotated[Fact, BeforeValidator(_fact), PlainSerializer(_fact_text)]
Pattern = Annotated[str, BeforeValidator(_pattern)]


class RequestRule(Section):
    """A rule that sets objective or tenant from trusted facts."""

    match: Annotated[Mapping[FactName, Pattern], BeforeValidator(_match)] = Field(default={})
    """Facts and the value each must have: a text, a prefix (`gold-*`), or any value (`*`). A fact
    is `header:NAME`, `body:NAME` (model, stream, max_completion_tokens, max_output_tokens,
    max_tokens, user, service_tier) or `metadata:NAMESPACE:KEY`. An empty match always matches. A
    rule on the body never matches a body that Envoy cannot parse: one with an integer from 2^63
    to 2^64 - 1, NaN or deep nesting; `flowcontrol_unread_bodies_total` counts them."""
    objective: str | None = Field(default=None, min_length=1)
    """InferenceObjective of requests that match."""
    objective_from: FactName | None = None
    """Fact whose value is the objective."""
    flow_id: str | None = Field(default=None, min_length=1)
    """Tenant of requests that match."""
    flow_id_from: FactName | None = None
    """Fact whose value is the tenant. For a header that holds a key (authorization, x-api-key,
    api-key, x-goog-api-key, cookie), the tenant is `key-` and 16 digits of the key's SHA-256, so
    that no log, ledger or page shows the key. `flowcontrol classify` shows the digits."""

    @model_validator(mode="after")
    def _sets_each_once(self) -> Self:
        objectives = (self.objective, self.objective_from)
        flow_ids = (self.flow_id, self.flow_id_from)
        if all(objectives) or all(flow_ids) or not any((*objectives, *flow_ids)):
            rule = "must set objective or objectiveFrom, or flowId or flowIdFrom, or one of each"
            raise broken(rule)
        return self

    def rule(self) -> Rule:
        """Return the rule in the form that requests are read with."""
        return Rule(
            match=tuple(Condition(fact, pattern) for fact, pattern in self.match.items()),
            objective=self.objective or self.objective_from,
            flow_id=self.flow_id or self.flow_id_from,
        )

    def facts(self) -> list[Fact]:
        """Return every fact that the rule uses."""
        sources = (self.objective_from, self.flow_id_from)
        return [*self.match, *(fact for fact in sources if fact is not None)]


class Requests(Section):
    """How requests are read."""

    exempt_paths: tuple[ExemptPath, ...] = (
        *("/health", "/healthz", "/ping", "/ready", "/version", "/metrics"),
        *("/v1/models", "/v1/models/*"),
        *("/", "/api/tags", "/api/ps", "/api/version"),  # Ollama's
        "/info",  # TGI's
        *("/v2", "/v2/health/*", "/v2/models/*"),  # KServe's, and so Triton's
        "POST /grpc.health.v1.Health/*",
        "POST /inference.GRPCInferenceService/ServerLive",
        "POST /inference.GRPCInferenceService/ServerReady",
        "POST /inference.GRPCInferenceService/ModelReady",
    )
    """Requests that pass without queueing and hold no slot. A path is exact, or a prefix that ends
    in *. A path alone covers GET, HEAD and OPTIONS. `POST /api/show` names a method; `* /echo`
    means any method."""
    exempt_without_gate: bool = Field(default=True, strict=True)
    """Whether Envoy lets exempt requests pass while this service is unreachable (`envoy-config`).
    If false, they get 503 like all others. With --original-dst they always get 503, because no
    endpoint is named."""
    on_fault: Literal["refuse", "continue"] = "refuse"
    """What happens to requests when flow control fails. refuse: 500 if the processor inside this
    service fails; 503, from Envoy, while this service is unreachable (`envoy-config`). continue:
    they pass ungated in both cases. Either way, responses that have begun complete."""
    rules: tuple[RequestRule, ...] = ()
    """Objective and flow id from facts that the operator trusts. Each is taken from the first rule
    that matches and sets it; such a rule takes precedence over the client's header."""
    trust_headers: bool = Field(default=True, strict=True)
    """Whether objective, flow id and TTFT target are also taken from the headers of the request. If
    false, clients cannot set them, and only the rules count."""
    trust_engine_headers: bool = Field(default=False, strict=True)
    """Whether x-vllm-priority, x-override-priority and x-gateway-destination-endpoint from a client
    reach the model server. If false, they are removed. true is for a proxy in front of this one
    that sets them; a value that this service sets replaces the client's."""
    websockets: bool = Field(default=False, strict=True)
    """Whether Envoy accepts WebSocket upgrades (`envoy-config`). A connection then queues like a
    request and holds one slot until it closes. If false, Envoy answers 403. Envoy Gateway accepts
    upgrades in any case; there, true prevents it from holding back an upgrade whose content type is
    JSON."""
    input_tokens_from: FactName | None = None
    """Fact with the number of tokens of the prompt, if something in front of Envoy sets one.
    Otherwise it is estimated from the announced size, at 4 bytes per token until usage shows how
    many."""
    read_bodies: bool = Field(default=True, strict=True)
    """Whether Envoy reads model, max_tokens and so on from request bodies (`envoy-config`). It then
    holds a JSON body until it is complete, before anything else, and refuses a body above its
    buffer limit with 413. Either way, it sends no body to this service."""
    read_bodies_up_to: LimitFrom1 = written("64Ki")
    """Envoy neither reads nor holds a body larger than this, as announced in content-length
    (`envoy-config`); rules on the body do not match it. Reading costs Envoy about 7 us per KiB.
    Unless set, it is unlimited while `rules` or `inputTokensFrom` use a fact of the body, because a
    client could otherwise evade them with a long prompt, and in policies for Envoy Gateway."""
    engine_priority: Annotated[Literal["off", "vllm", "sglang"], BeforeValidator(switched_off)] = (
        written("off", alias="enginePriority")
    )
    """Sends the band to model servers in a header that overrides the `priority` of the body. vllm:
    x-vllm-priority (needs --scheduling-policy priority). sglang: x-override-priority (needs
    --enable-priority-scheduling)."""
    response_headers: tuple[Literal["queue-duration", "position", "headroom"], ...] = (
        "queue-duration",
    )
    """Headers that Envoy adds to responses (`envoy-config`). queue-duration:
    x-llm-d-flow-queue-duration-ms. position: x-llm-d-flow-position, how many requests were ahead
    when the wait began; every wait is then forecast. headroom: x-llm-d-flow-headroom, the part of
    the pool still free at dispatch."""

    unseen_hold: Duration = written("10s")
    """How long after its dispatch a request keeps its slot behind a gateway that does not show its
    response (NGINX Gateway Fabric); set it to the usual duration of a response. Behind every other
    gateway the slot is freed when the response has ended."""

    conformance: bool = Field(default=False, strict=True)
    """Only for the conformance tests of the Gateway API Inference Extension, never for real
    traffic. A request chooses its endpoints by the header test-epp-endpoint-selection; the response
    header x-conformance-test-served-endpoint names the one that served it, as the gateway reports.
    Needs a picker."""

    @model_validator(mode="after")
    def _bodies_are_read_for_rules(self) -> Self:
        asked = [fact for fact in self._facts() if fact.namespace == BODY_NAMESPACE]
        if asked and not self.read_bodies:
            rule = f"must have readBodies: true while {_fact_text(asked[0])} is used"
            raise broken(rule)
        return self

    def body_bytes_max(self, *, by_default: bool) -> int | None:
        """Return the size in bytes up to which Envoy reads bodies; None: it reads every one.

        Args:
            by_default: whether there is a limit if none is set and no rule uses the body.
        """
        is_asked = any(fact.namespace == BODY_NAMESPACE for fact in self._facts())
        is_set = "read_bodies_up_to" in self.model_fields_set
        return self.read_bodies_up_to if is_set or (by_default and not is_asked) else None

    def intake(
        self,
        bodies: BodyReads | None = None,
        *,
        reads_prefixes: bool = False,
        endpoints: Callable[[], Iterable[str]] = tuple,
    ) -> Intake:
        """Return how requests are read.

        Args:
            bodies: counts bodies that Envoy could not read.
            reads_prefixes: whether the picker uses hashes of the beginning of prompts.
            endpoints: returns the addresses of the pool.
        """
        return Intake(
            exempt=ExemptPaths(self.exempt_paths),
            trusts_headers=self.trust_headers,
            rules=tuple(each.rule() for each in self.rules),
            input_tokens=self.input_tokens_from,
            bodies=bodies if self.read_bodies else None,
            conformance=Conformance(endpoints) if self.conformance else None,
            reads_prefixes=reads_prefixes,
        )

    def engine(self) -> EnginePriority | None:
        """Return how model servers get the band; None: they do not."""
        return ENGINE_PRIORITIES.get(self.engine_priority)

    def namespaces(self) -> list[str]:
        """Return the metadata namespaces that Envoy must forward for rules, without the body's."""
        return sorted({fact.namespace for fact in self._facts()} - {"", BODY_NAMESPACE})

    def headers(self) -> list[str]:
        """Return the headers that Envoy must forward."""
        conformance = {SELECTION_HEADER} if self.conformance else set()
        facts = {fact.header for fact in self._facts()}
        return sorted({*READ_HEADERS, *facts, *conformance} - {""})

    def _facts(self) -> list[Fact]:
        """Return every fact that is used."""
        facts = [fact for each in self.rules for fact in each.facts()]
        return facts if self.input_tokens_from is None else [*facts, self.input_tokens_from]


class Settlement(Section):
    """Envoy's reports of finished requests, in its gRPC access log."""

    access_log: bool = Field(default=True, strict=True)
    """Whether Envoy reports every finished request (`envoy-config`): status, time to first token,
    generation time, bytes, endpoint. Needs Envoy 1.37."""
    token_usage: bool = Field(default=True, strict=True)
    """Whether Envoy also reports token usage, which it reads from responses as they pass.
    `accept-encoding` is removed from requests, because usage in a compressed response cannot be
    read."""
    lost_after: Duration = written("60s")
    """A request that ended this long ago and was not reported counts as lost: its usage stays an
    estimate."""

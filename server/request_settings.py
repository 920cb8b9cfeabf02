"""The sections of the configuration file about requests and their settlement."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from server.classify import READ_HEADERS, ExemptPaths, Intake
from server.replies import ENGINE_PRIORITIES, EnginePriority
from server.rules import BODY_NAMESPACE, FACT_RULE, Condition, Fact, Rule, as_text, parse_fact
from server.sections import Duration, LimitFrom1, Section, broken, switched_off, written


def _fact(value: object) -> object:
    fact = parse_fact(value) if isinstance(value, str) else None
    if fact is None:
        raise broken(FACT_RULE)
    return fact


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


def _exempt_path(value: str) -> str:
    if not value.startswith("/") or "*" in value[:-1]:
        rule = "must be a path that begins with / and has * only at the end"
        raise broken(rule)
    return value


ExemptPath = Annotated[str, AfterValidator(_exempt_path)]
FactName = Annotated[Fact, BeforeValidator(_fact), PlainSerializer(_fact_text)]
Pattern = Annotated[str, BeforeValidator(_pattern)]


class RequestRule(Section):
    """What an operator makes of trusted facts."""

    match: Mapping[FactName, Pattern] = Field(default={})
    """Facts and what each must be: a text, one that begins so (`gold-*`), or anything (`*`). A fact
    is `header:NAME`, `body:NAME` (model, stream, max_tokens, max_completion_tokens, user,
    service_tier) or `metadata:NAMESPACE:KEY`. Nothing to match: always."""
    objective: str | None = Field(default=None, min_length=1)
    """The InferenceObjective of such a request."""
    objective_from: FactName | None = None
    """The fact that names it."""
    flow_id: str | None = Field(default=None, min_length=1)
    """The tenant of such a request."""
    flow_id_from: FactName | None = None
    """The fact that names it."""

    @model_validator(mode="after")
    def _says_something_once(self) -> Self:
        objectives = (self.objective, self.objective_from)
        flow_ids = (self.flow_id, self.flow_id_from)
        if all(objectives) or all(flow_ids) or not any((*objectives, *flow_ids)):
            rule = "must say objective or objectiveFrom, flowId or flowIdFrom, or one of each pair"
            raise broken(rule)
        return self

    def rule(self) -> Rule:
        """Return it as requests are read by it."""
        return Rule(
            match=tuple(Condition(fact, pattern) for fact, pattern in self.match.items()),
            objective=self.objective or self.objective_from,
            flow_id=self.flow_id or self.flow_id_from,
        )

    def facts(self) -> list[Fact]:
        """Return every fact it asks for."""
        said = (self.objective_from, self.flow_id_from)
        return [*self.match, *(fact for fact in said if fact is not None)]


class Requests(Section):
    """How requests are read."""

    exempt_paths: tuple[ExemptPath, ...] = (
        *("/health", "/healthz", "/ping", "/ready", "/version", "/metrics"),
        *("/v1/models", "/v1/models/*"),
    )
    """Paths that pass without queueing and hold no slot: exact, or a prefix that ends in *."""
    on_internal_fault: Literal["refuse", "continue"] = "refuse"
    """If the processor itself fails: refuse with 500, or let requests continue ungated."""
    rules: tuple[RequestRule, ...] = ()
    """Objective and flow id from facts that the operator trusts. Each is taken from the first rule
    that matches and says it; such a rule comes before the client's header."""
    trust_headers: bool = Field(default=True, strict=True)
    """Whether objective, flow id and TTFT target are also taken from the headers a request comes
    with. false: a client cannot name its own; only the rules count."""
    input_tokens_from: FactName | None = None
    """The fact that says how many tokens the prompt has, where something in front knows; else the
    announced size is divided by 4."""
    read_bodies: bool = Field(default=True, strict=True)
    """Whether Envoy is to read model, max_tokens and so on from request bodies (`envoy-config`). It
    then holds a whole JSON body before anything else, and refuses one beyond its buffer limit with
    413. No body reaches this service either way."""
    read_bodies_up_to: LimitFrom1 = written("unlimited")
    """Bytes of a body beyond which Envoy reads nothing of it (`envoy-config`), and lets it pass
    unheld; as announced in content-length. Reading costs Envoy about 7 us a KiB. Beyond it rules on
    the body find nothing: with such rules a client can evade them by its prompt's size."""
    engine_priority: Annotated[Literal["off", "vllm", "sglang"], BeforeValidator(switched_off)] = (
        written("off", alias="enginePriority")
    )
    """Tell model servers the band, as a header each of them lets overrule the body's `priority`:
    vllm: x-vllm-priority (needs --scheduling-policy priority); sglang: x-override-priority (needs
    --enable-priority-scheduling)."""
    response_headers: tuple[Literal["queue-duration", "position", "headroom"], ...] = (
        "queue-duration",
    )
    """Headers Envoy adds to responses (`envoy-config`): x-llm-d-flow-queue-duration-ms;
    x-llm-d-flow-position, how many stood ahead as the wait began; x-llm-d-flow-headroom, the part
    of the pool still free at dispatch."""

    @model_validator(mode="after")
    def _bodies_are_read_for_rules(self) -> Self:
        asked = [fact for fact in self._facts() if fact.namespace == BODY_NAMESPACE]
        if asked and not self.read_bodies:
            rule = f"must have readBodies: true while {_fact_text(asked[0])} is asked for"
            raise broken(rule)
        return self

    def intake(self) -> Intake:
        """Return how requests are to be read."""
        return Intake(
            exempt=ExemptPaths(self.exempt_paths),
            trusts_headers=self.trust_headers,
            rules=tuple(each.rule() for each in self.rules),
            input_tokens=self.input_tokens_from,
        )

    def engine(self) -> EnginePriority | None:
        """Return how model servers are told of the band."""
        return ENGINE_PRIORITIES.get(self.engine_priority)

    def namespaces(self) -> list[str]:
        """Return the metadata that Envoy must forward for the rules, that of bodies apart."""
        return sorted({fact.namespace for fact in self._facts()} - {"", BODY_NAMESPACE})

    def headers(self) -> list[str]:
        """Return the headers that Envoy must forward."""
        return sorted({*READ_HEADERS, *(fact.header for fact in self._facts())} - {""})

    def _facts(self) -> list[Fact]:
        """Return every fact that is asked for."""
        facts = [fact for each in self.rules for fact in each.facts()]
        return facts if self.input_tokens_from is None else [*facts, self.input_tokens_from]


class Settlement(Section):
    """What Envoy reports of finished requests, in its gRPC access log."""

    access_log: bool = Field(default=True, strict=True)
    """Whether Envoy is to report every finished request (`envoy-config`): status, time to first
    token, generation time, bytes, endpoint. Needs Envoy 1.37."""
    token_usage: bool = Field(default=True, strict=True)
    """And its token usage, which Envoy reads from responses. It holds a JSON response that is no
    stream until it is whole; one beyond its buffer limit becomes a 500."""
    lost_after: Duration = written("60s")
    """A request that ended this long ago and was never reported counts as lost: what it took stays
    an estimate."""

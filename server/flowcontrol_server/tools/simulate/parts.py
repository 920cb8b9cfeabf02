"""Parts of a scenario file: types of values, model servers and faults."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.alias_generators import to_camel

from flowcontrol.config import Role
from flowcontrol.simulation.faults import (
    ClockJumped,
    DecisionsSlow,
    DrainBegins,
    EndpointGone,
    EngineStalled,
    Fault,
    MetricsLie,
    MetricsStale,
    ObjectivesEdited,
    SettlementsLost,
    SettlementsSlow,
)
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol_server.common.sections import (
    Count,
    Duration,
    Positive,
    Section,
    broken,
    plain_number,
)
from flowcontrol_server.common.units import format_duration, parse_duration, parse_quantity

_DEFAULT = ModelServerConfig()
_SERVERS_MAX = 10_000


def demand(is_so: bool, rule: str) -> None:  # noqa: FBT001 - an assertion
    """Raise the error that pydantic reports as a broken rule, unless the condition holds."""
    if not is_so:
        raise broken(rule)


def _moment(value: object) -> object:
    moment_ns = parse_duration(value) if isinstance(value, str) else None
    demand(moment_ns is not None, "must be a duration such as 0s, 500ms or 5m")
    return moment_ns


def _proportion(value: object) -> object:
    number = plain_number(value)
    demand(number is not None and 0 <= number <= 1, "must be a number from 0 to 1")
    return number


def _switch(value: object) -> object:
    demand(isinstance(value, bool), "must be true or false")
    return value


def _priorities(value: object) -> object:
    is_mapping = isinstance(value, dict) and all(type(v) is int for v in value.values())
    demand(is_mapping, "must be names with whole numbers, such as {chat: 10, batch: -1}")
    return value


def _whole(value: object) -> object:
    if isinstance(value, str):
        value = parse_quantity(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    demand(is_whole, "must be a whole number from 1 such as 500, 20k or 4Ki")
    return value


Moment = Annotated[int, BeforeValidator(_moment)]
"""A duration that may be zero."""
Proportion = Annotated[float, BeforeValidator(_proportion)]
"""From 0 to 1, both included."""
Switch = Annotated[bool, BeforeValidator(_switch)]
Whole = Annotated[int, BeforeValidator(_whole)]
Priorities = Annotated[dict[str, int], BeforeValidator(_priorities)]
"""Objectives: name to priority."""


class OneOf(Section):
    """A section with exactly one setting."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        names = [to_camel(name) for name in type(self).model_fields]
        rule = f"must set exactly one of {', '.join(names[:-1])} and {names[-1]}"
        demand(len(self.model_fields_set) == 1, rule)
        return self

    @property
    def chosen(self) -> Any:
        """The value of that setting."""
        (name,) = self.model_fields_set
        return getattr(self, name)


class Span(Section):
    """A span of time."""

    from_: Moment = Field(alias="from")
    """Its begin."""
    until: Moment
    """Its end."""

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        demand(self.from_ < self.until, "must have from < until")
        return self


class Servers(Section):
    """A group of identical model servers."""

    name: str = Field(default="server", min_length=1)
    """Prefix of their names, followed by a number: server-0, server-1."""
    count: int = Field(default=1, ge=1, le=_SERVERS_MAX)
    """Number of servers."""
    role: Literal["both", "prefill", "decode"] = "both"
    """Their role. With prefill and decode, each request passes one server of each role in turn."""
    joins_at: Moment = Field(default="0s")  # type: ignore[assignment]  # read by its validator
    """When they join the pool."""
    speed: Positive = 1.0
    """Speed factor: the times below are divided by it."""
    sequences_max: Whole = _DEFAULT.sequences_max
    """Most requests in a batch; further requests queue inside the server."""
    kv_tokens: Whole = _DEFAULT.kv_tokens
    """Size of its KV cache in tokens."""
    batched_tokens_max: Whole = _DEFAULT.batched_tokens_max
    """Most tokens of one step."""
    step_base: Duration = Field(default=format_duration(_DEFAULT.step_base_ns))  # type: ignore[assignment]  # read by its validator
    """Base time of a step."""
    sequence: Moment = Field(default=format_duration(_DEFAULT.sequence_ns))  # type: ignore[assignment]  # read by its validator
    """Added for each request that is generating."""
    prefill_token: Moment = Field(default=format_duration(_DEFAULT.prefill_token_ns))  # type: ignore[assignment]  # read by its validator
    """Added for each prompt token."""
    context_token: Moment = Field(default=format_duration(_DEFAULT.context_token_ns))  # type: ignore[assignment]  # read by its validator
    """Added for each token in the KV cache."""

    prefix_block_tokens: Count = 0
    """Tokens of a block of its prefix cache; 512 for Mooncake's traces; 0: no prefix cache."""

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        try:
            self._config()
        except ValueError as error:
            demand(is_so=False, rule=f"can never run: {error}")
        return self

    def _config(self) -> ModelServerConfig:
        return ModelServerConfig(
            sequences_max=self.sequences_max,
            kv_tokens=self.kv_tokens,
            batched_tokens_max=self.batched_tokens_max,
            step_base_ns=max(1, round(self.step_base / self.speed)),
            sequence_ns=round(self.sequence / self.speed),
            prefill_token_ns=round(self.prefill_token / self.speed),
            context_token_ns=round(self.context_token / self.speed),
            prefix_block_tokens=self.prefix_block_tokens,
        )

    def specs(self) -> list[ServerSpec]:
        """Return the specification of each server."""
        names = [f"{self.name}-{index}" for index in range(self.count)]
        config = self._config()
        role = Role(self.role)
        return [
            ServerSpec(address=name, config=config, from_ns=self.joins_at, role=role)
            for name in names
        ]


class EndpointGoneSection(Span):
    """A server crashes and returns."""

    server: str
    """Name of the server."""
    noticed_after: Moment = Field(default="0s")  # type: ignore[assignment]  # read by its validator
    """Time until Envoy and the gate detect the crash, and the return."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return EndpointGone(
            address=self.server,
            from_ns=self.from_,
            until_ns=self.until,
            noticed_after_ns=self.noticed_after,
        )


class MetricsStaleSection(Span):
    """Scrapes fail."""

    servers: tuple[str, ...] | None = None
    """Whose; all when left out."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return MetricsStale(from_ns=self.from_, until_ns=self.until, addresses=self.servers)


class MetricsLieSection(Span):
    """Scrapes return wrong values."""

    servers: tuple[str, ...] | None = None
    """Whose; all when left out."""
    waiting: int = Field(default=0, ge=0)
    """Queued requests that they report."""
    running: int = Field(default=0, ge=0)
    """Running requests that they report."""
    kv_usage: Proportion = 0.0
    """KV cache usage that they report, 0 to 1."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return MetricsLie(
            from_ns=self.from_,
            until_ns=self.until,
            addresses=self.servers,
            waiting=self.waiting,
            running=self.running,
            kv_usage=self.kv_usage,
        )


class DelaySection(Span):
    """Something takes longer."""

    delay: Duration
    """The delay."""


class SettlementSlowSection(DelaySection):
    """The access log arrives late."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return SettlementsSlow(from_ns=self.from_, until_ns=self.until, delay_ns=self.delay)


class SettlementLostSection(Span):
    """The access log is lost."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return SettlementsLost(from_ns=self.from_, until_ns=self.until)


class DecisionsSlowSection(DelaySection):
    """Decisions take effect late."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return DecisionsSlow(from_ns=self.from_, until_ns=self.until, delay_ns=self.delay)


class EngineStalledSection(Span):
    """The gate gets no turn."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return EngineStalled(from_ns=self.from_, until_ns=self.until)


class ClockJumpedSection(Section):
    """The gate's clock jumps forward."""

    at: Moment
    """When."""
    by: Duration
    """Size of the jump."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return ClockJumped(at_ns=self.at, by_ns=self.by)


class ObjectivesEditedSection(Section):
    """Other objectives are applied."""

    at: Moment
    """When."""
    objectives: Priorities
    """The new set of objectives, name to priority."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return ObjectivesEdited(at_ns=self.at, priorities=self.objectives)


class DrainBeginsSection(Section):
    """The gate shuts down."""

    at: Moment
    """When."""
    budget: Duration
    """How long waiting requests may still be dispatched."""

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        return DrainBegins(at_ns=self.at, budget_ns=self.budget)


class FaultSection(OneOf):
    """One fault."""

    endpoint_gone: EndpointGoneSection | None = None
    metrics_stale: MetricsStaleSection | None = None
    metrics_lie: MetricsLieSection | None = None
    settlement_slow: SettlementSlowSection | None = None
    settlement_lost: SettlementLostSection | None = None
    decisions_slow: DecisionsSlowSection | None = None
    engine_stalled: EngineStalledSection | None = None
    clock_jumped: ClockJumpedSection | None = None
    objectives_edited: ObjectivesEditedSection | None = None
    drain_begins: DrainBeginsSection | None = None

    def fault(self) -> Fault:
        """Return the fault for the simulation."""
        fault: Fault = self.chosen.fault()
        return fault

    @property
    def server_names(self) -> tuple[str, ...]:
        """Names of the servers that the fault lists."""
        match self.chosen:
            case EndpointGoneSection(server=name):
                return (name,)
            case MetricsStaleSection(servers=names) | MetricsLieSection(servers=names):
                return names or ()
            case _:
                return ()

"""The engine's settings as a section of files: the service's configuration, and scenarios.

The engine's own defaults are taken from its configuration classes.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from flowcontrol.config import (
    Adaptive,
    Auto,
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Detector,
    Fairness,
    Limits,
    Ordering,
    Picker,
    Reclaim,
    Staleness,
    TokenPrices,
    Utilization,
)
from flowcontrol_server.common.sections import (
    Count,
    CountFrom1,
    Duration,
    From0,
    Limit,
    LimitFrom1,
    Part,
    Positive,
    Priority,
    Section,
    Share,
    broken,
    switched_off,
    written,
    written_duration,
)

ENVOY_PATIENCE_MAX_NS = 3_600_000_000_000
"""The longest message_timeout that Envoy accepts: no wait can be longer."""
ENVOY_MARGIN_NS = 30_000_000_000
"""Envoy waits this much longer than the longest wait, so that the engine always decides first."""

_ENGINE, _BAND = ControllerConfig(), BandSettings()
_CONCURRENCY, _UTILIZATION, _ADAPTIVE = Concurrency(), Utilization(), Adaptive()

_SETTINGS_OF = {
    "concurrency": {"max_concurrency", "max_token_concurrency"},
    "utilization": {
        *("queue_depth_threshold", "kv_cache_util_threshold"),
        *("metrics_staleness_threshold", "when_stale", "max_concurrency"),
    },
    "adaptive": {"first_limit", "max_limit"},
    "auto": set(),
}


class Saturation(Section):
    """When the pool is full. A list of such mappings is allowed, too: then the fullest counts."""

    detector: Literal["auto", "concurrency", "utilization", "adaptive"] = "auto"
    """auto: requests and tokens in flight against limits that it finds itself, from the model
    servers' metrics if there are any, else from the access log, else from how long requests take.
    concurrency: requests or tokens in flight, counted exactly from the streams Envoy holds open;
    the default if maxConcurrency or maxTokenConcurrency is set. utilization: what the model
    servers' metrics report. adaptive: requests in flight against a limit that it finds itself, from
    the access log."""
    max_concurrency: LimitFrom1 = written(_CONCURRENCY.requests_max)
    """concurrency: an endpoint is full with this many requests in flight; about what the engine
    batches. utilization: the same, where whenStale is fallback."""
    max_token_concurrency: LimitFrom1 = written("unlimited")
    """concurrency: an endpoint is full with this many estimated tokens in flight, prompts and
    answers."""
    queue_depth_threshold: CountFrom1 = _UTILIZATION.waiting_max
    """utilization: a model server is full with this many requests queued inside it."""
    kv_cache_util_threshold: Part = _UTILIZATION.kv_usage_max
    """utilization: a model server is full with this part of its KV cache in use."""
    metrics_staleness_threshold: Duration = written_duration(_UTILIZATION.stale_after_ns)
    """utilization: metrics older than this are stale."""
    when_stale: Literal["hold", "decay", "fallback", "closed"] = written(
        _UTILIZATION.staleness.value
    )
    """utilization: the load of a model server with stale metrics. hold: the last reported load,
    plus every dispatch since. decay: the same, halved each time the threshold passes again.
    fallback: its requests in flight over maxConcurrency. closed: full."""
    first_limit: CountFrom1 = _ADAPTIVE.limit_first
    """adaptive: first limit on the requests in flight at one endpoint."""
    max_limit: CountFrom1 = _ADAPTIVE.limit_max
    """adaptive: highest limit on the requests in flight at one endpoint."""

    @model_validator(mode="before")
    @classmethod
    def _a_limit_means_concurrency(cls, value: object) -> object:
        if isinstance(value, Mapping) and {"maxConcurrency", "maxTokenConcurrency"} & set(value):
            return {"detector": "concurrency", **value}
        return value

    @model_validator(mode="after")
    def _fits_its_detector(self) -> Self:
        strange = self.model_fields_set - _SETTINGS_OF[self.detector] - {"detector"}
        if strange:
            fields = type(self).model_fields
            names = sorted(str(fields[name].alias) for name in strange)
            rule = f"must not have settings that detector {self.detector} does not use: "
            raise broken(rule + ", ".join(names))
        if self.detector == "concurrency":
            if self.max_concurrency is None and self.max_token_concurrency is None:
                rule = "must limit maxConcurrency or maxTokenConcurrency"
                raise broken(rule)
        elif self.detector == "utilization":
            if self.max_concurrency is None:
                rule = "must limit maxConcurrency, for the fallback"
                raise broken(rule)
        elif self.detector == "adaptive" and self.max_limit < self.first_limit:
            rule = "must have firstLimit <= maxLimit"
            raise broken(rule)
        return self

    def config(self) -> Detector:
        """Return the engine's settings."""
        if self.detector == "concurrency":
            return Concurrency(
                requests_max=self.max_concurrency, tokens_max=self.max_token_concurrency
            )
        if self.detector == "auto":
            return Auto()
        if self.detector == "adaptive":
            return Adaptive(limit_first=self.first_limit, limit_max=self.max_limit)
        assert self.max_concurrency is not None, "validated above"
        return Utilization(
            waiting_max=self.queue_depth_threshold,
            kv_usage_max=self.kv_cache_util_threshold,
            stale_after_ns=self.metrics_staleness_threshold,
            staleness=Staleness(self.when_stale),
            requests_max=self.max_concurrency,
        )


TAGS = _ONE, _SEVERAL = ("(one)", "(several)")
"""Tags of pydantic, which are left out of the paths in errors."""

OneOrSeveral = Annotated[
    Annotated[Saturation, Tag(_ONE)] | Annotated[tuple[Saturation, ...], Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list | tuple) else _ONE),
]


class BandMatch(Section):
    """The bands that a template is for."""

    min_priority: Priority | None = None
    """Lowest priority, included."""
    max_priority: Priority | None = None
    """Highest priority, included."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_priority is None or self.max_priority is None:
            return self
        if self.min_priority > self.max_priority:
            rule = "must have minPriority <= maxPriority"
            raise broken(rule)
        return self


class BandSection(Section):
    """A template: settings for the bands it matches. It creates no band; objectives do."""

    match: BandMatch = BandMatch()
    """The bands; all if unset."""
    max_requests: Limit = written("unlimited")
    """Requests that may wait in such a band. 0: none may wait."""
    max_bytes: Limit = written("unlimited")
    """Bytes of bodies that may wait in such a band."""
    max_flow_requests: Limit = written("unlimited")
    """Requests that may wait in each flow of such a band."""
    max_flow_bytes: Limit = written("unlimited")
    """Bytes of bodies that may wait in each flow of such a band."""
    request_ttl: Duration | None = Field(default=None, alias="requestTTL")
    """Longest wait in such a band while the pool has endpoints. If unset,
    flowControl.requestTTL."""
    fairness: Literal[
        "weighted-tokens", "round-robin", "global-strict", "least-attained-service"
    ] = written(_BAND.fairness.value)
    """Which flow is served next. weighted-tokens: equal token cost, by weight. round-robin: equal
    turns. global-strict: the flow whose request is first by `ordering`. least-attained-service: the
    flow that has used least lately."""
    ordering: Literal["fcfs", "edf", "slo-deadline"] = written(_BAND.ordering.value)
    """Which request of a flow is served next. fcfs: first come, first served. edf: the request that
    expires first. slo-deadline: the request whose first token is due first, by
    x-llm-d-slo-ttft-ms."""
    min_share: Share = _BAND.share_min
    """Share of the dispatched token cost that such a band gets while it has requests waiting,
    whatever waits above it. The shares of all bands together are at most 1."""
    promote_after: Duration | None = None
    """A request that has waited this long in such a band goes before all others. If unset, none
    does."""
    wait_target: Part = _BAND.wait_target
    """With ceilings.policy reserve: part of the arrivals that may find no free slot because lower
    bands hold it. 1: no slot is left free for such a band."""

    def settings(self, ttl_ns: int) -> BandSettings:
        """Return the engine's settings, with this time to live where none is set."""
        return BandSettings(
            limits=Limits(requests_max=self.max_requests, bytes_max=self.max_bytes),
            flow_limits=Limits(requests_max=self.max_flow_requests, bytes_max=self.max_flow_bytes),
            ttl_ns=self.request_ttl or ttl_ns,
            fairness=Fairness(self.fairness),
            ordering=Ordering(self.ordering),
            share_min=self.min_share,
            promote_after_ns=self.promote_after,
            wait_target=self.wait_target,
        )


class CeilingSection(Section):
    """Which part of the pool each band may fill."""

    policy: Literal["reserve", "static", "priority-holdback", "soft-reflective"] = written(
        _ENGINE.ceilings.policy.value
    )
    """reserve: lower bands leave free the slots that higher bands need, learnt from their arrivals,
    so that at most waitTarget of these find none. They also leave time for reading the prompts of
    higher bands. static: every band may fill the pool up to maxCeiling. priority-holdback: the
    lower the band, the lower its ceiling, down to minCeiling. soft-reflective: lower bands fade out
    as the pool fills."""
    domain: Literal["rank", "value"] = "rank"
    """priority-holdback: how ceilings are spaced. rank: in even steps by a band's rank. value: in
    proportion to its priority, so that a band added or removed between the highest and the lowest
    moves no ceiling."""
    max_ceiling: Part = _ENGINE.ceilings.ceiling_max
    """Saturation at which the highest band is gated; with static, every band."""
    min_ceiling: Share = _ENGINE.ceilings.ceiling_min
    """priority-holdback: saturation at which the lowest band is gated."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.policy == "priority-holdback" and self.min_ceiling >= self.max_ceiling:
            rule = "must have minCeiling < maxCeiling"
            raise broken(rule)
        return self

    def config(self) -> CeilingSettings:
        """Return the engine's settings."""
        is_holdback = self.policy == "priority-holdback"
        policy = Ceilings(f"{self.policy}-{self.domain}" if is_holdback else self.policy)
        return CeilingSettings(
            policy=policy, ceiling_max=self.max_ceiling, ceiling_min=self.min_ceiling
        )


class ReclaimSection(Section):
    """Ending sheddable requests in flight (negative priority) for better ones that wait."""

    mode: Annotated[
        Literal["off", "before-first-byte", "any-time"], BeforeValidator(switched_off)
    ] = "off"
    """Which requests may be ended. before-first-byte: only requests that have not begun to answer;
    they get a clean 429. any-time: also requests that have begun; their response is cut off.
    Unless bodies are streamed through this service, Envoy's filter needs `allow_mode_override:
    true`, as `envoy-config` writes it: otherwise this service does not see when a response begins,
    and either mode cuts responses off."""
    at_once: CountFrom1 = _ENGINE.reclaim.at_once_max
    """Most requests that are being ended, and still in flight, at once."""
    patience: Duration = written_duration(_ENGINE.reclaim.patience_ns)
    """An ended request that is still in flight after this time is no longer waited for."""

    def config(self) -> Reclaim:
        """Return the engine's settings."""
        return Reclaim(
            is_enabled=self.mode != "off",
            is_only_before_first_byte=self.mode != "any-time",
            at_once_max=self.at_once,
            patience_ns=self.patience,
        )


class TokenPriceSection(Section):
    """What a token costs; only the ratios matter."""

    input: Positive = _ENGINE.prices.input
    """Price of a prompt token."""
    cached_input: From0 = _ENGINE.prices.cached_input
    """Price of a prompt token that was in the model server's prefix cache."""
    output: From0 = _ENGINE.prices.output
    """Price of a token of the answer."""


class FlowControl(Section):
    """The queue."""

    max_requests: Limit = Field(default=20_000)
    """Requests that may wait in all bands together. 0: none may wait."""
    max_bytes: Limit = written("4Gi")
    """Bytes of bodies that may wait in all bands together: as announced in content-length, or as
    counted by Envoy where it holds the body to read it. Envoy holds the bodies, unless a gateway
    streams them through this service."""
    request_ttl: Duration = written("60s", alias="requestTTL")
    """Longest wait while the pool has endpoints. The request is evicted exactly then, with 429."""
    no_endpoint_ttl: Duration = written("300s", alias="noEndpointTTL")
    """Longest wait while the pool is empty. The request is evicted exactly then, with 503."""
    drain_budget: Duration = written("30s")
    """How long after SIGTERM waiting requests may still be dispatched; those left then get 503."""
    bands: tuple[BandSection, ...] = ()
    """Templates; the first that matches a band's priority counts."""
    ceilings: CeilingSection = CeilingSection()
    """Which part of the pool each band may fill."""
    weights: Mapping[str, Positive] = Field(default={})
    """Weights of tenants, by fairness id, above 0; 1 for tenants not listed. With weighted-tokens a
    tenant of weight 2 gets twice as much as one of weight 1."""
    token_prices: TokenPriceSection = TokenPriceSection()
    """What a token costs; only the ratios matter."""
    attained_half_life: Duration = written_duration(_ENGINE.attained_half_life_ns)
    """least-attained-service: time after which a tenant's past usage counts half."""
    reclaim: ReclaimSection = ReclaimSection()
    """Ending sheddable requests in flight for better ones that wait."""

    @model_validator(mode="after")
    def _within_envoys_patience(self) -> Self:
        if self.longest_wait_ns + ENVOY_MARGIN_NS > ENVOY_PATIENCE_MAX_NS:
            seconds = (ENVOY_PATIENCE_MAX_NS - ENVOY_MARGIN_NS) // 1_000_000_000
            rule = (
                f"must keep the longest requestTTL + noEndpointTTL within {seconds}s: "
                "Envoy gives up on a parked request after at most an hour"
            )
            raise broken(rule)
        return self

    @property
    def longest_wait_ns(self) -> int:
        """Longest time that a request can be parked: both limits, one after the other."""
        ttls = [self.request_ttl]
        ttls += [band.request_ttl for band in self.bands if band.request_ttl]
        return max(ttls) + self.no_endpoint_ttl


class EngineSection(Section):
    """All settings of the engine."""

    picker: Annotated[
        Literal["off", "least-loaded", "prefix-affinity"], BeforeValidator(switched_off)
    ] = "off"
    """What chooses the endpoint. off: Envoy. least-loaded: this service, at dispatch.
    prefix-affinity: this service; the endpoint that has already served the first half of the prompt
    or more, unless its load is above a tenth and above 1.5 times the mean. Where bodies do not pass
    through this service, all prompts of a flow id count as having the same beginning."""
    picker_fallbacks: Count = _ENGINE.fallbacks_max
    """Further endpoints named with the one picked, in the order in which Envoy tries them if it
    cannot be reached. With 0, Envoy then chooses one itself."""
    saturation: OneOrSeveral = Saturation()
    """When the pool is full."""
    flow_control: FlowControl = FlowControl()
    """The queue."""

    def controller_config(self) -> ControllerConfig:
        """Return the engine's settings."""
        queue, saturation = self.flow_control, self.saturation
        detectors = (saturation,) if isinstance(saturation, Saturation) else saturation
        prices = queue.token_prices
        return ControllerConfig(
            limits=Limits(requests_max=queue.max_requests, bytes_max=queue.max_bytes),
            templates=tuple(
                BandTemplate(
                    priority_min=band.match.min_priority,
                    priority_max=band.match.max_priority,
                    settings=band.settings(queue.request_ttl),
                )
                for band in queue.bands
            ),
            default_settings=BandSettings(ttl_ns=queue.request_ttl),
            no_endpoint_ttl_ns=queue.no_endpoint_ttl,
            detectors=tuple(each.config() for each in detectors),
            ceilings=queue.ceilings.config(),
            picker=Picker(self.picker),
            fallbacks_max=self.picker_fallbacks,
            weights=dict(queue.weights),
            prices=TokenPrices(
                input=prices.input, cached_input=prices.cached_input, output=prices.output
            ),
            attained_half_life_ns=queue.attained_half_life,
            reclaim=queue.reclaim.config(),
        )

    @field_validator("saturation")
    @classmethod
    def _of_each_kind_one(
        cls, value: Saturation | tuple[Saturation, ...]
    ) -> Saturation | tuple[Saturation, ...]:
        if not value:
            rule = "must name a detector"
            raise broken(rule)
        kinds = [each.detector for each in value] if isinstance(value, tuple) else []
        if twice := [kind for kind, count in Counter(kinds).items() if count > 1]:
            rule = f"must name each detector once, got {', '.join(twice)} more than once"
            raise broken(rule)
        return value

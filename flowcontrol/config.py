"""Pure. The engine's configuration. Times in nanoseconds, sizes in bytes, None: no limit."""

# interpreted: its dataclasses are read by their hints

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from math import isfinite
from typing import Final, final

from flowcontrol.errors import ConfigError

RETRY_AFTER_MAX_NS: Final = 30_000_000_000
"""Longest Retry-After: the cap of the contract, llm-d-router#2487."""


class Fairness(Enum):
    """How a band chooses between its flows; theory in `fairness`."""

    WEIGHTED_TOKENS = "weighted-tokens"
    ROUND_ROBIN = "round-robin"
    GLOBAL_STRICT = "global-strict"
    LEAST_ATTAINED_SERVICE = "least-attained-service"


class Ordering(Enum):
    """How a flow orders its requests; of two equal ones the earlier arrival is first."""

    FCFS = "fcfs"
    EDF = "edf"
    """Earliest deadline first: the request that would be evicted next goes first."""
    SLO_DEADLINE = "slo-deadline"
    """The request whose first token is due next goes first; those without a due time go last."""


class Picker(Enum):
    """What chooses the endpoint of a dispatched request."""

    OFF = "off"
    """Envoy; the engine counts the pool as a whole."""
    LEAST_LOADED = "least-loaded"
    """The engine, at the moment of dispatch: the endpoint with the most room."""
    PREFIX_AFFINITY = "prefix-affinity"
    """The engine: the endpoint that served at least half of the prompt, if its load allows, else
    the one with the most room."""


class Role(Enum):
    """What an endpoint does, if prefill and decode run apart."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class Ceilings(Enum):
    """At which saturation each band is gated; theory in `ceilings`."""

    STATIC = "static"
    HOLDBACK_BY_RANK = "priority-holdback-rank"
    HOLDBACK_BY_VALUE = "priority-holdback-value"
    SOFT_REFLECTIVE = "soft-reflective"
    RESERVE = "reserve"
    """As much is left free as the bands above need; theory in `reserve`."""

    @property
    def is_holdback(self) -> bool:
        """Whether it is one of the policies that use `ceiling_min`."""
        return self in (Ceilings.HOLDBACK_BY_RANK, Ceilings.HOLDBACK_BY_VALUE)


class Staleness(Enum):
    """How an endpoint counts whose metrics are too old."""

    HOLD = "hold"
    """By its last scrape, and every dispatch since."""
    DECAY = "decay"
    """The same, halved each time another `stale_after_ns` passes."""
    FALLBACK = "fallback"
    """By its requests in flight over `requests_max`, like the concurrency detector."""
    CLOSED = "closed"
    """As full."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may wait. 0: nothing, None: unlimited. An exact fit is accepted."""

    requests_max: int | None = None
    bytes_max: int | None = None

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by what they limit, as in `LIMITED`."""
        every = ((name, getattr(self, f"{name}_max")) for name in LIMITED)
        return {name: most for name, most in every if most is not None}


LIMITED: Final = tuple(each.name.removesuffix("_max") for each in fields(Limits))
"""What can be limited: requests, bytes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BandSettings:
    """Settings of one band."""

    limits: Limits = field(default_factory=Limits)
    flow_limits: Limits = field(default_factory=Limits)
    """Limits of each of its flows."""
    ttl_ns: int | None = None
    """Longest wait while the pool has endpoints. None: for ever."""
    fairness: Fairness = Fairness.WEIGHTED_TOKENS
    ordering: Ordering = Ordering.FCFS
    share_min: float = 0.0
    """Part of the dispatched cost that this band gets while it has work waiting, whatever waits
    above it: from 0 to below 1, all bands together at most 1."""
    promote_after_ns: int | None = None
    """A request that has waited for so long goes before all others. None: never."""
    wait_target: float = 0.01
    """With the reserve policy: probability that an arrival finds no place because lower bands have
    taken it. Above 0, at most 1; 1: nothing is left free for it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BandTemplate:
    """Settings for the bands whose priority lies in a range. A template creates no band."""

    priority_min: int | None = None
    priority_max: int | None = None
    settings: BandSettings

    def matches(self, priority: int) -> bool:
        """Whether a band of this priority takes its settings from here; both ends included."""
        above = self.priority_min is None or priority >= self.priority_min
        below = self.priority_max is None or priority <= self.priority_max
        return above and below


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrices:
    """Cost of a token; only ratios matter. At least 0; `input` above 0."""

    input: float = 1.0
    cached_input: float = 0.1
    """A prompt token that the model server had in its prefix cache."""
    output: float = 2.0
    """As in VTC: generating a token takes about as long as prefilling two."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """Load by requests in flight, tokens in flight, or both: the fuller counts."""

    requests_max: int | None = 64
    """Requests at one endpoint, at least 1; None: no limit on requests."""
    tokens_max: int | None = None
    """Tokens, prompt and expected answer, at one endpoint, at least 1; None: no limit on them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """Load by the metrics of the endpoints."""

    waiting_max: int = 5
    """Requests queued inside an engine at which it is full, at least 1."""
    kv_usage_max: float = 0.8
    """Part of the KV cache in use at which it is full, above 0, at most 1."""
    stale_after_ns: int = 2_000_000_000
    """Age at which a scrape is too old, above 0."""
    staleness: Staleness = Staleness.FALLBACK
    requests_max: int = 64
    """Requests at one endpoint for the fallback, at least 1."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Load by a limit on requests in flight that the engine finds by itself."""

    limit_first: int = 8
    """First limit at one endpoint, at least 1."""
    limit_max: int = 4096
    """Largest limit at one endpoint, at least `limit_first`."""


@final
@dataclass(frozen=True, slots=True)
class Auto:
    """Load by limits on requests and tokens in flight that the engine finds by itself."""


Detector = Concurrency | Utilization | Adaptive | Auto


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CeilingSettings:
    """Which part of the pool each band may fill."""

    policy: Ceilings = Ceilings.RESERVE
    ceiling_max: float = 1.0
    """Ceiling of the highest band, or of all bands with static: above 0, at most 1."""
    ceiling_min: float = 0.8
    """Ceiling of the lowest band, with holdback: from 0 to below `ceiling_max`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaim:
    """Ending requests in flight for more important ones that wait."""

    is_enabled: bool = False
    is_only_before_first_byte: bool = True
    """Never end a request that has begun to answer."""
    at_once_max: int = 2
    """Most requests being ended at a time, at least 1."""
    patience_ns: int = 10_000_000_000
    """A request being ended that has not left after so long counts as lost; above 0."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The settings of the flow controller.

    Raises:
        ConfigError: names every field out of its range.
    """

    limits: Limits = field(default_factory=Limits)
    """Limits of all bands together."""
    templates: tuple[BandTemplate, ...] = ()
    """A band takes its settings from the first that matches its priority."""
    default_settings: BandSettings = field(default_factory=BandSettings)
    """For a band that no template matches."""
    no_endpoint_ttl_ns: int | None = None
    """Longest wait while the pool is empty. None: for ever."""
    detectors: tuple[Detector, ...] = (Auto(),)
    """At least one; the fullest counts."""
    ceilings: CeilingSettings = field(default_factory=CeilingSettings)
    picker: Picker = Picker.OFF
    fallbacks_max: int = 0
    """Endpoints named besides the one picked, in case it is unreachable. At least 0."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of tenants by flow id, above 0; 1.0 for those not named."""
    prices: TokenPrices = field(default_factory=TokenPrices)
    attained_half_life_ns: int = 60_000_000_000
    """For least-attained-service, above 0."""
    reclaim: Reclaim = field(default_factory=Reclaim)
    forecasts: bool = False
    """Whether every wait is forecast when it begins, for its decision. Otherwise only those are
    that the intervals are learnt from (`forecast.Calibration`). A query about one request or band
    is answered in any case."""

    def __post_init__(self) -> None:
        problems = [*_own_problems(self), *_detector_problems(self), *_tenant_problems(self)]
        problems += _limit_problems("limits", self.limits)
        problems += _band_problems("default_settings", self.default_settings)
        for index, template in enumerate(self.templates):
            problems += _band_problems(f"templates[{index}].settings", template.settings)
        if problems:
            raise ConfigError(problems)

    def settings_for(self, priority: int) -> BandSettings:
        """Return the settings of a band; cost O(templates)."""
        for template in self.templates:
            if template.matches(priority):
                return template.settings
        return self.default_settings


def _own_problems(config: ControllerConfig) -> list[str]:
    ceilings, reclaim = config.ceilings, config.reclaim
    low, high = ceilings.ceiling_min, ceilings.ceiling_max
    checks = [
        ("fallbacks_max must be >= 0", config.fallbacks_max, config.fallbacks_max >= 0),
        (
            "no_endpoint_ttl_ns must be >= 0",
            config.no_endpoint_ttl_ns,
            config.no_endpoint_ttl_ns is None or config.no_endpoint_ttl_ns >= 0,
        ),
        (
            "attained_half_life_ns must be > 0",
            config.attained_half_life_ns,
            config.attained_half_life_ns > 0,
        ),
        ("ceilings.ceiling_max must be > 0 and <= 1", high, 0 < high <= 1),
        (
            "ceilings.ceiling_min must be >= 0 and < ceiling_max",
            low,
            0 <= low < high or not ceilings.policy.is_holdback,
        ),
        ("reclaim.at_once_max must be >= 1", reclaim.at_once_max, reclaim.at_once_max >= 1),
        ("reclaim.patience_ns must be > 0", reclaim.patience_ns, reclaim.patience_ns > 0),
    ]
    return _failed(checks)


def _failed(checks: Sequence[tuple[str, object, bool]]) -> list[str]:
    return [f"{rule}, got {value}" for rule, value, holds in checks if not holds]


def _detector_problems(config: ControllerConfig) -> list[str]:
    problems = [] if config.detectors else ["detectors must name at least one"]
    for index, detector in enumerate(config.detectors):
        where = f"detectors[{index}]"
        match detector:
            case Concurrency(requests_max=requests_max, tokens_max=tokens_max):
                checks: list[tuple[str, object, bool]]
                if requests_max is None and tokens_max is None:
                    problems.append(f"{where} must limit requests or tokens")
                checks = [
                    (f"{where}.{name} must be >= 1", value, value is None or value >= 1)
                    for name, value in (("requests_max", requests_max), ("tokens_max", tokens_max))
                ]
            case Utilization():
                kv_usage_max = detector.kv_usage_max
                checks = [
                    (
                        f"{where}.waiting_max must be >= 1",
                        detector.waiting_max,
                        detector.waiting_max >= 1,
                    ),
                    (
                        f"{where}.kv_usage_max must be > 0 and <= 1",
                        kv_usage_max,
                        0 < kv_usage_max <= 1,
                    ),
                    (
                        f"{where}.stale_after_ns must be > 0",
                        detector.stale_after_ns,
                        detector.stale_after_ns > 0,
                    ),
                    (
                        f"{where}.requests_max must be >= 1",
                        detector.requests_max,
                        detector.requests_max >= 1,
                    ),
                ]
            case Adaptive(limit_first=first, limit_max=most):
                checks = [
                    (f"{where}.limit_first must be >= 1", first, first >= 1),
                    (f"{where}.limit_max must be >= limit_first", most, most >= first),
                ]
            case Auto():
                checks = []
        problems += _failed(checks)
    return problems


def _tenant_problems(config: ControllerConfig) -> list[str]:
    prices = config.prices
    checks: list[tuple[str, object, bool]] = [
        (f"weights[{flow_id!r}] must be > 0", weight, weight > 0 and isfinite(weight))
        for flow_id, weight in config.weights.items()
    ]
    checks += [
        ("prices.input must be > 0", prices.input, prices.input > 0),
        ("prices.cached_input must be >= 0", prices.cached_input, prices.cached_input >= 0),
        ("prices.output must be >= 0", prices.output, prices.output >= 0),
    ]
    return _failed(checks)


def _limit_problems(where: str, limits: Limits) -> list[str]:
    return [
        f"{where}.{name}_max must be >= 0 or unlimited, got {most}"
        for name, most in limits.given().items()
        if most < 0
    ]


def _band_problems(where: str, settings: BandSettings) -> list[str]:
    problems = _limit_problems(f"{where}.limits", settings.limits)
    problems += _limit_problems(f"{where}.flow_limits", settings.flow_limits)
    share, after_ns = settings.share_min, settings.promote_after_ns
    target = settings.wait_target
    checks = [
        (
            f"{where}.ttl_ns must be >= 0 or unlimited",
            settings.ttl_ns,
            settings.ttl_ns is None or settings.ttl_ns >= 0,
        ),
        (f"{where}.share_min must be >= 0 and < 1", share, 0 <= share < 1),
        (f"{where}.promote_after_ns must be >= 0", after_ns, after_ns is None or after_ns >= 0),
        (f"{where}.wait_target must be > 0 and <= 1", target, 0 < target <= 1),
    ]
    return problems + _failed(checks)

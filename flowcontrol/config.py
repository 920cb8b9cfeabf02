"""Pure. What the engine can be told to do. Times in nanoseconds, sizes in bytes, None: no limit."""

from dataclasses import dataclass, field
from enum import Enum
from typing import final

from flowcontrol.errors import ConfigError


class Fairness(Enum):
    """How a band chooses between its flows."""

    ROUND_ROBIN = "round-robin"
    GLOBAL_STRICT = "global-strict"


class Ordering(Enum):
    """How a flow orders its own requests."""

    FCFS = "fcfs"


class Picker(Enum):
    """Who chooses the endpoint of a dispatched request."""

    OFF = "off"
    """Envoy does; the engine counts the pool as a whole."""
    LEAST_LOADED = "least-loaded"
    """The engine does, at the moment of dispatch: the endpoint with the fewest in flight."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may wait. 0 means none may wait, None means unlimited. An exact fit is accepted."""

    requests_max: int | None = None
    bytes_max: int | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BandSettings:
    """How one band behaves."""

    limits: Limits = field(default_factory=Limits)
    ttl_ns: int | None = None
    """Longest wait while the pool has endpoints. None: for ever."""
    fairness: Fairness = Fairness.ROUND_ROBIN
    ordering: Ordering = Ordering.FCFS


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
class ControllerConfig:
    """Everything the flow controller is configured by.

    Raises:
        ConfigError: naming every field out of its range.
    """

    limits: Limits = field(default_factory=Limits)
    """Over all bands together."""
    templates: tuple[BandTemplate, ...] = ()
    """The first that matches a band's priority gives its settings."""
    default_settings: BandSettings = field(default_factory=BandSettings)
    """For a band that no template matches."""
    no_endpoint_ttl_ns: int | None = None
    """Longest wait while the pool is empty. None: for ever."""
    in_flight_max: int = 64
    """Requests in flight at one endpoint at which it is full; at least 1."""
    picker: Picker = Picker.OFF
    retry_after_max_ns: int = 30_000_000_000
    """Longest Retry-After ever told to a client."""

    def __post_init__(self) -> None:
        problems = []
        if self.in_flight_max < 1:
            problems.append(f"in_flight_max must be >= 1, got {self.in_flight_max}")
        if self.retry_after_max_ns < 0:
            problems.append(f"retry_after_max_ns must be >= 0, got {self.retry_after_max_ns}")
        if self.no_endpoint_ttl_ns is not None and self.no_endpoint_ttl_ns < 0:
            problems.append(f"no_endpoint_ttl_ns must be >= 0, got {self.no_endpoint_ttl_ns}")
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


def _limit_problems(where: str, limits: Limits) -> list[str]:
    pairs = (("requests_max", limits.requests_max), ("bytes_max", limits.bytes_max))
    return [
        f"{where}.{name} must be >= 0 or unlimited, got {value}"
        for name, value in pairs
        if value is not None and value < 0
    ]


def _band_problems(where: str, settings: BandSettings) -> list[str]:
    problems = _limit_problems(f"{where}.limits", settings.limits)
    if settings.ttl_ns is not None and settings.ttl_ns < 0:
        problems.append(f"{where}.ttl_ns must be >= 0 or unlimited, got {settings.ttl_ns}")
    return problems

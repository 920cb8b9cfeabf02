"""Pure. What the engine has learnt, as plain values, for another process to continue with.

Fairness accounts, token estimates, limits, drain rates. Losing them does no lasting harm: a process
without them learns again, and only a bounded number is kept. Stored values may be damaged, so they
are checked before an engine uses them.
"""

# interpreted: its dataclasses are read by their hints

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol.config import Role

KEPT_MAX = 1000
"""Most accounts of each band, and most estimates, that are kept."""
_MOST = 1e15
"""Largest number of tokens, bytes or ns: up to here a float is exact to a fraction of one."""


@final
@dataclass(slots=True)
class Estimate:
    """Usage of requests of one flow and model: means, and how many requests they are of."""

    flow_id: str | None
    """None: of every flow."""
    model: str
    answers: int = 0
    output: float = 0.0
    prompts: int = 0
    prompt: float = 0.0
    bytes: float = 0.0
    large_prompts: int = 0
    """The same of bodies above `estimates.LARGE_BYTES`."""
    large_prompt: float = 0.0
    large_bytes: float = 0.0


@final
@dataclass(slots=True)
class Drain:
    """The drain rate of a scope: dispatches, and the time in which they were seen."""

    requests: float = 0.0
    time_ns: float = 0.0


@final
@dataclass(slots=True)
class BandMemory:
    """What was learnt about one band."""

    priority: int
    accounts: Mapping[str, float] = field(default_factory=dict)
    """Cost by which each flow is ahead, or that it attained, by the band's fairness."""
    drain: Drain | None = None


@final
@dataclass(slots=True)
class CountsMemory:
    """Event counts, one value for each width of bins (`reserve.EventCounts`)."""

    bins: tuple[float, ...]
    means: tuple[float, ...]
    squares: tuple[float, ...]


@final
@dataclass(slots=True)
class BandNeed:
    """What the reserve has learnt about one band."""

    priority: int
    arrivals: CountsMemory
    """Arrivals of that band and all above it."""
    load: float
    """What one request adds to the saturation of the pool."""


@final
@dataclass(slots=True)
class ReserveMemory:
    """What the reserve has learnt: arrivals, departures, and how full the pool is."""

    bands: tuple[BandNeed, ...]
    departures: CountsMemory
    fullness: float


@final
@dataclass(slots=True)
class PlaceMemory:
    """What `auto` has found at one place, per endpoint."""

    requests: float
    calm: float
    """Most in flight without a queue."""
    is_starting: bool = False
    """Whether the limit on requests has never fallen."""
    tokens: float | None = None
    """Limit on tokens; None: unknown."""
    calm_tokens: float = 0.0
    cache_per_token: float = 0.0
    """Measured part of the cache that a token in flight takes; 0: not measured."""
    batch: float | None = None
    """Most requests that the engine batches; None: not found."""
    batch_for_ns: int = 0
    """How long that is believed, in ns."""


@final
@dataclass(slots=True)
class StageMemory:
    """What `auto` has found in one stage."""

    role: Role
    places: Mapping[str, PlaceMemory]
    """By endpoint; under an empty address, of all together."""
    shortest_ns: float = 0.0
    """How long the shortest requests are in flight, by departures; 0: unknown."""
    edge: float = 0.0
    """The limit at which more in flight gained too little, by departures; 0: not found."""


@final
@dataclass(slots=True)
class EngineMemory:
    """Everything that was learnt."""

    bands: tuple[BandMemory, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    """The latest last."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Limits found by `adaptive`: by endpoint; under an empty address, of all together."""
    drain: Drain | None = None
    stages: tuple[StageMemory, ...] = ()
    reserve: ReserveMemory | None = None
    """None: nothing is kept free."""

    def check(self) -> None:
        """Refuse values that no engine can have learnt: they may have been damaged.

        Raises:
            ValueError: a number is negative, too large, or not a number.
        """
        for each in self.estimates:
            _check(each.answers, each.output)
            _check_prompts(each.prompts, each.prompt, each.bytes)
            _check_prompts(each.large_prompts, each.large_prompt, each.large_bytes)
        for band in self.bands:
            _check(*band.accounts.values())
        for drain in (self.drain, *(band.drain for band in self.bands)):
            if drain is not None:
                _check(drain.requests, drain.time_ns)
        _check(*self.limits.values())
        for stage in self.stages:
            _check(stage.shortest_ns, stage.edge)
            for place in stage.places.values():
                _check(place.requests, place.calm, place.tokens or 0, place.calm_tokens)
                _check(place.cache_per_token, place.batch or 0, place.batch_for_ns)
        if self.reserve is not None:
            _check(self.reserve.fullness, *(band.load for band in self.reserve.bands))
            for counts in (self.reserve.departures, *(b.arrivals for b in self.reserve.bands)):
                _check(*counts.bins, *counts.means, *counts.squares)


def _check_prompts(count: int, tokens: float, byte_size: float) -> None:
    _check(count, tokens, byte_size)
    if count and not byte_size:
        message = f"{count} prompts must have bytes, got 0"
        raise ValueError(message)


def _check(*numbers: float) -> None:
    for number in numbers:
        if not 0 <= number <= _MOST:
            message = f"what was learnt must be from 0 to {_MOST:g}, got {number}"
            raise ValueError(message)

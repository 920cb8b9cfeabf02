"""Pure. What the engine has learnt, in plain values, for another process to go on with.

Accounts of fairness, estimates of tokens, learnt limits, drain rates: losing them does no
lasting harm, so what is kept is bounded, and a process that has none learns again. What was written
elsewhere may be damaged, so it is checked before an engine goes on with it.
"""

# interpreted: its dataclasses are read by their hints

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol.config import Role

KEPT_MAX = 1000
"""Accounts of each band, and estimates, that are kept."""
_MOST = 1e15
"""Tokens, bytes or ns: up to here a float is exact to a fraction of one."""


@final
@dataclass(slots=True)
class Estimate:
    """What requests of one flow and model took; None: of every flow."""

    flow_id: str | None
    model: str
    answers: int = 0
    output: float = 0.0
    prompts: int = 0
    prompt: float = 0.0
    bytes: float = 0.0


@final
@dataclass(slots=True)
class Drain:
    """How fast a scope drained lately."""

    requests: float = 0.0
    time_ns: float = 0.0


@final
@dataclass(slots=True)
class BandMemory:
    """What is known of one band."""

    priority: int
    accounts: Mapping[str, float] = field(default_factory=dict)
    """Cost by which each flow is ahead, or what it attained, as its fairness counts."""
    drain: Drain | None = None


@final
@dataclass(slots=True)
class CountsMemory:
    """Events by the second, each by the scales over which they are counted."""

    bins: tuple[float, ...]
    means: tuple[float, ...]
    squares: tuple[float, ...]


@final
@dataclass(slots=True)
class BandNeed:
    """What the reserve knows of one band."""

    priority: int
    arrivals: CountsMemory
    """Of that band and all above it."""
    load: float
    """What one request adds to the saturation of the pool."""


@final
@dataclass(slots=True)
class ReserveMemory:
    """How higher bands arrive, and how places get free."""

    bands: tuple[BandNeed, ...]
    departures: CountsMemory
    fullness: float


@final
@dataclass(slots=True)
class PlaceMemory:
    """The limits that `auto` has found at one place, for each of its endpoints."""

    requests: float
    calm: float
    """Most in flight, without a queue."""
    is_starting: bool = False
    """Whether the limit on requests has never fallen."""
    tokens: float | None = None
    """None: no limit is known."""
    calm_tokens: float = 0.0
    cache_per_token: float = 0.0
    """Part of the cache that a token in flight takes, as measured; 0: it was not."""
    batch: float | None = None
    """What the engine was found to batch; None: it was not."""
    batch_for_ns: int = 0
    """How long that is believed."""


@final
@dataclass(slots=True)
class StageMemory:
    """What `auto` knows of the endpoints that do one part of the work."""

    role: Role
    places: Mapping[str, PlaceMemory]
    """By endpoint, or of all together by an empty text."""
    shortest_ns: float = 0.0
    """How long the shortest are in flight, where departures alone tell; 0: not known."""
    edge: float = 0.0
    """Where departures told that more gains too little; 0: nowhere."""


@final
@dataclass(slots=True)
class EngineMemory:
    """What is known in all."""

    bands: tuple[BandMemory, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    """The latest last."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of requests in flight, as `adaptive` found them: by endpoint, or of all by an empty text."""
    drain: Drain | None = None
    stages: tuple[StageMemory, ...] = ()
    reserve: ReserveMemory | None = None
    """None: nothing is kept free."""

    def check(self) -> None:
        """Refuse what no engine can have learnt: it may have been damaged where it was kept.

        Raises:
            ValueError: a number is below 0, absurdly large, or none.
        """
        for each in self.estimates:
            _check(each.answers, each.output, each.prompts, each.prompt, each.bytes)
            if each.prompts and not each.bytes:
                message = f"{each.prompts} prompts of no bytes tell nothing"
                raise ValueError(message)
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


def _check(*numbers: float) -> None:
    for number in numbers:
        if not 0 <= number <= _MOST:
            message = f"what was learnt must be from 0 to {_MOST:g}, got {number}"
            raise ValueError(message)

"""Pure. What the engine has learnt, in plain values, for another process to go on with.

Accounts of fairness, estimates of tokens, learnt limits, drain rates: losing them does no
lasting harm, so what is kept is bounded, and a process that has none learns again.
"""

# interpreted: its dataclasses are read by their hints

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

KEPT_MAX = 1000
"""Accounts of each band, and estimates, that are kept."""


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
class EngineMemory:
    """What is known in all."""

    bands: tuple[BandMemory, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    """The latest last."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of requests in flight, as found: by endpoint, or of all together by an empty text."""
    drain: Drain | None = None

"""Pure. The state of the engine at one moment, frozen, for readers in any thread."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol.config import Limits
from flowcontrol.histogram import HistogramSnapshot
from flowcontrol.request import Outcome

WAIT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
"""Upper bounds of the wait histogram; the longest is beyond any default time to live."""
FORECAST_BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Upper bounds of the histogram of real waits over predicted ones."""


@final
@dataclass(frozen=True, slots=True)
class FlowSnapshot:
    """One flow."""

    flow_id: str
    waiting: int
    waiting_bytes: int
    in_flight: int
    oldest_wait_ns: int | None
    share: float = 0.0
    """Part of the token cost its band was served lately, from 0 to 1."""
    fair_share: float = 0.0
    """What it would be if all flows of the band that are here now wanted as much as they may get:
    by weight."""


@final
@dataclass(frozen=True, slots=True)
class BandSnapshot:
    """One band, with its flows of the longest backlog."""

    priority: int
    is_declared: bool
    waiting: int
    waiting_bytes: int
    in_flight: int
    oldest_wait_ns: int | None
    ceiling: float
    limits: Limits
    flow_count: int
    flows: tuple[FlowSnapshot, ...]
    expected_wait_ns: int | None = None
    """What one more request would wait, behind all that wait here and above; None when unknown."""
    late_wait_ns: int | None = None
    """The same, that nine in ten stay within."""


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """What became of the requests of one priority since the start; survives its band."""

    outcomes: Mapping[Outcome, int]
    completed: int
    wait_counts: Mapping[Outcome, tuple[int, ...]]
    """How many waited up to each of `WAIT_BOUNDS_S`, and last how many longer; not cumulated."""
    wait_sum_ns: Mapping[Outcome, int]
    forecasts: HistogramSnapshot | None = None
    """Real waits over predicted ones, of what was dispatched; a ratio of 1 as a second."""


@final
@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint; `in_flight` is None where only the pool's count is known."""

    address: str
    in_flight: int | None
    saturation: float


@final
@dataclass(frozen=True, slots=True)
class MoveSnapshot:
    """One change of a limit that the engine finds by itself."""

    ago_ns: int
    address: str | None
    """Whose limit; None: of all endpoints of the stage together."""
    before: float
    after: float
    reason: str


@final
@dataclass(frozen=True, slots=True)
class DetectorSnapshot:
    """What one detector makes of one stage of the pool."""

    stage: str
    """both, prefill or decode."""
    kind: str
    """concurrency, utilization, adaptive or auto."""
    saturation: float
    requests_limit: int | None
    """Requests in flight at which the stage is full, where the detector goes by such a number."""
    moves: tuple[MoveSnapshot, ...] = ()
    """The latest changes of that number, the newest last."""
    raised: int | None = None
    """How often that number went up in all; None where it is not found but set."""
    lowered: int | None = None


@final
@dataclass(frozen=True, slots=True)
class GoodputSnapshot:
    """The counts of one objective."""

    results: Mapping[str, int]
    """By word: good, late, failed."""
    good_tokens: int
    """Of the answers that were good, as far as model servers said."""


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How the processor keeps up."""

    turns: HistogramSnapshot
    """What one turn took, from its one reading of the clock to its decisions handed back."""
    lags: HistogramSnapshot
    """How long facts had been in the inbox, the oldest of each turn."""


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole engine."""

    saturation: float
    waiting: int
    waiting_bytes: int
    in_flight: int
    is_draining: bool
    bands: tuple[BandSnapshot, ...]
    """Highest priority first."""
    totals: Mapping[int, Totals]
    """By priority."""
    endpoints: tuple[EndpointSnapshot, ...]
    objectives: Mapping[str, int]
    """Name to priority."""
    unknown_objectives: int
    limits: Limits = field(default_factory=Limits)
    """Of all bands together."""
    detectors: tuple[DetectorSnapshot, ...] = ()
    goodput: Mapping[str, GoodputSnapshot] = field(default_factory=dict)
    """By objective; empty for requests that named none."""
    recovered: int = 0
    """Requests that another process dispatched and that hold a slot here."""
    pace: Pace | None = None
    """None: the machine was asked, not its processor."""


def requests_limit(detectors: Iterable[DetectorSnapshot]) -> int | None:
    """Return how many in flight fill the pool, None where no detector goes by such a number.

    Every request passes every stage, so the least limit counts; the pool can be full before that,
    by what else its detectors go by.
    """
    limits = (each.requests_limit for each in detectors)
    return min((limit for limit in limits if limit is not None), default=None)

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
"""Upper bounds of the wait histogram; the largest exceeds any default time to live."""
FORECAST_BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Upper bounds of the histogram of real over forecast waits."""


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
    """Its recent part of the token cost that its band was served, 0 to 1."""
    fair_share: float = 0.0
    """The share by weight, if all present flows of the band used theirs."""


@final
@dataclass(frozen=True, slots=True)
class BandSnapshot:
    """One band, with the flows that have the longest backlogs."""

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
    """Expected wait of one more request, behind all that wait here and above; None: unknown."""
    late_wait_ns: int | None = None
    """The wait within which nine in ten stay; None: unknown."""


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """Outcomes of the requests of one priority since the start; kept when its band is gone."""

    outcomes: Mapping[Outcome, int]
    completed: int
    wait_counts: Mapping[Outcome, tuple[int, ...]]
    """Requests that waited up to each of `WAIT_BOUNDS_S`, and last longer; not cumulative."""
    wait_sum_ns: Mapping[Outcome, int]
    forecasts: HistogramSnapshot | None = None
    """Real over forecast waits of dispatched requests; a ratio of 1 is counted as 1 s."""


@final
@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint; `in_flight` is None if only the pool's count is known."""

    address: str
    in_flight: int | None
    saturation: float


@final
@dataclass(frozen=True, slots=True)
class MoveSnapshot:
    """One change of a limit that the engine finds by itself."""

    ago_ns: int
    address: str | None
    """The endpoint of the limit; None: all endpoints of the stage together."""
    before: float
    after: float
    reason: str


@final
@dataclass(frozen=True, slots=True)
class DetectorSnapshot:
    """One detector of one stage of the pool."""

    stage: str
    """both, prefill or decode."""
    kind: str
    """concurrency, utilization, adaptive or auto."""
    saturation: float
    requests_limit: int | None
    """Requests in flight at which the stage is full; None: the detector has no such limit."""
    moves: tuple[MoveSnapshot, ...] = ()
    """The latest moves of that limit, the latest last."""
    raised: int | None = None
    """How often the limit rose in all; None: it is set, not found."""
    lowered: int | None = None


@final
@dataclass(frozen=True, slots=True)
class GoodputSnapshot:
    """The counts of one objective."""

    results: Mapping[str, int]
    """By word: good, late, failed, abandoned."""
    good_tokens: int
    """Output tokens of good answers, as far as model servers reported them."""


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How the processor keeps up."""

    turns: HistogramSnapshot
    """Duration of a turn, from reading the clock to delivering the decisions."""
    lags: HistogramSnapshot
    """Age of the oldest fact in the inbox, at the start of each turn."""


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
    """Requests of another process that hold a slot here."""
    pace: Pace | None = None
    """None: the snapshot was not taken by a processor."""


def requests_limit(detectors: Iterable[DetectorSnapshot]) -> int | None:
    """Return how many requests in flight fill the pool; None: no detector has such a limit.

    Every request passes every stage, so the smallest limit counts. Other measurements of the
    detectors can fill the pool before that.
    """
    limits = (each.requests_limit for each in detectors)
    return min((limit for limit in limits if limit is not None), default=None)

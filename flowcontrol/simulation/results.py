"""Pure. The results of a run: figures by tenant and band, and a transcript of all decisions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil, inf
from statistics import fmean, median
from typing import NamedTuple, final

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Attempt, ClientCall, Ending
from flowcontrol.simulation.distributions import Fixed
from flowcontrol.simulation.workload import ClosedLoop

_SECOND_NS = 1_000_000_000
_AT_ONCE_NS = 200_000_000
"""Errors up to this are ignored."""


class Sample(NamedTuple):
    """The state of the run at one time."""

    at_ns: int
    waiting: int
    """Requests waiting at the gate."""
    in_flight: int
    """Requests at the model servers, queued or running."""


class Waited(NamedTuple):
    """A forecast of a wait, and the real wait."""

    priority: int
    predicted_ns: int
    realised_ns: int
    late_ns: int
    """The forecast for nine in ten."""

    @property
    def is_close(self) -> bool:
        """Whether both agree within a factor of two, or nearly."""
        shorter, longer = sorted((self.predicted_ns, self.realised_ns))
        return longer <= max(2 * shorter, shorter + _AT_ONCE_NS)


class ForecastAccuracy(NamedTuple):
    """Accuracy of the forecasts of one band."""

    predicted_count: int
    ratio: float
    """Median of real over forecast waits."""
    close: float
    """Share that agrees within a factor of two, or nearly."""
    within: float
    """Share of real waits within the forecast for nine in ten."""


@final
@dataclass(slots=True)
class TenantFigures:
    """One tenant in one band, or several together.

    A call is what a person wants; decisions are about attempts, of which a call may have several.
    """

    call_count: int = 0
    endings: Counter[Ending] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    """Of all decisions."""
    waits_ns: list[int] = field(default_factory=list)
    """Wait at the gate of each dispatched attempt."""
    ttfts: list[tuple[int, int]] = field(default_factory=list)
    """For each answered call: when it began, and its time to first token from then."""
    slo_count: int = 0
    """Calls with an SLO for the first token."""
    slo_met_count: int = 0
    """Calls that were answered and met it."""
    tokens_wanted: float = 0
    """Input and output tokens of all calls; infinite for users without thinking time."""
    tokens_served: int = 0
    """Input and output tokens of calls answered before the end of arrivals."""
    ended_ns: int = 0
    """When the last call ended."""

    @property
    def refused_attempts(self) -> int:
        """Attempts that the gateway refused, evicted or reclaimed."""
        rest = (Outcome.DISPATCHED, Outcome.EVICTED_CANCELLED)
        return sum(count for outcome, count in self.outcomes.items() if outcome not in rest)

    @property
    def goodput(self) -> float | None:
        """Share of the calls with an SLO that met it; None: there are none."""
        return self.slo_met_count / self.slo_count if self.slo_count else None

    def wait_ns(self, percent: float) -> int | None:
        """Return a percentile of the waits; None: nothing was dispatched."""
        return percentile(self.waits_ns, percent)

    def ttft_ns(self, percent: float) -> int | None:
        """Return a percentile of the times to first token; None: nothing was answered."""
        return percentile([ttft_ns for _, ttft_ns in self.ttfts], percent)

    def add(self, other: "TenantFigures") -> None:
        """Add other figures."""
        self.call_count += other.call_count
        self.endings += other.endings
        self.outcomes += other.outcomes
        self.waits_ns += other.waits_ns
        self.ttfts += other.ttfts
        self.slo_count += other.slo_count
        self.slo_met_count += other.slo_met_count
        self.tokens_wanted += other.tokens_wanted
        self.tokens_served += other.tokens_served
        self.ended_ns = max(self.ended_ns, other.ended_ns)


@final
@dataclass(frozen=True, slots=True)
class ServerFigures:
    """One model server."""

    address: str
    utilisation: float
    """Part of its time up in which it was working, 0 to 1."""
    running_mean: float
    """Mean number of running sequences while it was up."""
    tokens_generated: int
    in_flight_most: int
    waiting_most: int
    """Most requests queued inside it."""
    cached_share: float
    """Part of the prompts' tokens that its prefix cache had, since it last started."""


@final
class Results:
    """Collects figures during a run; complete when it is over.

    Args:
        duration_ns: of arrivals; shares and rates are for this time.
    """

    def __init__(self, duration_ns: int) -> None:
        self.duration_ns = duration_ns
        self.tenants: dict[tuple[int, str], TenantFigures] = {}
        """By priority and fairness id."""
        self.samples: list[Sample] = []
        self.servers: tuple[ServerFigures, ...] = ()
        """Set when the run is over."""
        self.transcript: list[str] = []
        """One line per decision: time, id, outcome, priority, flow, wait, endpoint, retry-after."""
        self.waited: list[Waited] = []
        """Waits of dispatched requests with a forecast."""
        self.waiting_most = 0
        self.in_flight_most = 0
        self.ended_ns = 0
        """When all calls were over."""

    def begun(self, call: ClientCall) -> None:
        """Count a call that begins."""
        figures = self._of(call.priority, call.tenant)
        figures.call_count += 1
        figures.slo_count += call.workload.ttft_slo_ns is not None
        arrivals = call.workload.arrivals
        if isinstance(arrivals, ClosedLoop) and arrivals.think == Fixed(0):
            figures.tokens_wanted = inf
        figures.tokens_wanted += call.prompt_tokens + call.output_tokens

    def ended(self, call: ClientCall) -> None:
        """Count a call that has ended."""
        figures = self._of(call.priority, call.tenant)
        assert call.ending is not None
        assert call.ended_ns is not None
        figures.endings[call.ending] += 1
        figures.ended_ns = call.ended_ns
        if call.ending is not Ending.ANSWERED or call.first_token_ns is None:
            return
        ttft_ns = call.first_token_ns - call.asked_ns
        figures.ttfts.append((call.asked_ns, ttft_ns))
        slo_ns = call.workload.ttft_slo_ns
        figures.slo_met_count += slo_ns is not None and ttft_ns <= slo_ns
        if call.ended_ns <= self.duration_ns:
            figures.tokens_served += call.prompt_tokens + call.output_tokens

    def decided(self, decision: Decision, attempt: Attempt, now_ns: int) -> None:
        """Count a decision at the time it was made."""
        figures = self._of(decision.priority, decision.flow_id)
        figures.outcomes[decision.outcome] += 1
        waited_ns = now_ns - attempt.arrived_ns
        if decision.outcome is Outcome.DISPATCHED:
            figures.waits_ns.append(waited_ns)
            if decision.expected_wait_ns is not None:
                late_ns = decision.late_wait_ns or decision.expected_wait_ns
                said = Waited(decision.priority, decision.expected_wait_ns, waited_ns, late_ns)
                self.waited.append(said)
        self.transcript.append(
            f"{now_ns} {decision.request_id} {decision.outcome.value} {decision.priority} "
            f"{decision.flow_id} {waited_ns} {decision.endpoint or '-'} "
            f"{'-' if decision.retry_after_ns is None else decision.retry_after_ns}"
        )

    def sampled(self, sample: Sample) -> None:
        """Add a sample."""
        self.samples.append(sample)

    @property
    def digest(self) -> str:
        """SHA-256 of the transcript; the same for the same engine, plan and seed."""
        return sha256("\n".join(self.transcript).encode()).hexdigest()

    @property
    def priorities(self) -> tuple[int, ...]:
        """Priorities of the bands that had calls, highest first."""
        return tuple(sorted({priority for priority, _ in self.tenants}, reverse=True))

    def band(self, priority: int) -> TenantFigures:
        """Return the figures of all tenants of a band together."""
        return together(figures for key, figures in self.tenants.items() if key[0] == priority)

    def jain(self, priority: int) -> float | None:
        """Return Jain's index of the tokens served to tenants of a band; None: only one tenant.

        Fair is the max-min share of what the band was served: no tenant gets more than it wanted,
        and the rest is for the others.
        """
        mine = [figures for key, figures in self.tenants.items() if key[0] == priority]
        served = [figures.tokens_served for figures in mine]
        if len(mine) < 2 or not sum(served):  # noqa: PLR2004 - with oneself one shares fairly
            return None
        fair = max_min_shares([figures.tokens_wanted for figures in mine], sum(served))
        return jain_index([got / due for got, due in zip(served, fair, strict=True) if due])

    def calibration(self, priority: int) -> ForecastAccuracy | None:
        """Return the accuracy of the forecasts of a band; None: there were none.

        Only dispatched requests count: an evicted one would have waited longer, but how long is
        unknown.
        """
        mine = [each for each in self.waited if each.priority == priority]
        if not mine:
            return None
        ratios = [each.realised_ns / max(1, each.predicted_ns) for each in mine]
        return ForecastAccuracy(
            len(mine),
            median(ratios),
            fmean(each.is_close for each in mine),
            fmean(each.realised_ns <= each.late_ns for each in mine),
        )

    def tokens_per_second(self, figures: TenantFigures) -> float:
        """Return the tokens served per second of arrivals."""
        return figures.tokens_served * _SECOND_NS / self.duration_ns

    def _of(self, priority: int, tenant: str) -> TenantFigures:
        figures = self.tenants.get((priority, tenant))
        if figures is None:
            figures = self.tenants[priority, tenant] = TenantFigures()
        return figures


def together(many: Iterable[TenantFigures]) -> TenantFigures:
    """Return the sum of figures."""
    total = TenantFigures()
    for figures in many:
        total.add(figures)
    return total


def percentile(values: Sequence[int], percent: float) -> int | None:
    """Return the smallest value that so many percent do not exceed; None: no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def jain_index(shares: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 when all shares are equal, 1/n when one has everything.

    R. Jain, D. Chiu, W. Hawe: A Quantitative Measure of Fairness, DEC-TR-301, 1984. If demands
    differ, a share is what one got over what would have been fair.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def max_min_shares(wanted: Sequence[float], supply: float) -> list[float]:
    """Divide a supply so that no share can grow except at the cost of a smaller one."""
    shares = [0.0] * len(wanted)
    by_want = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for place, index in enumerate(by_want):
        shares[index] = min(wanted[index], supply / (len(wanted) - place))
        supply -= shares[index]
    return shares

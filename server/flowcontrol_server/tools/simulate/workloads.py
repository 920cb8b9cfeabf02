"""The workloads of a scenario file: clients, arrivals, lengths and patience."""

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from flowcontrol.errors import ConfigError
from flowcontrol.simulation.distributions import (
    Distribution,
    Exponential,
    Fixed,
    Lognormal,
    Uniform,
)
from flowcontrol.simulation.traces import TraceError, TraceRow, per_second, read_trace
from flowcontrol.simulation.workload import (
    Arrivals,
    AtOnce,
    ClosedLoop,
    Independent,
    Lengths,
    Poisson,
    Recorded,
    Replayed,
    Retry,
    Window,
    Workload,
)
from flowcontrol_server.common.sections import Duration, FileBeside, From0, Positive, Section
from flowcontrol_server.tools.simulate.parts import (
    Moment,
    OneOf,
    Span,
    Switch,
    Whole,
    demand,
)

_SECOND_NS = 1_000_000_000
_TENANTS_MAX = 100_000


def _plain(value: object) -> object:
    """Read a bare number or duration as a constant."""
    return value if isinstance(value, dict | Section) else {"fixed": value}


def load_trace(path: Path) -> list[TraceRow]:
    """Read a trace file.

    Raises:
        ConfigError: the file cannot be read, or one of its lines is invalid.
    """
    try:
        with path.open() as lines:
            return read_trace(lines)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    except TraceError as error:
        raise ConfigError([f"{path}: {error}"]) from error


class UniformTokens(Section):
    """A uniform distribution of lengths."""

    min: Whole
    """The shortest."""
    max: Whole
    """The longest."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        demand(self.min <= self.max, "must have min <= max")
        return self


class LognormalTokens(Section):
    """A lognormal distribution: many short, few long."""

    median: Whole
    """Half are shorter."""
    sigma: Positive
    """Two thirds lie within a factor of e^sigma of the median."""
    max: Whole
    """Bound of the length; longer ones are reduced to it."""


class TokensSection(OneOf):
    """A length in tokens."""

    fixed: Whole | None = None
    uniform: UniformTokens | None = None
    lognormal: LognormalTokens | None = None

    def distribution(self) -> Distribution:
        """Return the distribution for the simulation."""
        match self.chosen:
            case UniformTokens() as uniform:
                return Uniform(uniform.min, uniform.max)
            case LognormalTokens() as lognormal:
                return Lognormal(lognormal.median, lognormal.sigma, lognormal.max)
            case fixed:
                return Fixed(fixed)


class UniformTime(Section):
    """A uniform distribution of times."""

    min: Moment
    """The shortest."""
    max: Moment
    """The longest."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        demand(self.min <= self.max, "must have min <= max")
        return self


class ExponentialTime(Section):
    """An exponential distribution, which is memoryless."""

    mean: Duration
    """The mean."""


class TimeSection(OneOf):
    """A duration."""

    fixed: Moment | None = None
    uniform: UniformTime | None = None
    exponential: ExponentialTime | None = None

    def distribution(self) -> Distribution:
        """Return the distribution for the simulation."""
        match self.chosen:
            case UniformTime() as uniform:
                return Uniform(uniform.min, uniform.max)
            case ExponentialTime() as exponential:
                return Exponential(exponential.mean)
            case fixed:
                return Fixed(fixed)


Tokens = Annotated[TokensSection, BeforeValidator(_plain)]
"""A number, or a distribution."""
Time = Annotated[TimeSection, BeforeValidator(_plain)]
"""A duration, or a distribution."""


class BurstSection(Span):
    """A span with more arrivals, or fewer."""

    times: From0
    """Factor on the rate."""


class OnOffSection(Section):
    """Alternating times with and without arrivals; the first has arrivals."""

    on: Duration
    """Length of the times with arrivals."""
    off: Duration
    """Length of the times without."""

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: object) -> object:
        """Read the keys on and off, which YAML reads as booleans."""
        if not isinstance(value, dict):
            return value
        words = {True: "on", False: "off"}
        return {words[k] if isinstance(k, bool) else k: v for k, v in value.items()}


class PoissonSection(Section):
    """Independent clients, whose arrivals do not depend on the servers."""

    per_second: Positive
    """Mean rate of arrivals."""
    bursts: tuple[BurstSection, ...] = ()
    """Spans with another rate."""
    on_off: OnOffSection | None = None
    """Alternating times with and without arrivals; omitted: they always arrive."""

    def arrivals(self, trace: Path | None) -> Arrivals:  # noqa: ARG002 - as the others
        """Return the arrivals for the simulation."""
        windows = tuple(Window(burst.from_, burst.until, burst.times) for burst in self.bursts)
        if self.on_off is None:
            return Poisson(self.per_second, windows)
        return Poisson(self.per_second, windows, self.on_off.on, self.on_off.off)

    def expected(self, span_ns: tuple[int, int]) -> float:
        """Return the expected number of arrivals in a span."""
        begin, end = span_ns
        moments = {each for burst in self.bursts for each in (burst.from_, burst.until)}
        edges = [begin, *sorted(each for each in moments if begin < each < end), end]
        area = sum((b - a) * self._times(a) for a, b in pairwise(edges))
        turn = self.on_off
        part = 1.0 if turn is None else turn.on / (turn.on + turn.off)
        return self.per_second * part * area / _SECOND_NS

    def _times(self, moment_ns: int) -> float:
        bursts = (each for each in self.bursts if each.from_ <= moment_ns < each.until)
        return prod(each.times for each in bursts)


class AtOnceSection(Section):
    """A job whose requests arrive at the same time."""

    count: Whole
    """Requests in it."""

    def arrivals(self, trace: Path | None) -> Arrivals:  # noqa: ARG002 - as the others
        """Return the arrivals for the simulation."""
        return AtOnce(self.count)

    def expected(self, span_ns: tuple[int, int]) -> float:  # noqa: ARG002 - as the others
        """Return the number of arrivals."""
        return self.count


class ClosedLoopSection(Section):
    """Users who send the next request only after the answer to the one before."""

    users: Whole
    """Number of users."""
    think: Time = Field(default="0s")  # type: ignore[assignment]  # read by its validator
    """Time between an answer and the next request of a user."""
    ramp: Moment = Field(default="0s")  # type: ignore[assignment]  # read by its validator
    """Time over which the users begin, one after another."""

    def arrivals(self, trace: Path | None) -> Arrivals:  # noqa: ARG002 - as the others
        """Return the arrivals for the simulation."""
        return ClosedLoop(self.users, self.think.distribution(), self.ramp)

    def expected(self, span_ns: tuple[int, int]) -> float:  # noqa: ARG002 - as the others
        """Return the least number of arrivals: one of each user."""
        return self.users


class TraceSection(Section):
    """Recorded traffic, with its times and lengths."""

    file: FileBeside | None = None
    """Azure's CSV or Mooncake's JSON lines; `--trace` replaces it.
    A relative path is relative to the scenario."""
    per_second: Positive | None = None
    """Mean rate of the replay; omitted: that of the trace."""
    limit: Whole | None = None
    """The most requests to replay."""

    def arrivals(self, trace: Path | None) -> Arrivals:
        """Return the arrivals for the simulation.

        Raises:
            ConfigError: there is no trace, or it cannot be read.
        """
        path = trace or self.file
        if path is None:
            raise ConfigError(["a workload replays a trace: name one with --trace"])
        rows = load_trace(path)
        rate = per_second(rows)
        scale = self.per_second / rate if self.per_second and rate else 1.0
        scaled = [row._replace(at_ns=round(row.at_ns / scale)) for row in rows[: self.limit]]
        return Replayed(tuple(scaled))

    def expected(self, span_ns: tuple[int, int]) -> float:  # noqa: ARG002 - as the others
        """Return 0: the size of a trace is not limited."""
        return 0


class ArrivalsSection(OneOf):
    """The process of arrivals."""

    poisson: PoissonSection | None = None
    at_once: AtOnceSection | None = None
    closed_loop: ClosedLoopSection | None = None
    trace: TraceSection | None = None


class RetrySection(Section):
    """A client's reaction to a refusal."""

    attempts: int = Field(default=1, ge=1)
    """Most attempts, including the first."""
    honours_retry_after: Switch = True
    """Whether it waits for the time in Retry-After."""
    backoff: Duration = Field(default="1s")  # type: ignore[assignment]  # read by its validator
    """Its wait if there is no Retry-After, or it ignores that; doubles each time."""
    backoff_max: Duration = Field(default="30s")  # type: ignore[assignment]  # read by its validator
    """The longest such wait."""
    after_patience: Switch = False
    """Whether it also retries after it has disconnected."""


def _tenants(value: object) -> object:
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, 1.0)
    rule = "must be names, names with shares, or count with zipf, such as {count: 50, zipf: 1.1}"
    demand(isinstance(value, dict) and bool(value), rule)
    assert isinstance(value, dict)
    if "count" not in value:
        return value
    count, zipf = value["count"], value.get("zipf", 0)
    demand(value.keys() <= {"count", "zipf"} and type(count) is int and count >= 1, rule)
    demand(count <= _TENANTS_MAX, f"must have a count of at most {_TENANTS_MAX}, got {count}")
    demand(type(zipf) in (int, float) and zipf >= 0, rule)
    return {f"tenant-{n}": (n + 1) ** -float(zipf) for n in range(count)}


class WorkloadSection(Section):
    """One kind of client."""

    name: str = Field(min_length=1)
    """Unique in the scenario. Its random choices do not depend on other workloads."""
    objective: str | None = None
    """The InferenceObjective that requests name; omitted: none."""
    tenants: Annotated[dict[str, Positive], BeforeValidator(_tenants)] = Field(
        default_factory=lambda: {"default-flow": 1.0}
    )
    """Fairness ids: a list; a mapping to shares of the requests; or count, for tenant-0, tenant-1
    and so on. With zipf, the n-th tenant sends n^-zipf times as many requests as the first."""
    from_: Moment = Field(alias="from", default="0s")  # type: ignore[assignment]  # read by its validator
    """When arrivals begin."""
    until: Duration | None = None
    """When arrivals stop; omitted: at the end."""
    arrivals: ArrivalsSection
    """The process of arrivals."""
    prompt: Tokens | None = None
    """Length of a prompt."""
    output: Tokens | None = None
    """Length of its answer."""
    lengths_from: FileBeside | None = None
    """A trace that provides both lengths, in pairs."""
    announces_prompt: Switch = True
    """Whether the gateway gets the tokens of the prompt, or only its bytes."""
    max_tokens: Whole | None = None
    """Limit of the answer that requests set; a longer answer is cut there."""
    ttft_slo: Duration | None = Field(default=None, alias="ttftSLO")
    """Objective for the time to first token, from the first attempt."""
    announces_slo: Switch = Field(default=True, alias="announcesSLO")
    """Whether requests announce it, or only the results use it."""
    request_ttl: Duration | None = Field(default=None, alias="requestTTL")
    """The longest wait that requests allow."""
    patience: Time | None = None
    """How long clients wait for a first token before they disconnect; omitted: no limit."""
    retry: RetrySection = RetrySection()
    model: str = ""
    """Model of the requests; output lengths are learnt for each model."""
    servers: tuple[str, ...] | None = None
    """Servers that requests may go to, as in a gateway's subset hint; omitted: all."""

    @model_validator(mode="after")
    def _has_lengths(self) -> Self:
        both = self.prompt is not None and self.output is not None
        one = self.prompt is not None or self.output is not None
        sources = [both or one, self.lengths_from is not None, self.arrivals.trace is not None]
        demand(
            sum(sources) == 1 and one == both,
            "must have prompt and output, or lengthsFrom, or arrivals.trace",
        )
        return self

    def expected(self, duration_ns: int) -> float:
        """Return the expected number of arrivals."""
        end = duration_ns if self.until is None else min(self.until, duration_ns)
        expected: float = self.arrivals.chosen.expected((self.from_, max(self.from_, end)))
        return expected

    def workload(self, trace: Path | None) -> Workload:
        """Return the workload for the simulation.

        Args:
            trace: replaces the trace named here; None: that one. Ignored if no trace is replayed.

        Raises:
            ConfigError: a trace cannot be read.
        """
        arrivals: Arrivals = self.arrivals.chosen.arrivals(trace)
        retry = self.retry
        return Workload(
            name=self.name,
            arrivals=arrivals,
            lengths=self._lengths(arrivals),
            tenants=self.tenants,
            objective=self.objective,
            from_ns=self.from_,
            until_ns=self.until,
            announces_prompt=self.announces_prompt,
            output_tokens_max=self.max_tokens,
            ttft_slo_ns=self.ttft_slo,
            announces_slo=self.announces_slo,
            ttl_ns=self.request_ttl,
            patience=None if self.patience is None else self.patience.distribution(),
            retry=Retry(
                attempts_max=retry.attempts,
                honours_retry_after=retry.honours_retry_after,
                backoff_ns=retry.backoff,
                backoff_max_ns=retry.backoff_max,
                after_patience=retry.after_patience,
            ),
            model=self.model,
            subset=self.servers,
        )

    def _lengths(self, arrivals: Arrivals) -> Lengths:
        if isinstance(arrivals, Replayed):
            return Recorded(arrivals.rows)
        if self.lengths_from is not None:
            return Recorded(tuple(load_trace(self.lengths_from)))
        assert self.prompt is not None
        assert self.output is not None
        return Independent(self.prompt.distribution(), self.output.distribution())

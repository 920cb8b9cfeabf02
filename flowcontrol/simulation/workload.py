"""Pure. Workloads: when requests arrive, how long they are, and how patient clients are.

Open loop: people do not wait for each other's answers, so arrivals do not depend on the servers.
Closed loop: each of a number of users sends the next request only after the answer, as agents and
batch jobs do, so a slow pool gets fewer requests.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol, final

from flowcontrol.simulation.distributions import Distribution, Fixed
from flowcontrol.simulation.traces import TraceRow

_SECOND_NS = 1_000_000_000
BYTES_PER_TOKEN = 4
"""Announced bytes for each token of a prompt: OpenAI's rule of thumb for English."""


class Lengths(Protocol):
    """How long a prompt and its answer are."""

    def draw(self, chance: Random) -> tuple[int, int]:
        """Return tokens in and tokens out, each at least 1."""


@final
@dataclass(frozen=True, slots=True)
class Independent:
    """The length of the answer does not depend on that of the prompt."""

    prompt: Distribution
    output: Distribution

    def draw(self, chance: Random) -> tuple[int, int]:
        """Return one of each."""
        return self.prompt.draw(chance), self.output.draw(chance)


@final
@dataclass(frozen=True, slots=True)
class Recorded:
    """The lengths of a random request of a trace, so that prompt and answer belong together."""

    rows: tuple[TraceRow, ...]

    def draw(self, chance: Random) -> tuple[int, int]:
        """Return the lengths of one request."""
        row = chance.choice(self.rows)
        return row.input_tokens, row.output_tokens


class Window(NamedTuple):
    """A time with another rate."""

    from_ns: int
    until_ns: int
    times: float
    """Factor on the rate, at least 0; overlapping windows multiply."""


@final
@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals at a rate that may change: in windows, or by turning on and off."""

    per_second: float
    windows: tuple[Window, ...] = ()
    on_ns: int | None = None
    """Duration of each on phase; None: always on."""
    off_ns: int = 0
    """Duration of each off phase."""

    def times(self, from_ns: int, until_ns: int, chance: Random) -> Iterator[int]:
        """Yield the times of arrivals in order.

        Exact for a piecewise constant rate: the integral of the rate between two arrivals is
        exponential with mean 1.
        """
        now = float(from_ns)
        wanted = chance.expovariate(1.0)
        while now < until_ns:
            end_ns = min(until_ns, self._changes_ns(from_ns, now))
            rate = self._rate(from_ns, now) / _SECOND_NS
            room = rate * (end_ns - now)
            if wanted >= room:
                wanted -= room
                now = float(end_ns)
                continue
            now += wanted / rate
            yield int(now)
            wanted = chance.expovariate(1.0)

    def _rate(self, from_ns: int, now: float) -> float:
        rate = self.per_second
        for window in self.windows:
            if window.from_ns <= now < window.until_ns:
                rate *= window.times
        if self.on_ns is not None and (now - from_ns) % (self.on_ns + self.off_ns) >= self.on_ns:
            return 0.0
        return rate

    def _changes_ns(self, from_ns: int, now: float) -> float:
        """Return when the rate next changes."""
        edges = [edge for window in self.windows for edge in window[:2] if edge > now]
        changes_ns = min(edges, default=float("inf"))
        if self.on_ns is None:
            return changes_ns
        cycle, place = divmod(int(now) - from_ns, self.on_ns + self.off_ns)
        begin_ns = from_ns + cycle * (self.on_ns + self.off_ns)
        turn_ns = self.on_ns if place < self.on_ns else self.on_ns + self.off_ns
        return min(changes_ns, begin_ns + turn_ns)


@final
@dataclass(frozen=True, slots=True)
class AtOnce:
    """A job whose requests arrive at once."""

    count: int


@final
@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Users, each of whom sends a request, reads the answer, thinks, and sends the next."""

    users: int
    think: Distribution = field(default_factory=lambda: Fixed(0))
    """Time from the end of a call to the next one, ns."""
    ramp_ns: int = 0
    """Time over which the users begin, one after the other; 0: all at once."""


@final
@dataclass(frozen=True, slots=True)
class Replayed:
    """A trace, at its own times and with its own lengths."""

    rows: tuple[TraceRow, ...]


Arrivals = Poisson | AtOnce | ClosedLoop | Replayed


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """What a client does when its request is refused."""

    attempts_max: int = 1
    """Attempts in all, at least 1."""
    honours_retry_after: bool = True
    """Whether it waits for Retry-After; if there is none, it backs off."""
    backoff_ns: int = _SECOND_NS
    """First backoff; doubles with each attempt, and is spread at random by a half either way."""
    backoff_max_ns: int = 30 * _SECOND_NS
    after_patience: bool = False
    """Whether it also retries after running out of patience."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of client."""

    name: str
    arrivals: Arrivals
    lengths: Lengths
    """Lengths of each request; ignored by a replayed trace."""
    tenants: dict[str, float] = field(default_factory=lambda: {"default-flow": 1.0})
    """Fairness ids, each with its share of the requests; users get them in turn."""
    objective: str | None = None
    from_ns: int = 0
    until_ns: int | None = None
    """End of arrivals; None: the end of the run."""
    announces_prompt: bool = True
    """Whether the gateway knows the tokens of the prompt, or only its bytes."""
    output_tokens_max: int | None = None
    """Token limit of the request; longer answers are cut there."""
    ttft_slo_ns: int | None = None
    """When the first token is due, from the first attempt."""
    announces_slo: bool = True
    """Whether the request states that; else it counts in the results only."""
    ttl_ns: int | None = None
    """Longest wait that the request allows."""
    patience: Distribution | None = None
    """How long a client waits for its first token before it leaves, ns; None: for ever."""
    retry: Retry = field(default_factory=Retry)
    model: str = ""
    subset: tuple[str, ...] | None = None
    """Addresses of the servers that the requests may go to; None: any."""

"""Pure. What is asked of the pool: who comes when, wants how much, and how long they are patient.

Open loop: people do not wait for each other's answers, so they come whatever the servers do.
Closed loop: a number of users each of whom asks again only after the answer, as agents and batch
jobs do; a slow pool is asked less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol, final

from flowcontrol.simulation.distributions import Distribution, Fixed
from flowcontrol.simulation.traces import TraceRow

_SECOND_NS = 1_000_000_000
BYTES_PER_TOKEN = 4
"""How large a prompt is announced: OpenAI's rule of thumb for English."""


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
    """Any request of a trace, so that what was long together stays together."""

    rows: tuple[TraceRow, ...]

    def draw(self, chance: Random) -> tuple[int, int]:
        """Return those of one request."""
        row = chance.choice(self.rows)
        return row.input_tokens, row.output_tokens


class Window(NamedTuple):
    """A time in which the rate is another."""

    from_ns: int
    until_ns: int
    times: float
    """What the rate is multiplied by, from 0; where windows overlap, by each."""


@final
@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent people at a rate, which may change: in windows, or on and off by turns."""

    per_second: float
    windows: tuple[Window, ...] = ()
    on_ns: int | None = None
    """Comes only this long; None: always."""
    off_ns: int = 0
    """Then stays away this long, and so on."""

    def times(self, from_ns: int, until_ns: int, chance: Random) -> Iterator[int]:
        """Yield the arrivals of a time in order.

        Exact for a rate that is constant in pieces: the rate's integral between two arrivals is
        exponential with mean 1, whatever lies between.
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
    """A job that is dropped in one piece."""

    count: int


@final
@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Users each of whom asks, reads the answer, thinks, and asks again."""

    users: int
    think: Distribution = field(default_factory=lambda: Fixed(0))
    """From an answer, or from having given up, to the next question, ns."""
    ramp_ns: int = 0
    """The users begin one after another over this long; 0: all at once."""


@final
@dataclass(frozen=True, slots=True)
class Replayed:
    """A trace, at its own times and with its own lengths."""

    rows: tuple[TraceRow, ...]


Arrivals = Poisson | AtOnce | ClosedLoop | Replayed


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """What a client does when it is refused."""

    attempts_max: int = 1
    """How often it asks at all, from 1."""
    honours_retry_after: bool = True
    """Whether it waits for Retry-After; without one, it backs off by itself."""
    backoff_ns: int = _SECOND_NS
    """First wait of its own; doubles with each attempt, and is spread by a half either way."""
    backoff_max_ns: int = 30 * _SECOND_NS
    after_patience: bool = False
    """Whether it asks again, too, when it ran out of patience."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of client."""

    name: str
    arrivals: Arrivals
    lengths: Lengths
    """Of each request; a replayed trace has its own."""
    tenants: dict[str, float] = field(default_factory=lambda: {"default-flow": 1.0})
    """Fairness ids, each with its share of the requests; users are dealt to them in turn."""
    objective: str | None = None
    from_ns: int = 0
    until_ns: int | None = None
    """When they stop coming; None: at the end."""
    announces_prompt: bool = True
    """Whether the gateway knows the tokens of the prompt, or only its bytes."""
    output_tokens_max: int | None = None
    """What the client asks for at most; a longer answer is cut there."""
    ttft_slo_ns: int | None = None
    """When the first token is due, from when the client first asked."""
    announces_slo: bool = True
    """Whether the request says so too; else it only counts in the results."""
    ttl_ns: int | None = None
    """Longest wait that the request itself allows."""
    patience: Distribution | None = None
    """How long a client waits for its first token before it leaves, ns; None: for ever."""
    retry: Retry = field(default_factory=Retry)
    model: str = ""
    subset: tuple[str, ...] | None = None
    """Addresses of the servers that the requests may go to; None: any."""

"""Pure. What is measured at a place between two moves of its limits: evidence for `place`."""

from math import sqrt
from typing import Final, final

from flowcontrol.pool import InFlight

STANDING: Final = 0.7
"""Fewer requests waiting at an endpoint, on average, are no queue."""
_DEVIATIONS: Final = 3.0
"""Up to so many standard deviations above the usual number are chance, and no queue."""


@final
class MoveWindow:
    """What has happened since the limits last moved, or were last judged."""

    __slots__ = (
        *("all", "area", "began_ns", "counted_ns", "dispatched"),
        *("in_flight", "joined", "looked_ns", "members", "most", "most_tokens", "over"),
        *("running", "running_least", "running_most", "scrapes", "skips", "steps", "stood"),
        *("_endpoints", "_round", "token_ns", "tokens", "top", "usage"),
        *("turned_away", "waiting", "waiting_least", "waits", "waits_ns"),
    )

    def __init__(self, now_ns: int, in_flight: int, endpoints: int) -> None:
        self._endpoints = endpoints
        self.members: dict[int, int] = {}
        """Requests of the cohort that are not over: id to time of dispatch."""
        self.joined = self.over = self.turned_away = 0
        self.all = self.dispatched = 0
        """All dispatches, and those that did not fill an empty place."""
        self.waits = self.tokens = 0
        self.waits_ns = self.token_ns = 0.0
        self.steps = 0.0
        """Tokens expected in the answers to all dispatches: each takes a step."""
        self.area = 0
        self.most = 0
        self.most_tokens = 0.0
        self.in_flight = in_flight
        self.top = in_flight
        """Most in flight since it began. A dispatch that exceeds it fills an empty place."""
        self.began_ns = self.counted_ns = self.looked_ns = now_ns
        self.skips = endpoints
        """Scrapes still to ignore, because they are too early to show the last move."""
        self.scrapes = self.waiting = self.running = self.running_most = 0
        self.waiting_least = self.running_least = 0
        """In any one scrape."""
        self.stood = 0
        """The fewest that waited at all endpoints together, in any round of scrapes."""
        self.usage = 0.0
        """The largest part of a KV cache in use, in any one scrape."""
        self._round = 0
        """Requests waiting, in the round of scrapes under way."""

    def look(self, load: InFlight, now_ns: int) -> None:
        """Bring the account of requests in flight up to now."""
        self.area += self.in_flight * (now_ns - self.looked_ns)
        self.looked_ns = now_ns
        self.in_flight = load.requests
        if load.requests > self.most:
            self.most = load.requests
        if load.tokens > self.most_tokens:
            self.most_tokens = load.tokens

    def count(self, waiting: int, running: int, usage: float) -> None:
        """Take in one scrape."""
        is_first = not self.scrapes
        self.scrapes += 1
        self.waiting += waiting
        self.running += running
        if waiting < self.waiting_least or is_first:
            self.waiting_least = waiting
        if running < self.running_least or is_first:
            self.running_least = running
        if running > self.running_most:
            self.running_most = running
        if usage > self.usage:
            self.usage = usage
        self._round += waiting
        if self.scrapes % self._endpoints == 0:
            if self._round < self.stood or self.scrapes == self._endpoints:
                self.stood = self._round
            self._round = 0

    @property
    def mean(self) -> float:
        """Mean number in flight."""
        lasted_ns = self.looked_ns - self.counted_ns
        return self.area / lasted_ns if lasted_ns > 0 else float(self.in_flight)

    @property
    def rate(self) -> float:
        """Dispatches to each endpoint, per nanosecond."""
        lasted_ns = self.looked_ns - self.began_ns
        return self.all / self._endpoints / lasted_ns if lasted_ns > 0 else 0.0

    def usual(self, first_token_ns: float) -> float:
        """Return how many requests wait at an endpoint whatever the limit is.

        They wait for a prompt to be read: arrivals during a usual time to first token. Or for the
        end of the step under way: as a request runs for as many steps as its answer has tokens,
        the number running, divided by that. The larger counts.

        Args:
            first_token_ns: the usual time to first token; 0: unknown.
        """
        for_step = self.running_most * self.all / max(1.0, self.steps)
        return max(self.rate * first_token_ns, for_step)

    def queued(self, seen: int, first_token_ns: float) -> tuple[float, bool]:
        """Return the share that waits inside beyond the usual, and whether that is a queue.

        Args:
            seen: waiting, summed over the scrapes.
            first_token_ns: the usual time to first token; 0: unknown.
        """
        usual = self.usual(first_token_ns) * self.scrapes
        waiting = max(0.0, seen - usual)
        inside = seen + self.running
        by_chance = max(STANDING * self.scrapes / self._endpoints, _DEVIATIONS * sqrt(usual))
        return (waiting / inside if inside else 0.0), waiting >= by_chance

    @property
    def is_long(self) -> bool:
        """Whether everything in flight has been replaced once."""
        return self.dispatched >= self.most

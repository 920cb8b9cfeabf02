"""Pure. Limits that find themselves on traffic they have never seen: `auto`.

Three things fill an engine, and each needs its own evidence.

Sequences. Requests beyond what the engine batches wait inside it, where they cannot be reordered.
By Little's law, the share of the requests in flight that waits inside is

    s = dispatches x mean wait / area under the number in flight

over one window. The limit on requests falls while s is above `many`. It rises while s is below
`few` and the limit is reached. Between the two it stays.

Some requests wait inside whatever the limit is: each waits for the end of the step under way. A
request runs for as many steps as its answer has tokens, so by Little's law the number that waits
for a step is the number that runs divided by the length of an answer: hardly any of a chat, half of
all embeddings. They do not count as a queue.

To count what is queued, instead of reacting to delay, is the idea of TCP Vegas (Brakmo and
Peterson, 1995). Delay grows with prompts, answers and neighbours long before an engine is full;
gradient2 and Envoy's adaptive concurrency take that for congestion. AIMD waits for errors, and an
engine that queues without limit returns none.

KV cache. A sequence keeps its prompt and what it has answered in the cache, so the unit is the
token, not the request. When the cache overflows, the engine preempts answers that have begun and
computes them again, so that more in flight gives less output. The limit on tokens in flight (prompt
and expected answer) is 0.85 of the cache by its measured use: u / T for a use u at T tokens in
flight. The largest recent ratio counts, which covers answers longer than expected and shared
prefixes. A nearly empty cache is not measured, because only the longest answers are left in it.
Until a first measurement the limit is 0.8 of the capacity that the engine reports. One request may
go beyond the limit, so room is left for the largest recent one.

Prompts. A job that fills a hundred free places at once puts a hundred prompts before the next
person: half a minute of work, though nothing is full. So an endpoint is sent the next prompt only
when it has nearly read those before. How fast it reads is learnt from the least times to first
token (`prefill`). The engine loses nothing, since it could not have read them sooner. This is the
pacing of BBR (Cardwell et al., 2016): know the rate of the bottleneck and never send faster. To be
safe, the speed is one that the engine has shown.

The evidence degrades in steps. Each move of a limit names its evidence.

    metrics      s from requests waiting and running, cache from its use; takes seconds
    settlements  s from times to first token beyond the least for that length; takes as long as
                 the answers
    departures   s from how long the shortest requests took, and what more in flight gains (`blind`)

Settlements do not show which of the two limits a queue comes from. The limit that falls is the one
of which more was in flight than ever was without a queue; both fall, if that holds for both or for
neither. Departures move one limit, on requests, which is the same at every endpoint.

The start is fast and ends at the first sign of trouble: a queue, or a token that takes four times
the least. Where an engine reports the size of its cache, the limit leaps to one request for every
8 Ki tokens of it, 128 at most, since an engine with so large a cache batches as many. From there it
goes in steps: with metrics by 35 % of what was in flight, and at least four requests, at every
scrape, so that it overshoots by few; else by half a window. Output at n in flight goes as
n / (a + b n), so it grows as n does times a / (a + b n), the least time of a token over the present
one. A factor of four between them is where doubling n stops paying. After the start, steps are of
6 %. After three rises in a row, each of which lasted as long as a request is in flight, the step is
squared. So a limit that fell by mistake, or that the traffic has outgrown, recovers within some
service times.

To find an edge is to go over it, and requests sent beyond it wait. So at most one endpoint in four
(one, where there are fewer) goes further than any endpoint has been, and people find places at the
others. During the start the others follow at once to where that one had no queue. Later each takes
its own steps up to there, because the most that ever went well at one endpoint was partly luck. And
an edge is searched for once, not at each endpoint: endpoints with caches of the same size are taken
to have the same edge until they show another. So the start of one also ends where another of its
size had a queue.

What waits by chance is no queue. The number that usually waits for a step or a prompt, and three
standard deviations more (the deviation of a Poisson number is its root), come together now and
then. So no limit falls by a single scrape. Requests that fill empty places at once are no queue
either, nor are those that were in flight when a limit fell: nothing is judged before they have
drained. Before the first settlement nothing is known of the answers, so no limit falls by metrics
for four seconds. Before the speed of prompts is known they are not paced, and a burst of them waits
to be read: during the start, only what waits at every scrape is a queue. Later, too, some requests
wait because prompts are longer than usual, and a lower limit would not have them read sooner. This
is recognised where fewer requests run than have run at an endpoint of that size, or than its cache
has room for, so that places are free, and less than half of the cache is in use. It excuses at most
three windows in a row, since no metric says what else a request may be waiting for.

Where answers are long, a small share of the time in flight is a long wait for people. Where they
are short, a large share may be the wait for one prompt. Settlements measure the wait itself, so by
settlements a limit rises only while the mean wait is shorter than a usual time to first token, and
falls only while it is longer. With metrics the number running decides: if it stays the same over
three scrapes while others wait for more than twice a usual time to first token, the engine batches
no more. Then that number is the limit, at every endpoint with as large a cache that has not run
more. It is a setting of the engine, so it is seldom tried again (`belief`), by one endpoint in four
at a time, and the trial ends as soon as no more requests run than before. The number of tokens at
which settlements showed no queue is treated in the same way.

With a reserve (`reserve`) the limit is seldom reached, so a queue that would form at the limit does
not show. So beyond the number that ran when a queue was last seen, the limit rises only if it was
reached on average: it does not grow into the reserve. Before any queue was seen, three quarters of
it count as reached, because a reserve takes at most a quarter.

Bounds. The number in flight at an endpoint exceeds its limits by at most one request. Where the
engine picks, each endpoint has its own limits, so unequal endpoints find theirs. A false sign costs
at most half of a limit. A missed one costs a window's growth: half (or the leap) at the start, 6 %
later.

What it does not see. Without metrics: the use of the KV cache before the first queue, so that the
start may overshoot once, by half. How much of a person's time to first token is the job's work in
the same step (`reading` bounds its prompts). If prompts all have the same length, or most are read
in less than one step, they show no speed and are not paced. Of requests that do not come through
here, only the number is known: they take their part of a measured cache; what waits while none of
ours is there moves no limit; beside ours, they count like ours.
"""

from math import inf
from statistics import median
from typing import Final, final

from flowcontrol.blind import BlindLimit
from flowcontrol.config import Auto, Role
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.memory import StageMemory
from flowcontrol.moves import LimitMove, LimitMoves
from flowcontrol.picker import FULL
from flowcontrol.place import Moved, Place
from flowcontrol.pool import InFlight, StageLoad

_FIRST: Final = 8.0
"""Requests in flight at one endpoint to begin with."""
_SILENCE_NS, _SILENT_COMPLETIONS = 60_000_000_000, 64
"""When so many requests have ended in that time without a settlement, the access log is gone."""
_NO_METRICS_NS, _FIRST_METRICS_NS = 10_000_000_000, 2_000_000_000
"""Without a scrape for so long there are no metrics; and without one so soon after the start."""
_UNTRIED: Final = 12.0
"""Up to this limit an endpoint need not wait for another to go first."""
_EXPLORERS: Final = 4
"""One endpoint in so many, and at least one, may go further than any has been."""
_STAGE: Final = ""
"""The key of the one place that all endpoints share, where Envoy picks."""


@final
class AutoDetector:
    """The detector `auto`: requests and tokens in flight, over limits that find themselves.

    O(log endpoints) an event, O(endpoints) where they change or a limit moves.
    """

    counts_dispatches = True
    has_timer = True

    def __init__(self, settings: Auto, stage: StageLoad, now_ns: int) -> None:
        self.settings = settings
        self.revision = 0
        self.moves = LimitMoves()
        self._stage = stage
        self._has_settlements = False
        self._settled_ns = now_ns
        self._scraped_ns = now_ns + _FIRST_METRICS_NS - _NO_METRICS_NS
        self._completed = 0
        """Requests that have ended since the last settlement."""
        self._places: dict[str, Place] = {}
        """By address; where Envoy picks, one for the whole stage."""
        self._kept: StageMemory | None = None
        """What an earlier process had learnt, until there are endpoints to apply it to."""
        self._shortest_ns = self._edge = 0.0
        """What it had learnt from departures, until they are the only evidence."""
        self._blind: BlindLimit | None = None
        """While departures are the only evidence."""
        self._reading: KeyedHeap[str, int] = KeyedHeap()
        """Places that read prompts, by when the next may be sent or, failing that, all are read."""

    @property
    def limit(self) -> int:
        """Return how many may be in flight at all endpoints together."""
        return sum([int(place.requests_max) for place in self._places.values()])

    @property
    def tokens_limit(self) -> int | None:
        """Return how many tokens may be in flight at all endpoints together; None: not known."""
        tokens = sum([place.tokens_max for place in self._places.values()])
        return None if tokens == inf else int(tokens)

    def limit_of(self, address: str) -> int:
        """Return how many may be in flight at one endpoint."""
        own = self._places.get(address)
        if own is not None:
            return int(own.requests_max)
        return -(-self.limit // len(self._stage.addresses))

    def saturation(self) -> float:
        """Return the load of the stage; where the engine picks, of requests alone."""
        shared = self._places.get(_STAGE)
        if shared is None:
            return self._stage.pool().requests / self.limit
        return FULL if shared.pace.is_held else shared.saturation()

    def unheld(self) -> float:
        """Return the load of the stage as if every prompt that was sent were read."""
        shared = self._places.get(_STAGE)
        return self.saturation() if shared is None else shared.saturation()

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint."""
        own = self._places.get(address)
        return self.saturation() if own is None else own.saturation()

    def holds(self, address: str) -> bool:
        """Whether an endpoint must read prompts before it is sent the next."""
        own = self._places.get(address)
        return own is not None and own.pace.is_held

    def reads(self, address: str) -> bool:
        """Whether an endpoint is still reading a prompt."""
        own = self._places.get(address)
        return own is not None and own.pace.is_reading

    def reading_ns(self, lease: Lease) -> float:
        """Return how long a prompt occupies the endpoints, over their number; 0: unknown."""
        place = self._places.get(self._address_of(lease))
        return place.token_ns * lease.tokens.input / len(self._places) if place else 0.0

    def endpoints_changed(self, now_ns: int) -> None:
        """Keep the limits of endpoints that stay; a new one begins with their median."""
        if self._stage.is_picked:
            self._places = {
                address: self._place_at(address, now_ns) for address in self._stage.addresses
            }
        else:
            self._places = {_STAGE: self._place_of_stage(now_ns)}
        for address in set(self._reading) - set(self._places):
            self._reading.discard(address)
        self._resume(now_ns)
        if self._blind is not None:
            self._blind.watch(self._places, now_ns)
        self.revision += 1

    def remember(self, role: Role) -> StageMemory:
        """Return what was learnt about the endpoints of this role. O(endpoints)."""
        if not self._places and self._kept is not None:
            return self._kept
        if self._blind is not None:
            return self._blind.remember(role)
        places = {address: place.remember() for address, place in self._places.items()}
        return StageMemory(role, places, self._shortest_ns, self._edge)

    def restore(self, memory: StageMemory, now_ns: int) -> None:
        """Go on with what was learnt before; an endpoint that is not in it gets the median."""
        self._kept = memory if memory.places else None
        self._resume(now_ns)

    def _resume(self, now_ns: int) -> None:
        if self._kept is None or not self._places:
            return
        kept = self._kept.places
        usual = sorted(kept.values(), key=lambda each: each.requests)[len(kept) // 2]
        for address, place in self._places.items():
            place.resume(kept.get(address, usual), now_ns)
        self._blind = None
        self._shortest_ns, self._edge = self._kept.shortest_ns, self._kept.edge
        self._kept = None
        self.revision += 1

    def _place_at(self, address: str, now_ns: int) -> Place:
        load, place = self._stage.at(address), self._places.get(address)
        assert load is not None, "where the engine picks, each endpoint has an account"
        if place is None:
            others = list(self._places.values())
            usual = median([each.requests_max / each.endpoints for each in others] or [_FIRST])
            place = self._new_place(address, load, 1, usual, now_ns)
            if others:
                place.like(others[0])
        place.load = load
        return place

    def _place_of_stage(self, now_ns: int) -> Place:
        count, shared = len(self._stage.addresses), self._places.get(_STAGE)
        if shared is None:
            others = list(self._places.values())
            usual = median([each.requests_max for each in others] or [_FIRST])
            shared = self._new_place(_STAGE, self._stage.pool(), count, usual * count, now_ns)
            if others:
                shared.like(others[0])
        elif shared.endpoints != count:
            shared.scale(count, now_ns)
        return shared

    def _new_place(
        self, address: str, load: InFlight, endpoints: int, limit: float, now_ns: int
    ) -> Place:
        return Place(load, endpoints, limit, moved=self._moved(address), peers=self, now_ns=now_ns)

    def _moved(self, address: str) -> Moved:
        def moved(what: str, before: float, after: float, reason: str, now_ns: int) -> None:
            self.revision += 1
            self.moves.note(LimitMove(now_ns, address or None, before, after, f"{what}: {reason}"))

        return moved

    def proven(self) -> float:
        """Return the most that were in flight at one endpoint without a queue."""
        return max([_UNTRIED, *[place.proven for place in self._places.values()]])

    def edge(self, kv_capacity: int) -> float:
        """Return the fewest that ran when an endpoint of this size had a queue; inf: none had."""
        return min([p.edge for p in self._places.values() if p.kv_capacity == kv_capacity])

    def ran_most(self, kv_capacity: int) -> int:
        """Return the most that have run at one endpoint of this size."""
        return max([p.ran_most for p in self._places.values() if p.kv_capacity == kv_capacity])

    def found(self, place: Place, now_ns: int) -> None:
        """Hold endpoints of the same known cache size to the batch that one of them showed."""
        for other in self._places.values():
            if other is not place and place.kv_capacity and other.kv_capacity == place.kv_capacity:
                other.batches_like(place, now_ns)

    def may_explore(self, place: Place) -> bool:
        """Whether a place may go further than any other has been."""
        since_ns = place.began_ns
        ahead = [each.is_exploring(since_ns) for each in self._places.values() if each is not place]
        return sum(ahead) < max(1, len(self._places) // _EXPLORERS)

    def shown(self, proven: float, now_ns: int) -> None:
        """Let the others follow to where one had no queue."""
        for place in self._places.values():
            place.follow(proven, now_ns)

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch, and hold back the next prompt until this one is nearly read."""
        address = self._address_of(lease)
        place = self._places[address]
        place.charged(lease, now_ns)
        if self._blind is not None:
            self._blind.charged(address, lease.request.request_id, now_ns)
        if place.pace.is_reading:
            self._reading.put(address, place.pace.next_ns)

    def released(self, lease: Lease, now_ns: int) -> None:
        """Count a departure; after many without a settlement, none is expected any more."""
        self._completed += 1
        address = self._address_of(lease)
        place = self._places.get(address)
        if place is not None:
            place.released(now_ns)
        if self._blind is not None:
            self.revision += self._blind.released(address, lease.request.request_id, now_ns)
        else:
            self._notice_silence(now_ns)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used."""
        self._settled_ns, self._completed = now_ns, 0
        if settled.ttft_ns is not None and not self._has_settlements:
            self._has_settlements = True
            self._see(now_ns)
        place = self._places.get(self._address_of(lease))
        if place is not None:
            place.settled(lease, settled, now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in one scrape of an endpoint."""
        if load.running is not None:
            self._scraped_ns = now_ns
            self._see(now_ns)
        place = self._places.get(load.address) or self._places.get(_STAGE)
        if place is not None:
            place.observed(load, now_ns)

    def advance(self, now_ns: int) -> list[str]:
        """Let time pass for prompts; return the endpoints whose state this changed."""
        changed: list[str] = []
        while (first := self._reading.first()) is not None and first[0] <= now_ns:
            address = first[1]
            pace = self._places[address].pace
            pace.read(now_ns)
            if pace.is_reading:
                self._reading.put(address, pace.next_ns)
            else:
                self._reading.discard(address)
            changed.append(address)
        return changed

    def next_change_ns(self) -> int | None:
        """Return when time alone next changes an endpoint: it may be sent a prompt, or has read."""
        first = self._reading.first()
        return None if first is None else first[0]

    def _address_of(self, lease: Lease) -> str:
        return _STAGE if _STAGE in self._places else lease.endpoint or _STAGE

    def _see(self, now_ns: int) -> None:
        """Stop going by departures: there is better evidence."""
        if self._blind is not None:
            self._blind.end(now_ns)
            self._blind = None
            self.revision += 1

    def _notice_silence(self, now_ns: int) -> None:
        """Go by departures once they are the only evidence."""
        if now_ns - self._settled_ns > _SILENCE_NS and self._completed >= _SILENT_COMPLETIONS:
            self._has_settlements = False
        if self._has_settlements or now_ns - self._scraped_ns < _NO_METRICS_NS or not self._places:
            return
        places = self._places.values()
        usual = median([place.requests_max / place.endpoints for place in places])
        is_starting = all(place.is_starting for place in places)
        moved = self._moved(_STAGE)
        self._blind = BlindLimit(self._places, usual, moved, is_starting=is_starting, now_ns=now_ns)
        self._blind.resume(self._shortest_ns, self._edge)
        self._shortest_ns = self._edge = 0.0
        self.revision += 1

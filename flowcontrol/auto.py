"""Pure. Limits that find themselves on traffic they have never seen: `auto`.

Three things fill an engine, and each needs its own evidence.

Sequences. Beyond what it batches, requests wait inside, where they cannot be reordered. By
Little's law the share of what is in flight that waits inside is

    s = dispatches x mean wait / area under the number in flight

over one window. The limit on requests falls where s is above `many`, rises where s is below `few`
and the limit was reached, and else stays. Whatever the limit is, a request waits for the end of the
step under way. It runs for as many steps as its answer has tokens, so by Little's law as many wait
for that as run, over the length of answers: hardly any of a chat, half of all embeddings. They are
no queue. To count what is queued instead of reacting to delay is
TCP Vegas' idea (Brakmo and Peterson, 1995): latency itself grows with prompts, answers and
neighbours long before an engine is full, which gradient2 and Envoy's adaptive concurrency take for
congestion, and errors, which AIMD waits for, an engine that queues without limit never makes.

KV cache. A sequence holds its prompt and what it has answered, so the unit is the token, not the
request. Over the edge answers that have begun are preempted and computed again, so that more in
flight gives less output. The limit on tokens in flight (prompt, and answer as expected) is 0.85 of
the cache by the measured use of it: u / T for a use u at T tokens, the largest lately, so that
answers longer than expected and shared prefixes are in it; of a cache that is nearly empty only
the longest answers are left, and it tells nothing. Before any is measured, 0.8 of the capacity that
the engine tells. Since one request may go beyond a limit, room is left for the largest of late.

Prompts. A job that fills a hundred free places at once puts a hundred prompts before the next
person, half a minute of work, though nothing is full. So an endpoint is sent the next prompt only
when those before are nearly read, by the speed learnt from the least times to first token
(`prefill`). The engine loses nothing: it could not read them sooner. It is BBR's pacing (Cardwell
et al., 2016): to know the bottleneck's rate and never to send faster, instead of filling its
queue. To make it safe the speed is one that the engine has really shown.

The evidence degrades in steps, and each move says which it was.

    metrics      s from requests waiting and running, cache from its use; some seconds
    settlements  s from times to first token beyond the least for that length; with the answers
    departures   s from how long the shortest took, and what more in flight gains (`blind`)

By settlements nothing tells which of the two limits is to blame for a queue. It is the one of
which more was in flight than ever was without a queue; both, if it is both or neither. By
departures there is one limit, on requests, the same at every endpoint.

The start is fast and ends at the first sign: a queue, or a token taking four times the least. Where
an engine tells how large its cache is, it leaps to a request for every 8 Ki tokens of it, 128 at
most: an engine that is given so much batches as many. From there by metrics it goes in small steps,
by 35 % of what was in flight and at least four requests at every look, so that it goes over the
edge by few; else by half a window. Since output at n in flight goes as n / (a + b n), its growth is
that of n times a / (a + b n), the least time of a token over the present one: a quarter is where
doubling stops paying. Later steps are of 6 %, squared after three rises in a row that each lasted
as long as a request is in flight, so that a limit that has fallen by mistake, or that the traffic
has outgrown, is back in some service times.

To find an edge is to go over it, and who is sent there then waits. So one endpoint in four at most
(one, where there are fewer) goes further than any has been, and a person finds a place at the
others. At the start those follow at once to where it had no queue; later each takes its own steps
up to there, since the most that ever went well somewhere is what chance made of it. And an edge is
found once, not at each: endpoints whose caches are of one size have one edge until they show
another, so that a start ends also where another of the size had a queue.

What waits by chance is no queue. As many as usually wait for a step or for a prompt, and three
standard deviations more (a Poisson number's is its root), come together now and then, so that no
limit falls by one look. No queue either is what fills empty places at once, or was in flight when a
limit fell: nothing is judged before that has drained. And before the first settlement nothing is
known of answers, so that for four seconds no limit falls by metrics. Before the speed of prompts is
known they are not paced, and a burst of them waits to be read: during the start only what waits at
every look is a queue. Later, too, some wait for prompts that are longer than usual, and a lower
limit would not have them read sooner. That it is this is known where fewer run than have at an
engine of the size, or than its cache has room for in any case, so that there are places, and less
than half of the cache is in use; for three windows in a row at most, since no metric tells what
else a request may wait for.

Where answers are long, a small share of the time in flight is a long wait for people; where they
are short, a large share may be the wait for one prompt. So by settlements, which tell how long it
was, a limit rises only while the mean wait is shorter than a first token usually takes, and falls
only where it is longer. Metrics tell it by how many run: if at three looks no fewer and no more,
and others wait for twice as long as a first token usually takes, the engine batches no more. Then
that is the limit, at every endpoint with as large a cache that has not run more. It is a setting
of the engine, so it is tried again seldom (`belief`), by one endpoint in four at a time, and given
up as soon as no more run than before; and so is, where settlements showed a queue, how many tokens
did not wait.

With a reserve (`reserve`) the limit is seldom reached, so that nothing is seen of a queue that
would be there if it were. So beyond what ran at most when a queue was last seen, the limit rises
only if it was reached on average: it does not grow into the reserve. Before any queue was seen
three quarters of it count as reached: a reserve takes no more than the fourth.

Bounds. In flight at an endpoint never exceeds its limits by more than one request. Where the engine
picks, each endpoint has limits of its own, so unequal ones find theirs. A false sign costs at most
half of a limit, a missed one a window's growth: half at the start (or the leap), 6 % later.

What it does not see: without metrics, KV use before the first queue, so that the start may go over
the edge once by half; how much of a person's time to first token is the job's work in the same step
(`reading` keeps its prompts within bounds); and prompts all of one length, or most of them read in
less than a step, tell no speed, so they are not paced. Of requests that do not come through here it
knows their number and no more: they take their part of a measured cache, what waits while none of
ours is there moves no limit, and beside some of ours it counts like ours.
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
"""No settlement for so long, while so many requests ended: there is no access log any more."""
_UNHEARD_NS, _FIRST_WORD_NS = 10_000_000_000, 2_000_000_000
"""Nor does any endpoint say how it is, after so long; at the beginning it would have by then."""
_UNTRIED: Final = 12.0
"""So few that an endpoint may go there although no other has been."""
_EXPLORERS: Final = 4
"""Of so many endpoints one may go further than any has been; of fewer, one as well."""
_STAGE: Final = ""
"""Stands for the address where all endpoints have one place."""


@final
class AutoDetector:
    """Requests and tokens in flight over limits that find themselves.

    O(log endpoints), but O(endpoints) where they change or a limit moves.
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
        self._heard_ns = now_ns + _FIRST_WORD_NS - _UNHEARD_NS
        self._completed = 0
        """Since the last settlement."""
        self._places: dict[str, Place] = {}
        """By address, or one for the stage where Envoy picks."""
        self._kept: StageMemory | None = None
        """What another process had found, until there are endpoints."""
        self._shortest_ns = self._edge = 0.0
        """What it knew by departures, until those are all that tells anything."""
        self._blind: BlindLimit | None = None
        """While nothing but departures tells anything."""
        self._reading: KeyedHeap[str, int] = KeyedHeap()
        """Places that read prompts, by when they may be sent the next, or else have read all."""

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
        """Return the same, whether or not prompts have to be read first."""
        shared = self._places.get(_STAGE)
        return self.saturation() if shared is None else shared.saturation()

    def endpoint_saturation(self, address: str) -> float:
        """Return the load of one endpoint."""
        own = self._places.get(address)
        return self.saturation() if own is None else own.saturation()

    def holds(self, address: str) -> bool:
        """Whether the prompts that an endpoint was sent last have to be read first."""
        own = self._places.get(address)
        return own is not None and own.pace.is_held

    def reads(self, address: str) -> bool:
        """Whether an endpoint still reads a prompt."""
        own = self._places.get(address)
        return own is not None and own.pace.is_reading

    def reading_ns(self, lease: Lease) -> float:
        """Return the time of all endpoints together that a prompt takes; 0: it is not known."""
        place = self._places.get(self._address_of(lease))
        return place.token_ns * lease.tokens.input / len(self._places) if place else 0.0

    def endpoints_changed(self, now_ns: int) -> None:
        """Keep the limits of each endpoint that stays; who is new has what is usual among them."""
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
        """Return what was found, as that of the endpoints of this role. O(endpoints)."""
        if not self._places and self._kept is not None:
            return self._kept
        if self._blind is not None:
            return self._blind.remember(role)
        places = {address: place.remember() for address, place in self._places.items()}
        return StageMemory(role, places, self._shortest_ns, self._edge)

    def restore(self, memory: StageMemory, now_ns: int) -> None:
        """Go on with what was found before; endpoints that are not in it get the usual."""
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
        """Return how many were in flight at one endpoint without a queue, at most."""
        return max([_UNTRIED, *[place.proven for place in self._places.values()]])

    def edge(self, kv_capacity: int) -> float:
        """Return how few ran where an endpoint of this size had a queue; inf: none had."""
        return min([p.edge for p in self._places.values() if p.kv_capacity == kv_capacity])

    def ran_most(self, kv_capacity: int) -> int:
        """Return how many have run at one endpoint of this size, at most."""
        return max([p.ran_most for p in self._places.values() if p.kv_capacity == kv_capacity])

    def found(self, place: Place, now_ns: int) -> None:
        """Let the others of its size, if that is known, stay within what its engine batches."""
        for other in self._places.values():
            if other is not place and place.kv_capacity and other.kv_capacity == place.kv_capacity:
                other.batches_like(place, now_ns)

    def may_explore(self, place: Place) -> bool:
        """Whether a place may go further than any other has been."""
        since_ns = place.began_ns
        ahead = [each.is_exploring(since_ns) for each in self._places.values() if each is not place]
        return sum(ahead) < max(1, len(self._places) // _EXPLORERS)

    def shown(self, proven: float, now_ns: int) -> None:
        """Let the others follow where a place had as many in flight without a queue."""
        for place in self._places.values():
            place.follow(proven, now_ns)

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Count the dispatch, and hold the next prompt back until this one is nearly read."""
        address = self._address_of(lease)
        place = self._places[address]
        place.charged(lease, now_ns)
        if self._blind is not None:
            self._blind.charged(address, lease.request.request_id, now_ns)
        if place.pace.is_reading:
            self._reading.put(address, place.pace.next_ns)

    def released(self, lease: Lease, now_ns: int) -> None:
        """Count the departure; many without a settlement mean that there is none to come."""
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
        """Take in what a request really took."""
        self._settled_ns, self._completed = now_ns, 0
        if settled.ttft_ns is not None and not self._has_settlements:
            self._has_settlements = True
            self._see(now_ns)
        place = self._places.get(self._address_of(lease))
        if place is not None:
            place.settled(lease, settled, now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in what an endpoint says of itself."""
        if load.running is not None:
            self._heard_ns = now_ns
            self._see(now_ns)
        place = self._places.get(load.address) or self._places.get(_STAGE)
        if place is not None:
            place.observed(load, now_ns)

    def advance(self, now_ns: int) -> list[str]:
        """Let prompts be read; return where the next may go, or all are read."""
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
        """Return when the next prompt may go somewhere, or all are read there."""
        first = self._reading.first()
        return None if first is None else first[0]

    def _address_of(self, lease: Lease) -> str:
        return _STAGE if _STAGE in self._places else lease.endpoint or _STAGE

    def _see(self, now_ns: int) -> None:
        """Leave the limits to what tells more than departures."""
        if self._blind is not None:
            self._blind.end(now_ns)
            self._blind = None
            self.revision += 1

    def _notice_silence(self, now_ns: int) -> None:
        """Go by departures if nothing else tells anything any more."""
        if now_ns - self._settled_ns > _SILENCE_NS and self._completed >= _SILENT_COMPLETIONS:
            self._has_settlements = False
        if self._has_settlements or now_ns - self._heard_ns < _UNHEARD_NS or not self._places:
            return
        places = self._places.values()
        usual = median([place.requests_max / place.endpoints for place in places])
        is_starting = all(place.is_starting for place in places)
        moved = self._moved(_STAGE)
        self._blind = BlindLimit(self._places, usual, moved, is_starting=is_starting, now_ns=now_ns)
        self._blind.resume(self._shortest_ns, self._edge)
        self._shortest_ns = self._edge = 0.0
        self.revision += 1

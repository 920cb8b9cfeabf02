"""Pure. The limits of one endpoint, or of a stage that Envoy picks from, and what moves them.

Theory: `auto`. Every move follows from one number: the share s of the requests in flight that waits
inside the engine, in one window between two moves of the limits.
"""

from collections.abc import Callable
from math import inf, sqrt
from typing import Final, Protocol, final

from flowcontrol.belief import Belief
from flowcontrol.cache import CacheUse
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.memory import PlaceMemory
from flowcontrol.pace import PromptPace
from flowcontrol.pool import InFlight
from flowcontrol.prefill import FirstTokenTimes
from flowcontrol.window import STANDING, MoveWindow

_FEW, _AIM, _MANY = 0.045, 0.08, 0.115
"""Shares that wait inside: below the first the limit rises, above the last it falls."""
_SCRAPED: Final = 1.5
"""A share by metrics is exact, so less of it is allowed: it counts so many times."""
_START, _STEP, _STEP_MIN = 1.5, 1.06, 0.5
"""Growth of a limit before its first fall, and after; and the least growth, in requests."""
_FOLLOWED: Final = 2.0
"""A place follows another to so many times its own limit, before it has evidence of its own."""
_START_METRICS, _START_LEAST = 1.35, 4.0
"""Growth before the first fall, with metrics; and the least, in requests at each endpoint."""
_CACHE_EACH, _ROOM_MOST = 8192.0, 128.0
"""The start leaps to one request for so many tokens of KV cache, and to so many at most."""
_DOUBLINGS_MAX: Final = 3
_PATIENCE: Final = 3
"""After so many rises in a row, each as long as a request is in flight, the step is squared; and
`_DOUBLINGS_MAX` times at most."""
_FALL_MOST: Final = 0.5
"""One window lowers a limit to this part at most."""
_FALL_BLIND: Final = 2.0
"""Without metrics a limit falls by twice the excess, because the next evidence comes late."""
_REACHED, _REACHED_ALL, _REACHED_START = 0.9, 0.95, 0.75
"""Part of a limit that must have been in flight, at one moment or on average, for it to rise; and
at one moment before the first fall, which is less, because a reserve leaves no more."""
_FORGOTTEN: Final = 1.0003
"""Growth in each window of the number beyond which the limit must be reached on average."""
_TURNED_AWAY, _TURNED_AWAY_FALL = 0.1, 0.8
"""If engines refuse this part of a cohort, the limit falls to that part."""
_VAIN_FALL, _VAIN_EFFECT = 0.7, 0.5
"""If a limit fell to this part and the share waiting did not fall by half as much, the least time
to first token is wrong."""
_COHORT, _COHORT_FIRST, _COHORT_KNOWN = 16, 8, 0.75
"""Requests in the cohort of a window, before the first fall fewer; and the part that must be known
before it is judged."""
_SCRAPES: Final = 4
"""Scrapes of an endpoint in a window; before the first fall one is enough, if it shows no queue."""
_SCRAPES_LEAST: Final = 2
"""Before a limit falls: what one scrape shows may have come together by chance."""
_SCRAPES_STANDING: Final = 3
"""Until a queue is known to last; before the first fall, until one that may not last is judged."""
_FULL_BATCH, _FULL_WAIT = 0.98, 2.0
"""An engine batches no more if the number running stays the same, within this part, while others
wait for longer than so many usual times to first token."""
_TOKENS_SAME: Final = 0.15
"""Two findings of what a cache holds are the same if they differ by no more than this part."""
_READING, _READING_CACHE = 0.8, 0.5
"""Requests wait for prompts if fewer run than this part of the most that ran or have room, and
less than that part of the cache is in use."""
_EXCUSED_MOST: Final = 3
"""Windows in a row that this may excuse."""
_SETTLING_NS: Final = 500_000_000
"""For so long after a move, before the first fall, a scrape does not show its effect."""
_UNKNOWN_NS: Final = 4_000_000_000
"""Age of a window before a limit may fall, while no time to first token is known."""
_FADING, _FADING_METRICS = 1.002, 1.0005
"""Growth of the least times to first token in each window; with metrics it is slower, because then
they serve only for the speed of prompts."""
_FRESH_NS: Final = 10_000_000_000
"""Older metrics are ignored."""
_PLAIN: Final = 0.3
"""A share that needs no further scrape."""
_LONG: Final = 1.0
"""A mean wait inside, in usual times to first token. A longer one matters, however small the share
that waits; a shorter one is for the prompt ahead, however large that share."""
_SLOWER: Final = 4.0
"""Once a token takes so many times the least, more in flight gives little more output."""
_OUTPUT_MIN: Final = 8
"""Answers with fewer tokens do not show how long a token takes."""

Moved = Callable[[str, float, float, str, int], None]
"""Called with a move of a limit: which limit, from, to, reason and time."""


class Peers(Protocol):
    """All places of the stage: what they have shown, and which may go further."""

    def proven(self) -> float:
        """Return the most that were in flight at one endpoint without a queue."""

    def edge(self, kv_capacity: int) -> float:
        """Return the fewest that ran when an endpoint of this size had a queue; inf: none had."""

    def ran_most(self, kv_capacity: int) -> int:
        """Return the most that have run at one endpoint of this size."""

    def found(self, place: "Place", now_ns: int) -> None:
        """Note that a place has found how many requests its engine batches."""

    def may_explore(self, place: "Place") -> bool:
        """Whether a place may go further than any other has been."""

    def shown(self, proven: float, now_ns: int) -> None:
        """Note how many were in flight at one endpoint without a queue."""


@final
class Place:
    """One limit on requests and one on tokens. O(cohort) memory, O(log cohort) an event.

    Args:
        load: the account of what is in flight there.
        endpoints: how many share the place: 1, or all of the stage.
        requests_max: the first limit on requests.
        moved: called with every move of a limit.
        peers: all places of the stage.
        now_ns: the time, monotonic.
    """

    def __init__(  # noqa: PLR0913 - what a place needs to know
        self,
        load: InFlight,
        endpoints: int,
        requests_max: float,
        *,
        moved: Moved,
        peers: Peers,
        now_ns: int,
    ) -> None:
        self.load = load
        self.endpoints = endpoints
        self.requests_max = max(1.0, requests_max)
        self.tokens_max = inf
        self._is_starting = True
        self._tokens_start = True
        self._first_tokens = FirstTokenTimes()
        self.pace = PromptPace(self._first_tokens, now_ns)
        self._moved = moved
        self._peers = peers
        self.kv_capacity = 0
        """Tokens its KV cache holds, as the engine reports; 0: unknown."""
        self.explores = False
        """Whether more may be in flight here than at any endpoint without a queue."""
        self._wish = 0.0
        """The limit up to which it may follow others at once; 0: it does not want to go further."""
        self._scraped_ns: int | None = None
        self._cache = CacheUse()
        self._calm = self._calm_tokens = 0.0
        """Most requests, and most tokens, in flight without a queue."""
        self._rises = self._token_rises = 0
        """Rises in a row, of either limit."""
        self._excused = 0
        """Windows in a row in which too many waited, but for prompts."""
        self._ran = inf
        """The number that ran when a queue was last seen. Places beyond it may not be real."""
        self._edge = inf
        self.ran_most = 0
        """The most that ran at one endpoint since its engine was last seen to be full."""
        self._batch = Belief(1 - _FULL_BATCH)
        """Most requests that its engines batch."""
        self._tokens_edge = Belief(_TOKENS_SAME)
        """Tokens that their caches hold, as queues showed."""
        self._least_token_ns = 0.0
        self._fell_from: tuple[float, float] | None = None
        """Limit and share waiting when it began to fall."""
        self._window = MoveWindow(now_ns, load.requests, endpoints)

    def saturation(self) -> float:
        """Return the load: of requests or of tokens, the fuller counts."""
        by_requests = self.load.requests / int(self.requests_max)
        by_tokens = self.load.tokens / self.tokens_max
        return by_requests if by_requests > by_tokens else by_tokens

    @property
    def proven(self) -> float:
        """The most that were in flight at each endpoint without a queue."""
        return self._calm / self.endpoints

    @property
    def edge(self) -> float:
        """How many ran at each endpoint when a limit last fell that was reached; inf: none did."""
        return self._edge / self.endpoints

    @property
    def began_ns(self) -> int:
        """When the window under way began."""
        return self._window.began_ns

    def is_exploring(self, since_ns: int) -> bool:
        """Whether it goes beyond what was proven: judged since then, or at its limit."""
        return self.explores and (self._window.began_ns >= since_ns or self._is_reached(_REACHED))

    def like(self, other: "Place") -> None:
        """Begin with what another place of the same stage has learnt."""
        self._is_starting = other._is_starting  # noqa: SLF001 - same class
        self._tokens_start = other._tokens_start  # noqa: SLF001 - as above
        self.tokens_max = other.tokens_max * self.endpoints / other.endpoints

    def remember(self) -> PlaceMemory:
        """Return what it has learnt, per endpoint."""
        count = self.endpoints
        tokens = None if self.tokens_max == inf else self.tokens_max / count
        return PlaceMemory(
            requests=self.requests_max / count,
            calm=self._calm / count,
            is_starting=self._is_starting,
            tokens=tokens,
            calm_tokens=self._calm_tokens / count,
            cache_per_token=self._cache.per_token,
            batch=None if self._batch.value == inf else self._batch.value / count,
            batch_for_ns=self._batch.for_ns,
        )

    def resume(self, memory: PlaceMemory, now_ns: int) -> None:
        """Go on with what a similar place had learnt."""
        count = self.endpoints
        self.requests_max = max(1.0, memory.requests * count)
        self.tokens_max = inf if memory.tokens is None else max(1.0, memory.tokens * count)
        self._calm, self._calm_tokens = memory.calm * count, memory.calm_tokens * count
        self._is_starting = memory.is_starting
        self._tokens_start = memory.is_starting and memory.tokens is None
        self._cache.per_token = memory.cache_per_token
        if memory.batch is not None:
            self._batch.resume(memory.batch * count, memory.batch_for_ns, now_ns)
        self._begin(now_ns)

    @property
    def is_starting(self) -> bool:
        """Whether its limit on requests has never fallen."""
        return self._is_starting

    def allow(self, requests: float, now_ns: int) -> None:
        """Set the limit on requests at each endpoint, while departures are the only evidence."""
        self.requests_max = max(1.0, requests * self.endpoints)
        self._begin(now_ns)

    def scale(self, endpoints: int, now_ns: int) -> None:
        """Scale everything to another number of endpoints."""
        factor = endpoints / self.endpoints
        self.endpoints = endpoints
        self.tokens_max *= factor
        self._calm *= factor
        self._calm_tokens *= factor
        self._ran *= factor
        self._edge *= factor
        self._batch.scale(factor)
        self._tokens_edge.scale(factor)
        self._move(self.requests_max * factor, f"there are {endpoints} endpoints", now_ns)
        self._begin(now_ns)

    def follow(self, proven: float, now_ns: int) -> None:
        """Raise the limit to where another had no queue, if this one wants to go further."""
        before, limit = self.requests_max, min(self._wish, proven * self.endpoints)
        limit = self._within_batch(limit, now_ns)
        if limit > before:
            source = self._source(now_ns)
            reason = f"another endpoint has as many in flight without a queue, by {source}"
            self._move(limit, reason, now_ns)
            self._begin(now_ns)

    def batches_like(self, other: "Place", now_ns: int) -> None:
        """Go no further than the batch of another's engine, unless more have run here."""
        if self.ran_most > other.edge:
            return
        limit = other.edge * self.endpoints
        self._batch.resume(limit, other._batch.for_ns, now_ns)  # noqa: SLF001 - same class
        if self.requests_max > limit:
            self._end_start()
            self._ran = limit
            reason = "an endpoint with as large a cache runs no more at once, by metrics"
            self._move(limit, reason, now_ns)
            self._calm = min(self._calm, self.requests_max)
            self._begin(now_ns)

    # What happens

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch, and add it to the cohort of the window.

        The cohort grows by an eighth of further dispatches, to make up for lost settlements.
        """
        window = self._window
        window.look(self.load, now_ns)
        window.all += 1
        self._cache.sent(lease)
        window.steps += max(1.0, lease.tokens.output)
        self.pace.sent(self.token_ns * lease.tokens.input, now_ns)
        if window.top < self.load.requests and window.top < _REACHED * int(self.requests_max):
            window.top = self.load.requests  # it fills an empty place, which is no queue
            if not window.dispatched:
                window.area = 0
                window.counted_ns = now_ns
            return
        window.dispatched += 1
        if window.joined < self._wanted + window.dispatched // 8:
            window.joined += 1
            window.members[lease.request.request_id] = now_ns

    @property
    def token_ns(self) -> float:
        """Time of one more token of a prompt, over the number of endpoints; 0: unknown."""
        return self._first_tokens.token_ns / self.endpoints

    def released(self, now_ns: int) -> None:
        """Count a departure."""
        self._window.look(self.load, now_ns)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used."""
        window, is_first = self._window, not self._first_tokens.usual_ns
        waited_ns = self._first_tokens.learn(lease, settled)
        if is_first:  # until now the length of answers was a guess
            window.steps = float(window.all * max(1, settled.output_tokens or 1))
        if lease.request.request_id not in window.members:
            return
        window.look(self.load, now_ns)
        window.turned_away += settled.was_turned_away
        output, generation_ns = settled.output_tokens, settled.generation_ns
        if generation_ns and output is not None and output >= _OUTPUT_MIN:
            token_ns = generation_ns / (output - 1)
            if not self._least_token_ns or token_ns < self._least_token_ns:
                self._least_token_ns = token_ns
            window.token_ns += token_ns
            window.tokens += 1
        if waited_ns is not None:
            window.waits_ns += waited_ns
            window.waits += 1
        self._end(lease, now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Take in one scrape of an endpoint."""
        if load.running is None:
            return
        window = self._window
        window.look(self.load, now_ns)
        self._scraped_ns = now_ns
        self.ran_most = max(self.ran_most, load.running)
        self.kv_capacity = load.kv_tokens or 0
        if load.kv_usage is not None:
            self._learn_cache(load.kv_usage, load.kv_tokens, load.running + load.waiting)
        if not window.most:
            return  # what is there did not come through here, and no limit of ours is to blame
        if self._is_too_early(now_ns):
            return
        window.count(load.waiting, load.running, load.kv_usage or 0.0)
        share = self._scraped_share(window.waiting)
        is_unknown = not self._first_tokens.usual_ns
        if share <= _MANY or not is_unknown or now_ns - window.began_ns >= _UNKNOWN_NS:
            self._judge_looks(share, window.scrapes // self.endpoints, now_ns)

    def _judge_looks(self, share: float, looks: int, now_ns: int) -> None:
        """Judge the scrapes of this window, once there are enough of them."""
        window, wanted = self._window, _SCRAPES
        stood = self._scraped_share(window.stood * looks)
        if self._is_starting:
            share = min(share, max(stood, _AIM))  # prompts may wait that are not paced yet
            wanted = 1 if share < _FEW else _SCRAPES_STANDING
        if share > _PLAIN and looks >= _SCRAPES_LEAST and not self._waits_for_prompts():
            self._judge(share, now_ns)
        elif looks >= _SCRAPES_STANDING and self._is_batch_full():
            self._judge_full(now_ns)
        elif looks >= wanted:
            is_known = window.all >= _COHORT_FIRST or self._all_run()
            if is_known or stood > _MANY:
                self._judge(share, now_ns)

    def _is_too_early(self, now_ns: int) -> bool:
        """Whether a scrape cannot show the effect of the last move yet."""
        window = self._window
        if self._is_starting:
            return now_ns - window.began_ns < _SETTLING_NS
        if not window.skips:
            return False
        if self.load.requests <= int(self.requests_max):
            window.skips -= 1  # else requests from before still have to drain
        return True

    def _all_run(self) -> bool:
        """Whether the limit was reached and none waited: enough before the first fall."""
        window = self._window
        wanted = _REACHED_START * int(self.requests_max) * window.scrapes / self.endpoints
        return self._is_starting and not window.waiting and window.running >= wanted

    def _is_batch_full(self) -> bool:
        """Whether the engine runs all it can, and more wait than must at any limit."""
        window, usual_ns = self._window, self._first_tokens.usual_ns
        usual = window.usual(usual_ns)
        running = window.running_most * self.endpoints
        if window.most <= running or window.running_least < _FULL_BATCH * window.running_most:
            return False
        if _FULL_BATCH * self._batch.value <= running <= self._batch.value:
            return window.waiting_least > 0  # as many as were found before
        over = window.waiting_least - usual
        return over >= max(STANDING, sqrt(usual)) and (over > _FULL_WAIT * window.rate * usual_ns)

    def _scraped_share(self, seen: int) -> float:
        """Return the share that waits inside longer than any limit makes it wait.

        Args:
            seen: waiting, summed over the scrapes.
        """
        queued, is_queue = self._window.queued(seen, self._first_tokens.usual_ns)
        share = _SCRAPED * queued
        return share if is_queue else min(share, _AIM)

    def _learn_cache(self, usage: float, capacity: int | None, inside: int) -> None:
        """Learn the limit on tokens from the use of one cache.

        Args:
            usage: part of the cache in use, 0 to 1.
            capacity: tokens it holds; None: unknown.
            inside: requests in the engine. If some did not come through here, only our part of
                the use counts.
        """
        own = self.load.requests / self.endpoints
        if own < inside:
            usage *= own / inside
        most = self._cache.most(usage, capacity, self.load.tokens / self.endpoints)
        if most is not None:
            self.tokens_max = self.endpoints * most

    # Judgement

    @property
    def _wanted(self) -> int:
        return _COHORT_FIRST if self._is_starting else _COHORT

    def _has_metrics(self, now_ns: int) -> bool:
        return self._scraped_ns is not None and now_ns - self._scraped_ns < _FRESH_NS

    def _begin(self, now_ns: int) -> None:
        self._first_tokens.fade(_FADING_METRICS if self._has_metrics(now_ns) else _FADING)
        self._window = MoveWindow(now_ns, self.load.requests, self.endpoints)

    def _end(self, lease: Lease, now_ns: int) -> None:
        """Count a request of the cohort as over, and judge once most of them are."""
        window = self._window
        del window.members[lease.request.request_id]
        window.over += 1
        if window.turned_away >= _TURNED_AWAY * self._wanted:
            reason = f"engines refused {window.turned_away} of {window.over}"
            self._fall(_TURNED_AWAY_FALL, 0.0, reason, now_ns)
            self._begin(now_ns)
        elif not self._has_metrics(now_ns):
            wait_ns = self._wait_ns()
            if wait_ns is not None:
                usual_ns = self._first_tokens.usual_ns
                waited = wait_ns / usual_ns if usual_ns else None
                self._judge(wait_ns * window.dispatched / max(1, window.area), now_ns, waited)

    def _wait_ns(self) -> float | None:
        """Return the mean wait inside of the cohort; None: too few are known yet."""
        window = self._window
        is_known = window.over >= _COHORT_KNOWN * self._wanted and window.waits
        return window.waits_ns / window.waits if is_known else None

    def _judge(self, share: float, now_ns: int, waited: float | None = None) -> None:
        """Move the limits if they must move, and begin the next window.

        Args:
            share: of the requests in flight, that waits inside.
            now_ns: the time.
            waited: mean wait, in usual times to first token; None: unknown.
        """
        before, window = self.requests_max, self._window
        self.explores, self._wish = False, 0.0
        if window.tokens and window.token_ns > _SLOWER * self._least_token_ns * window.tokens:
            self._end_start()
        if share > _MANY and self._is_falling_in_vain(share, now_ns):
            self._relearn()
        elif share > _MANY and self._waits_for_prompts():
            self._rises = self._token_rises = 0
            self._excused += 1
        elif share > _MANY and (waited is None or waited > _LONG):
            self._excused = 0
            self._fell_from = self._fell_from or (before, share)
            by = share - _AIM if self._has_metrics(now_ns) else _FALL_BLIND * (share - _AIM)
            self._fall(max(_FALL_MOST, 1 - by), share, self._reason(share, now_ns), now_ns)
        elif share < _FEW and (waited is None or waited < _LONG):
            self._fell_from, self._excused = None, 0
            self._rise(share, self._reason(share, now_ns), now_ns)
        else:
            self._rises = self._token_rises = 0
        self._begin(now_ns)

    def _waits_for_prompts(self) -> bool:
        """Whether requests wait inside for prompts only, because places and cache are free.

        Prompts are read sooner or later. A longer wait is for something that no metric shows.
        """
        window = self._window
        if not window.scrapes or not self.kv_capacity or self._excused >= _EXCUSED_MOST:
            return False
        known = max(self._peers.ran_most(self.kv_capacity), self._places_in_cache())
        return window.running_most < _READING * known and window.usage < _READING_CACHE

    def _judge_full(self, now_ns: int) -> None:
        """Lower the limit to the batch of the engine, and begin the next window."""
        window = self._window
        self.explores, self._wish = False, 0.0
        running, waiting = window.running_most, window.waiting_least
        reason = f"no more than {running} run while at least {waiting} wait inside, by metrics"
        self._fall(window.running_most * self.endpoints / window.most, 0.0, reason, now_ns)
        self._edge = self._ran
        self.ran_most = running
        self._batch.found(self._ran, now_ns)
        self._peers.found(self, now_ns)
        self._begin(now_ns)

    def _reason(self, share: float, now_ns: int) -> str:
        return f"{share:.0%} of those in flight wait inside, by {self._source(now_ns)}"

    def _source(self, now_ns: int) -> str:
        return "metrics" if self._has_metrics(now_ns) else "settlements"

    def _end_start(self) -> None:
        if self._is_starting:
            self._rises = self._token_rises = 0
        self._is_starting = self._tokens_start = False

    def _fall(self, factor: float, share: float, reason: str, now_ns: int) -> None:
        """Lower the limit of which more was in flight than ever was without a queue."""
        window = self._window
        self._rises = self._token_rises = 0
        is_requests, is_tokens = window.most > self._calm, window.most_tokens > self._calm_tokens
        if self._has_metrics(now_ns):
            is_requests, is_tokens = True, False  # the limit on tokens follows the cache itself
        elif is_requests == is_tokens:
            is_requests = is_tokens = True
        if is_requests:
            self._is_starting = False
            self._ran = float(window.running_most * self.endpoints) or window.mean * (1 - share)
            self._edge = self._ran if self._is_reached(_REACHED) else inf
            limit = min(self.requests_max, max(1.0, float(window.most)))
            limit = min(limit * factor, max(self._ran, limit * _FALL_MOST))
            self._move(limit, reason, now_ns)
            self._calm = min(self._calm, self.requests_max)
        if is_tokens:
            self._tokens_start = False
            self._tokens_edge.found(window.most_tokens * max(factor, 1 - share), now_ns)
            self._move_tokens(min(self.tokens_max, window.most_tokens) * factor, reason, now_ns)
            self._calm_tokens = min(self._calm_tokens, self.tokens_max)

    def _rise(self, share: float, reason: str, now_ns: int) -> None:
        """Raise each limit that was reached."""
        window = self._window
        if window.most > self._calm:
            self._calm = float(window.most)
            self._peers.shown(self.proven, now_ns)
        self._calm_tokens = max(self._calm_tokens, window.most_tokens)
        if self._is_reached(_REACHED_START if self._is_starting else _REACHED):
            self._rises += window.is_long
            self._move(self._raised(share, now_ns), reason, now_ns)
            self._ran *= _FORGOTTEN
        if not self._has_metrics(now_ns) and window.most_tokens >= _REACHED * self.tokens_max:
            self._token_rises += window.is_long
            step = _START if self._tokens_start else step_after(self._token_rises)
            limit = min(self.tokens_max * step, self._tokens_edge.edge(now_ns))
            if limit > self.tokens_max:
                self._move_tokens(limit, reason, now_ns)

    def _is_reached(self, part: float) -> bool:
        """Whether this part of the limit was in flight at one moment."""
        return self._window.most >= part * int(self.requests_max)

    def _raised(self, share: float, now_ns: int) -> float:
        """Return the next limit on requests."""
        before, room = self.requests_max, self._room(now_ns)
        limit = max(self._stepped(share, now_ns), room)
        within = self._within_batch(limit, now_ns)
        if within < limit:
            limit = within
            self._rises = 0  # a step that was not taken does not count
        edge = self._peers.edge(self.kv_capacity) * self.endpoints
        if self._is_starting and limit > edge:
            self._end_start()
            limit = edge
            if self.kv_capacity:  # of the same size: it has no more places
                self._ran = edge
        if limit > self._ran and self._window.mean < _REACHED_ALL * int(before):
            limit = self._ran
        proven = max(self._calm, self._peers.proven() * self.endpoints, room)
        if self._peers.ran_most(self.kv_capacity) * self.endpoints <= self._batch.value < proven:
            proven = self._batch.value  # trying beyond that again is exploring
        if limit > proven:
            self.explores = self._peers.may_explore(self)
            if not self.explores:
                self._wish = _FOLLOWED * before if self._is_starting else 0.0
                limit = proven
        return max(before, limit)

    def _within_batch(self, limit: float, now_ns: int) -> float:
        """Return the limit, or less if the engine is believed to batch less."""
        batch = self._batch.edge(now_ns)
        return batch if self.ran_most * self.endpoints <= batch < limit else limit

    def _stepped(self, share: float, now_ns: int) -> float:
        """Return the limit after one step."""
        if self._is_starting:
            step = _START_METRICS if self._has_metrics(now_ns) else _START
            most = min(self.requests_max, float(self._window.most))  # a reserve keeps some free
            return max(most * step, most + _START_LEAST * self.endpoints)
        step = step_after(self._rises)
        if self._rises < _PATIENCE:
            step = min(step, 1 + _AIM - share)
        return max(self.requests_max * step, self.requests_max + _STEP_MIN)

    def _room(self, now_ns: int) -> float:
        """Return how many requests the caches have room for; 0: unknown, or after the start."""
        if not self._is_starting or not self._has_metrics(now_ns):
            return 0.0
        return self.endpoints * self._places_in_cache()

    def _places_in_cache(self) -> float:
        """Return how many requests one cache surely has room for; 0: unknown."""
        return min(self.kv_capacity / _CACHE_EACH, _ROOM_MOST)

    def _is_falling_in_vain(self, share: float, now_ns: int) -> bool:
        if self._fell_from is None or self._has_metrics(now_ns):
            return False
        limit, share_before = self._fell_from
        fallen = 1 - self.requests_max / limit
        is_low = self.requests_max < _VAIN_FALL * limit
        return is_low and share > share_before - _VAIN_EFFECT * fallen

    def _relearn(self) -> None:
        self._fell_from = None
        self._first_tokens.forget()

    def _move(self, limit: float, reason: str, now_ns: int) -> None:
        before = self.requests_max
        limit = max(1.0, limit)
        if abs(limit - before) >= _STEP_MIN:
            self.requests_max = limit
            self._moved("requests", before, limit, reason, now_ns)

    def _move_tokens(self, limit: float, reason: str, now_ns: int) -> None:
        before, self.tokens_max = self.tokens_max, max(1.0, limit)
        self._moved("tokens", before, self.tokens_max, reason, now_ns)


def step_after(rises: int) -> float:
    """Return the factor by which a limit grows after so many rises in a row."""
    doublings = rises // _PATIENCE
    if doublings > _DOUBLINGS_MAX:
        doublings = _DOUBLINGS_MAX
    step: float = _STEP ** (1 << doublings)
    return step

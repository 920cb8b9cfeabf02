"""Pure. A limit on requests in flight that is found by observing its effect: `adaptive`.

The latency of a language model says little about its load. It grows with the prompt, the answer and
every neighbour in the batch, long before an engine is full. What shows the load is how many of the
requests in flight wait inside the engines. By Little's law that is dispatches per second times the
mean wait inside. As a share s of the requests in flight,

    s = dispatches x mean wait / area under the number in flight

over one window. A few must wait, or engines run dry between a departure and the next dispatch. More
than a few are a queue that cannot be reordered. So the limit falls by s - `aim` while s is above
`many`. It rises while s is below `few` and the limit is reached. Between the two it stays.

To count what is queued, instead of reacting to delay, is the idea of TCP Vegas (Brakmo and
Peterson, 1995). gradient2 and Envoy's adaptive concurrency take the ratio of latencies, which here
would compare long answers with short ones. AIMD waits for errors, and an engine that queues without
limit returns none. The wait is measured in one of two ways.

With settlements: the time to first token, beyond the least for a prompt of that length at that
endpoint. This is fair to long prompts, and does not contain the length of the answer.

Without: how long requests are in flight. Only the shortest sixth counts, by how much it exceeds the
least that sixth ever took. A request that waits inside is delayed as much if its answer is short,
so a queue shows there first and most clearly.

A window judges a cohort: requests dispatched since the limit last moved, most of which must be
over. The first requests under a raised limit fill empty places and do not belong to it. So no
evidence moves the limit twice. Where the engine picks, each endpoint has its own limit; otherwise
slow endpoints, whose evidence comes late, would be judged by the fast ones.

What it does not see: a KV cache that overflows while answers are generated, because a request that
is then preempted has had its first token. A second detector with a limit on tokens covers that
(with several detectors, the fullest counts).

Two guards. The least time may be outdated (a slower model, longer answers): it grows slowly by
itself, and is learnt again if the limit has fallen far and no fewer requests wait. And when
settlements cease, the limit goes by the times in flight again.
"""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Final, final

from flowcontrol.config import Adaptive
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.evidence import Evidence, FirstTokens, Residences
from flowcontrol.flow import Lease
from flowcontrol.moves import LimitMove, LimitMoves
from flowcontrol.pool import StageLoad, WithoutPace

_START, _STEP, _STEP_MIN = 1.5, 1.06, 0.5
"""Growth per window before the first fall, and after; and the least growth, in requests."""
_FALL_MOST: Final = 0.5
"""One window lowers a limit to this part at most."""
_REACHED: Final = 0.9
"""Part of the limit that must have been in flight for it to rise."""
_TURNED_AWAY, _TURNED_AWAY_FALL = 0.1, 0.8
"""If engines refuse this part of a cohort, the limit falls to that part."""
_VAIN_FALL, _VAIN_EFFECT = 0.7, 0.5
"""If a limit fell to this part and the share waiting did not fall by half as much, the least time
is wrong."""
_SILENCE_NS, _SILENT_COMPLETIONS = 60_000_000_000, 64
"""When so many requests have ended in that time without a settlement, the access log is gone."""


@final
class _Watched:
    """One limit, and the cohort by which it is judged. O(cohort) memory, O(log cohort) an event."""

    def __init__(
        self,
        limit: float,
        evidence: Evidence,
        in_flight: Callable[[], int],
        moved: Callable[[float, float, str, int], None],
        now_ns: int,
    ) -> None:
        self.limit = limit
        self.limit_max = limit
        """Set by the detector, which knows the number of endpoints."""
        self.is_starting = True
        self._evidence = evidence
        self._count = in_flight
        self._moved = moved
        self._fell_from: tuple[float, float] | None = None
        """Limit and share waiting when it began to fall."""
        self._begin(now_ns, filling=0)

    def _begin(self, now_ns: int, filling: int) -> None:
        self._evidence.begin()
        self._filling = filling
        """Dispatches still to come that fill empty places."""
        self._members: dict[int, int] = {}
        """Requests of the cohort that are not over: id to time of dispatch."""
        self._joined = self._over = self._turned_away = self._dispatched = 0
        self._area = self._most = 0
        self._looked_ns = self._full_ns = now_ns
        self._in_flight = self._count()

    def _look(self, now_ns: int) -> None:
        self._area += self._in_flight * (now_ns - self._looked_ns)
        self._looked_ns = now_ns
        self._in_flight = self._count()
        self._most = max(self._most, self._in_flight)

    @property
    def _wanted(self) -> int:
        return self._evidence.cohort_first if self.is_starting else self._evidence.cohort

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Count a dispatch, and add it to the cohort.

        The cohort grows by an eighth of further dispatches, to make up for lost settlements.
        """
        self._look(now_ns)
        if self._filling:
            self._filling -= 1
            self._area = 0
            return
        self._dispatched += 1
        if self._joined < self._wanted + self._dispatched // 8:
            self._joined += 1
            if self._joined == self._wanted:
                self._full_ns = now_ns
            self._members[lease.request.request_id] = now_ns

    def released(self, lease: Lease, now_ns: int) -> None:
        """Count a departure."""
        self._look(now_ns)
        since_ns = self._members.get(lease.request.request_id)
        if since_ns is not None and self._evidence.released(now_ns - since_ns):
            self._end(lease, now_ns)

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used."""
        is_member = lease.request.request_id in self._members
        self._evidence.settled(lease, settled, is_member=is_member)
        if is_member:
            self._turned_away += settled.was_turned_away
            self._look(now_ns)
            self._end(lease, now_ns)

    def _end(self, lease: Lease, now_ns: int) -> None:
        del self._members[lease.request.request_id]
        self._over += 1
        is_full = self._joined >= self._wanted
        full_ns = now_ns - self._full_ns if is_full else 0
        if self._evidence.is_enough(self._over, self._wanted, full_ns):
            self._judge(now_ns)

    def scale(self, factor: float, reason: str, now_ns: int) -> None:
        """Scale the limit to another number of endpoints."""
        self.limit_max *= factor
        self._move(self.limit * factor, reason, now_ns)
        self._begin(now_ns, filling=0)

    def resume(self, limit: float) -> None:
        """Go on with a limit that was found before."""
        self.is_starting = False
        self.limit = min(max(1.0, limit), self.limit_max)

    def _judge(self, now_ns: int) -> None:
        before, wait_ns = self.limit, self._evidence.wait_ns()
        if self._turned_away >= _TURNED_AWAY * self._over:
            self.is_starting = False
            reason = f"engines refused {self._turned_away} of {self._over}"
            self._move(before * _TURNED_AWAY_FALL, reason, now_ns)
        elif wait_ns is not None:
            self._judge_share(wait_ns * self._dispatched / max(1, self._area), now_ns)
        self._begin(now_ns, filling=max(0, int(self.limit) - int(before)))

    def _judge_share(self, share: float, now_ns: int) -> None:
        evidence, before = self._evidence, self.limit
        reason = f"{share:.0%} of those in flight wait inside"
        low = evidence.aim if self.is_starting else evidence.few
        if share > evidence.many and self._is_falling_in_vain(share):
            evidence.relearn()
            self._fell_from = None
        elif share > evidence.many:
            self._fell_from = self._fell_from or (before, share)
            self.is_starting = False
            self._move(before * max(_FALL_MOST, 1 - (share - evidence.aim)), reason, now_ns)
        elif share < low and self._most >= _REACHED * int(before):
            self._fell_from = None
            factor = _START if self.is_starting else min(_STEP, 1 + evidence.aim - share)
            self._move(max(before * factor, before + _STEP_MIN), reason, now_ns)

    def _is_falling_in_vain(self, share: float) -> bool:
        if self._fell_from is None:
            return False
        limit, share_before = self._fell_from
        fallen = 1 - self.limit / limit
        return self.limit < _VAIN_FALL * limit and share > share_before - _VAIN_EFFECT * fallen

    def _move(self, limit: float, reason: str, now_ns: int) -> None:
        before, self.limit = self.limit, min(max(1.0, limit), self.limit_max)
        if self.limit != before:
            self._moved(before, self.limit, reason, now_ns)


@final
class AdaptiveDetector(WithoutPace):
    """The detector `adaptive`: requests in flight, over a limit that finds itself.

    O(1), O(endpoints) where they change.
    """

    counts_dispatches = True
    has_timer = False

    def __init__(self, settings: Adaptive, stage: StageLoad, now_ns: int) -> None:
        self.settings = settings
        self.revision = 0
        self.moves = LimitMoves()
        self._stage = stage
        self._endpoints: tuple[str, ...] = ()
        self._is_settled = False
        self._settled_ns = now_ns
        self._completed = 0
        """Requests that have ended since the last settlement."""
        self._watched: dict[str | None, _Watched] = {}
        """By address; None if all endpoints share one limit."""
        self._kept: Mapping[str, float] = {}
        """Limits that an earlier process had found, until there are endpoints to apply them to."""

    @property
    def limit(self) -> int:
        """Return how many may be in flight at all endpoints together."""
        return sum(int(watched.limit) for watched in self._watched.values())

    def limit_of(self, address: str) -> int:
        """Return how many may be in flight at one endpoint."""
        own = self._watched.get(address)
        return int(own.limit) if own else -(-self.limit // len(self._endpoints))

    def saturation(self) -> float:
        """Return what is in flight over the limit."""
        return self._stage.pool().requests / self.limit

    def endpoint_saturation(self, address: str) -> float:
        """Return what is in flight at the endpoint over its limit."""
        load = self._stage.at(address)
        return self.saturation() if load is None else load.requests / self.limit_of(address)

    def endpoints_changed(self, now_ns: int) -> None:
        """Keep the limits of endpoints that stay; a new one begins with their median."""
        before, self._endpoints = self._endpoints, tuple(self._stage.addresses)
        if not before:
            limit = float(self.settings.limit_first * len(self._endpoints))
            self._watched = {None: self._watch(None, limit, now_ns)}
        shared = self._watched.get(None)
        if before and shared is not None and before != self._endpoints:
            reason = f"{len(before)} endpoints became {len(self._endpoints)}"
            shared.scale(len(self._endpoints) / len(before), reason, now_ns)
        self._arrange(now_ns)
        kept, self._kept = self._kept, {}
        self.restore(kept, now_ns)

    def charged(self, lease: Lease, now_ns: int) -> None:
        """Count the dispatch."""
        watched = self._watcher_of(lease)
        assert watched is not None, "what is dispatched goes to an endpoint of the stage"
        watched.charged(lease, now_ns)

    def released(self, lease: Lease, now_ns: int) -> None:
        """Count a departure; after many without a settlement, none is expected any more."""
        self._completed += 1
        if (
            self._is_settled
            and self._completed >= _SILENT_COMPLETIONS
            and now_ns - self._settled_ns > _SILENCE_NS
        ):
            self._go_by_settlements(now_ns, is_so=False)
        watched = self._watcher_of(lease)
        if watched is not None:
            watched.released(lease, now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Ignored: metrics are not used."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in what a request actually used; the first gives each endpoint its own limit."""
        self._settled_ns, self._completed = now_ns, 0
        if settled.ttft_ns is not None and not self._is_settled:
            self._go_by_settlements(now_ns, is_so=True)
        watched = self._watcher_of(lease)
        if watched is not None:
            watched.settled(lease, settled, now_ns)

    def advance(self, now_ns: int) -> list[str]:  # noqa: ARG002 - at no time
        """Time alone has no effect."""
        return []

    def next_change_ns(self) -> int | None:
        """Time alone has no effect."""
        return None

    def _watcher_of(self, lease: Lease) -> _Watched | None:
        return self._watched.get(None) or self._watched.get(lease.endpoint)

    def _go_by_settlements(self, now_ns: int, *, is_so: bool) -> None:
        self._is_settled = is_so
        shared = self._watched.get(None)
        if shared is not None:
            self._watched = {None: self._watch(None, shared.limit, now_ns, like=shared)}
        self._arrange(now_ns)

    def _arrange(self, now_ns: int) -> None:
        """Keep one limit per endpoint if there are settlements and the engine picks, else one."""
        old = self._watched
        if not old:
            return  # there never was an endpoint
        shared = old.get(None)
        if self._is_settled and self._stage.is_picked:
            limits = [watched.limit for watched in old.values()]
            usual = shared.limit / len(self._endpoints) if shared else median(limits)
            like = next(iter(old.values()))
            self._watched = {
                address: old.get(address) or self._watch(address, usual, now_ns, like=like)
                for address in self._endpoints
            }
        elif shared is None:
            limit = sum(watched.limit for watched in old.values())
            like = next(iter(old.values()))
            self._watched = {None: self._watch(None, limit, now_ns, like=like)}
        self.revision += 1

    def remember(self) -> Mapping[str, float]:
        """Return the limits by endpoint; a shared limit under an empty address."""
        limits = {address or "": watched.limit for address, watched in self._watched.items()}
        return limits or self._kept

    def restore(self, limits: Mapping[str, float], now_ns: int) -> None:
        """Go on with limits found before, once there are endpoints."""
        if not self._watched:
            self._kept = limits
        if not self._watched or not limits:
            return
        if "" not in limits and not self._is_settled:
            self._go_by_settlements(now_ns, is_so=True)
        known = [limits[each] for each in self._endpoints if each in limits]
        usual = median(known) if known else 0.0
        together = limits.get("") or sum(limits.get(each, usual) for each in self._endpoints)
        for address, watched in self._watched.items():
            limit = together if address is None else limits.get(address, usual)
            if limit:
                watched.resume(limit)
        self.revision += 1

    def inherit(self, before: "AdaptiveDetector", now_ns: int) -> None:
        """Take over what a detector with other settings has learnt."""
        self.moves = before.moves
        self._kept = before._kept  # noqa: SLF001 - same class
        self._endpoints = before._endpoints  # noqa: SLF001 - as above
        self._is_settled, self._settled_ns = before._is_settled, before._settled_ns  # noqa: SLF001 - as above
        self._watched = {
            address: self._watch(address, watched.limit, now_ns, like=watched)
            for address, watched in before._watched.items()  # noqa: SLF001 - as above
        }

    def _watch(
        self, address: str | None, limit: float, now_ns: int, *, like: _Watched | None = None
    ) -> _Watched:
        def in_flight() -> int:
            own = None if address is None else self._stage.at(address)
            return (own or self._stage.pool()).requests

        def moved(before: float, after: float, reason: str, now_ns: int) -> None:
            self.revision += 1
            self.moves.note(LimitMove(now_ns, address, before, after, reason))

        most = float(self.settings.limit_max)
        if address is None:
            most *= len(self._endpoints)
        evidence = FirstTokens() if self._is_settled else Residences()
        watched = _Watched(max(1.0, min(limit, most)), evidence, in_flight, moved, now_ns)
        watched.limit_max = most
        watched.is_starting = like is None or like.is_starting
        return watched

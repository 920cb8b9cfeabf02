"""Pure. The limit on requests in flight, found by watching what comes of it.

Latency alone says little of a language model: it grows with the prompt, with the answer and with
every neighbour in the batch, long before the engine is full. Two signals do say when it is.

With settlements: the wait inside the engines. What a request's first token took, beyond the least
it takes for a prompt of that length, is time spent behind others; by Little's law that time, times
the requests settled a second, is the number that wait inside. This is TCP Vegas' estimate (Brakmo
and Peterson, 1995), taken on the first token, where it is fair to long answers, and against a floor
by prompt length, where it is fair to long prompts. The limit is right when few wait inside, enough
to keep the engines busy: between `_FEW` and `_MANY` of the limit.

Without: what more in flight is worth. By Little's law n = X R; below the knee more in flight n
gives more completions a second X, beyond it only longer ones. The elasticity d log X / d log n is
near 1 below and 0 above; the limit climbs while it is above one half, and steps back when it is
below.

Both move only on evidence of whole windows, and up only if the limit was reached: a quiet night
must not raise it. Until the first step back it grows by half a window, as TCP's slow start does.
"""

from collections import deque
from math import log, log2
from typing import NamedTuple, final

from flowcontrol.config import Adaptive
from flowcontrol.events import LoadObserved, Settled
from flowcontrol.flow import Lease
from flowcontrol.pool import StageLoad

_FEW, _MANY = 0.08, 0.20
"""Parts of the limit waiting inside the engines: below, it may rise; above, it falls."""
_START, _STEP = 1.5, 1.06
"""Growth a window, before and after the first step back."""
_PROBE = 1.15
"""Growth a window where only completions are seen: more, to stand out of their noise."""
_WINDOW_MIN = 16
"""Requests in a window, at least."""
_ELASTICITY = 0.5
_REACHED = 0.9
"""Part of the limit that must have been in flight for a window to be evidence about it."""
_FAILURES = 0.1
"""Part of a window that failed, above which the limit falls."""
_FLOOR_WINDOWS = 64
"""Windows after which the least first-token time seen is forgotten, in two halves."""
_MOVES_KEPT = 32
_SECOND_NS = 1_000_000_000


class Move(NamedTuple):
    """One change of the limit, and why."""

    at_ns: int
    before: float
    after: float
    reason: str


@final
class _Floor:
    """The least time to first token by length of prompt, over the last windows."""

    def __init__(self) -> None:
        self._least: list[dict[int, int]] = [{}, {}]

    def see(self, input_tokens: int, ttft_ns: int) -> int:
        """Take in one; return the least for prompts of about that length (a factor of 1.4)."""
        size = round(2 * log2(max(1, input_tokens)))
        young = self._least[1]
        young[size] = min(ttft_ns, young.get(size, ttft_ns))
        return min(young[size], self._least[0].get(size, ttft_ns))

    def age(self) -> None:
        """Forget the older half."""
        self._least = [self._least[1], {}]


@final
class AdaptiveDetector:
    """Requests in flight over a limit that finds itself. O(1).

    `moves` explains every change of the limit, the latest last.
    """

    def __init__(self, settings: Adaptive, stage: StageLoad, now_ns: int) -> None:
        self.limit = float(settings.limit_first)
        """Of the whole stage."""
        self.moves: deque[Move] = deque(maxlen=_MOVES_KEPT)
        self._settings = settings
        self._stage = stage
        self._is_starting = True
        self._endpoints = 0
        self._floor = _Floor()
        self._window_count = 0
        self._has_settlements = False
        self._previous: tuple[float, float] | None = None
        """Of the window before, without settlements: mean in flight and completions a second."""
        self._begin_window(now_ns)

    def saturation(self) -> float:
        """Return what is in flight over the limit."""
        return self._stage.pool().requests / max(1, int(self.limit))

    def endpoint_saturation(self, address: str) -> float:
        """Return the endpoint's part in flight over its part of the limit."""
        load = self._stage.at(address)
        if load is None:
            return self.saturation()
        return load.requests / max(1.0, -(-int(self.limit) // max(1, self._endpoints)))

    def endpoints_changed(self, now_ns: int) -> None:
        """Keep the limit of each endpoint: the stage's grows and shrinks with their number."""
        count = len(self._stage.addresses)
        if self._endpoints and count:
            self._move(self.limit * count / self._endpoints, now_ns, f"{count} endpoints")
        elif count:
            self.limit = float(self._settings.limit_first * count)
        self._endpoints = count or self._endpoints
        self._begin_window(now_ns)

    def charged(self, lease: Lease, now_ns: int) -> None:  # noqa: ARG002 - only how many
        """Count the dispatch."""
        self._observe_in_flight(now_ns)

    def released(self, lease: Lease, now_ns: int) -> None:  # noqa: ARG002 - only how many
        """Count the completion."""
        self._observe_in_flight(now_ns)
        self._completed += 1
        if not self._has_settlements and self._completed >= 2 * self._window_size():
            self._close_window_of_completions(now_ns)

    def observed(self, load: LoadObserved, now_ns: int) -> None:
        """Need no metrics."""

    def settled(self, lease: Lease, settled: Settled, now_ns: int) -> None:
        """Take in a time to first token, or a failure."""
        self._failed += not settled.is_success
        self._settled += 1
        if settled.ttft_ns is not None and settled.is_success:
            self._has_settlements = True
            prompt = settled.input_tokens
            floor_ns = self._floor.see(
                round(lease.tokens.input) if prompt is None else prompt, settled.ttft_ns
            )
            self._inside_ns += settled.ttft_ns - floor_ns
            self._timed += 1
        if self._has_settlements and self._settled >= self._window_size():
            self._close_window_of_settlements(now_ns)

    def advance(self, now_ns: int) -> None:
        """Not depend on time alone."""

    def next_change_ns(self) -> int | None:
        """Not depend on time alone."""
        return None

    def _window_size(self) -> int:
        return max(_WINDOW_MIN, int(self.limit))

    def _begin_window(self, now_ns: int) -> None:
        self._since_ns = self._counted_ns = now_ns
        self._completed = self._settled = self._failed = self._timed = 0
        self._inside_ns = 0
        self._most = 0
        self._area = 0
        self._last = self._stage.pool().requests

    def _observe_in_flight(self, now_ns: int) -> None:
        self._area += self._last * (now_ns - self._counted_ns)
        self._counted_ns = now_ns
        self._last = self._stage.pool().requests
        self._most = max(self._most, self._last)

    def _close_window_of_settlements(self, now_ns: int) -> None:
        seconds = max(1e-9, (now_ns - self._since_ns) / _SECOND_NS)
        inside = self._inside_ns / _SECOND_NS / seconds
        was_reached = self._most >= _REACHED * int(self.limit)
        if self._failed > _FAILURES * self._settled:
            self._fall(self.limit * 0.8, now_ns, f"{self._failed} of {self._settled} failed")
        elif inside > _MANY * self.limit:
            target = self.limit - inside + _FEW * self.limit
            self._fall(max(target, self.limit / 2), now_ns, f"{inside:.1f} wait inside the engines")
        elif was_reached and inside < _FEW * self.limit:
            self._rise(_STEP, now_ns, f"{inside:.1f} wait inside the engines")
        self._window_count += 1
        if self._window_count % (_FLOOR_WINDOWS // 2) == 0:
            self._floor.age()
        self._begin_window(now_ns)

    def _close_window_of_completions(self, now_ns: int) -> None:
        elapsed_ns = max(1, now_ns - self._since_ns)
        in_flight, rate = self._area / elapsed_ns, self._completed / (elapsed_ns / _SECOND_NS)
        was_reached = self._most >= _REACHED * int(self.limit)
        before, self._previous = self._previous, (in_flight, rate)
        if was_reached and (before is None or abs(log(in_flight / before[0])) < log(_PROBE) / 3):
            self._rise(_PROBE, now_ns, "trying more")
        elif was_reached and before is not None:
            elasticity = log(rate / before[1]) / log(in_flight / before[0])
            reason = f"completions grow {elasticity:.2f} for 1 in flight"
            if elasticity > _ELASTICITY:
                self._rise(_PROBE, now_ns, reason)
            else:
                self._fall(self.limit / _PROBE, now_ns, reason)
        self._begin_window(now_ns)

    def _rise(self, step: float, now_ns: int, reason: str) -> None:
        factor = _START if self._is_starting else step
        self._move(max(self.limit + 1, self.limit * factor), now_ns, reason)

    def _fall(self, limit: float, now_ns: int, reason: str) -> None:
        self._is_starting = False
        self._move(limit, now_ns, reason)

    def _move(self, limit: float, now_ns: int, reason: str) -> None:
        most = self._settings.limit_max * max(1, len(self._stage.addresses))
        after = min(max(1.0, limit), float(most))
        if after != self.limit:
            self.moves.append(Move(now_ns, self.limit, after, reason))
            self.limit = after

"""Pure. When has a request waited too long?

There are two budgets, one for each regime: `ttl_ns` of its band while the pool has endpoints, and
`no_endpoint_ttl_ns` while it is empty. The budget in force counts from the arrival, or from the
first change of regime after it. It never starts again at a later change, so that a flapping pool
does not extend a wait, and it never exceeds the sum of both budgets, which Envoy's timeouts are
derived from. The client's own limit counts from the arrival in either regime, and only shortens.
"""

from collections.abc import Iterable
from typing import Final, final

from flowcontrol.band import Band
from flowcontrol.bands import Bands
from flowcontrol.config import ControllerConfig
from flowcontrol.flow import Lease
from flowcontrol.keyedheap import KeyedHeap
from flowcontrol.request import Outcome

_NEVER: Final = 1 << 63


def earlier(one_ns: int | None, other_ns: int | None) -> int | None:
    """Return the earlier of two times, either of which may never come."""
    if one_ns is None or other_ns is None:
        return other_ns if one_ns is None else one_ns
    return min(one_ns, other_ns)


@final
class Expiry:
    """The deadlines of waiting requests. O(log waiting); O(waiting) when the regime changes."""

    def __init__(self, config: ControllerConfig, bands: Bands) -> None:
        self._config = config
        self._bands = bands
        self._is_empty = True
        self._deadlines: KeyedHeap[Lease, int] = KeyedHeap()

    @property
    def outcome(self) -> Outcome:
        """The outcome of a request that has waited too long in the regime in force."""
        return Outcome.EVICTED_NO_ENDPOINTS if self._is_empty else Outcome.EVICTED_TTL

    def appoint(self, lease: Lease, band: Band) -> None:
        """Set the deadline of a newcomer in its lease."""
        lease.deadline_ns = self._deadline_ns(lease, band)

    def admit(self, lease: Lease) -> None:
        """Watch the deadline of a request from now on."""
        if lease.deadline_ns is not None:
            self._deadlines.put(lease, lease.deadline_ns)

    def remove(self, lease: Lease) -> None:
        """Drop the deadline of a request that no longer waits."""
        self._deadlines.discard(lease)

    def first_due(self, now_ns: int) -> Lease | None:
        """Return a request whose deadline has passed; None: there is none."""
        first = self._deadlines.first()
        return first[1] if first is not None and first[0] <= now_ns else None

    def next_due_ns(self) -> int | None:
        """Return the next deadline."""
        first = self._deadlines.first()
        return None if first is None else first[0]

    def change_regime(self, waiting: Iterable[Lease], now_ns: int, *, is_empty: bool) -> None:
        """Apply the other budget; nothing expires in this turn, so that a revived pool serves."""
        if is_empty == self._is_empty:
            return
        self._is_empty = is_empty
        for lease in waiting:
            if lease.budget_from_ns == lease.arrived_ns:
                lease.budget_from_ns = now_ns
        self._recompute(waiting, now_ns)

    def reconfigure(self, config: ControllerConfig, waiting: Iterable[Lease], now_ns: int) -> None:
        """Apply other settings."""
        self._config = config
        self._recompute(waiting, now_ns)

    def _recompute(self, waiting: Iterable[Lease], now_ns: int) -> None:
        """Recompute all deadlines; a request already waiting never expires in this turn."""
        for lease in waiting:
            band = self._bands.by_priority[lease.flow.key.priority]
            lease.deadline_ns = self._deadline_ns(lease, band)
            if lease.is_admitted:
                if lease.deadline_ns is not None:
                    lease.deadline_ns = max(lease.deadline_ns, now_ns + 1)
                self._deadlines.discard(lease)
                self.admit(lease)
            band.move(lease)

    def _deadline_ns(self, lease: Lease, band: Band) -> int | None:
        ttl_ns, own_ttl_ns = band.settings.ttl_ns, lease.request.ttl_ns
        empty_ttl_ns = self._config.no_endpoint_ttl_ns
        current_ns = empty_ttl_ns if self._is_empty else ttl_ns
        ends_ns = _NEVER if current_ns is None else lease.budget_from_ns + current_ns
        if ttl_ns is not None and empty_ttl_ns is not None:
            both_ns = lease.arrived_ns + ttl_ns + empty_ttl_ns
            if both_ns < ends_ns:
                ends_ns = both_ns
        if own_ttl_ns is not None and lease.arrived_ns + own_ttl_ns < ends_ns:
            ends_ns = lease.arrived_ns + own_ttl_ns
        return None if ends_ns == _NEVER else ends_ns

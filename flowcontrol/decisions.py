"""Pure. Records and counts decisions, each once."""

from typing import Final, final

from flowcontrol.band import Band
from flowcontrol.bands import Bands
from flowcontrol.events import Decision, Settled
from flowcontrol.flow import Lease
from flowcontrol.forecast import Forecast
from flowcontrol.goodput import Goodput
from flowcontrol.pool import Pool
from flowcontrol.request import Outcome, Request
from flowcontrol.tally import Tally, make_room

_UNKNOWN: Final = Forecast(0, None)


@final
class Decisions:
    """The decisions of the turn under way, and the counts of all turns. O(1)."""

    def __init__(self, bands: Bands, pool: Pool) -> None:
        self.tallies: dict[int, Tally] = {}
        """By priority; limited for priorities that have no band any more."""
        self.goodput = Goodput()
        self._bands = bands
        self._pool = pool
        self._made: list[Decision] = []

    def add(
        self,
        lease: Lease,
        band: Band,
        outcome: Outcome,
        now_ns: int,
        retry_after_ns: int | None = None,
    ) -> None:
        """Record the outcome of a request of this band."""
        priority, flow_id = lease.flow.key
        waited_ns = (lease.dispatched_ns if lease.is_in_flight else now_ns) - lease.arrived_ns
        said = lease.forecast or _UNKNOWN
        self.tally(priority).count(outcome, waited_ns, said.wait_ns)
        self._made.append(
            Decision(
                lease.request.request_id,
                outcome,
                priority,
                flow_id,
                waited_ns,
                lease.endpoint,
                retry_after_ns,
                self._pool.saturation(),
                band.waiting,
                lease.is_reclaimable,
                lease.is_watched,
                said.wait_ns,
                lease.without_room,
                lease.fallbacks,
                said.position,
                said.late_ns,
            )
        )

    def turn_away(
        self, request: Request, priority: int, outcome: Outcome, retry_after_ns: int
    ) -> None:
        """Record the refusal of a request that never entered a band."""
        self.tally(priority).count(outcome, 0)
        self._made.append(
            Decision(
                request.request_id,
                outcome,
                priority,
                request.flow_id,
                waited_ns=0,
                retry_after_ns=retry_after_ns,
                saturation=self._pool.saturation(),
            )
        )

    def settled(self, lease: Lease, settled: Settled) -> None:
        """Count the result of a dispatched request, once, by its last attempt."""
        if not settled.was_sent:
            return
        named = lease.request.objective
        is_declared = named is not None and named in self._bands.objectives
        objective = named if is_declared and named else ""
        self.goodput.count(objective, lease, settled, self._is_declared)

    def tally(self, priority: int) -> Tally:
        """Return the counts of a priority."""
        tally = self.tallies.get(priority)
        if tally is None:
            make_room(self.tallies, self._has_band)
            tally = self.tallies[priority] = Tally()
        return tally

    def _has_band(self, priority: int) -> bool:
        return priority in self._bands.by_priority

    def _is_declared(self, objective: str) -> bool:
        return not objective or objective in self._bands.objectives

    def take(self) -> list[Decision]:
        """Return the decisions since the last call."""
        made, self._made = self._made, []
        return made

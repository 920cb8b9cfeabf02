"""Pure. The bands that exist: those that objectives declare, and 0 when first needed."""

from collections.abc import Iterator, Mapping
from typing import final

from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.config import ControllerConfig
from flowcontrol.flow import Lease
from flowcontrol.request import DEFAULT_PRIORITY


@final
class Bands:
    """The bands, highest priority first when iterated.

    A band without an objective drains: nothing new enters, waiting requests keep their places, and
    the band disappears with its last request.

    Args:
        config: where bands take their settings from.
        everything: the account of all bands together.
    """

    def __init__(self, config: ControllerConfig, everything: Capacity) -> None:
        self.objectives: dict[str, int] = {}
        """Name to priority."""
        self.unknown_objectives = 0
        """Requests that named an undeclared objective."""
        self.by_priority: dict[int, Band] = {}
        """All bands; read-only."""
        self._config = config
        self._everything = everything
        self._order: list[Band] = []

    def __iter__(self) -> Iterator[Band]:
        return iter(self._order)

    def priority_of(self, objective: str | None) -> int:
        """Return the priority of an objective; an unknown one is counted and has 0."""
        if objective is None:
            return DEFAULT_PRIORITY
        priority = self.objectives.get(objective)
        if priority is None:
            self.unknown_objectives += 1
            return DEFAULT_PRIORITY
        return priority

    def needed(self, priority: int, now_ns: int) -> Band:
        """Return the band of a priority, created if it does not exist."""
        return self.by_priority.get(priority) or self._add(priority, now_ns)

    def waiting_of(self, priority: int, flow_id: str) -> list[Lease]:
        """Return the waiting requests of a flow, in order of arrival; none for an unknown flow."""
        band = self.by_priority.get(priority)
        flow = None if band is None else band.flows.get(flow_id)
        return [] if flow is None else flow.leases()

    def declare(self, objectives: Mapping[str, int], now_ns: int) -> None:
        """Replace the set of objectives."""
        self.objectives = dict(objectives)
        declared = {*self.objectives.values(), DEFAULT_PRIORITY}
        for band in list(self._order):
            band.is_declared = band.priority in declared
            self.drop_if_done(band)
        for priority in sorted(declared - {DEFAULT_PRIORITY} - self.by_priority.keys()):
            self._add(priority, now_ns)

    def drop_if_done(self, band: Band) -> None:
        """Remove a band that has drained."""
        if not band.is_declared and band.is_idle:
            del self.by_priority[band.priority]
            self._order.remove(band)

    def reconfigure(self, config: ControllerConfig, now_ns: int) -> None:
        """Apply other settings to every band. O(waiting)."""
        self._config = config
        for band in self._order:
            band.reconfigure(config, now_ns)

    def waiting_above(self, band: Band) -> int:
        """Return how many wait in higher bands; O(bands)."""
        return sum(each.waiting for each in self._order if each.priority > band.priority)

    def check_invariants(self, waiting: list[Lease]) -> None:
        """Compare the bands with all waiting requests. O(waiting). For tests."""
        assert all(lease.is_admitted for lease in waiting)
        order = [band.priority for band in self._order]
        assert order == sorted(order, reverse=True)
        for band in self._order:
            mine = [lease for lease in waiting if lease.flow.key.priority == band.priority]
            assert len(mine) == band.waiting
            band.check_invariants()
            assert band.is_declared or not band.is_idle, "an undeclared idle band is forgotten"

    def _add(self, priority: int, now_ns: int) -> Band:
        band = Band(priority, self._config, self._everything, now_ns)
        self.by_priority[priority] = band
        self._order.append(band)
        self._order.sort(key=lambda each: -each.priority)
        return band

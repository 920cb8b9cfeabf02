"""Pure. A flow and the leases that its requests hold on it."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import final

from flowcontrol.request import FlowKey, Request


@final
@dataclass(slots=True, eq=False)
class Lease:
    """A live request: waiting in its flow, or in flight. Compared by identity."""

    request: Request
    flow: "Flow"
    arrival_index: int
    """Position among all arrivals; settles every tie."""
    arrived_ns: int
    budget_from_ns: int
    """Since when its time to live counts: its arrival, or the one change of regime after it."""
    is_admitted: bool = False
    """Whether it counts against the limits. A newcomer does not until it is found to fit."""
    is_in_flight: bool = False
    endpoint: str | None = None


@final
class Flow:
    """The requests of one tenant at one priority: a queue in arrival order, and those in flight.

    Every operation is O(1). No dead entry is ever kept: what leaves is removed there and then.
    """

    __slots__ = ("_waiting", "in_flight", "key", "waiting_bytes")

    def __init__(self, key: FlowKey) -> None:
        self.key = key
        self.in_flight = 0
        self.waiting_bytes = 0
        self._waiting: OrderedDict[int, Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def head(self) -> Lease:
        """The one to go next; there must be one."""
        return next(iter(self._waiting.values()))

    @property
    def newest(self) -> Lease:
        """The one to give up its place first; there must be one."""
        return next(reversed(self._waiting.values()))

    def push(self, lease: Lease) -> None:
        """Queue a request behind all others."""
        assert lease.request.request_id not in self._waiting, "a request waits once"
        self._waiting[lease.request.request_id] = lease
        self.waiting_bytes += lease.request.byte_size

    def remove(self, lease: Lease) -> None:
        """Take a request out, wherever it stands."""
        del self._waiting[lease.request.request_id]
        self.waiting_bytes -= lease.request.byte_size

    def leases(self) -> list[Lease]:
        """Return all that wait, the next to go first; O(waiting)."""
        return list(self._waiting.values())

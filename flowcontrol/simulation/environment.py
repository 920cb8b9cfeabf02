"""Pure. Events that neither gateway nor clients cause: servers, scrapes and faults."""

from collections import Counter
from functools import partial
from typing import Protocol, assert_never, final

from flowcontrol.config import Role
from flowcontrol.events import DrainBegan, EndpointsChanged, Fact, ObjectivesChanged
from flowcontrol.simulation.clock import VirtualClock
from flowcontrol.simulation.faults import (
    ClockJumped,
    Conditions,
    DecisionsSlow,
    DrainBegins,
    EndpointGone,
    EngineStalled,
    Fault,
    MetricsLie,
    MetricsStale,
    ObjectivesEdited,
    SettlementsLost,
    SettlementsSlow,
)
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerPool


class Host(Protocol):
    """The world as the environment acts on it."""

    @property
    def is_busy(self) -> bool:
        """Whether a client still waits for something."""

    def post(self, fact: Fact) -> None:
        """Pass a fact to the engine."""

    def lost(self, request_id: int) -> None:
        """Take in that the server of a request has crashed."""

    def stall(self, until_ns: int) -> None:
        """Give the engine no turn until then."""

    def jump(self, by_ns: int) -> None:
        """Put the engine's clock forward."""


@final
class Environment:
    """Schedules these events.

    Args:
        plan: the events and their times.
        clock: schedules them.
        pool: whose servers come and go.
        conditions: how faults change scrapes.
        host: where they take effect.
    """

    def __init__(
        self, plan: Plan, clock: VirtualClock, pool: ServerPool, conditions: Conditions, host: Host
    ) -> None:
        self._plan = plan
        self._clock = clock
        self._pool = pool
        self._conditions = conditions
        self._host = host
        self._absences = Counter({spec.address: 1 for spec in plan.servers})
        """For each server, the number of reasons for which it is down; 0: it is up."""
        self._unlisted = Counter(self._absences)
        """For each server, the number of reasons for which it is not listed as an endpoint."""

    def start(self) -> None:
        """Post the initial facts, and schedule the rest."""
        self._host.post(ObjectivesChanged(dict(self._plan.objectives)))
        for spec in self._plan.servers:
            if spec.from_ns == 0:
                self._rise(spec.address)
                self._unlisted[spec.address] -= 1
            else:
                self._clock.at(spec.from_ns, partial(self._rise, spec.address))
                self._clock.at(spec.from_ns, partial(self._list, spec.address))
        self._post_endpoints()
        for fault in self._plan.faults:
            self._plan_fault(fault)
        if self._plan.scrape_interval_ns is not None:
            self._clock.after(self._plan.scrape_interval_ns, self._scrape)

    def _plan_fault(self, fault: Fault) -> None:
        at, host = self._clock.at, self._host
        match fault:
            case EndpointGone():
                address, notice_ns = fault.address, fault.noticed_after_ns
                at(fault.from_ns, partial(self._fall, address))
                at(fault.from_ns + notice_ns, partial(self._unlist, address))
                at(fault.until_ns, partial(self._rise, address))
                at(fault.until_ns + notice_ns, partial(self._list, address))
            case EngineStalled():
                at(fault.from_ns, partial(host.stall, fault.until_ns))
            case ClockJumped():
                at(fault.at_ns, partial(host.jump, fault.by_ns))
            case ObjectivesEdited():
                at(fault.at_ns, partial(host.post, ObjectivesChanged(dict(fault.priorities))))
            case DrainBegins():
                at(fault.at_ns, partial(host.post, DrainBegan(fault.budget_ns)))
            case MetricsStale() | MetricsLie() | SettlementsSlow() | SettlementsLost():
                pass  # applied by the conditions
            case DecisionsSlow():
                pass
            case _:
                assert_never(fault)

    def _fall(self, address: str) -> None:
        self._absences[address] += 1
        if self._absences[address] == 1:
            for request_id in self._pool.servers[address].crash():
                self._host.lost(request_id)

    def _rise(self, address: str) -> None:
        self._absences[address] -= 1
        if not self._absences[address]:
            self._pool.servers[address].rise()

    def _unlist(self, address: str) -> None:
        self._unlisted[address] += 1
        self._post_endpoints()

    def _list(self, address: str) -> None:
        self._unlisted[address] -= 1
        self._post_endpoints()

    def _post_endpoints(self) -> None:
        addresses = self._addresses()
        self._pool.set_known(addresses)
        roles = {s.address: s.role for s in self._plan.servers if s.role is not Role.BOTH}
        self._host.post(EndpointsChanged(addresses, roles))

    def _addresses(self) -> tuple[str, ...]:
        """Return the listed endpoints, in the order of the plan."""
        return tuple(s.address for s in self._plan.servers if not self._unlisted[s.address])

    def _scrape(self) -> None:
        interval_ns = self._plan.scrape_interval_ns
        assert interval_ns is not None
        for address in self._addresses():
            server = self._pool.servers[address]
            if server.is_up:
                seen = self._conditions.observed(server.load(), self._clock.now_ns)
                if seen is not None:
                    self._host.post(seen)
        if self._clock.now_ns < self._plan.duration_ns or self._host.is_busy:
            self._clock.after(interval_ns, self._scrape)

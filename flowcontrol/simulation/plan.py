"""Pure. Everything that a simulated run consists of, except the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from flowcontrol.simulation.faults import (
    ClockJumped,
    DrainBegins,
    EndpointGone,
    Fault,
    ObjectivesEdited,
)
from flowcontrol.simulation.pool import Balancer, ServerSpec
from flowcontrol.simulation.workload import Workload


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens in a run, apart from the engine's decisions."""

    duration_ns: int
    """No call begins after it; the run goes on until all calls are over."""
    servers: tuple[ServerSpec, ...]
    workloads: tuple[Workload, ...]
    objectives: Mapping[str, int] = field(default_factory=dict)
    """Objectives at the start: name to priority."""
    faults: tuple[Fault, ...] = ()
    balancer: Balancer = Balancer.LEAST_REQUEST
    settlement_delay_ns: int | None = 1_000_000_000
    """Delay of the access log after the end of a request; None: there is no access log.
    1 s: Envoy's default `buffer_flush_interval` of the access log service."""
    scrape_interval_ns: int | None = None
    """Interval between scrapes of each endpoint; None: no scrapes."""
    has_engine_priority: bool = False
    """Whether engines serve waiting requests of higher bands first."""

    @property
    def quiet_ns(self) -> int:
        """When the run is quiet: the end of arrivals and of every fault."""
        ends = [self.duration_ns]
        for fault in self.faults:
            match fault:
                case EndpointGone():
                    ends.append(fault.until_ns + fault.noticed_after_ns)
                case ClockJumped() | ObjectivesEdited() | DrainBegins():
                    ends.append(fault.at_ns)
                case _:
                    ends.append(fault.until_ns)
        return max(ends + [server.from_ns for server in self.servers])

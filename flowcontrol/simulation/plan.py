"""Pure. Everything a simulated run is made of, but for the engine."""

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
    """What happens, apart from what the engine decides."""

    duration_ns: int
    """No call begins after it; the run goes on until all are over."""
    servers: tuple[ServerSpec, ...]
    workloads: tuple[Workload, ...]
    objectives: Mapping[str, int] = field(default_factory=dict)
    """Name to priority, from the beginning."""
    faults: tuple[Fault, ...] = ()
    balancer: Balancer = Balancer.LEAST_REQUEST
    settlement_delay_ns: int | None = 1_000_000_000
    """After the end of a request, when its access log arrives; None: there is none.
    1 s: Envoy's default `buffer_flush_interval` of the access log service."""
    scrape_interval_ns: int | None = None
    """How often each endpoint's load is observed; None: never."""
    has_engine_priority: bool = False
    """Whether model servers take those of higher bands first of what waits inside."""

    @property
    def quiet_ns(self) -> int:
        """When nothing more is done to the gateway: the end of arrivals and of every fault."""
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

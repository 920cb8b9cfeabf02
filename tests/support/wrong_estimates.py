"""Flows of equal weight that always have requests waiting, and whose answers are estimated wrongly.

For a model it has never seen, the engine expects `OUTPUT_DEFAULT` tokens of answer, and later what
this flow's last answers had. Here answers have four times as many tokens or a fourth. Prompts are
as long as answers, so that shares by tokens and by their prices are the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from flowcontrol.config import ControllerConfig, Picker
from flowcontrol.controller import FlowController
from flowcontrol.estimates import OUTPUT_DEFAULT
from flowcontrol.simulation.distributions import Fixed
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.traces import TraceRow
from flowcontrol.simulation.workload import ClosedLoop, Independent, Lengths, Recorded, Workload
from flowcontrol.simulation.world import World
from tests.support.effects import SMALL
from tests.support.overloads import MINUTE, SECOND

FLOWS, USERS = 8, 24
"""Number of flows, and of users of each, who send the next request at once after an answer."""
LONG, SHORT = round(4 * OUTPUT_DEFAULT), round(OUTPUT_DEFAULT / 4)


def _same(tokens: int) -> Lengths:
    return Independent(Fixed(tokens), Fixed(tokens))


def _by_chance() -> Lengths:
    """Return four times the length or a fourth, at random, with the expected length as the mean."""
    rows = [TraceRow(0, SHORT, SHORT)] * 4 + [TraceRow(0, LONG, LONG)]
    return Recorded(tuple(rows))


def _users(flow: int, name: str, lengths: Lengths, from_ns: int, until_ns: int) -> Workload:
    return Workload(
        name=f"{name} {flow} {from_ns}",
        arrivals=ClosedLoop(USERS),
        lengths=lengths,
        tenants={f"flow-{flow}": 1.0},
        from_ns=from_ns,
        until_ns=until_ns,
    )


def never_seen(end_ns: int) -> Iterator[Workload]:
    """Yield flows, half with long answers, half with short ones."""
    for flow in range(FLOWS):
        yield _users(flow, "asks", _same(LONG if flow % 2 else SHORT), 0, end_ns)


def changing(end_ns: int) -> Iterator[Workload]:
    """Yield flows that alternate each minute between long and short answers."""
    for flow in range(FLOWS):
        for minute, from_ns in enumerate(range(0, end_ns, MINUTE)):
            lengths = _same(LONG if (flow + minute) % 2 else SHORT)
            yield _users(flow, "asks", lengths, from_ns, min(end_ns, from_ns + MINUTE))


def by_chance(end_ns: int) -> Iterator[Workload]:
    """Yield flows, half with random long and short answers, half with answers as expected."""
    usual = _same(round(OUTPUT_DEFAULT))
    for flow in range(FLOWS):
        yield _users(flow, "asks", _by_chance() if flow % 2 else usual, 0, end_ns)


@final
@dataclass(frozen=True)
class Wrong:
    """One way in which estimates are wrong."""

    workloads: Callable[[int], Iterator[Workload]]
    """Returns the flows, given the end of arrivals in ns."""
    settles: bool = True
    """Whether the access log reports the actual answers."""


CASES = {
    "never seen before": Wrong(never_seen),
    "changing every minute": Wrong(changing),
    "by chance": Wrong(by_chance),
    "never seen, no access log": Wrong(never_seen, settles=False),
}


def run(wrong: Wrong, minutes: float, seed: int = 889) -> Results:
    """Run with the engine's defaults; the engine picks."""
    end_ns = round(minutes * MINUTE)
    plan = Plan(
        duration_ns=end_ns,
        servers=tuple(ServerSpec(address=f"s{n}", config=SMALL) for n in range(3)),
        workloads=tuple(wrong.workloads(end_ns)),
        settlement_delay_ns=SECOND if wrong.settles else None,
        scrape_interval_ns=SECOND,
    )
    config = ControllerConfig(picker=Picker.LEAST_LOADED)
    return World(FlowController(config, 0), plan, seed).finish()

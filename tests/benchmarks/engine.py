"""What does the engine itself cost a request, and is that cost flat?

Question: how much CPU does one request take from its arrival to its end in the flow controller
alone, over the reference's matrix; and flow churn, mass cancellation, mass expiry, settlement and
the memory of a waiting request.

Method: so many callers stand before a flow controller, each with one request; whoever is dispatched
ends at once and comes again with another. A turn tells the controller what ended and who came, and
polls, as the processor does: with limit L there are L requests a turn, with free flow one of every
caller. Facts are built beforehand. The queue is filled, and the first turns are run, before
the clock starts. Time is CPU time of the process. Cells take turns; medians of the rounds are given
with their spread. Memory is what Python allocates while the queue is filled, engine and request.

Caveats: one process, nothing but the engine; no thread, no futures, no wire (bridge.py has these).
The garbage collector is tuned as in the service. Not all cells do the same for a request, so they
cannot cost the same. With free flow all are dispatched in the turn they come in, and never admitted
and taken out of the queue again; with a limit, most are. With a limit of 1 each request has a turn
of its own (one, not two: who leaves and who comes are told in the same), with 100 a hundredth of
one; what an empty turn costs is among the last lines. The rest of the difference is the
interpreter's: a turn that does everything once finds caches and branch predictors cold, one that
does it a hundred times in a row does not.

    python tests/benchmarks/engine.py [--rounds 5] [--requests 20000] [--fairness weighted-tokens]
"""

import argparse
import statistics
import time
import tracemalloc

from matrix import Cell, begin, measure_all, print_all, traffic

from flowcontrol.config import Fairness, Ordering
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left, ObjectivesChanged, Settled
from flowcontrol.request import Outcome, Request
from flowcontrol_server.service import tune_garbage_collection

TURN_NS = 100_000
SECOND_NS = 1_000_000_000
DEEP = Cell(limit=100, bands=8, flows=5_000, callers=50_000)


class Bench:
    """A controller and what happens to it."""

    def __init__(self, cell: Cell, options: argparse.Namespace) -> None:
        config = cell.config(Fairness(options.fairness), Ordering(options.ordering))
        self.cell = cell
        self.now_ns = 0
        self.controller = FlowController(config, 0)
        self.controller.handle(EndpointsChanged(("10.0.0.1:8000",)), 0)
        self.controller.handle(ObjectivesChanged(cell.objectives), 0)

    def facts(self, count: int, first_id: int = 0, ttl_ns: int | None = None) -> list[Arrived]:
        """Return arrivals."""
        return [
            Arrived(
                Request(
                    first_id + index,
                    each.flow_id,
                    each.objective,
                    each.byte_size,
                    ttl_ns=ttl_ns,
                    ttft_slo_ns=(index * 7919) % 1000 * 1_000_000,
                )
            )
            for index, each in enumerate(traffic(self.cell, count))
        ]

    def turn(self, facts: list[Arrived], left: list[int]) -> list[int]:
        """Run one turn; return who was dispatched."""
        controller, now_ns = self.controller, self.now_ns
        for request_id in left:
            controller.handle(Left(request_id), now_ns)
        for fact in facts:
            controller.handle(fact, now_ns)
        decisions = controller.poll(now_ns)
        controller.next_wakeup_ns()
        self.now_ns += TURN_NS
        return [each.request_id for each in decisions if each.outcome is Outcome.DISPATCHED]

    def per_request(self, count: int) -> float:
        """Return the CPU seconds of one request in the steady state of the cell."""
        arrivals = self.facts(self.cell.callers + 2 * count)
        tune_garbage_collection()
        left = self.turn(arrivals[: self.cell.callers], [])
        at = self.cell.callers
        began_s, first = 0.0, 0
        while at < len(arrivals):
            if not first and at >= self.cell.callers + count:
                began_s, first = time.process_time(), at
            come = arrivals[at : at + len(left)]
            at += len(left)
            left = self.turn(come, left)
        return (time.process_time() - began_s) / (len(arrivals) - first)

    def filled(self, ttl_ns: int | None = None) -> float:
        """Let as many wait as there are callers; return the CPU seconds of one."""
        facts = self.facts(self.cell.callers, ttl_ns=ttl_ns)
        began_s = time.process_time()
        for start in range(0, len(facts), 100):
            self.turn(facts[start : start + 100], [])
        return (time.process_time() - began_s) / len(facts)


def empty_turn(options: argparse.Namespace) -> float:
    """Return the CPU seconds of a turn in which nothing happens, while 50,000 wait."""
    bench = Bench(DEEP, options)
    bench.filled()
    began_s = time.process_time()
    for _ in range(20_000):
        bench.turn([], [])
    return (time.process_time() - began_s) / 20_000


def churn(options: argparse.Namespace) -> float:
    """Return the CPU seconds of a request whose flow nobody has seen before or will again."""
    bench = Bench(Cell(limit=100, bands=1, flows=1, callers=5000), options)
    arrivals = [Arrived(Request(index, f"flow-{index}")) for index in range(25_000)]
    left = bench.turn(arrivals[:5000], [])
    began_s = time.process_time()
    for at in range(5000, 25_000, 100):
        left = bench.turn(arrivals[at : at + 100], left)
    return (time.process_time() - began_s) / 20_000


def cancellation(options: argparse.Namespace) -> float:
    """Return the CPU seconds of one departure, when everybody who waits gives up."""
    bench = Bench(DEEP, options)
    bench.filled()
    began_s = time.process_time()
    for start in range(0, DEEP.callers, 100):
        bench.turn([], list(range(start, start + 100)))
    assert not bench.controller.waiting
    return (time.process_time() - began_s) / DEEP.callers


def expiry(options: argparse.Namespace) -> float:
    """Return the CPU seconds of one eviction, when everybody's time is up in the same turn."""
    bench = Bench(DEEP, options)
    bench.filled(ttl_ns=60 * SECOND_NS)
    bench.now_ns = 100 * SECOND_NS
    began_s = time.process_time()
    bench.turn([], [])
    assert not bench.controller.waiting
    return (time.process_time() - began_s) / DEEP.callers


def settlement(options: argparse.Namespace) -> float:
    """Return the CPU seconds of one settlement, of a request in flight."""
    bench = Bench(DEEP._replace(limit=20_000), options)
    bench.filled()
    facts = [Settled(index, 500, 0, 300, 10**8, 10**9) for index in range(DEEP.callers)]
    began_s = time.process_time()
    for fact in facts:
        bench.controller.handle(fact, bench.now_ns)
    return (time.process_time() - began_s) / DEEP.callers


def memory(options: argparse.Namespace) -> float:
    """Return the bytes that one waiting request holds."""
    bench = Bench(DEEP, options)
    tracemalloc.start()
    bench.filled()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / DEEP.callers


def main() -> None:
    """Measure and print."""
    options, chosen = begin("engine alone", __doc__, 20_000)
    results = measure_all(
        chosen, options.rounds, lambda cell: Bench(cell, options).per_request(options.requests)
    )
    print_all(results, "request")
    if options.cells:
        return
    others = {
        "a turn in which nothing happens": empty_turn,
        "a request of a flow never seen before": churn,
        "one of 50,000 who all give up": cancellation,
        "one of 50,000 whose time is up at once": expiry,
        "a settlement": settlement,
    }
    for name, measure in others.items():
        seconds = [measure(options) * 1e6 for _ in range(options.rounds)]
        print(
            f"{name:40} {statistics.median(seconds):6.1f} us  {min(seconds):.1f}-{max(seconds):.1f}"
        )
    print(f"{'a waiting request, of 50,000':40} {memory(options):6.0f} B")


if __name__ == "__main__":
    main()

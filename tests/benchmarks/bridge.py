"""What does a request cost from the event loop to the engine's thread and back, and is it flat?

Question: how many requests a second pass the gate, that is a future, the inbox, the processor's
thread, the engine, and the delivery back to the loop, over the reference's matrix? And how much CPU
does one take, the loop's and the processor's together?

Method: so many callers, each a task with one request at a time, which leaves as soon as it is
dispatched and comes again with another, on uvloop and with the switch interval of the service. What
classify reads from headers is read beforehand. The queue is filled first; the clock runs from one
arrival to another, so that filling and emptying are not measured. Cells take turns; medians of the
rounds are given with their spread, first of wall time, then of the CPU time of the process.

Caveats: no gRPC and no wire. Two threads share one interpreter lock: with a limit of 1 each request
pays for two hand-overs between them and nothing is batched, so wall time measures the hand-over.
The reference's benchmark does the same work with goroutines and channels; its detector is a mock.

    python tests/benchmarks/bridge.py [--rounds 5] [--requests 10000] [--fairness weighted-tokens]
"""

import argparse
import asyncio
import sys
import time

import uvloop
from matrix import Cell, begin, measure_all, print_all, traffic

from flowcontrol.config import Fairness, Ordering
from flowcontrol.events import DrainBegan, EndpointsChanged, ObjectivesChanged
from flowcontrol_server.requests.classify import classify
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.service import SWITCH_INTERVAL_S, tune_garbage_collection


class Run:
    """One cell, once."""

    def __init__(self, cell: Cell, options: argparse.Namespace) -> None:
        self.cell = cell
        self.options = options
        self.requests = [
            classify(
                {
                    "x-llm-d-inference-fairness-id": each.flow_id,
                    "x-llm-d-inference-objective": each.objective,
                    "content-length": str(each.byte_size),
                }
            )
            for each in traffic(cell, cell.callers + 2 * options.requests)
        ]
        self.next = 0
        self.first = cell.callers + options.requests
        self.wall_s = self.cpu_s = 0.0

    async def caller(self, gate: FlowGate) -> None:
        """Come, wait, leave, and come again."""
        while self.next < len(self.requests):
            if self.next == self.first:
                self.wall_s, self.cpu_s = -time.perf_counter(), -time.process_time()
            request = self.requests[self.next]
            self.next += 1
            if self.next == len(self.requests):
                self.wall_s += time.perf_counter()
                self.cpu_s += time.process_time()
            parked = gate.park(request)
            await parked.future()
            gate.leave(parked)

    async def run(self) -> None:
        """Run the cell."""
        cell, options = self.cell, self.options
        ended = asyncio.get_running_loop().create_future()
        config = cell.config(Fairness(options.fairness), Ordering(options.ordering))
        gate = FlowGate(config, 10**6, lambda _parked, _decision: None, ended.set_result)
        gate.post(EndpointsChanged(("10.0.0.1:8000",)))
        gate.post(ObjectivesChanged(cell.objectives))
        gate.start()
        await asyncio.gather(*(self.caller(gate) for _ in range(cell.callers)))
        gate.post(DrainBegan(0))
        assert await ended is None, "the processor has failed"
        assert gate.join(10)


def main() -> None:
    """Measure and print."""
    options, chosen = begin("gate, inbox, thread and futures", __doc__, 10_000)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cpu: dict[Cell, list[float]] = {cell: [] for cell in chosen}

    def measure(cell: Cell) -> float:
        run = Run(cell, options)
        tune_garbage_collection()
        uvloop.run(run.run())
        cpu[cell].append(run.cpu_s / options.requests)
        return run.wall_s / options.requests

    wall = measure_all(chosen, options.rounds, measure)
    print("wall time")
    print_all(wall, "request")
    print("CPU time")
    print_all(cpu, "request")


if __name__ == "__main__":
    main()

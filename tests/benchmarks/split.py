"""What is lost when K gates share a pool, each with a K-th of the limit?

Method: 30,000 requests on a virtual clock, with the engine that
serves. Twelve tenants, of which one asks four times as much as each other; one request in ten is
urgent. Answers take 1 s on average (exponential). Arrivals are 1.25 times what the limit of 64 can
serve, and each request goes to a gate by chance, as Envoy would send it. Queues hold 1,000 requests
in all. K = 1 is one decider.

Unused is the part of the limit that was free at a gate while another had requests waiting.
Fairness is Jain's index of what the eleven equal tenants were served of what they asked for; the
largest tenant's share is beside its fair twelfth.

Caveats: no failures, no prefix cache, equal requests.

    python -m tests.benchmarks.split
"""

import heapq
import platform
import random
import statistics
from collections import Counter

from flowcontrol.config import Concurrency, ControllerConfig, Limits
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Decision, EndpointsChanged, Left, ObjectivesChanged
from flowcontrol.request import Outcome, Request

LIMIT, REQUESTS, WAITING = 64, 30_000, 1000
TENANTS = 12
OVERLOAD = 1.25
SECOND = 1_000_000_000


def run(gates: int, seed: int) -> tuple[float, float, float, float, float]:
    """Return unused slots, fairness, the largest tenant's share, and two waits in seconds."""
    chance = random.Random(seed)
    config = ControllerConfig(
        limits=Limits(requests_max=WAITING // gates),
        detectors=(Concurrency(requests_max=LIMIT // gates),),
    )
    engines = [FlowController(config, 0) for _ in range(gates)]
    for engine in engines:
        engine.handle(ObjectivesChanged({"urgent": 10}), 0)
        engine.handle(EndpointsChanged(("10.0.0.1:80",)), 0)
    ends: list[tuple[int, int, int]] = []
    served: Counter[str] = Counter()
    waits: dict[int, list[float]] = {0: [], 10: []}
    now_ns, unused, area_ns = 0, 0.0, 0
    weights = [4, *[1] * (TENANTS - 1)]
    next_ns = 0

    def take(decisions: list[Decision], gate: int) -> None:
        for each in decisions:
            if each.outcome is Outcome.DISPATCHED:
                served[each.flow_id] += 1
                waits[each.priority].append(each.waited_ns / SECOND)
                end_ns = now_ns + round(chance.expovariate(1) * SECOND)
                heapq.heappush(ends, (end_ns, each.request_id, gate))

    request_id = 0
    while request_id < REQUESTS:
        at_ns = min(next_ns, ends[0][0]) if ends else next_ns
        if any(engine.waiting for engine in engines):
            free = sum(LIMIT // gates - engine.in_flight for engine in engines)
            unused += free * (at_ns - now_ns)
            area_ns += at_ns - now_ns
        now_ns = at_ns
        if ends and ends[0][0] == now_ns:
            _, ended, gate = heapq.heappop(ends)
            engines[gate].handle(Left(ended), now_ns)
        else:
            request_id += 1
            gate = chance.randrange(gates)
            tenant = chance.choices(range(TENANTS), weights)[0]
            objective = "urgent" if chance.random() < 0.1 else None
            request = Request(request_id, f"tenant-{tenant}", objective, byte_size=100)
            engines[gate].handle(Arrived(request), now_ns)
            next_ns = now_ns + round(chance.expovariate(LIMIT * OVERLOAD) * SECOND)
        take(engines[gate].poll(now_ns), gate)
    equal = [served[f"tenant-{number}"] for number in range(1, TENANTS)]
    jain = sum(equal) ** 2 / (len(equal) * sum(each * each for each in equal))
    urgent = sorted(waits[10])
    return (
        unused / (area_ns * LIMIT),
        jain,
        served["tenant-0"] / served.total(),
        statistics.mean(waits[10]),
        urgent[len(urgent) * 99 // 100],
    )


def main() -> None:
    """Measure and print."""
    print(__doc__)
    print(f"Python {platform.python_version()}, seeds 1 to 3, the worst of each\n")
    print("| gates | unused | fairness | largest tenant | urgent waits, mean | p99 |")
    print("|---|---|---|---|---|---|")
    for gates in (1, 2, 4):
        results = [run(gates, seed) for seed in (1, 2, 3)]
        unused, jain, largest, mean_s, p99_s = zip(*results, strict=True)
        print(
            f"| {gates} | {max(unused):.1%} | {min(jain):.4f} | {max(largest):.1%} "
            f"| {max(mean_s) * 1000:.0f} ms | {max(p99_s) * 1000:.0f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()

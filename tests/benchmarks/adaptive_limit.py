"""Is the adaptive limit as good as the best fixed one, with nothing to set?

Question: how many answers in time does a pool give each second, with the limit that the engine
finds by itself, of what it gives with the best fixed limit, which takes trying all of them?

Method: the overloads of support.overloads, each on each pool of it, simulated for so many minutes:
with every fixed limit of the sweep, with the adaptive one told by settlements, and with the
adaptive one that sees departures alone. The whole run counts, so what learning costs is in it. A
call is in time if its first token is within its objective, from when the client first asked; who
waits at the
gate for half as long is refused. The best fixed limit is the best for this seed, found with
hindsight; `changing` has other traffic in its second half, for which another one would be best.

Caveats: the model server is that of the demo, without a prefix cache; the picker is the engine's
(`--envoy` has Envoy choose). One seed; --seed takes another.

    python tests/benchmarks/adaptive_limit.py [--pools uniform,mixed] [--minutes 10] [--seed 889]
"""

import argparse
import platform
import time

from flowcontrol.config import Adaptive, Concurrency, Detector, Picker
from tests.support.overloads import OVERLOADS, POOLS, Overload, goodput, run

LIMITS = (2, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 32)
LIMITS_LARGE = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
NEEDED = 0.9


def measure(overload: Overload, pool: str, arguments: argparse.Namespace) -> bool:
    """Print one line of the sweep; return whether the adaptive limit was good enough."""

    def of(detector: Detector, *, settles: bool = True) -> float:
        return goodput(
            run(
                overload,
                pool,
                detector,
                seed=arguments.seed,
                minutes=arguments.minutes,
                settles=settles,
                picker=Picker.OFF if arguments.envoy else Picker.LEAST_LOADED,
            )
        )

    limits = LIMITS_LARGE if pool == "large" else LIMITS
    fixed = {limit: of(Concurrency(requests_max=limit)) for limit in limits}
    best = max(fixed.values())
    adaptive, blind = of(Adaptive()), of(Adaptive(), settles=False)
    swept = " ".join(f"{limit}:{value:.2f}" for limit, value in fixed.items())
    print(f"{pool:8} {overload.name:13} {swept}")
    print(
        f"{'':22} best {best:.2f} at {max(fixed, key=fixed.__getitem__)}, adaptive {adaptive:.2f} "
        f"({adaptive / best:.0%}), by departures alone {blind:.2f} ({blind / best:.0%})",
        flush=True,
    )
    return adaptive >= NEEDED * best


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pools", default="uniform,mixed")
    parser.add_argument("--overloads", default=",".join(OVERLOADS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=889)
    parser.add_argument("--envoy", action="store_true", help="Envoy chooses the endpoint")
    arguments = parser.parse_args()
    pools = arguments.pools.split(",")
    unknown = sorted(set(pools) - POOLS.keys())
    if unknown:
        parser.error(f"pools must be of {', '.join(POOLS)}, got {', '.join(unknown)}")
    print(f"Python {platform.python_version()}, {arguments.minutes:g} minutes each")
    print(f"seed {arguments.seed}; answers in time per second by requests in flight per endpoint")
    began_s = time.process_time()
    wanting = [
        f"{name} on {pool}"
        for pool in pools
        for name in arguments.overloads.split(",")
        if not measure(OVERLOADS[name], pool, arguments)
    ]
    print(f"{time.process_time() - began_s:.0f} s of CPU")
    print(f"below {NEEDED:.0%} of the best: {', '.join(wanting) or 'nothing'}")


if __name__ == "__main__":
    main()

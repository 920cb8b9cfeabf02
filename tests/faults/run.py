"""Does what is promised hold while parts die? A real Envoy, real processes, ledgers of all sides.

Method: for each fault, two model servers of 12 slots each, one gate (or two with Redis) and Envoy
are started. 60 clients ask one after the other; 3 % leave early; 2 % of the answers take 3 to 6 s,
8 % take 0.3 to 1 s, the others 20 to 60 ms. The fault is planted at random times. Clients write
down each answer, byte for byte; model servers write down each request at its arrival and at its
end, with the ticket that Envoy added from the gate's metadata; afterwards the gate says what it
still holds.

Verdicts: every request is answered once (no answer is missing, cut off or given twice); nothing
reaches a model server without a ticket of its own; the limit holds as the model servers saw it, but
for what the fault is stated to allow; order within a flow holds where it is promised, as far as the
gate can keep it: an earlier request that Envoy held up, before it reached the gate or after it was
dispatched, as the gate's log says, was not overtaken there; nothing waits and nothing is in flight
at the end; no log has a traceback. `excess` is the most requests beyond the limit of a model
server, and for how long in all. `*`: not promised for this fault.

    python -m tests.faults.run --requests 100000 --seed 1 [--only NAME ...] [--keep DIRECTORY]
"""

import argparse
import asyncio
import contextlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.e2e.harness import eventually
from tests.faults.accounts import Books, Excess, excess
from tests.faults.clients import Clients
from tests.faults.planted import FAULTS, Fault
from tests.faults.site import LIMIT, QUIET_WITHIN_S, Site

CONCURRENCY: Final = 60
HEAD: Final = (
    "| fault | requests | answered 200 | refused | cut | unanswered | double | ungated "
    "| excess | leaked | order breaks | tracebacks | time | verdict |"
)


@dataclass(frozen=True)
class Row:
    """What came of one fault."""

    fault: Fault
    requests: int
    good: int
    refused: int
    cut: int
    unanswered: int
    double: int
    ungated: int
    excess: Excess
    leaked: str
    order_breaks: int
    tracebacks: int
    took_s: float

    def broken(self) -> list[str]:
        """Return the promises that were broken."""
        fault = self.fault
        beyond = self.excess.requests > fault.excess or self.excess.seconds > fault.excess_s
        promises = {
            "cut": self.cut and not fault.may_cut,
            "unanswered": self.unanswered and not fault.may_cut,
            "double": self.double,
            "ungated": self.ungated,
            "limit": beyond,
            "leaked": self.leaked,
            "order": self.order_breaks and fault.is_ordered,
            "traceback": self.tracebacks != (fault.times if fault.is_own else 0),
        }
        return [name for name, is_broken in promises.items() if is_broken]

    def __str__(self) -> str:
        """The row as text."""
        cut_mark = "*" if self.fault.may_cut else ""
        order_mark = "" if self.fault.is_ordered else "*"
        worst = f"{self.excess.requests}, {self.excess.seconds:.2f} s" if self.excess[0] else "0"
        cells = (
            *(self.fault.name, self.requests, self.good, self.refused),
            *(f"{self.cut}{cut_mark}", f"{self.unanswered}{cut_mark}", self.double, self.ungated),
            *(worst, self.leaked or "0", f"{self.order_breaks}{order_mark}", self.tracebacks),
            *(f"{self.took_s:.0f} s", ", ".join(self.broken()) or "held"),
        )
        return "| " + " | ".join(map(str, cells)) + " |"


async def plant(site: Site, clients: Clients, fault: Fault, chance: random.Random) -> None:
    """Plant the fault so many times, each in its part of the requests."""
    for number in range(fault.times):
        wanted = (number + chance.uniform(0.1, 0.6)) / fault.times
        while clients.part() < wanted:  # noqa: ASYNC110 - the clients ring no bell
            await asyncio.sleep(0.01)
        if not clients.is_over:
            await fault.act(site, chance)


async def run(fault: Fault, directory: Path, requests: int, seed: int) -> Row:
    """Run one fault and judge it."""
    began_s = time.monotonic()
    chance = random.Random(f"{seed} {fault.name}")
    command, settings = fault.command(directory), fault.settings(directory)
    site = Site(
        directory,
        is_pair=fault.is_pair,
        has_network=fault.has_network,
        has_leases=fault.has_leases,
        command=command,
        settings=settings,
        tries=fault.tries,
    )
    async with site:
        await site.leader()
        clients = Clients(site.stack.gateway, requests, CONCURRENCY, chance)
        async with fault.around(site) if fault.around else contextlib.nullcontext():
            await asyncio.gather(clients.run(), plant(site, clients, fault, chance))
        leaked = ""
        try:
            await eventually(lambda: _is_quiet(site), QUIET_WITHIN_S)
        except (AssertionError, TimeoutError):
            leaked = ", ".join(f"{key} {value:g}" for key, value in (await site.held()).items())
        books = Books(clients.asked, site.served(), site.started(), LIMIT, site.dispatches())
        _keep(directory, books, site)
        return Row(
            fault,
            requests=len(books.asked),
            good=sum(each.is_whole for each in books.asked),
            refused=sum(each.status not in {0, 200} for each in books.asked),
            cut=len(books.cut()),
            unanswered=len(books.unanswered()),
            double=len(books.double()),
            ungated=len(books.ungated()),
            excess=excess(books.served, LIMIT),
            leaked=leaked,
            order_breaks=len(books.order_breaks()),
            tracebacks=site.tracebacks(),
            took_s=time.monotonic() - began_s,
        )


async def _is_quiet(site: Site) -> bool:
    return not any((await site.held()).values())


def _keep(directory: Path, books: Books, site: Site) -> None:
    """Write down what needs an explanation, beside the logs."""
    lines = [f"unanswered {each}" for each in books.unanswered()]
    lines += [f"cut {each}" for each in books.cut()]
    lines += [f"refused {each}" for each in books.asked if each.status not in {0, 200}]
    lines += [f"double {each}" for each in books.double()]
    lines += [f"ungated {each}" for each in books.ungated()]
    lines += [f"overtaken {each}" for each in books.overtaken()]
    lines += [f"trouble {each}" for each in site.troubles()]
    (directory / "findings.txt").write_text("\n".join(lines))


async def run_all(faults: list[Fault], requests: int, seed: int, keep: Path | None) -> int:
    """Run all, print the table; return how many promises were broken."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    print(__doc__)
    print(f"{platform.platform()}, Python {platform.python_version()}, seed {seed}\n")
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1), flush=True)
    began_s = time.monotonic()
    rows, skipped = [], []
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    for fault in faults:
        if fault.needs is not None and not Path(fault.needs).exists():
            skipped.append(f"{fault.name}: needs {fault.needs}")
            continue
        if fault.is_root and os.geteuid():
            skipped.append(f"{fault.name}: needs root")
            continue
        directory = Path(tempfile.mkdtemp(prefix="faults-", dir=keep))
        rows.append(await run(fault, directory, max(CONCURRENCY, requests // len(faults)), seed))
        print(rows[-1], flush=True)
        if keep is None:
            shutil.rmtree(directory)
        else:
            directory.rename(keep / fault.name.replace(" ", "-"))
    total = sum(row.requests for row in rows)
    print(f"\n{total} requests in {(time.monotonic() - began_s) / 60:.1f} minutes")
    for line in skipped:
        print(f"not done: {line}")
    return sum(len(row.broken()) for row in rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of faults")
    parser.add_argument("--keep", type=Path, help="directory for logs and ledgers")
    options = parser.parse_args()
    faults = [each for each in FAULTS if not options.only or each.name in options.only]
    sys.exit(1 if asyncio.run(run_all(faults, options.requests, options.seed, options.keep)) else 0)


if __name__ == "__main__":
    main()

"""Is a ledger decided again identically, and what do ledger and shadow cost?

Question: over 100,000 decisions and more, of every kind, does `flowcontrol replay` decide the same?
What do recording, writing, replay and a shadow take per request, in CPU time?

Method: the tests' traffic (bursts, impatient clients, tenants with weights, evictions by operator,
settlements, first bytes, scrapes, three bands, two endpoints that the engine picks) is played
through an engine that does all it can (three detectors, one of them adaptive, held back ceilings,
reclaiming, a share, promotions, forecasts), and looked at and asked between its turns. Its turns
are handed to a feed as the processor would, and written by the writer's own thread; then the files
are read and decided again by the command's own code. The recorder is measured alone, as the
processor would pay for it: the median of several rounds over the same turns. CPU time of the
process.

Caveats: the traffic is dense, with few turns without facts; at low rates an empty turn or two are
written per request. Writing shares the interpreter's lock with everything else in the process.

    python tests/benchmarks/replay.py [--requests 100000] [--rounds 5] [--keep FOLDER]
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flowcontrol.config import Ordering
from flowcontrol.controller import FlowController
from flowcontrol.replay.ledger import Turn
from flowcontrol.replay.rerun import Rerun
from flowcontrol_server.ledger.reader import parts_of
from flowcontrol_server.ledger.recording import TurnFeed
from flowcontrol_server.ledger.replay import replay
from flowcontrol_server.ledger.writer import LedgerWriter
from tests.support.recorded import Recording, busy, whole_config


def record(turns: list[Turn], controller: FlowController) -> float:
    """Hand every turn to a feed that nobody takes from; return the CPU time."""
    feed = TurnFeed(1 << 40)
    began_s = time.process_time()
    for turn in turns:
        feed.turned(controller, turn)
    return time.process_time() - began_s


def write(path: Path, recording: Recording) -> float:
    """Write every turn; return the CPU time."""
    feed = TurnFeed(1 << 40)
    for turn in recording.turns:
        feed.turned(recording.controller, turn)
    writer = LedgerWriter(path, 1 << 40, 1, feed, hides_flows=False)
    began_s = time.process_time()
    writer.start(recording.config, recording.began_ns)
    writer.close(600)
    assert writer.turns == len(recording.turns), "all of it is written"
    return time.process_time() - began_s


def shadow(recording: Recording) -> float:
    """Let the same configuration decide along; return the CPU time."""
    engine = FlowController(whole_config(), recording.began_ns)
    rerun = Rerun(engine, has_own_config=True)
    began_s = time.process_time()
    for turn in recording.turns:
        rerun.turn(turn)
    return time.process_time() - began_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    began_s = time.process_time()
    recording = busy(Recording(whole_config(), 5, is_looked_at=True), options.requests)
    decided_s = time.process_time() - began_s
    decisions = recording.decisions
    print(f"{len(recording.turns)} turns, {len(decisions)} decisions, {Ordering.EDF.value} above 0")
    for outcome, count in Counter(each.outcome.value for each in decisions).most_common():
        print(f"  {count:>8}  {outcome}")
    with tempfile.TemporaryDirectory() as place:
        path = (options.keep or Path(place)) / "ledger.jsonl"
        per = 1e6 / options.requests
        recorded = [record(recording.turns, recording.controller) for _ in range(options.rounds)]
        written = [write(path, recording) for _ in range(options.rounds)]
        size = sum(part.stat().st_size for part in parts_of(path))
        began_s = time.process_time()
        status, lines = replay(path, None)
        replayed_s = time.process_time() - began_s
        shadowed = [shadow(recording) for _ in range(options.rounds)]
    print(f"traffic, engine, looks  {decided_s * per:6.1f} us a request")
    for name, rounds in (("recorder", recorded), ("writer", written), ("shadow", shadowed)):
        spread = f"{min(rounds) * per:.1f} to {max(rounds) * per:.1f}"
        print(f"{name:20} {statistics.median(rounds) * per:6.1f} us a request ({spread})")
    print(f"replay, with reading {replayed_s * per:6.1f} us a request")
    print(f"ledger               {size / options.requests:6.0f} bytes a request")
    print("\n".join(lines))
    raise SystemExit(status)


if __name__ == "__main__":
    main()

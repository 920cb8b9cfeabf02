"""An access log that has told of nothing, for those who show what it told."""

import time

from server.gate import FlowGate
from server.settlement import Counts, Settlement

LOST_AFTER_NS = 60_000_000_000
SILENT = Counts(received=0, lost=2, awaited=1)


def silent_log(gate: FlowGate) -> Settlement:
    """Return the account of three requests that ended: two longer ago than they are waited for."""
    settlement = Settlement(LOST_AFTER_NS, gate.priority_in_flight, gate.post)
    settlement.stream_opened()
    now_ns = time.monotonic_ns()
    for request_id, ended_ns in enumerate((now_ns - 3 * LOST_AFTER_NS,) * 2 + (now_ns,), 1):
        settlement.request_ended(request_id, 0, ended_ns)
    return settlement

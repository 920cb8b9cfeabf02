"""The state of an access log that has reported nothing, for tests of how it is shown."""

import time

from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import Claim, Counts, LogJoin

LOST_AFTER_NS = 60_000_000_000
SILENT = Counts(received=0, lost=2, awaited=1)


def silent_log(gate: FlowGate) -> LogJoin:
    """Return the state with three ended requests, two of them longer ago than the log may take."""
    settlement = LogJoin(LOST_AFTER_NS, gate.claim_in_flight, gate.post)
    settlement.stream_opened()
    now_ns = time.monotonic_ns()
    for request_id, ended_ns in enumerate((now_ns - 3 * LOST_AFTER_NS,) * 2 + (now_ns,), 1):
        settlement.request_ended(request_id, Claim(0), ended_ns)
    return settlement

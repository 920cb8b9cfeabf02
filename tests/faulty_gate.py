"""A test double: the real service, in which the end of a tenant's requests cannot be told."""

from flowcontrol.events import Decision
from server.cli import main
from server.gate import Parked
from server.logs import RequestLog

FAULT = "planted-fault"

_request_ended = RequestLog.request_ended


def _end_or_fail(self: RequestLog, parked: Parked, decision: Decision) -> None:
    if decision.flow_id == FAULT:
        message = "a planted fault"
        raise RuntimeError(message)
    _request_ended(self, parked, decision)


if __name__ == "__main__":
    RequestLog.request_ended = _end_or_fail  # type: ignore[method-assign]  # the planted fault
    main()

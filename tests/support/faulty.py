"""A test double: the real service with a planted fault.

With PLANTED=sample in the environment, the dashboard's samples fail. For the tenant FAULT, the
callback at the end of a request fails; for LIBRARY_FAULT, a callback of a library does.
"""

import asyncio
import json
import os

from flowcontrol.events import Decision
from flowcontrol_server.admin import live
from flowcontrol_server.cli import main
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.service import Service

FAULT = "planted-fault"
LIBRARY_FAULT = "planted-library-fault"

_request_ended = Service._request_ended  # noqa: SLF001 - not compiled, unlike what it calls


def _end_or_fail(self: Service, parked: Parked, decision: Decision) -> None:
    if decision.flow_id == FAULT:
        message = "a planted fault"
        raise RuntimeError(message)
    if decision.flow_id == LIBRARY_FAULT:
        asyncio.get_running_loop().call_soon(json.loads, "no JSON")
    _request_ended(self, parked, decision)


def _fail(*_arguments: object) -> live.Reading:
    message = "a planted fault"
    raise ValueError(message)


if __name__ == "__main__":
    if os.environ.get("PLANTED") == "sample":
        live.read = _fail  # type: ignore[assignment]  # the planted fault
    Service._request_ended = _end_or_fail  # type: ignore[method-assign]  # noqa: SLF001 - the fault
    main()

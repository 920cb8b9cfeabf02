"""A test double: the real service around an engine with a planted fault.

The engine raises when a request arrives whose fairness id is FAULT. Everything else, the command
line included, is the product's. Run it as the product: `python faulty_service.py serve ...`.
"""

from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, Fact
from flowcontrol_server.cli import main

FAULT = "planted-fault"

_handle = FlowController.handle


def _handle_or_fail(self: FlowController, fact: Fact, now_ns: int) -> None:
    if isinstance(fact, Arrived) and fact.request.flow_id == FAULT:
        message = "a planted fault"
        raise RuntimeError(message)
    _handle(self, fact, now_ns)


if __name__ == "__main__":
    FlowController.handle = _handle_or_fail  # type: ignore[method-assign]  # the planted fault
    main()

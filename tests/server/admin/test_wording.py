"""What a waiting request waits for, in words and in the API."""

from dataclasses import replace

import pytest

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived
from flowcontrol.request import Request
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.views.explain import Gate, explain
from flowcontrol_server.admin.wording import sentences


@pytest.mark.parametrize("gate", Gate)
def test_every_gate(gate: Gate) -> None:
    """Whatever it waits for has a sentence of its own, and a name in the API."""
    controller = FlowController(ControllerConfig(), 0)
    controller.handle(Arrived(Request(1)), 0)
    controller.poll(0)
    explained = explain(controller, 1, 0)
    assert explained is not None
    said = sentences(replace(explained, gate=gate))[1]

    assert said.startswith(("It waits because", "It waits, although", "Nothing blocks"))
    assert gate is Gate.NONE or api.Explanation.Gate.Value(gate.name)

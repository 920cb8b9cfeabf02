"""The header by which a conformance test chooses its endpoints."""

import pytest

from flowcontrol_server.common.envoy_messages import ProcessingResponse
from flowcontrol_server.requests.classify import Intake, classify
from flowcontrol_server.requests.codec import Encoder
from flowcontrol_server.requests.conformance import SELECTION_HEADER, SERVED_HEADER, Conformance
from flowcontrol_server.requests.exchange import Acknowledge, MessageKind

POOL = ("10.0.0.1:3000", "10.0.0.1:3002", "10.0.0.2:3000", "[fd00::1]:3000")
INTAKE = Intake(conformance=Conformance(lambda: POOL))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("10.0.0.2", ("10.0.0.2:3000",)),
        ("10.0.0.1", ("10.0.0.1:3000", "10.0.0.1:3002")),
        ("10.0.0.1:3002", ("10.0.0.1:3002",)),
        ("10.0.0.2, 10.0.0.1:3000", ("10.0.0.1:3000", "10.0.0.2:3000")),
        ("[fd00::1]", ("[fd00::1]:3000",)),
        ("10.0.0.9", ()),
        ("", ()),
    ],
)
def test_selection(selection: str, expected: tuple[str, ...]) -> None:
    """An address stands for all of its ports; what is not of the pool counts for nothing."""
    assert classify({SELECTION_HEADER: selection}, {}, INTAKE).subset == expected


def test_no_selection() -> None:
    """Without the header, or without the switch, any endpoint will do."""
    assert classify({}, {}, INTAKE).subset is None
    assert classify({SELECTION_HEADER: "10.0.0.2"}, {}, Intake()).subset is None


def test_served() -> None:
    """The answer to the headers of a response names who served it."""
    (data,) = Encoder().encode(Acknowledge(MessageKind.RESPONSE_HEADERS, "10.0.0.2:3000"))
    response = ProcessingResponse.FromString(data)
    (option,) = response.response_headers.response.header_mutation.set_headers

    assert (option.header.key, option.header.raw_value) == (SERVED_HEADER, b"10.0.0.2:3000")

"""What a serving process writes, whoever writes it."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
import structlog

from flowcontrol_server.telemetry import logs
from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR, Sink
from flowcontrol_server.telemetry.output import queued_output


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    """Structlog as it is before and after the service has it to itself."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def test_streams() -> None:
    """`print` and tracebacks pass through the sink by whole lines, then no more."""
    before = sys.stdout, sys.stderr
    file = io.BytesIO()
    with queued_output(Sink(file)):
        print("out")  # noqa: T201 - what a library may do
        print("e", end="", file=sys.stderr)  # noqa: T201 - as above
        print("rr", file=sys.stderr)  # noqa: T201 - as above
        print("no end", end="", file=sys.stderr)  # noqa: T201 - as above

    assert file.getvalue() == b"out\nerr\nno end\n"
    assert (sys.stdout, sys.stderr) == before


def test_libraries(capfd: pytest.CaptureFixture[str]) -> None:
    """What libraries log, and warnings, are lines of our log; below warning they are none."""
    logs.configure("info")
    library = logging.getLogger("a.library")
    with queued_output(STANDARD_ERROR):
        library.info("unheard")
        library.warning("%d of %d", 1, 2)
        library.log(logging.ERROR + 5, "between levels")
        warnings.showwarning("old", DeprecationWarning, "file.py", 1)

    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["library_logged"] * 3
    assert [line["level"] for line in lines] == ["warning", "error", "warning"]
    assert [line["logger"] for line in lines] == ["a.library", "a.library", "py.warnings"]
    assert [line["message"] for line in lines[:2]] == ["1 of 2", "between levels"]

"""The canonical line of a request."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from flowcontrol.events import Decision
from flowcontrol.request import Outcome, Request
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.telemetry import logs
from flowcontrol_server.telemetry.log_sink import Sink

MS = 1_000_000
DISPATCHED = Decision(
    request_id=7,
    outcome=Outcome.DISPATCHED,
    priority=10,
    flow_id="tenant",
    waited_ns=1_234_567,
    endpoint="10.0.0.5:8000",
    saturation=0.98765,
    waiting=4,
)


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    """Structlog as it is before and after the service has it to itself."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def request(decided_ns: int = 1, left_ns: int | None = 2) -> Parked:
    """A request that is over."""
    return Parked(
        Request(7, "tenant", "chat", 2048, 5000 * MS, model="llama-70b"),
        "e7f1",
        "/v1/chat/completions",
        decided_ns=decided_ns,
        left_ns=left_ns,
    )


def line_of(
    decision: Decision,
    decided_ns: int = 100 * MS,
    left_ns: int | None = 350 * MS,
    *,
    continue_on_fault: bool = False,
) -> Any:
    """The one line that is written when such a request is over."""
    parked = request(decided_ns, left_ns)
    written = io.BytesIO()
    log = logs.request_log(lambda _write: None, Sink(written))
    log.request_ended(parked, decision, continue_on_fault=continue_on_fault)
    log.write()
    line = json.loads(written.getvalue())
    assert line.pop("timestamp").endswith("Z")
    return line


class TestRequestEnded:
    """One line per request, at its end."""

    def test_dispatched(self) -> None:
        """A request that went on has its wait, its time in flight and its endpoint."""
        expected = {
            "event": "request_decided",
            "level": "info",
            "request_id": 7,
            "client_request_id": "e7f1",
            "flow_id": "tenant",
            "objective": "chat",
            "model": "llama-70b",
            "priority": 10,
            "outcome": "dispatched",
            "http_status": None,
            "waited_ms": 1.235,
            "in_flight_ms": 250.0,
            "byte_size": 2048,
            "saturation": 0.988,
            "waiting": 4,
            "endpoint": "10.0.0.5:8000",
        }

        assert expected == line_of(DISPATCHED)

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            (Outcome.REJECTED_CAPACITY, 429),
            (Outcome.REJECTED_NO_ENDPOINTS, 503),
            (Outcome.REJECTED_DRAINING, 503),
            (Outcome.EVICTED_TTL, 429),
            (Outcome.EVICTED_NO_ENDPOINTS, 503),
            (Outcome.EVICTED_DISPLACED, 429),
            (Outcome.EVICTED_CANCELLED, 499),
            (Outcome.EVICTED_DRAINED, 503),
            (Outcome.EVICTED_STOOD_DOWN, 503),
            (Outcome.EVICTED_MOVED, None),
            (Outcome.INTERNAL, 500),
        ],
    )
    def test_refused(self, outcome: Outcome, status: int | None) -> None:
        """A request that did not has the status its client got, and was never in flight."""
        line = line_of(replace(DISPATCHED, outcome=outcome, endpoint=None))

        assert line["outcome"] == outcome.value
        assert line["http_status"] == status
        assert line["in_flight_ms"] == 0.0
        assert line["endpoint"] is None

    def test_let_on(self) -> None:
        """A request that went on although the engine had failed was told nothing; others were."""
        fault = replace(DISPATCHED, outcome=Outcome.INTERNAL, endpoint=None)
        refused = replace(fault, outcome=Outcome.EVICTED_TTL)

        assert line_of(fault, continue_on_fault=True)["http_status"] is None
        assert line_of(refused, continue_on_fault=True)["http_status"] == 429

    def test_reclaimed(self) -> None:
        """A request that was ended in flight has both: the status, and how long it was there."""
        line = line_of(replace(DISPATCHED, outcome=Outcome.RECLAIMED))

        assert (line["outcome"], line["http_status"]) == ("reclaimed", 429)
        assert line["in_flight_ms"] == line_of(DISPATCHED)["in_flight_ms"] > 0

    def test_left_before_the_news(self) -> None:
        """A request that left while its dispatch crossed was in flight for no time."""
        assert line_of(DISPATCHED, decided_ns=100 * MS, left_ns=90 * MS)["in_flight_ms"] == 0.0

    def test_no_header_values(self) -> None:
        """The line has these keys and no others: no path, no header, no body."""
        assert line_of(DISPATCHED).keys() == {
            *("event", "level", "request_id", "client_request_id", "flow_id", "objective"),
            *("model", "priority", "outcome", "http_status", "waited_ms", "in_flight_ms"),
            "byte_size",
            *("saturation", "waiting", "endpoint"),
        }


class TestWriting:
    """Many at once."""

    def test_together(self, capfd: pytest.CaptureFixture[str]) -> None:
        """The first that ends asks to be written soon; until then the others join it."""
        asked: list[Callable[[], None]] = []
        log = logs.request_log(asked.append)
        parked = request()
        for request_id in range(3):
            log.request_ended(parked, replace(DISPATCHED, flow_id=f'"{request_id}\n\x00é'))
        assert capfd.readouterr().err == ""

        (write,) = asked
        write()
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        log.write()

        assert [line["flow_id"] for line in lines] == [f'"{number}\n\x00é' for number in range(3)]
        assert capfd.readouterr().err == ""
        log.request_ended(parked, DISPATCHED)
        assert len(asked) == 2

    def test_level(self, capfd: pytest.CaptureFixture[str]) -> None:
        """They are lines of level info."""
        logs.configure("warning")
        log = logs.request_log(lambda _write: None)
        log.request_ended(request(), DISPATCHED)
        log.write()

        assert capfd.readouterr().err == ""


class TestConfigure:
    """JSON on standard error."""

    def test_a_line(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A line is one JSON object with level, time in UTC, event and its keys."""
        logs.configure("info")
        structlog.get_logger().info("drain_began", budget_ms=1.5, flow_id='a"\n\x00é')

        captured = capfd.readouterr()
        line = json.loads(captured.err)
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert line.pop("timestamp").endswith("Z")
        assert line == {
            "event": "drain_began",
            "level": "info",
            "budget_ms": 1.5,
            "flow_id": 'a"\n\x00é',
        }

    @pytest.mark.parametrize(
        ("level", "shown"),
        [
            ("debug", ["debug", "info", "warning", "error"]),
            ("info", ["info", "warning", "error"]),
            ("warning", ["warning", "error"]),
            ("error", ["error"]),
        ],
    )
    def test_levels(self, capfd: pytest.CaptureFixture[str], level: str, shown: list[str]) -> None:
        """What is below the level is not written."""
        logs.configure(level)
        logger = structlog.get_logger()
        for each in ("debug", "info", "warning", "error"):
            getattr(logger, each)("event")

        lines = capfd.readouterr().err.splitlines()
        assert shown == [json.loads(line)["level"] for line in lines]

    def test_exceptions(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A fault is written with its traceback, on the same line."""
        logs.configure("error")
        fault = AssertionError("a request was lost")
        structlog.get_logger().critical("processor_failed", exc_info=fault)

        captured = capfd.readouterr().err
        assert captured.count("\n") == 1
        (exception,) = json.loads(captured)["exception"]
        assert exception["exc_type"] == "AssertionError"
        assert exception["exc_value"] == "a request was lost"

    def test_variables_stay_out_of_tracebacks(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A traceback names lines; what variables held there, such as a key, is not written."""
        logs.configure("error")

        def read(headers: dict[str, str]) -> None:
            """Fail with a request in hand."""
            headers.pop(":path")

        try:
            read({"authorization": "Bearer key-of-a-client"})
        except KeyError:
            structlog.get_logger().exception("callback_failed")

        captured = capfd.readouterr().err
        assert "key-of-a-client" not in captured
        assert '"name": "read"' in captured

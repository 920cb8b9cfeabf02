"""Warnings about connections are bounded."""

from structlog.testing import capture_logs

from flowcontrol_server.doors.connection_log import ConnectionLog


class TestConnectionLog:
    """One line of a kind between two flushes."""

    def test_bounded(self) -> None:
        """The first is logged at once, the others as one line with their count."""
        with capture_logs() as logged:
            log = ConnectionLog()
            for number in range(1_000):
                log.report("failed", reason=number)
            log.report("cut_off", reason="other")
            log.flush()

        assert [(line["event"], line["reason"], line.get("count")) for line in logged] == [
            ("failed", 0, None),
            ("cut_off", "other", None),
            ("failed", 999, 999),
        ]

    def test_quiet(self) -> None:
        """After an interval without any, the next one is logged at once."""
        with capture_logs() as logged:
            log = ConnectionLog()
            log.report("failed", reason="first")
            log.flush()
            log.report("failed", reason="second")
            log.flush()

        assert [line["reason"] for line in logged] == ["first", "second"]

"""What is wrong now, and since when."""

from flowcontrol_server.common.status import PROBLEMS_MAX, Problem, ServiceStatus
from tests.support.standing import ABOUT


class TestStatus:
    """Problems as they come and go."""

    def test_since(self) -> None:
        """A problem keeps the time it was first seen, also when its words change."""
        now_s, found = 100.0, [("chat.yaml", "is not YAML")]
        status = ServiceStatus({"source": lambda: found}, lambda: ABOUT, lambda: now_s)
        first = status.problems()
        now_s, found = 160.0, [("chat.yaml", "cannot be read"), ("b.yaml", "is not YAML")]

        assert first == [Problem("source", "chat.yaml", "is not YAML", 100.0)]
        assert status.problems() == [
            Problem("source", "chat.yaml", "cannot be read", 100.0),
            Problem("source", "b.yaml", "is not YAML", 160.0),
        ]

    def test_gone(self) -> None:
        """One that went away and comes back begins again."""
        now_s, found = 100.0, [("chat.yaml", "is not YAML")]
        status = ServiceStatus({"source": lambda: found}, lambda: ABOUT, lambda: now_s)
        status.problems()
        found = []
        assert status.problems() == []
        now_s, found = 160.0, [("chat.yaml", "is not YAML")]
        assert [each.since_s for each in status.problems()] == [160.0]

    def test_bounded(self) -> None:
        """Of each kind at most so many are shown, and of each text so much."""
        many = [(f"r{index}", "x" * 10_000) for index in range(1000)]
        status = ServiceStatus({"load": lambda: many}, lambda: ABOUT)

        assert len(status.problems()) == PROBLEMS_MAX
        assert {len(each.text) for each in status.problems()} == {500}

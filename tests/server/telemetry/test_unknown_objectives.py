"""Objectives that are not declared: each is reported once."""

from structlog.testing import capture_logs

from flowcontrol.events import EndpointsChanged, Fact, ObjectivesChanged
from flowcontrol_server.telemetry.unknown_objectives import NAMES_MAX, UnknownObjectives


def told(unknown: UnknownObjectives, *objectives: str | None, priority: int = 0) -> list[str]:
    """Return of whom the log is told as requests that named these end."""
    with capture_logs() as lines:
        for objective in objectives:
            unknown.request_ended(objective, priority)
    assert {(line["event"], line["log_level"]) for line in lines} <= {
        ("objective_unknown", "warning")
    }
    return [line["objective"] for line in lines]


class TestUnknownObjectives:
    """What the log says."""

    def test_each_once(self) -> None:
        """Not of who named none, nor of a declared one."""
        unknown = UnknownObjectives(lambda _fact: None)
        unknown.post(ObjectivesChanged({"chat": 10}))

        assert told(unknown, "caht", None, "chat", "caht", "batch", "caht") == ["caht", "batch"]

    def test_declared_live(self) -> None:
        """The latest set counts, and everything is passed on."""
        posted: list[Fact] = []
        unknown = UnknownObjectives(posted.append)
        facts: list[Fact] = [
            ObjectivesChanged({"chat": 10}),
            ObjectivesChanged({}),
            EndpointsChanged(("a",)),
        ]
        unknown.post(facts[0])
        before = told(unknown, "chat")
        for fact in facts[1:]:
            unknown.post(fact)

        assert (before, told(unknown, "chat")) == ([], ["chat"])
        assert told(unknown, "scraps", priority=-1) == []  # it was declared when it came
        assert posted == facts

    def test_bounded(self) -> None:
        """The names are the clients'; the last line says that it is the last."""
        unknown = UnknownObjectives(lambda _fact: None)
        with capture_logs() as lines:
            for number in range(2 * NAMES_MAX):
                unknown.request_ended(f"name-{number}", 0)

        assert [line["further_names_suppressed"] for line in lines] == [False] * (NAMES_MAX - 1) + [
            True
        ]

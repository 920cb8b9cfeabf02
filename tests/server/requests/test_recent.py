"""The ring of newest decisions."""

from flowcontrol.events import Decision
from flowcontrol.request import Outcome, Request
from flowcontrol_server.requests.recent import RecentDecisions, own_id


def keep(
    recent: RecentDecisions,
    request_id: int,
    client_id: str = "",
    *,
    outcome: Outcome = Outcome.DISPATCHED,
    flow_id: str = "a",
    priority: int = 0,
) -> None:
    """One decision."""
    decision = Decision(request_id, outcome, priority, flow_id, 5)
    recent.keep(Request(request_id, flow_id), client_id, decision, request_id)


def ids(recent: RecentDecisions, **wanted: object) -> list[int]:
    """The newest that fit."""
    return [each.decision.request_id for each in recent.newest(9, **wanted)]  # type: ignore[arg-type]  # of a test


class TestRing:
    """Bounded, and found both ways."""

    def test_the_oldest_is_forgotten(self) -> None:
        """By every name it had."""
        recent = RecentDecisions(2)
        for request_id in (1, 2, 3):
            keep(recent, request_id, f"client-{request_id}")

        assert len(recent) == 2
        assert ids(recent) == [3, 2]
        assert recent.find("1") is None
        assert recent.find("client-1") is None

    def test_ours_before_theirs(self) -> None:
        """A client may call its request by a number."""
        recent = RecentDecisions(9)
        keep(recent, 7, "8")
        keep(recent, 8, "c")
        by_ours, by_theirs = recent.find("8"), recent.find("c")

        assert by_ours is not None
        assert by_ours is by_theirs
        assert by_ours.decision.request_id == 8

    def test_the_latest_of_a_client_that_repeats_itself(self) -> None:
        """And its forgotten first one takes nothing with it."""
        recent = RecentDecisions(2)
        for request_id in (1, 2, 3):
            keep(recent, request_id, "same")
        found = recent.find("same")

        assert found is not None
        assert found.decision.request_id == 3

    def test_filters(self) -> None:
        """By band, flow and outcome."""
        recent = RecentDecisions(9)
        keep(recent, 1, flow_id="a", priority=10)
        keep(recent, 2, flow_id="b", outcome=Outcome.EVICTED_TTL)
        keep(recent, 3, flow_id="a")

        assert ids(recent, priority=0) == [3, 2]
        assert ids(recent, flow_id="a") == [3, 1]
        assert ids(recent, outcome="evicted-ttl") == [2]
        assert [each.decision.request_id for each in recent.newest(1)] == [3]

    def test_time_of_day(self) -> None:
        """As the clock stood at the decision, whatever the machine slept since the start."""
        times = iter((10**18, 2 * 10**18))
        recent = RecentDecisions(2, lambda: next(times))
        keep(recent, 1)
        keep(recent, 2)

        assert [each.wall_ns for each in recent.newest(2)] == [2 * 10**18, 10**18]


def test_what_can_be_an_id_of_ours() -> None:
    """A number, and not a longer one than there will ever be."""
    assert own_id("12") == 12
    assert [own_id(text) for text in ("", "a1", "٣", "1" * 19)] == [None] * 4

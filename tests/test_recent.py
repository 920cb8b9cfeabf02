"""The ring of newest decisions."""

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from server.classify import RequestFacts
from server.recent import RecentDecisions, is_ours


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
    facts = RequestFacts(flow_id, None, 0, None, client_id, "/")
    recent.keep(facts, Decision(request_id, outcome, priority, flow_id, 5), request_id)


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
        """In nanoseconds since 1970."""
        assert RecentDecisions(1).wall_ns(0) < RecentDecisions(1).wall_ns(10**12)


def test_what_can_be_an_id_of_ours() -> None:
    """A number, and not a longer one than there will ever be."""
    assert is_ours("12")
    assert not is_ours("")
    assert not is_ours("a1")
    assert not is_ours("٣")
    assert not is_ours("1" * 19)

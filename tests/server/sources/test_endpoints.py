"""Endpoints of several sources, together."""

import pytest

from flowcontrol.config import Role
from flowcontrol.events import Endpoint
from flowcontrol_server.sources.endpoints import Roster, role_of_label

A, B, C = Endpoint("10.0.0.5:8000"), Endpoint("10.0.0.6:8000"), Endpoint("10.0.0.7:8000")


@pytest.fixture(name="told")
def _told() -> list[tuple[Endpoint, ...]]:
    """Who was present at each change."""
    return []


@pytest.fixture(name="roster")
def _roster(told: list[tuple[Endpoint, ...]]) -> Roster:
    """An empty roster."""
    roster = Roster(lambda: told.append(roster.present))
    return roster


Changes = list[tuple[Endpoint, ...]]


class TestRoster:
    """Who is known, and who is present."""

    def test_sources_add_up(self, roster: Roster, told: Changes) -> None:
        """What several sources know counts together, each address once, sorted."""
        roster.know("dns", [C, A])
        roster.know("file", [B, A])

        assert told == [(A, C), (A, B, C)]
        assert roster.addresses == (A.address, B.address, C.address)

    def test_sources_are_replaced_whole(self, roster: Roster, told: Changes) -> None:
        """What a source no longer knows is gone, unless another knows it."""
        roster.know("dns", [A, B])
        roster.know("file", [B])
        roster.know("dns", [C])
        roster.forget("file")

        assert told == [(A, B), (A, B), (B, C), (C,)]

    def test_forgetting_a_stranger(self, roster: Roster, told: Changes) -> None:
        """To forget a source that knew nothing is no change."""
        roster.forget("file")

        assert told == []

    def test_the_first_word_on_a_role_counts(self, roster: Roster) -> None:
        """Two sources that disagree on a role do not make two endpoints."""
        prefill = Endpoint(A.address, Role.PREFILL)
        roster.know("file", [prefill])
        roster.know("dns", [A])

        assert roster.present == (prefill,)

    def test_down(self, roster: Roster, told: Changes) -> None:
        """Who is down is known but not present, until it is up again."""
        roster.know("dns", [A, B])
        roster.mark(A.address, is_up=False)
        roster.mark(A.address, is_up=False)
        assert roster.down == {A.address}
        assert roster.addresses == (A.address, B.address)
        roster.mark(A.address, is_up=True)
        roster.mark(B.address, is_up=True)

        assert told == [(A, B), (B,), (A, B)]

    def test_a_stranger_is_not_down(self, roster: Roster) -> None:
        """An address nobody knows cannot be down, and is not when it comes."""
        roster.know("dns", [A])
        roster.mark(B.address, is_up=False)
        roster.know("dns", [A, B])

        assert roster.present == (A, B)

    def test_down_ends_with_the_endpoint(self, roster: Roster) -> None:
        """An endpoint that leaves while down and comes back is another one."""
        roster.know("dns", [A, B])
        roster.mark(A.address, is_up=False)
        roster.know("dns", [B])
        roster.know("dns", [A, B])

        assert roster.present == (A, B)


class TestRoleOfLabel:
    """The words of llm-d.ai/role."""

    @pytest.mark.parametrize(
        ("label", "role"),
        [
            ("", Role.BOTH),
            ("both", Role.BOTH),
            ("prefill", Role.PREFILL),
            ("decode", Role.DECODE),
            ("encode-prefill", Role.PREFILL),
            ("prefill-decode", Role.BOTH),
            ("encode-prefill-decode", Role.BOTH),
            ("encode", None),
            ("unheard-of", Role.BOTH),
        ],
    )
    def test_words(self, label: str, role: Role | None) -> None:
        """Each has its meaning."""
        assert role_of_label(label) == role

"""Which endpoints are down, and for how long."""

import pytest

from flowcontrol_server.sources.health import (
    EJECTED_FIRST_S,
    EJECTED_LONGEST_S,
    FAILURES_MAX,
    EndpointHealth,
)

A, B, C = "10.0.0.5:8000", "10.0.0.6:8000", "10.0.0.7:8000"
Changes = list[tuple[str, bool]]


@pytest.fixture(name="changes")
def _changes() -> Changes:
    """What was told."""
    return []


@pytest.fixture(name="health")
def _health(changes: Changes) -> EndpointHealth:
    """Three endpoints, all well."""
    health = EndpointHealth(3, lambda address, is_up: changes.append((address, is_up)))
    health.watch([A, B, C])
    return health


def fail(health: EndpointHealth, address: str, now_s: float, count: int = FAILURES_MAX) -> None:
    """So many requests fail there."""
    for _ in range(count):
        health.outcome(address, now_s, is_failure=True)


class TestUnreachable:
    """Nobody listens."""

    def test_misses_in_a_row(self, health: EndpointHealth, changes: Changes) -> None:
        """The third miss in a row takes an endpoint out; it is told once."""
        health.missed(A, 0)
        health.missed(A, 1)
        assert changes == []
        health.missed(A, 2)
        health.missed(A, 3)

        assert changes == [(A, False)]

    def test_an_answer_in_between(self, health: EndpointHealth, changes: Changes) -> None:
        """Misses must come in a row."""
        for now_s in range(10):
            health.missed(A, now_s)
            health.missed(A, now_s)
            health.reached(A, now_s)

        assert changes == []

    def test_the_first_answer_ends_it(self, health: EndpointHealth, changes: Changes) -> None:
        """One answer is enough to come back."""
        for now_s in range(5):
            health.missed(A, now_s)
        health.reached(A, 5)

        assert changes == [(A, False), (A, True)]

    def test_nobody_looks_any_more(self, health: EndpointHealth, changes: Changes) -> None:
        """What was missed is forgotten, and who fails stays out for that."""
        fail(health, B, 5)
        for now_s in range(3):
            health.missed(A, now_s)
            health.missed(B, now_s)
        health.missed(C, 2)
        health.forget_misses(6)
        health.missed(C, 7)
        health.missed(C, 8)

        assert changes == [(B, False), (A, False), (A, True)]

    def test_all_may_be_unreachable(self, health: EndpointHealth, changes: Changes) -> None:
        """When nobody listens anywhere the pool is empty."""
        for address in (A, B, C):
            for now_s in range(3):
                health.missed(address, now_s)

        assert changes == [(A, False), (B, False), (C, False)]

    def test_strangers(self, health: EndpointHealth, changes: Changes) -> None:
        """Who is not watched is not judged; who leaves is forgotten."""
        for now_s in range(2):
            health.missed(A, now_s)
            health.missed("10.9.9.9:1", now_s)
        health.watch([B])
        health.watch([A, B])
        health.missed(A, 3)
        health.reached("10.9.9.9:1", 3)
        health.outcome("10.9.9.9:1", 3, is_failure=True)

        assert changes == []


class TestFailing:
    """It answers, but what it answers is failure."""

    def test_failures_in_a_row(self, health: EndpointHealth, changes: Changes) -> None:
        """Five failed requests in a row take an endpoint out for ten seconds."""
        fail(health, A, 0, FAILURES_MAX - 1)
        assert changes == []
        fail(health, A, 0, 1)
        health.advance(EJECTED_FIRST_S - 0.1)
        assert changes == [(A, False)]
        health.advance(EJECTED_FIRST_S)

        assert changes == [(A, False), (A, True)]

    def test_when_to_advance(self, health: EndpointHealth) -> None:
        """It says when the first of those out for failing may try again; None: nobody is out."""
        health.watch([A, B, C, "10.0.0.8:8000"])
        times = [health.next_s]
        fail(health, A, 0)
        fail(health, B, 3)
        times.append(health.next_s)
        health.advance(EJECTED_FIRST_S)
        times.append(health.next_s)
        health.watch([A, C])
        times.append(health.next_s)

        assert times == [None, EJECTED_FIRST_S, 3 + EJECTED_FIRST_S, None]

    def test_a_success_in_between(self, health: EndpointHealth, changes: Changes) -> None:
        """Failures must come in a row."""
        for _ in range(10):
            fail(health, A, 0, FAILURES_MAX - 1)
            health.outcome(A, 0, is_failure=False)

        assert changes == []

    def test_probation(self, health: EndpointHealth, changes: Changes) -> None:
        """After a rest one failure is enough, and each rest is twice as long, up to the longest."""
        fail(health, A, 0)
        now_s = 0.0
        for rest_s in (10, 20, 40, 80, 160, 160):
            health.advance(now_s + rest_s - 0.1)
            assert changes == [(A, False)]
            now_s += rest_s
            health.advance(now_s)
            assert changes == [(A, False), (A, True)]
            changes.clear()
            fail(health, A, now_s, 1)

        assert rest_s == EJECTED_LONGEST_S

    def test_success_ends_probation(self, health: EndpointHealth, changes: Changes) -> None:
        """One success, and it takes five failures again."""
        fail(health, A, 0)
        health.advance(10)
        health.outcome(A, 10, is_failure=False)
        fail(health, A, 10, FAILURES_MAX - 1)

        assert changes == [(A, False), (A, True)]

    def test_an_answer_to_a_scrape_is_no_success(
        self, health: EndpointHealth, changes: Changes
    ) -> None:
        """A server whose metrics are well may fail every request all the same."""
        fail(health, A, 0)
        health.reached(A, 1)

        assert changes == [(A, False)]

    def test_not_more_than_half(self, health: EndpointHealth, changes: Changes) -> None:
        """Where all fail, the fault is not theirs: of three one goes at most."""
        for address in (A, B, C):
            fail(health, address, 0)
        assert changes == [(A, False)]
        health.advance(10)
        fail(health, B, 10, 1)

        assert changes == [(A, False), (A, True), (B, False)]

    def test_the_only_one(self, changes: Changes) -> None:
        """A single endpoint is never taken out for failing."""
        health = EndpointHealth(3, lambda address, is_up: changes.append((address, is_up)))
        health.watch([A])
        fail(health, A, 0, 100)

        assert changes == []

    def test_both_reasons(self, health: EndpointHealth, changes: Changes) -> None:
        """Out for both reasons, it comes back when both have ended."""
        fail(health, A, 0)
        for now_s in range(3):
            health.missed(A, now_s)
        health.advance(10)
        assert changes == [(A, False)]
        health.reached(A, 11)

        assert changes == [(A, False), (A, True)]

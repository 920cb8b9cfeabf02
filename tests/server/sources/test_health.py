"""Which endpoints are down because requests could not be sent to them."""

from flowcontrol_server.sources.health import (
    REFUSALS_MAX,
    REFUSED_FIRST_S,
    REFUSED_LONGEST_S,
    EndpointHealth,
)

POOL = ("10.0.0.5:8000", "10.0.0.6:8000")
FIRST, SECOND = POOL


class Judged:
    """Health, and which endpoints it says are up."""

    def __init__(self) -> None:
        self.up = set(POOL)
        self.health = EndpointHealth(3, self._changed)
        self.health.watch(POOL)

    def _changed(self, address: str, is_up: bool) -> None:  # noqa: FBT001 - as it is told
        (self.up.add if is_up else self.up.discard)(address)

    def refuse(self, address: str, times: int, now_s: float = 0.0) -> None:
        """Have so many requests not be sent there."""
        for _ in range(times):
            self.health.refused(address, now_s)


class TestRefusing:
    """Envoy cannot connect."""

    def test_several_in_a_row(self) -> None:
        """Several refusals in a row take an endpoint out; an answer in between begins again."""
        judged = Judged()
        judged.refuse(FIRST, REFUSALS_MAX - 1)
        judged.health.outcome(FIRST, 0.0, is_failure=False)
        judged.refuse(FIRST, REFUSALS_MAX - 1)
        assert judged.up == {FIRST, SECOND}
        judged.refuse(FIRST, 1)
        assert judged.up == {SECOND}

    def test_whole_pool(self) -> None:
        """All of them may be out: requests wait instead of being sent into refusals."""
        judged = Judged()
        for address in POOL:
            judged.refuse(address, REFUSALS_MAX)

        assert judged.up == set()

    def test_tried_again(self) -> None:
        """Each is tried again after a second; one more refusal doubles the time, to a bound."""
        judged = Judged()
        judged.refuse(FIRST, REFUSALS_MAX)
        now_s, rests = 0.0, []
        for _ in range(6):
            assert judged.up == {SECOND}
            until_s = judged.health.next_s
            assert until_s is not None
            rests.append(until_s - now_s)
            now_s = until_s
            judged.health.advance(now_s)
            assert judged.up == {FIRST, SECOND}
            judged.refuse(FIRST, 1, now_s)

        assert rests == [min(REFUSED_FIRST_S * 2**n, REFUSED_LONGEST_S) for n in range(6)]

    def test_answer_ends_it(self) -> None:
        """Once it has answered, it counts from the beginning."""
        judged = Judged()
        judged.refuse(FIRST, REFUSALS_MAX)
        judged.health.advance(REFUSED_FIRST_S)
        judged.health.outcome(FIRST, 2.0, is_failure=False)
        judged.refuse(FIRST, REFUSALS_MAX - 1, 3.0)

        assert judged.up == {FIRST, SECOND}

    def test_late_refusals(self) -> None:
        """Refusals that are reported while it is out are of before, and do not lengthen it."""
        judged = Judged()
        judged.refuse(FIRST, 50)

        assert judged.health.next_s == REFUSED_FIRST_S

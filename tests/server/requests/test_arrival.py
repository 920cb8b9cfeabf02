"""How old a request is by Envoy's clock."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.requests.arrival import FRESH_NS, ArrivalClock

MS = 1_000_000
SECOND = 1_000 * MS
LONGEST_NS = 60 * SECOND
WALL_NS = 1_795_873_709_000_000_000
SENT_AGAIN = pytest.approx(7 * SECOND - FRESH_NS, abs=2 * MS)
"""The age of a request that Envoy saw 7 s ago."""


class Envoy:
    """Sends requests to a gate, by a clock that differs from the gate's."""

    def __init__(self, ahead_ns: int = 0) -> None:
        self.clock = ArrivalClock(LONGEST_NS)
        self.ahead_ns = ahead_ns
        self.now_ns = 5 * SECOND
        self.set_ns = 0
        """By how much the gate's clock was set since."""

    def send(self, age_ns: int = MS) -> int:
        """A request of that age; return the age that the gate believes."""
        true_ns = WALL_NS + self.now_ns
        wall_ns = true_ns + self.set_ns
        began_ns = true_ns - age_ns + self.ahead_ns
        began = datetime.fromtimestamp(began_ns // 1000 / 1e6, UTC).isoformat()
        return self.clock.age_ns(began, wall_ns, self.now_ns)

    def settle(self) -> None:
        """Send fresh requests for half a minute."""
        for _ in range(30):
            self.now_ns += SECOND
            self.send()


class TestAge:
    """What is believed."""

    def test_as_envoy_writes_it(self) -> None:
        """Microseconds, and an offset."""
        clock = ArrivalClock(LONGEST_NS)
        began = "2026-11-28T13:48:29.447108+00:00"
        wall_ns = int(datetime(2026, 11, 28, 13, 48, 32, tzinfo=UTC).timestamp()) * SECOND

        assert clock.age_ns(began, wall_ns, 0) == 2_552_892_000 - FRESH_NS

    def test_fresh(self) -> None:
        """What comes straight from Envoy has no age: it is served as it comes."""
        envoy = Envoy()

        assert envoy.send(99 * MS) == 0
        assert envoy.send(101 * MS) == pytest.approx(1 * MS, abs=2000)

    def test_sent_again(self) -> None:
        """At a replica that knows the clock, and at one that just started."""
        envoy, starting = Envoy(), Envoy()
        envoy.settle()

        assert envoy.send(7 * SECOND) == SENT_AGAIN
        assert starting.send(7 * SECOND) == SENT_AGAIN

    @pytest.mark.parametrize("ahead_ns", [-900 * MS, -200 * MS, 200 * MS, 900 * MS])
    def test_skew(self, ahead_ns: int) -> None:
        """Clocks that differ somewhat are compared."""
        envoy = Envoy(ahead_ns)
        envoy.settle()

        assert envoy.send() == 0
        assert envoy.send(7 * SECOND) == SENT_AGAIN

    @pytest.mark.parametrize("ahead_ns", [-3600 * SECOND, -5 * SECOND, 5 * SECOND, 3600 * SECOND])
    def test_skew_is_capped(self, ahead_ns: int) -> None:
        """Clocks that differ more say nothing."""
        envoy = Envoy(ahead_ns)
        envoy.settle()

        assert envoy.send() == 0
        assert envoy.send(7 * SECOND) == 0

    def test_wrong_clock_at_the_start(self) -> None:
        """Before clocks have been compared an impossible age expires nobody."""
        assert Envoy(-3600 * SECOND).send() == 0

    def test_longest_wait(self) -> None:
        """Nothing is older than the longest wait."""
        envoy = Envoy()
        envoy.settle()

        assert envoy.send(200 * SECOND) == LONGEST_NS

    def test_a_clock_that_is_set(self) -> None:
        """It is compared again within two windows."""
        envoy = Envoy()
        envoy.settle()
        envoy.ahead_ns = 500 * MS
        envoy.settle()

        assert envoy.send(7 * SECOND) == SENT_AGAIN

    def test_order_after_our_clock_was_set(self) -> None:
        """Who comes when ages are believed again goes before nobody that came while none was."""
        envoy = Envoy()
        envoy.settle()
        envoy.set_ns = 500 * MS
        arrivals_ns = []
        for _ in range(150):
            envoy.now_ns += 100 * MS
            envoy.send()
            arrivals_ns.append(envoy.now_ns - envoy.send(2 * SECOND))

        assert arrivals_ns == sorted(arrivals_ns)
        assert envoy.now_ns - arrivals_ns[-1] == pytest.approx(2 * SECOND - FRESH_NS, abs=2 * MS)

    @pytest.mark.parametrize("set_ns", [-3600 * SECOND, -SECOND, SECOND, 3600 * SECOND])
    def test_our_clock_is_set(self, set_ns: int) -> None:
        """No request gets an age by that, whether it is set back or not; then it is compared."""
        envoy = Envoy()
        envoy.settle()
        envoy.set_ns = set_ns
        at_once = envoy.send(), envoy.send(7 * SECOND)
        envoy.now_ns += 2 * SECOND
        later = envoy.send()
        envoy.set_ns = 0
        back = envoy.send()
        envoy.settle()

        assert (at_once, later, back) == ((0, 0), 0, 0)
        assert envoy.send(7 * SECOND) == SENT_AGAIN

    @pytest.mark.parametrize("ahead_ns", [-3600 * SECOND, 3600 * SECOND])
    def test_envoys_clock_is_set(self, ahead_ns: int) -> None:
        """By an hour: no request gets an age by that."""
        envoy = Envoy()
        envoy.settle()
        envoy.ahead_ns = ahead_ns

        assert (envoy.send(), envoy.send(7 * SECOND)) == (0, 0)

    @pytest.mark.parametrize("text", ["", "soon", "2026-11-28T13:48:29", "2026-13-28", "9" * 99])
    def test_no_time(self, text: str) -> None:
        """What is no time says nothing."""
        assert ArrivalClock(LONGEST_NS).age_ns(text, WALL_NS, 0) == 0

    @given(st.lists(st.tuples(st.integers(0, SECOND // 1000), st.integers(0, SECOND // 1000))))
    def test_first_stays_first(self, steps: list[tuple[int, int]]) -> None:
        """Requests that came in one order to Envoy and to us count as having come in that order.

        However long each was under way, because a worker of Envoy or this process got no time: but
        for as much as the clocks are found to be apart otherwise than before.
        """
        envoy = Envoy()
        envoy.settle()
        began_ns, latest_ns = envoy.now_ns, 0
        for later_us, delayed_us in steps:
            began_ns += later_us * 1000
            envoy.now_ns = max(envoy.now_ns, began_ns + delayed_us * 1000)
            before_ns = envoy.clock.skew_ns
            arrived_ns = envoy.now_ns - envoy.send(envoy.now_ns - began_ns)
            latest_ns -= max(0, before_ns - envoy.clock.skew_ns)

            assert arrived_ns >= latest_ns
            latest_ns = max(latest_ns, arrived_ns)

    @given(st.lists(st.tuples(st.text() | st.datetimes().map(lambda t: f"{t}Z"), st.integers(0))))
    def test_any(self, said: list[tuple[str, int]]) -> None:
        """Whatever is said, ages stay within their bounds."""
        clock, now_ns = ArrivalClock(LONGEST_NS), 0
        for began, later_ns in said:
            now_ns += later_ns
            assert 0 <= clock.age_ns(began, WALL_NS, now_ns) <= LONGEST_NS

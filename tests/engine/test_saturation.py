"""How full the pool is, and where there is room: detectors, in the pool that asks them."""

import gc
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import (
    Adaptive,
    Auto,
    Concurrency,
    ControllerConfig,
    Detector,
    Limits,
    Ordering,
    Picker,
    Role,
    Staleness,
    Utilization,
)
from flowcontrol.controller import FlowController
from flowcontrol.estimates import Tokens
from flowcontrol.events import (
    Answered,
    Arrived,
    Endpoint,
    EndpointsChanged,
    Left,
    LoadObserved,
    Settled,
)
from flowcontrol.flow import Flow, Lease
from flowcontrol.picker import FULL
from flowcontrol.pool import Pool
from flowcontrol.request import FlowKey, Request
from flowcontrol.saturation import make_detectors

SECOND = 1_000_000_000
FLOW = Flow(FlowKey(0, "a"), Ordering.FCFS, Limits())


class Gate:
    """A pool, and the leases of what is in flight in it."""

    def __init__(
        self, *detectors: Detector, picks: bool = True, pool: str | tuple[Endpoint, ...] = "ab"
    ) -> None:
        self.picker = Picker.LEAST_LOADED if picks else Picker.OFF
        self.pool = Pool(self.picker, make_detectors(detectors))
        self.now_ns = 0
        self.in_flight: list[Lease] = []
        self.number = 0
        self.become(pool)

    def become(self, pool: str | tuple[Endpoint, ...]) -> None:
        """Have other endpoints; each letter is one."""
        endpoints = tuple(Endpoint(name) for name in pool) if isinstance(pool, str) else pool
        self.pool.set_endpoints(endpoints, self.now_ns)

    def switch(self) -> None:
        """Turn the picker on, or off."""
        self.picker = Picker.OFF if self.pool.picks else Picker.LEAST_LOADED
        detectors = [each.settings for each in self.pool.detectors[Role.BOTH]]
        self.pool.reconfigure(self.picker, make_detectors(detectors), self.now_ns)

    def send(self, tokens: float = 10) -> str | None:
        """Dispatch one, and return where it went."""
        self.number += 1
        lease = Lease(Request(self.number), FLOW, self.number, 0, Tokens(tokens, 0), 1.0)
        self.pool.charge(lease, self.now_ns)
        self.in_flight.append(lease)
        return lease.endpoint

    def fill(self, most: int = 100) -> int:
        """Dispatch until there is no room; return how many."""
        sent = 0
        while self.pool.saturation() < FULL and sent < most:
            self.send()
            sent += 1
        return sent

    def end(self, address: str | None = None) -> None:
        """Let the oldest of an endpoint leave, or of all."""
        at = (n for n, lease in enumerate(self.in_flight) if address in (None, lease.endpoint))
        self.pool.release(self.in_flight.pop(next(at)), self.now_ns)

    def scrape(self, address: str, waiting: int = 0, kv_usage: float = 0.0) -> None:
        """Hear from an endpoint."""
        self.pool.observed(LoadObserved(address, waiting, 0, kv_usage), self.now_ns)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += round(seconds * SECOND)
        self.pool.advance(self.now_ns)

    def loads(self) -> dict[str, float]:
        """Return the load of each endpoint."""
        return {
            each.address: self.pool.endpoint_saturation(each.address)
            for each in self.pool.endpoints
        }


class TestConcurrency:
    """Counted exactly."""

    def test_by_requests(self) -> None:
        """From 0 to 1 in sixths, while Envoy picks from two endpoints of three."""
        gate = Gate(Concurrency(requests_max=3), picks=False)
        saturations = [gate.pool.saturation()]
        for _ in range(6):
            assert gate.send() is None
            saturations.append(gate.pool.saturation())

        assert saturations == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, FULL]
        assert gate.loads() == {"a": FULL, "b": FULL}

    def test_by_tokens(self) -> None:
        """Ten tokens each of 40 at two endpoints; what is long counts more."""
        gate = Gate(Concurrency(requests_max=None, tokens_max=40), picks=False)
        gate.send(10)
        assert gate.pool.saturation() == 1 / 8
        gate.send(70)
        assert gate.pool.saturation() == FULL
        gate.end()
        gate.end()
        assert gate.pool.saturation() == 0

    @pytest.mark.parametrize(("tokens", "fit"), [(1, 6), (10, 6), (20, 4), (40, 2)])
    def test_by_both(self, tokens: int, fit: int) -> None:
        """The fuller counts: three requests or 40 tokens at each endpoint."""
        gate = Gate(Concurrency(requests_max=3, tokens_max=40))
        sent = 0
        while gate.pool.saturation() < FULL:
            gate.send(tokens)
            sent += 1
        assert sent == fit

    def test_equals_take_turns(self) -> None:
        """An even pool is filled evenly."""
        gate = Gate(Concurrency(requests_max=3))
        assert [gate.send() for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]
        assert gate.pool.saturation() == FULL

    @pytest.mark.parametrize("detector", [Concurrency(requests_max=1), Auto(), Adaptive()])
    def test_slot_follows_the_request(self, detector: Detector) -> None:
        """A request that another endpoint serves than was picked counts there, until it ends."""
        controller = FlowController(
            ControllerConfig(detectors=(detector,), picker=Picker.LEAST_LOADED), 0
        )
        controller.handle(EndpointsChanged(("a", "b")), 0)
        controller.handle(Arrived(Request(1)), 0)
        (decision,) = controller.poll(0)
        assert decision.endpoint == "a"
        for served in ("b", "", "gone"):  # who served is not always known, nor always of the pool
            controller.handle(Answered(1, served), 1)
            controller.check_invariants()
            assert {e: load.requests for e, load in controller.pool.loads.items()} == {
                "a": 0,
                "b": 1,
            }
        controller.handle(Arrived(Request(2)), 2)
        (decision,) = controller.poll(2)
        assert decision.endpoint == "a"
        controller.handle(Left(1), 3)
        controller.check_invariants()
        assert controller.pool.loads["b"].requests == 0

    def test_room_is_used_where_it_is(self) -> None:
        """An endpoint that finished more is sent more."""
        gate = Gate(Concurrency(requests_max=3))
        gate.fill()
        gate.end("b")
        gate.end("b")

        assert [gate.send(), gate.send()] == ["b", "b"]

    def test_overfull_fills_no_other(self) -> None:
        """When the limit falls below what is in flight, an endpoint that joins has room at once."""
        gate = Gate(Concurrency(requests_max=9))
        gate.fill()
        detectors = make_detectors([Concurrency(requests_max=2)])
        gate.pool.reconfigure(gate.picker, detectors, 0)
        assert gate.pool.saturation() >= FULL
        gate.become("abc")
        assert gate.pool.saturation() == pytest.approx(2 / 3)
        assert [gate.send(), gate.send()] == ["c", "c"]
        assert gate.pool.saturation() >= FULL

    @pytest.mark.parametrize("picks", [True, False])
    def test_empty_pool_is_full(self, picks: bool) -> None:  # noqa: FBT001 - both
        """No endpoint, no room; and an absence leaves nothing behind."""
        gate = Gate(Concurrency(requests_max=3), picks=picks)
        gate.become("")
        assert gate.pool.is_empty
        assert gate.pool.saturation() == FULL
        gate.become("c")
        assert gate.pool.saturation() == 0

    def test_shrinking_pool_is_more_than_full(self) -> None:
        """While Envoy picks, what is in flight stays in flight, wherever it is."""
        gate = Gate(Concurrency(requests_max=3), picks=False)
        gate.fill()
        gate.become("a")

        assert gate.pool.saturation() == 2.0

    def test_departed_do_not_count(self) -> None:
        """They are at an endpoint whose slots do not count either; back with it, they do."""
        gate = Gate(Concurrency(requests_max=3))
        gate.fill()
        gate.become("a")
        gate.end("b")
        assert gate.pool.saturation() == FULL
        gate.end("a")
        assert gate.pool.saturation() == pytest.approx(2 / 3)
        gate.become("ab")
        assert gate.loads() == {"a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3)}

    def test_time_changes_nothing(self) -> None:
        """A count is a count."""
        gate = Gate(Concurrency(requests_max=3), pool="a")
        (detector,) = gate.pool.detectors[Role.BOTH]
        detector.advance(SECOND)
        assert detector.next_change_ns() is None

    def test_double_release_is_an_error(self) -> None:
        """A slot is given back once."""
        gate = Gate(Concurrency(requests_max=3))
        gate.send()
        (lease,) = gate.in_flight
        gate.end()
        with pytest.raises(AssertionError, match="released more than was charged"):
            gate.pool.release(lease, 0)


class Scraped:
    """What `utilization` promises, computed from everything that ever happened: the oracle."""

    def __init__(self, settings: Utilization, *, picks: bool) -> None:
        self.settings = settings
        self.picks = picks
        """Now; who was sent before it changed counts as it did."""
        self.said: dict[str, tuple[int, float, int]] = {}
        """When, what, and after how many dispatches."""
        self.sent: list[tuple[str | None, bool]] = []
        """Where, and whether it is in flight."""

    def load(self, pool: str, address: str, now_ns: int) -> float:
        """Return the load of one endpoint."""
        parts = {None: 1 / len(pool), address: 1}
        mine = [is_in_flight * parts.get(at, 0) for at, is_in_flight in self.sent]
        limit = self.settings.requests_max
        if address not in self.said:
            is_fallback = self.settings.staleness is Staleness.FALLBACK
            return sum(mine) / limit if is_fallback else FULL
        at_ns, base, number = self.said[address]
        is_stale = now_ns - at_ns >= self.settings.stale_after_ns
        if is_stale and self.settings.staleness is Staleness.CLOSED:
            return FULL
        if is_stale and self.settings.staleness is Staleness.FALLBACK:
            return sum(mine) / limit
        return base + sum(mine[number:]) / self.settings.waiting_max

    def saturation(self, pool: str, now_ns: int) -> float:
        """Return the load of the pool."""
        loads = [self.load(pool, address, now_ns) for address in pool]
        is_sure = self.picks and not any(flies for at, flies in self.sent if at is None)
        return sum(min(FULL, load) if is_sure else load for load in loads) / len(loads)


def follow(
    settings: Utilization,
    seed: int,
    *,
    picks: bool,
    make: Callable[[Gate], Gate] = lambda g: g,
    more: tuple[str, ...] = (),
) -> None:
    """Hold a pool of two or three against the oracle, for a hundred events by chance."""
    chance = Random(seed)
    pool = chance.choice(["ab", "abc"])
    gate = make(Gate(settings, picks=picks, pool=pool))
    oracle = Scraped(settings, picks=picks)
    numbers: list[int] = []
    for _ in range(100):
        match chance.choice(["send", "send", "send", "end", "scrape", "wait", *more]):
            case "send" if gate.pool.saturation() < FULL:
                oracle.sent.append((gate.send(), True))
                numbers.append(len(oracle.sent) - 1)
            case "end" if gate.in_flight:
                number = numbers.pop(0)
                oracle.sent[number] = (oracle.sent[number][0], False)
                gate.end()
            case "scrape":
                address, waiting = chance.choice(pool), chance.randint(0, 4)
                kv_usage = chance.choice([0.0, 0.4, 1.0])
                gate.scrape(address, waiting, kv_usage)
                base = max(waiting / settings.waiting_max, kv_usage / settings.kv_usage_max)
                oracle.said[address] = (gate.now_ns, base, len(oracle.sent))
            case "wait":
                gate.wait(chance.choice([0.1, 1.0, 3.0]))
            case "switch":
                gate.switch()
                oracle.picks = gate.pool.picks
            case "flap":
                gate.become("")
                gate.become(pool)
            case _:
                pass
        if gate.pool.saturation() < FULL:
            expected = oracle.saturation(pool, gate.now_ns)
            assert gate.pool.saturation() == pytest.approx(expected)
        for address, load in gate.loads().items():
            mine = oracle.load(pool, address, gate.now_ns)
            whole = oracle.saturation(pool, gate.now_ns)
            assert load == pytest.approx(mine if oracle.picks else whole)


class TestUtilization:
    """As scraped, and what was dispatched since."""

    @pytest.mark.parametrize("picks", [True, False])
    @pytest.mark.parametrize("staleness", [Staleness.HOLD, Staleness.FALLBACK, Staleness.CLOSED])
    @pytest.mark.parametrize("seed", range(4))
    def test_agrees_with_counting(self, staleness: Staleness, seed: int, picks: bool) -> None:  # noqa: FBT001 - both
        """Whatever is sent, ends, is scraped or falls silent, in whatever order."""
        follow(Utilization(staleness=staleness, requests_max=8), seed, picks=picks)

    @pytest.mark.parametrize("picks", [True, False])
    @pytest.mark.parametrize("staleness", [Staleness.HOLD, Staleness.CLOSED])
    @pytest.mark.parametrize("seed", range(8))
    def test_switching_the_picker(self, staleness: Staleness, seed: int, picks: bool) -> None:  # noqa: FBT001 - both
        """After a change of picker, what was sent before counts where it went, if that is known."""
        follow(Utilization(staleness=staleness), seed, picks=picks, more=("switch", "flap"))

    def test_picker_switched_on(self) -> None:
        """A hundred that Envoy spread over ten endpoints are ten at each, and then none."""
        gate = Gate(Utilization(waiting_max=100), picks=False, pool="abcdefghij")
        for address in "abcdefghij":
            gate.scrape(address)
        for _ in range(100):
            gate.send()
        gate.switch()
        assert gate.pool.saturation() == pytest.approx(0.1)
        assert set(gate.loads().values()) == {0.1}
        for _ in range(100):
            gate.end()
        assert set(gate.loads().values()) == {0}
        assert gate.pool.saturation() == 0

    @pytest.mark.interpreted
    @pytest.mark.parametrize("picks", [True, False])
    def test_disagrees_with_what_is_wrong(self, picks: bool) -> None:  # noqa: FBT001 - both
        """A pool that forgets to charge, or is deaf to ends, or to one endpoint, is found out."""

        def forgets(gate: Gate) -> Gate:
            (detector,) = gate.pool.detectors[Role.BOTH]
            detector.charged = lambda lease, now_ns: None  # type: ignore[method-assign]  # noqa: ARG005
            return gate

        def is_deaf(gate: Gate) -> Gate:
            (detector,) = gate.pool.detectors[Role.BOTH]
            detector.released = lambda lease, now_ns: None  # type: ignore[method-assign]  # noqa: ARG005
            return gate

        def follow_ten(make: Callable[[Gate], Gate]) -> None:
            for seed in range(10):
                follow(Utilization(staleness=Staleness.HOLD), seed, picks=picks, make=make)

        for make in (forgets, is_deaf):
            with pytest.raises(AssertionError):
                follow_ten(make)

    def test_fuller_of_two(self) -> None:
        """Requests queued inside, or the KV cache."""
        gate = Gate(Utilization(waiting_max=5, kv_usage_max=0.8), pool="a")
        gate.scrape("a", waiting=1, kv_usage=0.4)
        assert gate.pool.saturation() == 0.5
        gate.scrape("a", waiting=4, kv_usage=0.4)
        assert gate.pool.saturation() == 0.8

    def test_nothing_is_sent_twice_into_one_scrape(self) -> None:
        """However late the next: five at each of two endpoints, and no more."""
        gate = Gate(Utilization(waiting_max=5, staleness=Staleness.HOLD))
        gate.scrape("a")
        gate.scrape("b")
        assert gate.fill() == 10
        gate.wait(1)
        assert gate.fill() == 0
        gate.scrape("b", waiting=3)
        assert gate.fill() == 2
        assert gate.in_flight[-1].endpoint == "b"

    def test_what_ended_does_not_wait(self) -> None:
        """Short requests are not held up by the time between two scrapes."""
        gate = Gate(Utilization(waiting_max=2), pool="a")
        gate.scrape("a")
        for _ in range(20):
            assert gate.send() == "a"
            gate.end()
        assert gate.pool.saturation() == 0

    def test_overfull_fills_no_other(self) -> None:
        """One endpoint far over its limit leaves the other as free as it is."""
        gate = Gate(Utilization())
        gate.scrape("a", waiting=50)
        gate.scrape("b")
        assert gate.pool.saturation() == 0.5
        assert gate.send() == "b"

    @pytest.mark.parametrize(
        ("staleness", "fit"),
        [(Staleness.HOLD, 3), (Staleness.FALLBACK, 8), (Staleness.CLOSED, 0)],
    )
    def test_staleness(self, staleness: Staleness, fit: int) -> None:
        """What an endpoint counts for that said 2 of 5 and then nothing for two seconds."""
        gate = Gate(Utilization(staleness=staleness, requests_max=8), pool="a")
        gate.scrape("a", waiting=2)
        assert gate.pool.next_change_ns() == 2 * SECOND
        gate.wait(1.9)
        assert gate.pool.saturation() == 0.4
        gate.wait(0.1)
        assert gate.pool.next_change_ns() is None
        assert gate.fill() == fit

    @pytest.mark.parametrize("picks", [True, False])
    def test_decay(self, picks: bool) -> None:  # noqa: FBT001 - both
        """What it said, and what was sent since, halve each two seconds, however seldom asked."""
        gate = Gate(Utilization(staleness=Staleness.DECAY), picks=picks, pool="a")
        gate.scrape("a", waiting=3)
        assert gate.fill() == 2
        gate.wait(2)
        assert gate.pool.saturation() == FULL
        gate.wait(2)
        assert gate.pool.saturation() == 0.5
        assert gate.fill() == 3
        gate.wait(6)
        assert gate.pool.saturation() == pytest.approx(1.1 / 8)
        assert gate.pool.next_change_ns() == gate.now_ns + 2 * SECOND
        gate.scrape("a", waiting=5)
        assert gate.pool.saturation() == FULL
        for _ in range(5):
            gate.end()
        assert gate.pool.saturation() == FULL

    @pytest.mark.parametrize(
        ("staleness", "expected"),
        [
            (Staleness.HOLD, FULL),
            (Staleness.DECAY, FULL),
            (Staleness.FALLBACK, 0.0),
            (Staleness.CLOSED, FULL),
        ],
    )
    def test_never_heard_of(self, staleness: Staleness, expected: float) -> None:
        """Absence is never zero: at most what is counted is believed."""
        gate = Gate(Utilization(staleness=staleness), pool="a")
        gate.wait(100)
        assert gate.pool.saturation() == expected

    def test_a_cache_not_told(self) -> None:
        """An engine that does not say how full its cache is counts by its queue alone."""
        gate = Gate(Utilization(), pool="a")
        gate.pool.observed(LoadObserved("a", 2, running=None, kv_usage=None), 0)
        assert gate.pool.saturation() == 0.4

    def test_who_comes_back_is_new(self) -> None:
        """What an endpoint said before it left is forgotten; who stays is remembered."""
        gate = Gate(Utilization(staleness=Staleness.HOLD))
        gate.scrape("a", waiting=1)
        gate.scrape("b", waiting=1)
        gate.become("a")
        gate.scrape("b", waiting=1)
        gate.become("ab")
        assert gate.loads() == {"a": 0.2, "b": FULL}
        gate.wait(10)
        assert gate.pool.next_change_ns() is None

    def test_other_settings_know_what_was_said(self) -> None:
        """A changed setting asks for no scrape before it can serve."""
        gate = Gate(Utilization(staleness=Staleness.HOLD), pool="a")
        gate.scrape("a", waiting=2)
        changed = make_detectors([Utilization(waiting_max=10, staleness=Staleness.HOLD)])
        gate.pool.reconfigure(gate.picker, changed, 0)
        gate.send()
        assert gate.pool.saturation() == pytest.approx(0.4 + 0.1)

    @pytest.mark.parametrize("picks", [True, False])
    def test_who_ends_in_an_empty_pool(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Endpoints that flap leave nothing behind, and forget no request that is still there."""
        gate = Gate(Utilization(staleness=Staleness.HOLD), picks=picks, pool="a")
        gate.scrape("a")
        for left in (1, 2):
            gate.send()
            gate.send()
            gate.become("")
            gate.end()
            gate.become("a")
            assert gate.pool.saturation() == pytest.approx(left / 5)
        gate.become("")
        gate.end()
        gate.end()
        gate.become("a")
        assert gate.pool.saturation() == 0
        (detector,) = gate.pool.detectors[Role.BOTH]
        books = [each for each in gc.get_referents(detector) if isinstance(each, dict)]
        assert [len(book) for book in books if None not in book and "a" not in book] == [0]

    def test_who_ends_while_nobody_decodes(self) -> None:
        """Each stage hears of the end of what it was charged for, and of nothing else."""
        pool = (Endpoint("p", Role.PREFILL), Endpoint("d", Role.DECODE))
        gate = Gate(Utilization(staleness=Staleness.HOLD), picks=False, pool=pool)
        gate.scrape("p")
        gate.scrape("d")
        gate.send()
        gate.send()
        gate.become(pool[:1])
        gate.send()  # to those who prefill alone
        gate.end()
        gate.become(pool)
        assert gate.loads() == {"p": 0.4, "d": 0.2}
        gate.end()
        gate.end()
        assert gate.loads() == {"p": 0, "d": 0}

    @pytest.mark.parametrize("picks", [True, False])
    def test_two_that_take_over_from_one(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Each has an account of its own."""
        gate = Gate(Utilization(staleness=Staleness.HOLD), picks=picks, pool="a")
        gate.scrape("a")
        gate.send()
        changed = [Utilization(waiting_max=most, staleness=Staleness.HOLD) for most in (10, 20)]
        gate.pool.reconfigure(gate.picker, make_detectors(changed), 0)
        gate.send()
        assert gate.pool.saturation() == pytest.approx(2 / 10)
        gate.scrape("a", waiting=1)
        gate.send()
        assert gate.pool.saturation() == pytest.approx(2 / 10)
        for _ in range(3):
            gate.end()
        assert gate.pool.saturation() == pytest.approx(1 / 10)

    @pytest.mark.parametrize("picks", [True, False])
    def test_an_empty_pool_keeps_its_stages(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Where some prefill and others decode, too, an absence of all is one of moments."""
        pool = (Endpoint("p", Role.PREFILL), Endpoint("d", Role.DECODE))
        gate = Gate(Utilization(staleness=Staleness.HOLD), picks=picks, pool=pool)
        gate.scrape("p", waiting=2)
        gate.scrape("d", waiting=1)
        gate.send()
        before = gate.loads()
        gate.become(())
        assert gate.pool.saturation() == FULL
        gate.become(pool)
        assert gate.loads() == before


class TestSeveral:
    """The fullest counts, and in each stage."""

    def test_fullest_counts(self) -> None:
        """Three requests by count; the metrics say that there is room for two."""
        gate = Gate(Concurrency(requests_max=3), Utilization(waiting_max=5), pool="a")
        gate.scrape("a", waiting=3)
        assert gate.pool.saturation() == 0.6
        assert gate.fill() == 2
        gate.scrape("a", waiting=0)
        assert gate.fill() == 1

    def test_full_together(self) -> None:
        """One endpoint full by one measure and the other by another: none has room."""
        gate = Gate(Concurrency(requests_max=2), Utilization(waiting_max=5))
        gate.scrape("a", waiting=5)
        gate.scrape("b", waiting=0)
        assert [gate.send(), gate.send()] == ["b", "b"]
        assert gate.pool.saturation() == FULL

    @pytest.mark.parametrize("picks", [True, False])
    def test_stages(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Every request passes one that prefills and one that decodes: the scarcer kind counts."""
        pool = (
            Endpoint("p", Role.PREFILL),
            Endpoint("d", Role.DECODE),
            Endpoint("e", Role.DECODE),
        )
        gate = Gate(Concurrency(requests_max=3), picks=picks, pool=pool)
        assert gate.fill() == 3
        assert {lease.endpoint for lease in gate.in_flight} == ({"d", "e"} if picks else {None})
        gate.become((*pool, Endpoint("q", Role.PREFILL)))
        assert gate.fill() == 3
        gate.become((*pool, Endpoint("q", Role.PREFILL), Endpoint("b")))
        assert gate.fill() == 3
        assert gate.in_flight[-1].endpoint == ("b" if picks else None)

    @pytest.mark.parametrize("picks", [True, False])
    def test_stages_by_metrics(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Both kinds are scraped, and both are charged."""
        pool = (Endpoint("p", Role.PREFILL), Endpoint("d", Role.DECODE))
        gate = Gate(Utilization(waiting_max=5), picks=picks, pool=pool)
        gate.scrape("p", waiting=3)
        gate.scrape("d", waiting=1)
        assert gate.fill() == 2
        gate.scrape("p")
        assert gate.fill() == 2

    @pytest.mark.parametrize("picks", [True, False])
    def test_no_one_decodes(self, picks: bool) -> None:  # noqa: FBT001 - both
        """A pool in which nobody answers is as one without endpoints."""
        gate = Gate(Concurrency(), picks=picks, pool=(Endpoint("p", Role.PREFILL),))
        assert gate.pool.is_empty
        assert gate.pool.saturation() == FULL

    @pytest.mark.parametrize("picks", [True, False])
    def test_no_one_prefills(self, picks: bool) -> None:  # noqa: FBT001 - both
        """Whoever decodes can read a prompt, too."""
        gate = Gate(Concurrency(), picks=picks, pool=(Endpoint("d", Role.DECODE),))
        assert not gate.pool.is_empty
        assert gate.pool.saturation() == 0

    @pytest.mark.parametrize("detector", [Auto(), Utilization(), Adaptive(), Concurrency()])
    def test_served_where_only_prompts_are_read(self, detector: Detector) -> None:
        """What Envoy sent to an endpoint that nothing is picked at stays where it was picked."""
        config = ControllerConfig(detectors=(detector,), picker=Picker.LEAST_LOADED)
        controller = FlowController(config, 0)
        roles = {"p": Role.PREFILL, "d": Role.DECODE}
        controller.handle(EndpointsChanged(("p", "d"), roles), 0)
        for address in "pd":
            controller.handle(LoadObserved(address, 0, 0, 0.0), 0)
        controller.handle(Arrived(Request(1)), 0)
        controller.poll(0)
        controller.handle(Settled(1, ttft_ns=1), 1)  # each endpoint has a limit of its own now
        controller.handle(Answered(1, "p"), 1)
        controller.poll(1)

        assert [controller.pool.loads[address].requests for address in "pd"] == [0, 1]

    def test_same_settings_keep_the_detector(self) -> None:
        """Nothing is forgotten where nothing changed; what is new is added."""
        gate = Gate(Utilization(), Adaptive(), pool="a")
        before = gate.pool.detectors[Role.BOTH]
        detectors = make_detectors([Adaptive(), Adaptive(), Concurrency(), Utilization()])
        gate.pool.reconfigure(gate.picker, detectors, 0)
        after = gate.pool.detectors[Role.BOTH]
        assert (after[0], after[3]) == (before[1], before[0])
        assert after[1] is not before[1]


steps = st.lists(
    st.one_of(
        st.just("charge"),
        st.integers(0, 20).map(lambda index: ("release", index)),
        st.sets(st.sampled_from(["a", "b", "c"])).map(lambda names: ("pool", *sorted(names))),
    ),
    max_size=60,
)


@pytest.mark.slow
@given(steps=steps, requests_max=st.integers(1, 3))
@settings(max_examples=150)
def test_counts_agree(steps: list[str | tuple[str, ...]], requests_max: int) -> None:
    """Whatever pool comes and goes: the counts are true and no endpoint is overfull."""
    gate = Gate(Concurrency(requests_max=requests_max), pool="")
    pool = ""
    for step in steps:
        if step == "charge":
            if gate.pool.saturation() < FULL:
                assert str(gate.send()) in pool
        elif step[0] == "pool":
            pool = "".join(map(str, step[1:]))
            gate.become(pool)
        elif gate.in_flight:
            lease = gate.in_flight.pop(int(step[1]) % len(gate.in_flight))
            gate.pool.release(lease, 0)

        loads = Counter(str(lease.endpoint) for lease in gate.in_flight)
        assert {a: gate.pool.loads[a].requests for a in pool} == {a: loads[a] for a in pool}
        assert all(load <= requests_max for load in loads.values())
        slots = len(pool) * requests_max
        used = sum(loads[address] for address in pool)
        assert gate.pool.saturation() == pytest.approx(used / slots if slots else FULL)
        assert (gate.pool.saturation() < FULL) is (used < slots)

"""The limits that find themselves: in simulated pools, with what evidence there is."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from random import Random
from typing import final

import pytest

from flowcontrol.auto import AutoDetector
from flowcontrol.config import (
    Auto,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Detector,
    Limits,
    Ordering,
    Picker,
    Role,
)
from flowcontrol.controller import FlowController
from flowcontrol.estimates import Tokens
from flowcontrol.events import Arrived, EndpointsChanged, Left, LoadObserved, Settled
from flowcontrol.flow import Flow, Lease
from flowcontrol.place import Place
from flowcontrol.pool import InFlight
from flowcontrol.request import FlowKey, Request
from flowcontrol.simulation.distributions import Fixed, Lognormal
from flowcontrol.simulation.faults import EndpointGone, Fault
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.workload import AtOnce, Independent, Lengths, Poisson, Workload
from flowcontrol.simulation.world import World
from tests.support.overloads import MINUTE, SECOND

FLOW = Flow(FlowKey(0, "a"), Ordering.FCFS, Limits())
MIXED = Independent(Lognormal(300, 0.7, 2000), Lognormal(60, 0.6, 400))
"""Of several lengths, so that they tell how long a token of a prompt takes."""
DEMO = ModelServerConfig()
"""Runs 16 sequences at once."""
FAST = ModelServerConfig(
    sequences_max=256,
    kv_tokens=12_000,
    batched_tokens_max=2048,
    step_base_ns=10_000_000,
    sequence_ns=100_000,
    prefill_token_ns=50_000,
    context_token_ns=10,
)
"""Only its cache stops it."""


class Pool:
    """A job on a pool, with people beside it from the beginning.

    Args:
        servers: one for each.
        detector: says how full they are.
        lengths: of the job's prompts and answers.
        people: a second.
    """

    def __init__(
        self,
        *servers: ModelServerConfig,
        detector: Detector | None = None,
        lengths: Lengths = MIXED,
        people: float = 1.0,
        job: int = 400,
        scrapes: bool = True,
        settles: bool = True,
        picker: Picker = Picker.LEAST_LOADED,
        ceilings: Ceilings = Ceilings.STATIC,
        later: tuple[Workload, ...] = (),
        faults: tuple[Fault, ...] = (),
    ) -> None:
        config = ControllerConfig(
            detectors=(detector or Auto(),),
            ceilings=CeilingSettings(policy=ceilings),
            picker=picker,
        )
        self.engine = FlowController(config, 0)
        self.plan = Plan(
            duration_ns=4 * MINUTE,
            servers=tuple(ServerSpec(address=f"s{n}", config=s) for n, s in enumerate(servers)),
            workloads=(
                Workload(name="people", arrivals=Poisson(people), lengths=MIXED, objective="chat"),
                Workload(
                    name="job",
                    arrivals=AtOnce(job),
                    lengths=lengths,
                    objective="batch",
                    from_ns=30 * SECOND,
                ),
                *later,
            ),
            faults=faults,
            objectives={"chat": 10, "batch": -1},
            settlement_delay_ns=SECOND if settles else None,
            scrape_interval_ns=SECOND if scrapes else None,
        )

    def run(self) -> Results:
        """Run it to the end."""
        return World(self.engine, self.plan, 1).finish()

    @property
    def detector(self) -> AutoDetector:
        """What is tested."""
        (detector,) = self.engine.pool.detectors[Role.BOTH]
        assert isinstance(detector, AutoDetector)
        return detector


EVIDENCE = {
    "metrics": {},
    "settlements": {"scrapes": False},
    "departures": {"scrapes": False, "settles": False},
}


class TestSequences:
    """What an engine batches is found."""

    @pytest.mark.parametrize("source", EVIDENCE)
    def test_limit(self, source: str) -> None:
        """Hardly more is in flight than runs, and hardly less; each move says what told it."""
        pool = Pool(DEMO, DEMO, **EVIDENCE[source])  # type: ignore[arg-type]  # keywords of a test
        results = pool.run()

        later = [s.in_flight for s in results.samples if s.at_ns / SECOND > 60 and s.waiting]
        assert max(later) <= 1.5 * 32
        assert sorted(later)[len(later) // 2] >= 0.7 * 32
        assert all(source in move.reason for move in pool.detector.moves.latest)

    def test_job_ends_as_with_the_best_limit(self) -> None:
        """Finding it costs a job hardly any time."""
        best = Pool(DEMO, DEMO, detector=Concurrency(requests_max=16)).run()
        found = Pool(DEMO, DEMO).run()

        assert found.band(-1).ended_ns <= 1.1 * best.band(-1).ended_ns

    def test_unequal(self) -> None:
        """Each endpoint has a limit of its own."""
        small = replace(DEMO, sequences_max=4)
        pool = Pool(DEMO, small)
        pool.run()

        assert pool.detector.limit_of("s1") <= 6
        assert pool.detector.limit_of("s0") >= 12

    def test_envoy_picks(self) -> None:
        """Where Envoy picks there is one limit for all endpoints."""
        pool = Pool(DEMO, DEMO, picker=Picker.OFF)
        results = pool.run()

        assert {move.address for move in pool.detector.moves.latest} == {None}
        assert max(s.in_flight for s in results.samples if s.at_ns > MINUTE) <= 1.5 * 32


class TestExploration:
    """An edge is found by few, so that people find a place at the others."""

    def test_one_in_four(self) -> None:
        """Never may more than one endpoint of four go further than any has been."""
        pool = Pool(*[DEMO] * 4, job=800)
        world = World(pool.engine, pool.plan, 1)
        ahead = []
        for second in range(31, 60):
            world.run_until(second * SECOND)
            proven = pool.detector.proven()
            ahead.append(sum(pool.detector.limit_of(f"s{n}") > proven for n in range(4)))

        assert max(ahead) == 1

    def test_edge_is_found_once(self) -> None:
        """What one endpoint has shown to be too many is tried at no other of its size."""
        pool = Pool(*[DEMO] * 4, job=800)
        world = World(pool.engine, pool.plan, 1)
        world.run_until(50 * SECOND)

        fell = [move for move in pool.detector.moves.latest if move.after < move.before]
        assert len(fell) == 1


class TestLooks:
    """What an endpoint says of itself, look by look."""

    def test_falls_once(self) -> None:
        """What was in flight before a fall is no sign: nothing is judged before it has drained."""
        place = _Place(limit=20, in_flight=20)
        for second in range(1, 30):
            place.look(second, waiting=10, running=10)

        (fall,) = place.moves
        assert fall == pytest.approx(10, abs=1)

    def test_start(self) -> None:
        """Before it first falls a limit rises at every look but one that follows at once."""
        place = _Place(limit=8, in_flight=40)
        for seconds in (1, 1.2, 2, 2.2, 3):
            place.look(seconds, waiting=0, running=40)

        assert place.moves == [pytest.approx(limit) for limit in (12, 12 * 1.35, 12 * 1.35**2)]

    @pytest.mark.parametrize(("queue", "falls"), [(0, False), (5, True)])
    def test_by_chance(self, queue: int, *, falls: bool) -> None:
        """Of short answers some always wait for the end of a step, at times three times as many.

        That is no queue; as many all the time are one.
        """
        place, chance = _Place(limit=30, in_flight=12), Random(2)
        for second in range(1, 60):
            place.send(60, second, output=8)
            usual = sum(chance.random() < 0.125 for _ in range(10))  # of ten that run, 10 / 8
            place.look(second, waiting=usual + queue, running=10)

        assert any(limit < 30 for limit in place.moves) == falls

    @pytest.mark.parametrize(("varies", "expected"), [(0, 256), (20, None)])
    def test_batch_is_full(self, varies: int, expected: int | None) -> None:
        """While no more run, even a few of many wait for long: the limit is what runs.

        While as many come and go, they wait for their prompts.
        """
        place = _Place(limit=350, in_flight=267)
        place.report(999, 0, ttft_s=0.1)
        for second in range(1, 4):
            place.send(7, second, output=300)
            place.look(second, waiting=11, running=256 - varies * (second % 2))

        assert place.moves == ([] if expected is None else [expected])

    def test_prompts_that_are_not_paced(self) -> None:
        """Before the speed of prompts is known some wait to be read: they do not end the start."""
        place = _Place(limit=16, in_flight=16)
        place.report(999, 0, ttft_s=0.05)
        for second, waiting in enumerate((3, 4, 0, 0, 0), 1):
            place.send(8, second, output=30)
            place.look(second, waiting=waiting, running=16 - waiting)

        assert all(limit > 16 for limit in place.moves)

    def test_one_look(self) -> None:
        """Three that wait at one look of five came together by chance."""
        place = _Place(limit=20, in_flight=8)
        place.report(999, 0, ttft_s=0.2)
        for second in range(1, 60):
            place.send(2, second, output=100)
            place.look(second, waiting=3 if second % 5 == 0 else 0, running=5)

        assert place.moves == []

    def test_others(self) -> None:
        """What an engine was sent past the gate is no reason for a limit to fall."""
        place = _Place(limit=8, in_flight=0)
        for second in range(1, 60):
            place.look(second, waiting=30, running=16, kv_usage=0.9)

        assert place.moves == []

    @pytest.mark.parametrize(("others", "expected"), [(0, 94.4), (1, 188.9)])
    def test_cache_of_others(self, others: int, expected: float) -> None:
        """Of a cache in use, requests that came past the gate have their part."""
        place = _Place(limit=8, in_flight=1, tokens=100)
        place.look(1, waiting=0, running=1 + others, kv_usage=0.9)

        assert place.tokens_max == pytest.approx(expected, rel=0.01)

    def test_stage(self) -> None:
        """Where Envoy picks, what runs at one endpoint is not all that runs."""
        place = _Place(limit=36, in_flight=36, endpoints=2)
        for second in range(1, 9):
            place.send(8, second, output=100)
            place.look(second / 2, waiting=2, running=16)

        assert place.moves == [pytest.approx(34, abs=2)]

    def test_batch_of_another(self) -> None:
        """What another of the size batches is the limit here, until more have run."""
        place, busier = _Place(limit=30, in_flight=10), _Place(limit=30, in_flight=24)
        busier.look(1, waiting=0, running=24)
        full = _Place(limit=18, in_flight=18).is_full(2, running=16)
        for each in (place, busier):
            each.learn_from(full, 6)

        assert place.moves == [16]
        assert busier.moves == [pytest.approx(24 * 1.35)]

    def test_batch_of_another_is_followed_no_further(self) -> None:
        """Where others went before they found it, a place that comes later does not go."""
        place = _Place(limit=12, in_flight=12, peers=_Alone(explores=False))
        place.look(1, waiting=0, running=12)
        place.learn_from(_Place(limit=18, in_flight=18).is_full(2, running=16), 6)
        place.follow(20, 7)

        assert place.moves == [16]

    def test_batch_is_believed(self) -> None:
        """Nobody tries to exceed a batch for a minute; once it is found again, for two.

        And then in small steps, however often it could have risen meanwhile.
        """
        place = _Place(limit=17, in_flight=17)
        tried = []
        for found in (10, 80):
            place.hold(17)
            place.is_full(found, running=16)
            assert place.moves[-1] == 16
            place.hold(16)
            for second in range(found + 4, found + 200):
                place.send(8, second, output=30)
                place.look(second, waiting=0, running=16)
                if place.moves[-1] >= 17:
                    tried.append(second - found)
                    assert place.moves[-1] < 18
                    break

        assert tried == [pytest.approx(62, abs=6), pytest.approx(122, abs=6)]

    def test_batch_is_tried_by_few(self) -> None:
        """To exceed a batch again is to go further than any has been, whatever drained here."""
        place = _Place(limit=17, in_flight=17, peers=_Alone(explores=False))
        place.is_full(10, running=16)
        place.hold(18)
        place.send(1, 14, output=30)
        place.hold(16)
        for second in range(15, 200):
            place.send(8, second, output=30)
            place.look(second, waiting=0, running=16)

        assert place.moves == [16]

    def test_batch_is_found_again_at_once(self) -> None:
        """As many as were found before, and no more: a single one that waits is enough."""
        place = _Place(limit=17, in_flight=17)
        place.is_full(10, running=16)
        place.hold(16)
        second = 14
        while place.moves[-1] < 17:
            place.send(8, second, output=30)
            place.look(second, waiting=0, running=16)
            second += 1
        place.hold(17)
        for later in range(second, second + 4):
            place.send(60, later, output=30)
            place.look(later, waiting=1, running=16)

        assert (place.moves[0], place.moves[-1]) == (16, 16)

    @pytest.mark.parametrize(("room", "limit"), [(1, 12), (80, 80), (400, 128)])
    def test_cache_has_room(self, room: int, limit: float) -> None:
        """An engine with a large cache batches as many as have room, so the start leaps there."""
        place = _Place(limit=8, in_flight=8, kv_capacity=room * 8192)
        place.look(1, waiting=0, running=8)

        assert place.moves == [limit]

    @pytest.mark.parametrize(
        ("ran", "kv_usage", "seconds", "falls"),
        [(16, 0.3, 8, False), (8, 0.3, 8, True), (16, 0.6, 8, True), (16, 0.3, 30, True)],
    )
    def test_prompts_to_be_read(
        self, ran: int, kv_usage: float, seconds: int, *, falls: bool
    ) -> None:
        """Where more have run, and the cache is not full, those that wait wait for prompts.

        But for so long only; an adapter, say, may be missing for ever.
        """
        place = _Place(limit=8, in_flight=12, kv_capacity=1000, peers=_Alone(ran))
        place.report(999, 0, ttft_s=0.1)
        for second in range(1, seconds):
            place.send(8, second, output=30)
            place.look(second, waiting=4, running=8 - 2 * (second % 2), kv_usage=kv_usage)

        assert any(limit < 8 for limit in place.moves) == falls

    def test_burst_after_the_leap(self) -> None:
        """A burst into places that the cache has room for waits to be read: it is no queue."""
        place = _Place(limit=64, in_flight=40, kv_capacity=64 * 8192, peers=_Alone(8))
        for second in range(1, 6):
            place.send(8, second, output=30)
            place.look(second, waiting=30, running=8 + second, kv_usage=0.1)

        assert all(limit >= 64 for limit in place.moves)


@final
class _Place:
    """A place of its own, of which the test says what is in flight."""

    def __init__(
        self,
        limit: int,
        in_flight: int,
        tokens: float = 0.0,
        *,
        endpoints: int = 1,
        kv_capacity: int | None = None,
        peers: "_Alone | None" = None,
    ) -> None:
        self.moves: list[float] = []
        """Limits on requests."""
        self._kv_capacity = kv_capacity
        self._load = InFlight(in_flight, tokens)
        self._place = Place(
            *(self._load, endpoints, limit),
            moved=self._moved,
            peers=peers or _Alone(),
            now_ns=0,
        )

    def _moved(self, what: str, before: float, after: float, reason: str, now_ns: int) -> None:
        assert after != before, (reason, now_ns)
        assert what == "requests" or self._load.tokens, (before, reason, now_ns)
        if what == "requests":
            self.moves.append(after)

    def hold(self, in_flight: int) -> None:
        """Have so many in flight."""
        self._load.requests = in_flight

    def send(self, count: int, second: int, output: int) -> None:
        """Send so many, of which as many end."""
        for number in range(count):
            self._place.charged(_lease(number, output), second * SECOND)

    @property
    def tokens_max(self) -> float:
        """The limit on tokens."""
        return self._place.tokens_max

    def look(
        self, second: float, waiting: int, running: int, kv_usage: float | None = None
    ) -> None:
        """Let the endpoint say how it is."""
        seen = LoadObserved(
            "a",
            waiting=waiting,
            kv_usage=kv_usage,
            running=running,
            kv_tokens=self._kv_capacity,
        )
        self._place.observed(seen, round(second * SECOND))

    def is_full(self, from_second: int, running: int) -> "_Place":
        """Let no more run at four looks, while three wait for long."""
        self.report(999, from_second, ttft_s=0.1)
        for second in range(from_second, from_second + 4):
            self.send(7, second, output=300)
            self.look(second, waiting=3, running=running)
        return self

    def learn_from(self, other: "_Place", second: float) -> None:
        """Let another have found how many it batches."""
        own, others = self._place, other._place  # noqa: SLF001 - one of us
        own.batches_like(others, round(second * SECOND))

    def follow(self, proven: float, second: int) -> None:
        """Let another have had so many in flight without a queue."""
        self._place.follow(proven, second * SECOND)

    def serve(self, count: int, until_s: float, ttfts_s: float) -> None:
        """Send so many, and let the access log report all of them later."""
        self.send(count, 0, output=10)
        for number in range(count):
            self.report(number, until_s, ttfts_s)

    def report(self, number: int, second: float, ttft_s: float) -> None:
        """Let the access log report one."""
        settled = Settled(number, ttft_ns=round(ttft_s * SECOND))
        self._place.settled(_lease(number, output=10), settled, round(second * SECOND))


def _lease(number: int, output: int) -> Lease:
    return Lease(Request(number), FLOW, 1, 0, Tokens(30, output), 1.0)


class _Alone:
    """A place has no other beside it, but for one at which so many ran."""

    def __init__(self, ran: int = 0, *, explores: bool = True) -> None:
        self._ran = ran
        self._explores = explores

    def ran_most(self, kv_capacity: int) -> int:
        """One of this size has run so many."""
        return self._ran if kv_capacity else 0

    def proven(self) -> float:
        """None is there."""
        return 0.0

    def edge(self, kv_capacity: int) -> float:
        """None is known."""
        return inf + kv_capacity

    def found(self, place: Place, now_ns: int) -> None:
        """Nobody takes note."""

    def may_explore(self, place: Place) -> bool:
        """It may, if it was said so."""
        return place.explores or self._explores

    def shown(self, proven: float, now_ns: int) -> None:
        """Nobody takes note."""


@pytest.mark.slow
class TestFewSteps:
    """Whoever waits for the end of the step under way is no queue."""

    def test_embeddings(self) -> None:
        """Where each runs for one step, as many wait as run, and a job ends as soon as it can."""
        lengths = Independent(Lognormal(500, 0.7, 2000), Fixed(1))
        best = Pool(FAST, lengths=lengths, job=4000, detector=Concurrency(requests_max=16)).run()
        found = Pool(FAST, lengths=lengths, job=4000).run()

        assert found.band(-1).ended_ns <= 1.1 * best.band(-1).ended_ns


@pytest.mark.slow
class TestRecovery:
    """Driven over the edge on purpose, people are served as before within three service times.

    Then nine in ten of their first tokens come in the time they came before, or in half a second.
    """

    SINCE_S, SERVICE_S = 60, 5
    MONSTERS = Workload(
        name="monsters",
        arrivals=AtOnce(40),
        lengths=Independent(Lognormal(2000, 0.3, 4000), Lognormal(300, 0.3, 800)),
        objective="batch",
        from_ns=SINCE_S * SECOND,
        tenants={"monsters": 1.0},
    )
    HALVED = EndpointGone(address="s1", from_ns=SINCE_S * SECOND, until_ns=10 * MINUTE)

    @pytest.mark.parametrize(
        "change", [{"later": (MONSTERS,)}, {"faults": (HALVED,)}], ids=["monsters", "halved"]
    )
    @pytest.mark.parametrize("source", ["metrics", "settlements"])
    def test_as_before(self, source: str, change: Mapping[str, object]) -> None:
        """A batch of prompts that take a sixth of a cache each; half of the servers gone."""
        pool = Pool(
            *(FAST, FAST),
            people=6.0,
            job=2000,
            ceilings=Ceilings.RESERVE,
            **EVIDENCE[source],  # type: ignore[arg-type]  # keywords of a test
            **change,  # type: ignore[arg-type]  # as above
        )
        ttfts = pool.run().band(10).ttfts

        before = _late_s(ttfts, 30, self.SINCE_S)
        after = _late_s(ttfts, self.SINCE_S + 3 * self.SERVICE_S, 120)
        assert after <= max(1.2 * before, 0.5)


class TestCache:
    """The KV cache is not filled over its edge."""

    LONG = Independent(Lognormal(400, 0.5, 2000), Lognormal(300, 0.5, 1500))

    def test_tokens(self) -> None:
        """Without a limit on requests that means anything, that on tokens keeps the cache whole."""
        pool = Pool(FAST, lengths=self.LONG, people=0.5)
        found = pool.run()
        over = Pool(
            FAST, lengths=self.LONG, people=0.5, detector=Concurrency(requests_max=64)
        ).run()

        assert over.servers[0].waiting_most > 30
        assert found.servers[0].waiting_most <= 12
        tokens_limit = pool.detector.tokens_limit
        assert tokens_limit is not None
        assert tokens_limit < 2 * FAST.kv_tokens

    def test_large_requests(self) -> None:
        """Where one takes a quarter of the cache, the next is not sent to a cache without room."""
        large = Independent(Lognormal(3000, 0.3, 6000), Fixed(200))
        results = Pool(FAST, lengths=large, people=0.5, job=100).run()

        assert results.servers[0].waiting_most <= 4
        assert results.band(-1).ended_ns < 150 * SECOND

    def test_not_told(self) -> None:
        """Where no engine tells of its cache there is no limit on tokens before the first queue."""
        pool = Pool(FAST, lengths=self.LONG, scrapes=False, job=1)
        pool.run()

        assert pool.detector.tokens_limit is None


@pytest.mark.slow
class TestPrompts:
    """A job does not put a hundred prompts before the next person."""

    def test_paced(self) -> None:
        """People hear the first token soon while the job fills free places, which take as long."""
        lengths = Independent(Lognormal(1500, 0.5, 4000), Fixed(200))
        large = replace(FAST, kv_tokens=400_000)
        paced = Pool(large, lengths=lengths, people=2.0, job=150)
        results = paced.run()
        flood = Pool(
            large,
            lengths=lengths,
            people=2.0,
            job=150,
            detector=Concurrency(requests_max=150),
        ).run()

        assert _slowest_s(results) < _slowest_s(flood) / 2
        assert results.band(-1).ended_ns < 1.3 * flood.band(-1).ended_ns


class TestSettlements:
    """What the access log tells, in whatever order."""

    @pytest.mark.parametrize(
        ("lasts_s", "waits_s", "limit"),
        [
            (60, 0.1, 30),  # hardly anybody waits inside
            (60, 0.3, None),  # a half percent of the time, and longer than for a first token
            (1, 0.15, None),  # a sixth of the time, for the prompt before one's own
            (1, 0.3, 10),
        ],
    )
    def test_waits(self, lasts_s: float, waits_s: float, limit: float | None) -> None:
        """A limit rises only while waits are short, and falls only where they are long."""
        place = _Place(limit=20, in_flight=20)
        place.report(99, 0, ttft_s=0.2)
        place.serve(8, until_s=lasts_s * 8 / 20, ttfts_s=1.5 * 0.2 + waits_s)

        assert place.moves == ([] if limit is None else [pytest.approx(limit, abs=2)])

    def test_tokens_that_did_not_wait(self) -> None:
        """After a queue no more tokens are sent for a minute than did not wait then."""
        place = _Place(limit=20, in_flight=20, tokens=4000)
        place.report(99, 0, ttft_s=0.2)
        place.serve(8, until_s=8 / 20, ttfts_s=1.5 * 0.2 + 0.3)  # 30 % of the time in flight
        limits = [place.tokens_max]
        for second in range(1, 90):
            place.send(16, second, output=10)
            for number in range(16):
                place.report(number, second + 0.9, ttft_s=0.2)
            limits.append(place.tokens_max)

        assert limits[0] == pytest.approx(4000 * (1 - 2 * (0.3 - 0.08)), rel=0.01)
        assert max(limits[:59]) == pytest.approx(4000 * 0.7, rel=0.01)
        assert max(limits) > 4000 * 0.7 * 1.05

    def test_before_the_departure(self) -> None:
        """The log reports a request before it has left, without a first token: it may have failed.

        Nothing is known then of how long any request takes.
        """
        controller = FlowController(ControllerConfig(detectors=(Auto(),)), 0)
        controller.handle(EndpointsChanged(("a",)), 0)
        for number in range(200):
            now_ns = number * 1_000_000
            controller.handle(Arrived(Request(number)), now_ns)
            assert len(controller.poll(now_ns)) == 1
            controller.handle(Settled(number, is_success=False), now_ns)
            controller.handle(Left(number), now_ns + 500_000)

        assert controller.in_flight == 0


def _late_s(ttfts: list[tuple[int, int]], from_s: float, until_s: float) -> float:
    """Return what nine in ten times to first token stay within, of those asked meanwhile."""
    times = sorted(ttft for at_ns, ttft in ttfts if from_s <= at_ns / SECOND < until_s)
    return times[int(0.9 * len(times))] / SECOND


def _slowest_s(results: Results) -> float:
    ttft_ns = results.band(10).ttft_ns(99)
    assert ttft_ns is not None
    return ttft_ns / SECOND

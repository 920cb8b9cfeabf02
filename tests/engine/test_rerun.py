"""Recorded turns, decided again: identically, and by another engine."""

import json
from dataclasses import replace
from random import Random

import pytest

from flowcontrol.config import Concurrency, ControllerConfig, Picker, Reclaim
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    EndpointsChanged,
    Fact,
    Left,
    LoadObserved,
    ObjectivesChanged,
    Reconfigured,
    Settled,
)
from flowcontrol.replay.comparison import OTHERS, Comparison, Figures, Pairs, by_priority
from flowcontrol.replay.ledger import Header, Turn, from_line, take_checkpoint, to_line
from flowcontrol.replay.rerun import Rerun
from flowcontrol.request import FlowKey, Outcome, Request
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import ServerSpec
from flowcontrol.simulation.workload import Poisson
from flowcontrol.simulation.world import World
from flowcontrol.views.view import take_snapshot
from tests.support.effects import SERVER, job, people
from tests.support.recorded import (
    ENDPOINTS,
    MILLISECOND,
    OBJECTIVES,
    SECOND,
    Recording,
    busy,
    small_config,
    whole_config,
)
from tests.support.simulated import random_config, random_plan


def compared(turns: list[Turn], rerun: Rerun) -> Comparison:
    """Play the turns."""
    comparison = Comparison()
    for turn in turns:
        comparison.take(turn.now_ns, turn.decisions, rerun.turn(turn))
    return comparison


def one_slot(requests_max: int = 1, ttl_ns: int | None = None) -> ControllerConfig:
    """One endpoint with so many slots."""
    return ControllerConfig(
        detectors=(Concurrency(requests_max=requests_max),), no_endpoint_ttl_ns=ttl_ns
    )


def beside(candidate: ControllerConfig) -> tuple[Recording, Rerun]:
    """An engine with one slot, and a candidate on the same facts."""
    recording = Recording(one_slot())
    recording.turn(0, EndpointsChanged(ENDPOINTS[:1]))
    rerun = Rerun(FlowController(candidate, 0), has_own_config=True)
    rerun.turn(recording.turns[0])
    return recording, rerun


def play(recording: Recording, rerun: Rerun, now_ns: int, *facts: Fact) -> list[tuple[int, str]]:
    """One turn of both; what the candidate decided."""
    recording.turn(now_ns, *facts)
    return [(d.request_id, d.outcome.value) for d in rerun.turn(recording.turns[-1])]


@pytest.mark.slow
class TestTheSameConfiguration:
    """Identical, to the nanosecond."""

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_everything_is_decided_alike(self, seed: int) -> None:
        """Thousands of decisions of every kind."""
        recording = busy(Recording(small_config(), 5), 2500, seed)
        rerun = Rerun(FlowController(small_config(), 5), has_own_config=False)
        comparison = compared(recording.turns, rerun)

        assert comparison.first_difference is None
        assert comparison.recorded_count >= 2500
        assert len({decision.outcome for decision in recording.decisions}) >= 4
        assert (comparison.pairs.undecided, rerun.open_count) == ((0, 0), 0)

    @pytest.mark.parametrize("seed", [1, 2])
    def test_with_all_the_engine_can_do(self, seed: int) -> None:
        """First bytes, scrapes, reclaiming, an adaptive limit, shares; through lines of a ledger.

        Looking at the engine changes nothing.
        """
        recording = busy(Recording(whole_config(), 5, is_looked_at=True), 2500, seed)
        turns = [from_line(json.loads(json.dumps(to_line(turn)))) for turn in recording.turns]
        rerun = Rerun(FlowController(whole_config(), 5), has_own_config=False)
        comparison = compared([turn for turn in turns if isinstance(turn, Turn)], rerun)

        assert comparison.first_difference is None
        assert comparison.recorded_count >= 2500
        told = {type(fact) for turn in recording.turns for fact in turn.facts}
        assert told >= {Answered, Settled, LoadObserved}
        decisions = recording.decisions
        assert Outcome.RECLAIMED in {decision.outcome for decision in decisions}
        assert any(decision.expected_wait_ns is not None for decision in decisions)
        moves = take_snapshot(rerun.candidate, recording.turns[-1].now_ns, 1).detectors[-1].moves
        assert moves, "an adaptive limit that moves is part of it"

    @pytest.mark.parametrize("seed", range(12))
    def test_in_any_world(self, seed: int) -> None:
        """Any configuration, with clients that retry, servers that fail, and an operator."""
        chance = Random(seed)
        config = random_config(chance)
        recording = Recording(config, is_looked_at=True)
        World(recording, random_plan(chance), seed).finish()
        header = from_line(json.loads(json.dumps(to_line(Header("run", 0, 0, 0, config)))))
        assert isinstance(header, Header)
        rerun = Rerun(FlowController(header.config, 0), has_own_config=False)
        comparison = compared(recording.turns, rerun)

        assert comparison.first_difference is None, seed
        assert comparison.recorded_count > 20

    def test_a_change_of_configuration_is_followed(self) -> None:
        """As recorded."""
        recording = Recording(one_slot())
        recording.turn(0, EndpointsChanged(ENDPOINTS[:1]))
        recording.turn(1, Arrived(Request(1)), Arrived(Request(2)))
        recording.turn(2, Reconfigured(one_slot(2)))
        rerun = Rerun(FlowController(one_slot(), 0), has_own_config=False)

        assert compared(recording.turns, rerun).first_difference is None
        assert rerun.candidate.in_flight == 2

    def test_woken_at_its_own_pace_it_decides_alike(self) -> None:
        """As a shadow with the engine's own settings would: only what is late in reality is not."""
        recording = busy(Recording(small_config(), 5), 2500)
        rerun = Rerun(FlowController(small_config(), 5), has_own_config=True)
        pairs = compared(recording.turns, rerun).pairs.counts

        assert all(was is would_be for was, would_be in pairs)

    def test_a_bug_shows(self) -> None:
        """The negative control: one departure less, and the first difference is found."""
        recording = busy(Recording(small_config(), 5), 500)
        index = next(i for i, t in enumerate(recording.turns) if any(map(is_left, t.facts)))
        turn = recording.turns[index]
        facts = [fact for fact in turn.facts if not is_left(fact)]
        recording.turns[index] = Turn(turn.now_ns, facts, turn.decisions)
        rerun = Rerun(FlowController(small_config(), 5), has_own_config=False)
        difference = compared(recording.turns, rerun).first_difference

        assert difference is not None
        assert difference.now_ns >= turn.now_ns


def is_left(fact: Fact) -> bool:
    """Whether it is a departure."""
    return isinstance(fact, Left)


class TestAnotherConfiguration:
    """The rest of the story, filled in."""

    def test_served_later_it_is_served_as_long(self) -> None:
        """Reality has two slots, the candidate one: 10 ms each, one after the other."""
        recording = Recording(one_slot(2))
        recording.turn(0, EndpointsChanged(ENDPOINTS[:1]))
        rerun = Rerun(FlowController(one_slot(1), 0), has_own_config=True)
        rerun.turn(recording.turns[0])

        assert play(
            recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2)), Arrived(Request(3))
        ) == [(1, "dispatched")]
        assert play(recording, rerun, 20, Left(1), Left(2)) == [(2, "dispatched")]
        assert play(recording, rerun, 33, Left(3)) == [(3, "dispatched")]
        assert rerun.candidate.in_flight == 1
        rerun.turn(Turn(60, [], []))
        assert rerun.candidate.in_flight == 0
        assert rerun.open_count == 0

    def test_served_sooner_its_slot_is_free_when_reality_says(self) -> None:
        """Reality has one slot, the candidate two."""
        recording, rerun = beside(one_slot(2))
        assert play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2))) == [
            (1, "dispatched"),
            (2, "dispatched"),
        ]
        play(recording, rerun, 20, Left(1))
        assert rerun.candidate.in_flight == 1
        play(recording, rerun, 30, Left(2))
        assert rerun.candidate.in_flight == 0
        assert rerun.open_count == 0

    def test_never_served_in_reality_it_is_served_as_others_were(self) -> None:
        """Reality served 10 ns on average when it evicted this one."""
        recording, rerun = beside(one_slot(2))
        play(recording, rerun, 10, Arrived(Request(1)))
        play(recording, rerun, 20, Left(1))
        play(recording, rerun, 30, Arrived(Request(2)), Arrived(Request(3, ttl_ns=2)))
        play(recording, rerun, 33)
        assert rerun.candidate.in_flight == 2
        play(recording, rerun, 41)
        assert rerun.candidate.in_flight == 1

    def test_who_hangs_up_hangs_up(self) -> None:
        """Waiting in reality, being served by the candidate."""
        recording, rerun = beside(one_slot(2))
        play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2)))
        play(recording, rerun, 15, Left(2))

        assert rerun.candidate.in_flight == 1

    def test_refused_in_reality_it_waits_on(self) -> None:
        """The client's departure afterwards is of reality alone."""
        recording, rerun = beside(one_slot())
        play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2)))
        turn = Turn(20, [], [Decision(2, Outcome.EVICTED_TTL, 0, "default-flow", 10)])
        rerun.turn(turn)
        rerun.turn(Turn(21, [Left(2)], []))

        assert rerun.candidate.waiting == 1
        assert [d.request_id for d in rerun.turn(Turn(30, [Left(1)], []))] == [2]

    def test_it_is_woken_when_it_asks(self) -> None:
        """Its own deadlines come at their own time, between recorded turns."""
        recording, rerun = beside(small_config())
        play(recording, rerun, 10, *(Arrived(Request(n, "f", "chat")) for n in range(1, 7)))

        decided = rerun.turn(Turn(9 * SECOND, [], []))
        assert {2 * SECOND} == {decision.waited_ns for decision in decided}

    def test_reclaimed_it_leaves_at_once(self) -> None:
        """Also where reality served it already, so that it is known when it would have left."""
        recording = Recording(one_slot(2))
        recording.turn(0, EndpointsChanged(ENDPOINTS[:1]), ObjectivesChanged({"job": -1}))
        candidate = replace(one_slot(1), reclaim=Reclaim(is_enabled=True))
        rerun = Rerun(FlowController(candidate, 0), has_own_config=True)
        rerun.turn(recording.turns[0])
        play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2, objective="job")))
        play(recording, rerun, 1010, Left(1), Left(2))

        assert play(recording, rerun, 1020, Arrived(Request(3))) == [(2, "reclaimed")]
        assert play(recording, rerun, 1021) == [(3, "dispatched")]

    def test_its_configuration_is_its_own(self) -> None:
        """What is changed in reality is not changed for it."""
        recording, rerun = beside(one_slot(1))
        play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2)))
        play(recording, rerun, 20, Reconfigured(one_slot(2)))

        assert rerun.candidate.in_flight == 1

    def test_usage_is_told_when_it_is_its_time(self) -> None:
        """A settlement of who still waits is held back until it has been served."""
        recording = Recording(one_slot(2))
        recording.turn(0, EndpointsChanged(ENDPOINTS[:1]))
        rerun = Rerun(FlowController(one_slot(1), 0), has_own_config=True)
        rerun.turn(recording.turns[0])
        play(recording, rerun, 10, Arrived(Request(1)), Arrived(Request(2)))
        play(recording, rerun, 15, Answered(2), Settled(2, 1, 0, 1), Left(2))
        assert rerun.candidate.charges.seen == 0
        play(recording, rerun, 20, Left(1))
        rerun.turn(Turn(26, [], []))

        assert rerun.candidate.charges.seen == 1
        assert rerun.candidate.in_flight == 0

    def test_more_room_serves_more(self) -> None:
        """Twice the slots: fewer evictions, shorter waits, and nothing left over."""
        recording = busy(Recording(small_config(4), 5), 2500)
        rerun = Rerun(FlowController(small_config(8), 5), has_own_config=True)
        comparison = compared(recording.turns, rerun)
        rerun.turn(Turn(recording.turns[-1].now_ns + 10 * SECOND, [], []))
        before, after = by_priority(comparison.recorded)[0], by_priority(comparison.candidate)[0]

        assert after.outcomes[Outcome.DISPATCHED] > 1.3 * before.outcomes[Outcome.DISPATCHED]
        assert comparison.pairs.undecided == (0, 0)
        assert rerun.open_count == 0
        assert rerun.candidate.in_flight == 0


class TestFromACheckpoint:
    """Who comes late knows who is live, and learns the rest."""

    def test_it_goes_on(self) -> None:
        """From the middle of the traffic, nothing is lost and nearly all is decided alike."""
        recording = busy(Recording(small_config(), 5), 2500)
        middle = len(recording.turns) // 2
        again = Recording(small_config(), 5)
        for turn in recording.turns[:middle]:
            again.turn(turn.now_ns, *turn.facts)
        checkpoint = take_checkpoint(again.controller, recording.turns[middle - 1].now_ns)
        rerun = Rerun.restored(checkpoint, small_config(), has_own_config=False)
        comparison = compared(recording.turns[middle:], rerun)
        alike = sum(n for (was, now), n in comparison.pairs.counts.items() if was is now)

        assert alike > 0.8 * comparison.pairs.counts.total()
        assert rerun.open_count == 0
        assert comparison.pairs.counts.total() > 1000

    def test_what_was_learnt(self) -> None:
        """Limits and a reserve that found themselves go on: by default, too, most is as it was."""
        config = ControllerConfig(picker=Picker.LEAST_LOADED)
        recording = Recording(config)
        plan = Plan(
            duration_ns=100 * SECOND,
            servers=(ServerSpec(address="s0", config=SERVER),),
            workloads=(people(Poisson(4), 2), job(600, 1000, 150, from_s=10)),
            objectives=OBJECTIVES,
            settlement_delay_ns=SECOND,
            scrape_interval_ns=SECOND,
        )
        world = World(recording, plan, 1)
        world.run_until(50 * SECOND)
        before, checkpoint = (
            len(recording.turns),
            take_checkpoint(recording.controller, 50 * SECOND),
        )
        world.run_until(100 * SECOND)
        rerun = Rerun.restored(checkpoint, config, has_own_config=False)
        pairs = compared(recording.turns[before:], rerun).pairs

        assert sum(pairs.undecided) < 0.02 * pairs.counts.total()
        assert pairs.counts.total() > 300


@pytest.mark.slow
class TestComparison:
    """Counting what both did."""

    def test_a_missing_decision_is_a_difference(self) -> None:
        """On either side."""
        decision = Decision(1, Outcome.DISPATCHED, 0, "a", 5)
        fewer, more = Comparison(), Comparison()
        fewer.take(7, [decision], [])
        more.take(8, [], [decision])

        assert (7, decision, None) == fewer.first_difference
        assert (8, None, decision) == more.first_difference
        assert (fewer.pairs.undecided, more.pairs.undecided) == ((0, 1), (1, 0))

    def test_waits_are_of_those_dispatched(self) -> None:
        """Half of them waited no longer than the median."""
        figures = Figures()
        assert figures.wait_ns(0.5) is None
        for wait in (30, 10, 20):
            figures.count(Decision(wait, Outcome.DISPATCHED, 0, "a", wait * MILLISECOND))
        figures.count(Decision(9, Outcome.EVICTED_TTL, 0, "a", SECOND))

        assert figures.wait_ns(0.5) == 20 * MILLISECOND
        assert figures.wait_ns(1.0) == 30 * MILLISECOND

    def test_too_many_flows_are_summed_up(self) -> None:
        """Under one name."""
        comparison = Comparison()
        for number in range(10_005):
            decision = Decision(number, Outcome.DISPATCHED, 0, f"flow-{number}", 0)
            comparison.take(number, [decision], [decision])

        assert comparison.recorded[FlowKey(0, OTHERS)].outcomes.total() == 5
        assert by_priority(comparison.recorded)[0].outcomes.total() == 10_005

    def test_a_reclaimed_request_was_dispatched(self) -> None:
        """It counts once, by its first decision."""
        pairs = Pairs()
        dispatched = Decision(1, Outcome.DISPATCHED, -1, "a", 0)
        reclaimed = Decision(1, Outcome.RECLAIMED, -1, "a", 0)
        pairs.take([dispatched], [])
        pairs.take([reclaimed], [dispatched, reclaimed])

        assert pairs.counts == {(Outcome.DISPATCHED, Outcome.DISPATCHED): 1}
        assert pairs.undecided == (0, 0)


def test_objectives_reach_the_candidate() -> None:
    """Bands are those of reality."""
    recording, rerun = beside(one_slot())
    play(recording, rerun, 10, ObjectivesChanged(OBJECTIVES))

    assert [band.priority for band in rerun.candidate.bands] == [10, -1]

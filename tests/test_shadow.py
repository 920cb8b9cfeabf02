"""Shadow mode: a candidate beside the engine, unheard."""

import pytest

from flowcontrol.config import ControllerConfig
from flowcontrol.events import Arrived, Decision
from flowcontrol.ledger import Entry, Gap, Shadowed, Turn
from flowcontrol.request import Outcome, Request
from server.recording import TurnFeed
from server.records import Records
from server.shadow import Shadow
from tests.recorded import Recording, busy, small_config

JOIN_S = 20.0


def shadowed(
    recording: Recording, candidate: ControllerConfig, *more: Entry, ledger: TurnFeed | None = None
) -> Shadow:
    """Let a candidate decide a whole recording."""
    feed = TurnFeed(1 << 30)
    shadow = Shadow(candidate, feed, ledger)
    again = Recording(recording.config, recording.began_ns)
    for turn in recording.turns:
        again.turn(turn.now_ns, *turn.facts)
        feed.turned(again.controller, turn)
    for entry in more:
        feed.put(entry)
    shadow.start(recording.began_ns)
    shadow.close(JOIN_S)
    return shadow


class TestShadow:
    """What a candidate would have done."""

    def test_with_the_same_settings_it_would_do_the_same(self) -> None:
        """The control: every pair of outcomes is a pair of equals."""
        recording = busy(Recording(small_config(), 5), 500)
        report = shadowed(recording, small_config()).report

        assert report.is_running
        assert {pair: n for pair, n in report.pairs.items() if pair[0] is not pair[1]} == {}
        assert len(recording.decisions) == sum(report.pairs.values())

    def test_with_others_it_says_what_would_be_different(self) -> None:
        """By outcome, and in waits by band; the ledger has every decision."""
        recording = busy(Recording(small_config(), 5), 500)
        ledger = TurnFeed()
        report = shadowed(recording, small_config(8), ledger=ledger).report
        ledger.close()
        decisions: list[Decision] = []
        for entry in ledger.take(0):
            assert isinstance(entry, Shadowed)
            decisions += entry.decisions

        assert report.pairs[Outcome.EVICTED_TTL, Outcome.DISPATCHED] > 10
        assert {10, 0, -1} == report.totals.keys()
        assert len(decisions) == sum(sum(t.outcomes.values()) for t in report.totals.values())
        assert (report.waiting, report.in_flight, report.restarts) == (0, 0, 0)

    def test_one_that_fails_harms_nobody(self) -> None:
        """It is reported, and takes nothing in any more."""
        recording = Recording(small_config(), 5)
        twice = Turn(7, [Arrived(Request(1)), Arrived(Request(1))], [])
        feed = TurnFeed()
        shadow = Shadow(small_config(), feed, None)
        feed.turned(recording.controller, twice)
        shadow.start(5)
        shadow.close(JOIN_S)
        feed.turned(recording.controller, twice)

        assert not shadow.report.is_running
        assert list(feed.take(0)) == []

    def test_one_that_fell_behind_begins_anew(self) -> None:
        """From the checkpoint behind the gap."""
        recording = busy(Recording(small_config(), 5), 100)
        feed = TurnFeed()
        shadow = Shadow(small_config(), feed, None)
        feed.turned(recording.controller, recording.turns[0])
        feed.put(Gap(len(recording.turns) - 1))
        feed.want_checkpoint()
        feed.turned(recording.controller, Turn(recording.turns[-1].now_ns + 1, [], []))
        shadow.start(5)
        shadow.close(JOIN_S)

        assert shadow.report.is_running
        assert shadow.report.restarts == 1

    @pytest.mark.parametrize("entry", [Gap(3), Shadowed(9)])
    def test_nothing_else_counts(self, entry: Entry) -> None:
        """Before the checkpoint nobody can say."""
        shadow = shadowed(Recording(small_config(), 5), small_config(), entry)

        assert shadow.report.is_running


class TestMetrics:
    """What Prometheus is told."""

    def test_without_records_nothing(self) -> None:
        """And nothing is recorded."""
        records = Records(None, None)
        records.start(small_config(), 5)
        records.close()

        assert records.recorder is None
        assert list(records.collector().collect()) == []

    def test_a_shadow_has_families_like_the_engine(self) -> None:
        """With the pairs that differ beside them."""
        records = Records(None, None)
        records.shadow = shadowed(busy(Recording(small_config(), 5), 300), small_config(8))
        families = {each.name: each for each in records.collector().collect()}
        differing = families["flowcontrol_shadow_differences"].samples

        assert families["flowcontrol_shadow_up"].samples[0].value == 1.0
        assert {"evicted-ttl", "dispatched"} in [set(s.labels.values()) for s in differing]
        assert all(len(set(sample.labels.values())) == 2 for sample in differing)
        assert families["flowcontrol_shadow_wait_seconds"].samples
